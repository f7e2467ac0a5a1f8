"""Parts of pages that more than one page shows: clips, flow, runs, quarantine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.loader import Clip, ClipIndex
from kinema.pipelines.pictures import flow_picture
from kinema.pipelines.report.page import Page

SHOWN_HEIGHT = 150
MAX_QUARANTINE_ROWS = 200
RUN_PICTURE_WIDTH = 512


def add_clips(page: Page, clips_url: str, max_clips: int = 6) -> None:
    """Figures of a clips artifact, and three frames each of some clips spread over it."""
    artifact = Artifact.read(clips_url)
    samples = artifact.samples()
    columns = {name: samples[name].to_pylist() for name in ("num_frames", "fps_num", "fps_den", "motion_score")}
    rows = zip(columns["num_frames"], columns["fps_num"], columns["fps_den"], strict=True)
    page.numbers(
        {
            "clips": samples.num_rows,
            "sources": len(set(samples["source"].to_pylist())),
            "shards": len(artifact.commits()),
            "frames": sum(columns["num_frames"]),
            "seconds": round(sum(n * den / num for n, num, den in rows), 1),
            "MB": round(sum(record["bytes"] for record in artifact.commits().values()) / 1e6, 1),
            "exact duplicates": samples.num_rows - samples["duplicate_of"].null_count,
            "near duplicates": samples.num_rows - samples["near_duplicate_of"].null_count,
        }
    )
    if not samples.num_rows:
        return
    index = ClipIndex.open(clips_url, skip_duplicates=False)
    pictures = []
    for number in spread(len(index), max_clips):
        clip = index.clip(number)
        frames = clip.frames(spread(clip.num_frames, 3))
        strip = np.concatenate([shrink(frame) for frame in frames], axis=1)
        pictures.append((strip, f"{clip.meta['source']} {clip.meta['start_s']:.2f}-{clip.meta['end_s']:.2f} s"))
    page.pictures(pictures)
    page.histogram(columns["num_frames"], "frames per clip")
    page.histogram([m for m in columns["motion_score"] if m is not None], "motion score (share of the diagonal)")


def add_flow(page: Page, flow_url: str, clips_url: str | None, max_pairs: int = 4) -> None:
    """Figures of a flow artifact, and frame, flow and occlusion of some pairs."""
    artifact = Artifact.read(flow_url)
    samples = artifact.samples()
    rows = samples.to_pylist()
    page.numbers(
        {
            "clips": samples.num_rows,
            "pairs": sum(row["num_pairs"] for row in rows),
            "mean motion, px": _mean([row["mean_flow_px"] for row in rows]),
            "occluded share": _mean([row["occluded_share"] for row in rows]),
            "saturated values": sum(row["num_saturated"] for row in rows),
            "MB": round(sum(record["bytes"] for record in artifact.commits().values()) / 1e6, 1),
        }
    )
    if clips_url and rows:
        index = ClipIndex.open(clips_url, flow_url, skip_duplicates=False)
        moving = sorted(range(len(index)), key=lambda i: -_motion(rows, index.clip(i)))
        for number in moving[:max_pairs]:
            page.pictures(_pair_pictures(index.clip(number)))
        page.text("Colour is direction, saturation is length relative to the longest vector of the picture.")
    page.histogram(
        [row["mean_flow_px"] for row in rows if row["mean_flow_px"] is not None], "mean motion of a clip, px"
    )


def add_quarantine(page: Page, artifacts: Sequence[Artifact]) -> None:
    """What was left out, and why."""
    rows = [
        {"artifact": artifact.kind, **{k: row[k] for k in ("source", "stage", "error_class", "message", "attempts")}}
        for artifact in artifacts
        for row in artifact.quarantined().to_pylist()
    ]
    page.table(rows[:MAX_QUARANTINE_ROWS])
    if len(rows) > MAX_QUARANTINE_ROWS:
        page.text(f"{len(rows) - MAX_QUARANTINE_ROWS} more are in quarantine.parquet.")


def add_run(page: Page, run: str | Path) -> None:
    """Curves, throughput and pictures of a training run."""
    folder = Path(run)
    points = read_metrics(folder)
    if points:
        last = points[-1]
        page.numbers(
            {
                "steps": last["step"],
                "loss": last.get("loss", math.nan),
                "samples/s": _mean([p["samples_per_second"] for p in points if "samples_per_second" in p]),
                "step, s": _mean([p["step_time_s"] for p in points if "step_time_s" in p]),
                "share of time waiting for data": _mean([p.get("data_wait_share", math.nan) for p in points]),
                "samples not counted": sum(p.get("samples_not_counted", 0) for p in points),
            }
        )
        steps = [p["step"] for p in points]
        losses = [name for name in points[0] if name == "loss" or name.endswith("_loss")]
        page.line_chart({name: (steps, [p.get(name, math.nan) for p in points]) for name in losses}, "step", "loss")
        speed = [p.get("samples_per_second", math.nan) for p in points]
        page.line_chart({"samples/s": (steps, speed)}, "step", "samples/s")
    newest: dict[str, Path] = {}
    for path in sorted((folder / "pictures").glob("*.png")):
        newest[path.stem.rsplit("_", 1)[0]] = path
    for name, path in newest.items():
        with Image.open(path) as picture:
            caption = f"{name.replace('_', ', ')} (step {int(path.stem[-8:])})"
            page.pictures([(np.array(picture.convert("RGB")), caption)], width=max(picture.width, RUN_PICTURE_WIDTH))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The points of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def spread(total: int, count: int) -> list[int]:
    """Up to `count` different numbers from 0 to total - 1, evenly spread."""
    return sorted({round(i) for i in np.linspace(0, total - 1, min(count, total))})


def shrink(picture: np.ndarray, height: int = SHOWN_HEIGHT) -> np.ndarray:
    """A picture [H, W, 3] at the height at which pages show it."""
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def _pair_pictures(clip: Clip) -> list[tuple[np.ndarray, str]]:
    t, gap = clip.flow_pairs[len(clip.flow_pairs) // 2]
    flow = clip.flow(t, gap)
    occlusion = clip.occlusion(t, gap)
    shown = [
        (shrink(clip.frames([t])[0]), f"{clip.meta['source']}, frame {t}"),
        (shrink(flow_picture(torch.from_numpy(flow))), f"flow to frame {t + gap}, up to {_longest(flow):.1f} px"),
    ]
    if occlusion is not None:
        mask = np.repeat(np.where(occlusion, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
        shown.append((shrink(mask), f"occluded (black): {occlusion.mean():.1%}"))
    return shown


def _longest(flow_px: np.ndarray) -> float:
    return float(np.hypot(flow_px[0], flow_px[1]).max())


def _motion(rows: Sequence[Mapping[str, Any]], clip: Clip) -> float:
    return next((row["mean_flow_px"] or 0.0 for row in rows if row["key"] == clip.key), 0.0)


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return round(sum(known) / len(known), 4) if known else math.nan
