"""Parts of pages that more than one page shows: clips, flow, runs, quarantine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.artifacts.layout import RUN_FILE
from kinema.pipelines.loader import Clip, ClipIndex
from kinema.pipelines.pictures.images import flow_picture
from kinema.pipelines.pictures.motion import (
    arrows_picture,
    encode_mp4,
    track_trails,
    warped_difference,
    wheel_picture,
)
from kinema.pipelines.report.page import Page
from kinema.pipelines.report.variety import caption_of, spread, varied
from kinema.pipelines.tracking import flatten

SHOWN_HEIGHT = 150
MAX_QUARANTINE_ROWS = 200
RUN_PICTURE_WIDTH = 512
PAIR_PICTURE_WIDTH = 300
FILM_WIDTH, FILM_HEIGHT = 480, 360
MAX_FILM_FRAMES = 96
MAX_TRAILS = 256


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
    for number in varied(index, max_clips):
        clip = index.clip(number)
        frames = clip.frames(spread(clip.num_frames, 3))
        pictures.append((np.concatenate([shrink(frame) for frame in frames], axis=1), caption_of(clip)))
    page.pictures(pictures)
    page.histogram(columns["num_frames"], "frames per clip")
    page.histogram([m for m in columns["motion_score"] if m is not None], "motion score (share of the diagonal)")


def add_tracks(page: Page, tracks_url: str, clips_url: str | None, max_clips: int = 3) -> None:
    """Figures of a tracks artifact, and films of the longest moving tracks of some clips."""
    artifact = Artifact.read(tracks_url)
    samples = artifact.samples()
    rows = samples.to_pylist()
    page.numbers(
        {
            "clips": samples.num_rows,
            "tracks": sum(row["num_tracks"] for row in rows),
            "visible share": _mean([row["visible_share"] for row in rows]),
            "mean motion, px a frame": _mean([row["mean_step_px"] for row in rows]),
            "clipped coordinates": sum(row["num_saturated"] for row in rows),
            "MB": round(sum(record["bytes"] for record in artifact.commits().values()) / 1e6, 1),
        }
    )
    if clips_url and rows:
        index = ClipIndex.open(clips_url, tracks_url=tracks_url, skip_duplicates=False)
        for number in varied(index, max_clips):
            clip = index.clip(number)
            caption = caption_of(clip)
            page.film(encode_mp4(_trails(clip), clip.fps), caption, width=FILM_WIDTH)
        page.text("A track keeps the colour of where it began; it is hollow while the tracker takes it to be hidden.")
    for column, label in {
        "visible_share": "visible share of a clip",
        "mean_step_px": "motion of a clip, px a frame",
    }.items():
        page.histogram([row[column] for row in rows if row[column] is not None], label)


def _trails(clip: Clip) -> Iterator[np.ndarray]:
    """The first frames of a clip with at most `MAX_TRAILS` of its tracks, small."""
    tracks = clip.tracks()
    shown = spread(tracks.points_px.shape[1], MAX_TRAILS)
    num_frames = min(clip.num_frames, MAX_FILM_FRAMES)
    height = min(tracks.size[0], FILM_HEIGHT)
    frames = (shrink(at_size(frame, tracks.size), height) for frame in clip.frames(range(num_frames)))
    scale = np.array(
        [shrink(np.zeros((*tracks.size, 3), np.uint8), height).shape[1] / tracks.size[1], height / tracks.size[0]]
    )
    points = (tracks.points_px[:num_frames, shown] + 0.5) * scale - 0.5
    return track_trails(frames, points, tracks.visible[:num_frames, shown])


SIGNALS = {
    "pair_motion_px": "mean motion of a pair, px",
    "pair_consistency_px": "forward-backward distance of a pair, px (median)",
    "pair_occluded_share": "share of occluded pixels",
    "pair_photometric": "photometric error after warping (grey values, 0..1)",
    "pair_uncertainty_px": "error the teacher expects, px",
    "pair_disagreement_px": "distance to the other teacher, px",
}


def add_flow(page: Page, flow_url: str, clips_url: str | None, max_pairs: int = 4) -> None:
    """Figures of a flow artifact, histograms of its quality signals, and its best and worst pairs as pictures."""
    artifact = Artifact.read(flow_url)
    samples = artifact.samples()
    rows = samples.to_pylist()
    pairs = flow_pairs(rows)
    page.numbers(
        {
            "clips": samples.num_rows,
            "pairs": sum(row["num_pairs"] for row in rows),
            "mean motion, px": _mean([row["mean_flow_px"] for row in rows]),
            "occluded share": _mean([row["occluded_share"] for row in rows]),
            "static pairs": sum(bool(pair.get("pair_static")) for pair in pairs),
            "pairs nothing explains": sum(bool(pair.get("pair_cut")) for pair in pairs),
            "saturated values": sum(row["num_saturated"] for row in rows),
            "MB": round(sum(record["bytes"] for record in artifact.commits().values()) / 1e6, 1),
        }
    )
    if clips_url and rows:
        index = ClipIndex.open(clips_url, flow_url, skip_duplicates=False)
        clips = {key: number for number, key in enumerate(index.keys)}
        page.pictures([(wheel_picture(), "colour of a motion from the centre")])
        page.text("Saturation is length relative to the longest vector of a picture. In the difference after warping, "
                  "grey is explained, occluded pixels are blue, and targets outside the frame black.")  # fmt: skip
        for title, chosen in ranked_pairs(pairs, max_pairs).items():
            page.text(title)
            for pair in chosen:
                if pair["key"] in clips:
                    page.pictures(_pair_pictures(index.clip(clips[pair["key"]]), pair), width=PAIR_PICTURE_WIDTH)
    for column, label in SIGNALS.items():
        values = [pair[column] for pair in pairs if pair.get(column) is not None]
        if values:
            page.histogram(values, label)
    if not pairs:
        motion = [row["mean_flow_px"] for row in rows if row["mean_flow_px"] is not None]
        page.histogram(motion, "mean motion of a clip, px")


def flow_pairs(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One mapping per stored pair: the clip's key and the pair's signals; empty for flow that has none."""
    found = []
    for row in rows:
        columns = {name: values for name, values in row.items() if name.startswith("pair_") and values is not None}
        for number in range(len(columns.get("pair_t", ()))):
            found.append(
                {
                    "key": row["key"],
                    "source": row.get("source"),
                    **{name: values[number] for name, values in columns.items()},
                }
            )
    return found


def ranked_pairs(pairs: Sequence[Mapping[str, Any]], count: int) -> dict[str, list[Mapping[str, Any]]]:
    """Pairs to look at, by heading: the most and the least consistent of the moving ones, of different videos first.

    Forward pairs only; without backward flow the photometric error decides.
    """
    moving = [p for p in pairs if p["pair_gap"] > 0 and not p["pair_static"]]
    signal = "pair_consistency_px" if any(p["pair_consistency_px"] is not None for p in moving) else "pair_photometric"
    known = sorted((p for p in moving if p[signal] is not None), key=lambda p: p[signal])
    unknown = [p for p in moving if p[signal] is None]
    label = SIGNALS[signal]
    return {
        f"Best pairs by {label}": _of_different_videos(known, count),
        f"Worst pairs by {label}": _of_different_videos([*unknown, *reversed(known)], count),
    }


def _of_different_videos(pairs: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The first pair of every video, then the first of every further clip."""
    videos: dict[str, Mapping[str, Any]] = {}
    clips: dict[str, Mapping[str, Any]] = {}
    for pair in pairs:
        videos.setdefault(pair.get("source") or pair["key"], pair)
        clips.setdefault(pair["key"], pair)
    further = [pair for pair in clips.values() if pair not in videos.values()]
    return [*videos.values(), *further][:count]


def add_quarantine(page: Page, artifacts: Sequence[Artifact]) -> None:
    """What was left out, and why, in a section of its own; nothing where nothing was."""
    rows = [
        {"artifact": artifact.kind, **{k: row[k] for k in ("source", "stage", "error_class", "message", "attempts")}}
        for artifact in artifacts
        for row in artifact.quarantined().to_pylist()
    ]
    if rows:
        page.section(f"Left out: {len(rows)}", "Inputs in quarantine, and why.", warning=True)
        page.table(rows[:MAX_QUARANTINE_ROWS])
    if len(rows) > MAX_QUARANTINE_ROWS:
        page.text(f"{len(rows) - MAX_QUARANTINE_ROWS} more are in quarantine.parquet.")


def add_run(page: Page, run: str | Path) -> None:
    """What a training run is made of, its curves, throughput and newest pictures."""
    folder = Path(run)
    record = json.loads((folder / RUN_FILE).read_text()) if (folder / RUN_FILE).is_file() else {}
    for notice in record.get("notices", ()):
        page.text(f"Note: {notice}.")
    add_curves(page, folder)
    newest: dict[str, Path] = {}
    for path in sorted((folder / "pictures").glob("*.png")):
        newest[path.stem.rsplit("_", 1)[0]] = path
    for name, path in newest.items():
        with Image.open(path) as picture:
            caption = f"{name.replace('_', ', ')} (step {int(path.stem[-8:]):,})"
            page.pictures([(np.array(picture.convert("RGB")), caption)], width=max(picture.width, RUN_PICTURE_WIDTH))


def add_curves(page: Page, run: Path) -> None:
    """Figures and curves of metrics.jsonl."""
    points = read_metrics(run)
    if not points:
        return
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


def add_run_facts(page: Page, run: str | Path) -> None:
    """Data, checkpoints, MLflow run and settings of a training run."""
    folder = Path(run)
    record = json.loads((folder / RUN_FILE).read_text())
    page.section("Data")
    page.table([{"input": name, **entry} for name, entry in record.get("inputs", {}).items()])
    page.section("Checkpoints")
    page.table([_checkpoint_row(path) for path in sorted((folder / "checkpoints").glob("step_*"))])
    page.section("MLflow")
    uri, run_id = record.get("tracking_uri", ""), record.get("run_id", "")
    if uri.startswith("http"):
        page.link(f"{uri.rstrip('/')}/#/runs/{run_id}", f"Run {run_id} at {uri}")
    elif uri:
        page.text(f"Run {run_id}. To look at it:")
        page.code(f"mlflow ui --host 127.0.0.1 --backend-store-uri {uri}")
    page.section("Settings")
    page.table([{"key": key, "value": str(value)} for key, value in flatten(record.get("config", {})).items()])


def _checkpoint_row(folder: Path) -> dict[str, Any]:
    meta = json.loads((folder / "meta.json").read_text()) if (folder / "meta.json").is_file() else {}
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"step": meta.get("step"), "loss": meta.get("loss"), "MB": round(size / 1e6, 1), "folder": folder.name}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The points of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def shrink(picture: np.ndarray, height: int = SHOWN_HEIGHT) -> np.ndarray:
    """A picture [H, W, 3] at the height at which pages show it."""
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def _pair_pictures(clip: Clip, signals: Mapping[str, Any]) -> list[tuple[np.ndarray, str]]:
    t, gap = signals["pair_t"], signals["pair_gap"]
    stored = clip.flow_pair(t, gap)
    first, second = (at_size(frame, clip.flow_size) for frame in clip.frames([t, t + gap]))
    flow, hidden = stored.flow_px, stored.occlusion
    known = {name: signals.get(f"pair_{name}") for name in ("consistency_px", "photometric")}
    caption = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in known.items() if value is not None)
    return [
        (shrink(first), f"{clip.meta['source']}, frame {t}"),
        (shrink(flow_picture(torch.from_numpy(flow))), f"flow to frame {t + gap}, up to {longest(flow):.1f} px"),
        (shrink(arrows_picture(first, flow)), "where pixels go"),
        (shrink(warped_difference(first, second, flow, hidden)), f"difference after warping ({caption})"),
    ]


def at_size(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A frame reduced to the size of its flow."""
    return frame if frame.shape[:2] == size else cv2.resize(frame, size[::-1], interpolation=cv2.INTER_AREA)


def longest(flow_px: np.ndarray) -> float:
    """Length of the longest known vector of a flow field."""
    return float(np.nanmax(np.hypot(flow_px[0], flow_px[1])))


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return round(sum(known) / len(known), 4) if known else math.nan
