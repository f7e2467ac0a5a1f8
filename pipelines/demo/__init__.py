"""`kinema demo flowfeat`: the whole path on your videos, or on rendered scenes, with a page that grows meanwhile."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kinema.configs import WorkflowConfig, load_stage
from kinema.pipelines import tracking, workflow
from kinema.pipelines.demo.encoder import encoder_settings
from kinema.pipelines.demo.measures import (
    HELD_OUT_SEED,
    Explained,
    explained_variance,
    held_out_flow,
    is_rendered,
    known_motion,
    teacher_error,
)
from kinema.pipelines.demo.page import GrowingPage
from kinema.pipelines.demo.server import PageServer
from kinema.pipelines.registry import registered_name
from kinema.pipelines.scenes import render_demo_videos

__all__ = ["HELD_OUT_SEED", "DemoSummary", "demo", "held_out_flow", "is_rendered", "known_motion", "teacher_error"]

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
    explained: dict[str, float] = field(default_factory=dict)
    """Shares of the teacher's variance that held-out frames explain; see `measures.Explained`."""
    known_motion: dict[str, float] = field(default_factory=dict)
    """Errors in pixels against exact motion; only for rendered scenes."""
    out: str = ""
    """The workspace."""
    exit_status: int = 0
    """3 if a stage quarantined more than allowed."""


def demo(config_path: str | None = None, overrides: Sequence[str] = ()) -> DemoSummary:
    """Run the demo workflow; its page is served on loopback from the first stage on and is a plain file afterwards.

    Args: overrides, `videos=DIR`, `backbone_weights=auto|scratch|published|FILE`, and any key of the workflow
        (`workspace=DIR`, `train.steps=50`).
    """
    started = time.monotonic()
    settings = [f"shard.{text}" if text.startswith("videos=") else text for text in overrides]
    settings = encoder_settings(settings)
    config = load_stage("run", config_path or "demo", settings)
    workspace = Path(config.workspace).expanduser().resolve()
    if not config.shard.videos:
        config = load_stage("run", config_path or "demo", [*settings, f"shard.videos={_render(workspace / 'videos')}"])
    with tracking.logging_beside(str(workspace / "report.html")):
        return _demo(config, workspace, started)


def _demo(config: WorkflowConfig, workspace: Path, started: float) -> DemoSummary:
    page = GrowingPage(config, workspace / "report.html")
    server = PageServer(page.path)
    sys.stderr.write(f"demo: the page grows at {server.address}\n")
    opened = False

    def follow(stage: str, event: str, so_far: workflow.WorkflowSummary) -> None:
        nonlocal opened
        page.follow(stage, event, so_far)
        if event == "ended" and not opened:
            opened = True
            _open(server.address)

    try:
        result = workflow.run(config, follow=follow)
        explained: Explained | None = explained_variance(result.outputs["train"]) if "train" in result.outputs else None
        known = known_motion(config, result) if explained else {}
        if explained:
            sys.stderr.write(
                f"demo: flow read from the features of {explained.frames} held-out frames explains "
                f"{explained.r2:.3f} of the teacher's variance (R2); before training {explained.r2_step_0:.3f}, the "
                "best constant flow 0\n"
            )
        path = page.finish(explained, known)
    finally:
        server.close()
    return DemoSummary(
        report=str(path),
        mlflow=_mlflow_command(),
        model=f"models:/{registered_name(config.register, config.train.model)}@champion",
        stages=result.stages,
        seconds=round(time.monotonic() - started, 1),
        explained=dataclasses.asdict(explained) if explained else {},
        known_motion=known,
        out=str(workspace),
        exit_status=result.exit_status,
    )


def _open(address: str) -> None:
    """Show the page, where somebody sits in front of a screen."""
    has_screen = sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if has_screen and sys.stderr.isatty():
        webbrowser.open(address)


def _mlflow_command() -> str:
    command = f"mlflow ui --backend-store-uri {tracking.tracking_uri()} --host 127.0.0.1"
    binary = Path(sys.executable).parent / "mlflow"
    found = binary.exists() and not shutil.which("mlflow")
    return command.replace("mlflow ui", f"{binary} ui", 1) if found else command


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
