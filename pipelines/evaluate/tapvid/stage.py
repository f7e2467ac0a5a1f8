"""Benchmark `tapvid`: point trackers on TAP-Vid files or on rendered scenes."""

from __future__ import annotations

from pathlib import Path

from kinema.configs import EvaluateConfig
from kinema.pipelines.evaluate.tapvid.files import TapVidFiles
from kinema.pipelines.evaluate.tapvid.scores import SCENES, evaluate_tapvid, scene_videos
from kinema.pipelines.evaluate.tapvid.trackers import TrackerSettings, load_tracker
from kinema.pipelines.progress import Progress


def run_tapvid(config: EvaluateConfig) -> tuple[dict[str, float], list[Path]]:
    """Mean measures over videos. Raises: ValueError for a tracker or data that do not fit."""
    videos = scene_videos() if config.data == SCENES else TapVidFiles(config.data)
    tracker = load_tracker(
        TrackerSettings(
            config.model, config.weights, config.teacher, config.queries, config.single_queries, config.iters
        )
    )
    progress = Progress("evaluate", 0, "videos")

    def shown(done: int, name: str) -> None:
        progress.total = max(done, getattr(videos, "num_known", done))
        progress.update(done, name)

    scores = evaluate_tapvid(tracker, videos, config.queries, shown)
    progress.close()
    if config.out:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        scores.write_csv(Path(config.out) / "videos.csv")
    return {f"tapvid_{name}": value for name, value in scores.mean.items()}, []
