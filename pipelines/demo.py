"""`kinema demo flowfeat`: the whole path on your videos, or on rendered scenes, with a page at the end."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kinema.configs import TrainConfig, WorkflowConfig, build, load_stage
from kinema.pipelines import tracking, workflow
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.registry import registered_name
from kinema.pipelines.report import Page, sections
from kinema.pipelines.scenes import Scene, clip_truth, load_scene, render_demo_videos
from kinema.pipelines.train import build_model, load_model
from kinema.pipelines.train.flow_error import flow_error

HELD_OUT_SEED = 10_000
HELD_OUT_SCENES = 3
HELD_OUT_FRAMES = 4
TEACHER_PAIRS_PER_CLIP = 4
RENDERED_FRAMES = 192
RENDERED_SHOTS = 12


@dataclass(frozen=True)
class DemoSummary:
    """What the demo made and measured."""

    report: str
    """The page."""
    mlflow: str
    """Command that shows the runs."""
    model: str
    """Registry URI of the trained model."""
    stages: dict[str, str]
    """{stage: `done` or `skipped`}."""
    seconds: float
    """Wall time."""
    known_motion: dict[str, float] = field(default_factory=dict)
    """Errors in pixels against exact motion; only for rendered scenes."""
    exit_status: int = 0
    """3 if a stage quarantined more than allowed."""


def demo(config_path: str | None = None, overrides: Sequence[str] = ()) -> DemoSummary:
    """Run the demo workflow and write its page.

    Args: overrides, `videos=DIR`, and any key of the workflow (`workspace=DIR`, `train.steps=50`).
    """
    started = time.monotonic()
    settings = [f"shard.{text}" if text.startswith("videos=") else text for text in overrides]
    config = load_stage("run", config_path or "demo", settings)
    workspace = Path(config.workspace).expanduser().resolve()
    if not config.shard.videos:
        config = load_stage("run", config_path or "demo", [*settings, f"shard.videos={_render(workspace / 'videos')}"])
    with tracking.logging_beside(str(workspace / "report.html")):
        return _demo(config, workspace, started)


def _demo(config: WorkflowConfig, workspace: Path, started: float) -> DemoSummary:
    result = workflow.run(config)
    known = known_motion(config, result)
    page = _page(config, result, known, time.monotonic() - started)
    path = page.write(workspace / "report.html")
    command = f"mlflow ui --backend-store-uri {tracking.tracking_uri()} --host 127.0.0.1"
    if (binary := Path(sys.executable).parent / "mlflow").exists() and not shutil.which("mlflow"):
        command = command.replace("mlflow ui", f"{binary} ui", 1)
    uri = f"models:/{registered_name(config.register, config.train.model)}@champion"
    seconds = round(time.monotonic() - started, 1)
    return DemoSummary(str(path), command, uri, result.stages, seconds, known, result.exit_status)


def known_motion(config: WorkflowConfig, result: workflow.WorkflowSummary) -> dict[str, float]:
    """End-point errors against exact motion, if the videos are rendered scenes; otherwise nothing.

    The teacher's error is over stored pairs of the training clips; the student's over held-out scenes, of a linear
    map from features to flow fitted on one crop of a frame and judged on another (train/flow_error.py).
    """
    videos = Path(config.shard.videos)
    if not _rendered(videos):
        return {}

    run = result.outputs["train"]
    settings = json.loads((Path(run) / "run.json").read_text())["config"]
    frames, flows, valid = held_out_flow()
    flowfeat = config.train.settings
    options: dict[str, Any] = {
        "resize": flowfeat.resize,
        "crop": flowfeat.crop,
        "crop_scale": flowfeat.crop_scale,
        "ridge_alpha": flowfeat.ridge_alpha,
    }
    before = flow_error(build_model(build(TrainConfig, settings)), frames, flows, valid, **options)
    after = flow_error(load_model(run), frames, flows, valid, **options)
    return {
        "teacher_epe_px": teacher_error(videos, result.outputs["shard"], result.outputs["teach"]),
        "student_epe_px_step_0": before.epe_px,
        "student_epe_px": after.epe_px,
        "constant_epe_px": after.constant_epe_px,
    }


def held_out_flow(size: int = 224) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Frames, exact flow and visibility of scenes that no training clip shows."""
    frames, flows, valid = [], [], []
    for number in range(HELD_OUT_SCENES):
        scene = Scene(seed=HELD_OUT_SEED + number, height=size, width=size, num_frames=24)
        for t in sections.spread(scene.num_frames - 2, HELD_OUT_FRAMES):
            frames.append(scene.frame(t))
            flows.append(scene.flow_px(t, t + 2))
            valid.append(~scene.occluded(t, t + 2))
    return frames, flows, valid


def teacher_error(videos: Path, clips_url: str, flow_url: str) -> float:
    """Mean end-point error of stored flow at visible pixels, in pixels of the clip."""
    from kinema.pipelines.loader import ClipIndex

    index = ClipIndex.open(clips_url, flow_url)
    errors = []
    for number in range(len(index)):
        clip = index.clip(number)
        truth = clip_truth(videos, clip.meta)
        for pair in sections.spread(len(clip.flow_pairs), TEACHER_PAIRS_PER_CLIP):
            t, gap = clip.flow_pairs[pair]
            flow = clip.flow(t, gap)
            exact, occluded = truth.motion(t, gap, flow.shape[1:])
            errors.append(np.linalg.norm(flow - exact, axis=0)[~occluded].mean())
    return float(np.mean(errors))


def _render(folder: Path) -> Path:
    """The demo's own videos; rendered once."""
    if not folder.is_dir():
        sys.stderr.write("demo: no videos= given; rendering three scenes with known motion\n")
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        render_demo_videos(partial, num_frames=RENDERED_FRAMES, num_shots=(RENDERED_SHOTS,) * 3)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder


def _rendered(videos: Path) -> bool:
    files = sorted(videos.glob("*.mp4")) if videos.is_dir() else []
    try:
        return bool(files) and all(load_scene(path) for path in files)
    except (ValueError, OSError):
        return False


def _page(config: WorkflowConfig, result: workflow.WorkflowSummary, known: dict[str, float], seconds: float) -> Page:
    clips, flow = (result.outputs[stage] for stage in ("shard", "teach"))
    page = Page("kinema demo: FlowFeat", f"{config.shard.videos} -> shards -> flow -> training -> registry")
    shard, teach, train = (result.summaries[stage] for stage in ("shard", "teach", "train"))
    page.numbers(
        {
            "videos": shard["sources"],
            "clips": shard["clips"],
            "quarantined": shard["quarantined"] + teach["quarantined"],
            "flow pairs": teach["pairs"],
            "training steps": train["step"],
            "samples/s": round(train["samples_per_second"], 2),
            "seconds": round(seconds, 1),
        }
    )
    if not config.train.settings.backbone_weights:
        page.text(
            f"The backbone of {config.train.settings.variant} is untrained: no published weights were given. Features "
            "show motion, not meaning. With weights: train.flowfeat.backbone_weights=FILE or =published."
        )
    if known:
        page.section("Against known motion", "These scenes were rendered, so their exact motion is known.")
        page.table([{"measure": _MEASURES[name], "error, px": value} for name, value in known.items()])
    page.section("Clips", "First, middle and last frame of some clips.")
    sections.add_clips(page, clips)
    page.section(f"Flow ({config.teach.teacher})")
    sections.add_flow(page, flow, clips)
    page.section("Training", "Columns: input crop, teacher's flow, predicted flow, main components of the features.")
    sections.add_run(page, result.outputs["train"])
    page.section("Time")
    page.table(
        [{"stage": k, "seconds": v.get("seconds"), "now": result.stages[k]} for k, v in result.summaries.items()]
    )
    page.section("Quarantine", "Inputs that were left out, and why.")
    sections.add_quarantine(page, [Artifact.read(clips), Artifact.read(flow)])
    page.section("Use it")
    page.code(
        "import mlflow\n"
        f'mlflow.set_tracking_uri("{tracking.tracking_uri()}")\n'
        f'model = mlflow.pyfunc.load_model("models:/{registered_name(config.register, config.train.model)}@champion")\n'
        "features = model.predict(images)  # uint8 [B, H, W, 3]"
    )
    return page


_MEASURES = {
    "teacher_epe_px": "teacher's flow, training clips",
    "student_epe_px_step_0": "flow read from features, held-out scenes, before training",
    "student_epe_px": "flow read from features, held-out scenes, after training",
    "constant_epe_px": "best constant flow, held-out scenes",
}
