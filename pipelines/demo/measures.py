"""What the demo measures: errors against exact motion of rendered scenes, and how much of the teacher's flow held-out
frames explain."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kinema.configs import TrainConfig, WorkflowConfig, build
from kinema.pipelines import workflow
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.report.variety import spread
from kinema.pipelines.scenes import Scene, clip_truth, load_scene
from kinema.pipelines.train import ClipLoader, build_model, load_model
from kinema.pipelines.train.flow_error import flow_error
from kinema.pipelines.train.recipes.choose import make_recipe

HELD_OUT_SEED = 10_000
HELD_OUT_SCENES = 3
HELD_OUT_FRAMES = 4
TEACHER_PAIRS_PER_CLIP = 4
JUDGED_FRAMES = 48


@dataclass(frozen=True)
class Explained:
    """Shares of the teacher's variance on frames that training did not see; a constant flow explains 0 at best."""

    r2: float
    """By flow read from the trained features."""
    r2_step_0: float
    """By flow read from the features before training."""
    r2_constant: float
    """By the best constant flow of each judged crop: 0 by definition."""
    frames: int
    """Frames judged."""
    sources: int
    """Videos they are of."""


def explained_variance(run: str | Path) -> Explained:
    """Judge a FlowFeat run on the clips that `loader.hold_out` kept out of its training.

    A linear map from features to flow is fitted on one crop of a frame and judged on another, as in training
    (train/flow_error.py), with the teacher's stored flow as truth.
    """
    config = run_config(run)
    index = ClipLoader(config, make_recipe(config)).held_out()
    frames, flows, sources = [], [], set()
    each = max(1, -(-JUDGED_FRAMES // len(index)))
    for number in spread(len(index), JUDGED_FRAMES):
        clip = index.clip(number)
        pairs = [(t, gap) for t, gap in clip.flow_pairs if 0 < gap <= config.settings.gap]
        longest = max((gap for _, gap in pairs), default=0)
        pairs = [(t, gap) for t, gap in pairs if gap == longest]
        for t, gap in (pairs[i] for i in spread(len(pairs), each)) if pairs else ():
            frames.append(clip.frames([t])[0])
            flows.append(clip.flow(t, gap))
            sources.add(clip.meta["source"])
    before = flow_error(build_model(config), frames, flows, **_as_trained(config))
    after = flow_error(load_model(run), frames, flows, **_as_trained(config))
    return Explained(after.r2, before.r2, 0.0, after.num_frames, len(sources))


def run_config(run: str | Path) -> TrainConfig:
    """The settings a run was trained with."""
    return build(TrainConfig, json.loads((Path(run) / "run.json").read_text())["config"])


def _as_trained(config: TrainConfig) -> dict[str, Any]:
    flowfeat = config.settings
    return {name: getattr(flowfeat, name) for name in ("resize", "crop", "crop_scale", "ridge_alpha")}


def known_motion(config: WorkflowConfig, result: workflow.WorkflowSummary) -> dict[str, float]:
    """End-point errors against exact motion, if the videos are rendered scenes; otherwise nothing.

    The teacher's error is over stored pairs of the training clips; the student's over held-out scenes, of a linear
    map from features to flow fitted on one crop of a frame and judged on another (train/flow_error.py).
    """
    videos = Path(config.shard.videos)
    if not is_rendered(videos):
        return {}
    run = result.outputs["train"]
    trained = run_config(run)
    frames, flows, valid = held_out_flow()
    before = flow_error(build_model(trained), frames, flows, valid, **_as_trained(trained))
    after = flow_error(load_model(run), frames, flows, valid, **_as_trained(trained))
    return {
        "teacher_epe_px": teacher_error(videos, result.outputs["shard"], result.outputs["teach"]),
        "student_epe_px_step_0": before.epe_px,
        "student_epe_px": after.epe_px,
        "constant_epe_px": after.constant_epe_px,
        "student_r2_step_0": before.r2,
        "student_r2": after.r2,
    }


def held_out_flow(size: int = 224) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Frames, exact flow and visibility of scenes that no training clip shows."""
    frames, flows, valid = [], [], []
    for number in range(HELD_OUT_SCENES):
        scene = Scene(seed=HELD_OUT_SEED + number, height=size, width=size, num_frames=24)
        for t in spread(scene.num_frames - 2, HELD_OUT_FRAMES):
            frames.append(scene.frame(t))
            flows.append(scene.flow_px(t, t + 2))
            valid.append(~scene.occluded(t, t + 2))
    return frames, flows, valid


def teacher_error(videos: Path, clips_url: str, flow_url: str) -> float:
    """Mean end-point error of stored flow at visible pixels, in pixels of the clip."""
    index = ClipIndex.open(clips_url, flow_url)
    errors = []
    for number in range(len(index)):
        clip = index.clip(number)
        truth = clip_truth(videos, clip.meta)
        for pair in spread(len(clip.flow_pairs), TEACHER_PAIRS_PER_CLIP):
            t, gap = clip.flow_pairs[pair]
            flow = clip.flow(t, gap)
            exact, occluded = truth.motion(t, gap, flow.shape[1:])
            errors.append(np.linalg.norm(flow - exact, axis=0)[~occluded].mean())
    return float(np.mean(errors))


def is_rendered(videos: Path) -> bool:
    """Whether a folder holds films that kinema rendered itself, whose exact motion is known."""
    files = sorted(videos.glob("*.mp4")) if videos.is_dir() else []
    try:
        return bool(files) and all(load_scene(path) for path in files)
    except (ValueError, OSError):
        return False
