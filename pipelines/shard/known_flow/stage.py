"""`kinema shard layout=sintel` and its like: a data set's pairs packed without loss, and their flow beside the clips.

Every pair is read once before anything is planned, so that a damaged one costs itself alone; what was read is noted in
the artifact and not read again while its files stay as they are.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

from kinema.configs.json_text import json_text
from kinema.configs.shard import ClipConfig, ShardConfig
from kinema.pipelines import engine
from kinema.pipelines.artifacts import Artifact, sample_key
from kinema.pipelines.errors import StageError
from kinema.pipelines.flow_datasets import FlowDataset, Selection, open_dataset
from kinema.pipelines.progress import Progress
from kinema.pipelines.shard.known_flow.pack import TEACHER
from kinema.pipelines.shard.known_flow.shards import PlannedClip, append_plans, build_shards
from kinema.pipelines.shard.known_flow.windows import Checked, Window, check_window, windows_of
from kinema.pipelines.sidecars.flow_codec import SCALE
from kinema.pipelines.sidecars.sidecar import column_mean, column_sum, default_out

LOSSLESS: Literal["h264_lossless"] = "h264_lossless"
_NOTES = "_scan/flow_pairs.json"
_NOTE_EVERY_S = 30.0
_PAIRS_PER_TASK = 32


@dataclass(frozen=True)
class FlowShardSummary:
    """What `kinema shard --json` prints for a data set with known flow."""

    sources: int
    """Pairs found whole."""
    clips: int
    """Clips in the artifact."""
    pairs: int
    """Pairs with known flow in the artifact."""
    quarantined: int
    """Pairs that are damaged, each with its reason in quarantine.parquet of the clips."""
    shards: int
    """Committed shards."""
    seconds: float
    """Wall time of this run."""
    new_clips: int
    """Clips that this run planned."""
    built_shards: int
    """Shards that this run built."""
    bytes: int
    """Of all clips."""
    flow_bytes: int
    """Of all flow."""
    flow: str
    """Where the flow artifact is."""
    known_share: float
    """Share of pixels with known flow."""
    mean_flow_px: float
    """Mean length of the known flow."""
    unstorable_pixels: int
    """Pixels whose flow reaches beyond +-2047 px, stored as unknown."""
    exit_status: int = field(default=0, metadata={"json": False})
    """0, or 3 when more than the allowed share of pairs is quarantined."""


def run(config: ShardConfig, *, report: Callable[[str], None] | None = None) -> FlowShardSummary:
    """Make or continue the clips artifact at `config.out` and the flow artifact at `config.flow`.

    Raises: ValueError for bad settings or a data set of which files are missing; StageError when nothing is usable.
    """
    started = time.monotonic()
    say = report or (lambda line: print(f"shard: {line}", file=sys.stderr, flush=True))
    clip = lossless(config)
    dataset = _open(config)
    say(f"{len(dataset)} pairs of {config.layout} in {config.videos}" + _partial_note(dataset))
    if Artifact.is_new(config.out) and engine.backend() == "ray":
        engine.connect()  # an engine that cannot start leaves no folder behind
    clips = Artifact.open(config.out, kind="clips", config=content_config(config, clip))
    windows = windows_of(dataset.pairs, config.dataset.clip_frames)
    with clips.swept_on_failure():
        checked = _check(clips, windows, config)
        bad = {name: why for window in windows for name, why in checked[window.id].bad.items()}
        _settle_quarantine(clips, dataset, bad)
        planned = _plan(clips, windows, checked, config)
        if not planned:
            raise StageError(f"no pair of {config.videos} can be used: {next(iter(bad.values()))[1]}")
        flow, new_clips = append_plans(clips, flow_opener(config), planned, config.shard_mb, config.min_shards)
        with flow.swept_on_failure():
            built = build_shards(
                *(clips, flow, planned, clip, Fraction(config.frames_fps).limit_denominator(1001), config.motion),
                num_workers=config.num_workers,
                timeout_s=config.source_timeout_s,
            )
    for artifact in (clips, flow):
        artifact.finalize()
    say(f"flow is in {flow.url}, in steps of 1/{SCALE} px (off by 1/{2 * SCALE} px at most, beyond 512 px by 1/32 px)")
    if bad:
        say(f"{len(bad)} of {len(dataset)} pairs quarantined, the first: {next(iter(bad.values()))[1]}")
    share = len(bad) / len(dataset)
    numbers = (len(dataset), len(bad), new_clips, built, round(time.monotonic() - started, 3))
    return summary(clips, flow, numbers, 3 if share > config.allowed_quarantine else 0)


def lossless(config: ShardConfig) -> ClipConfig:
    """How the pictures are coded. Raises: ValueError for settings that would change them."""
    if not config.out:
        raise ValueError("out= is empty; give a folder or URL, for example out=workspace/clips")
    if not config.videos and config.layout != "rendered":
        raise ValueError(f"videos= is empty; give the folder of {config.layout}")
    if config.clip.codec not in ("h264", LOSSLESS):
        raise ValueError(f"clip.codec={config.clip.codec}: known flow is packed without loss; use {LOSSLESS}")
    for name in ("short_side", "fps"):
        if getattr(config.clip, name):
            value = getattr(config.clip, name)
            raise ValueError(f"clip.{name}={value}: pairs with known flow keep their size and frames; leave it out")
    return replace(config.clip, codec=LOSSLESS)


def content_config(config: ShardConfig, clip: ClipConfig) -> dict[str, Any]:
    """What decides the content of the clips."""
    chosen = asdict(config.dataset)
    del chosen["partial"]
    if not chosen["trusted_only"]:
        del chosen["trusted_only"]  # it came later, and artifacts made before have the same content
    return {
        "dataset": {"layout": config.layout, **chosen},
        "clip": {"codec": clip.codec, "gop": clip.gop, "preset": clip.preset},
        "frames_fps": config.frames_fps,
        "motion": config.motion,
    }


def _open(config: ShardConfig) -> FlowDataset:
    chosen = config.dataset
    if chosen.trusted_only and config.layout != "sintel":
        raise ValueError(f"dataset.trusted_only is for layout=sintel, {config.layout} has no such masks; leave it out")
    selection = Selection(chosen.split, chosen.passes, chosen.cameras, chosen.directions, chosen.trusted_only)
    return open_dataset(config.layout, config.videos, selection, partial=chosen.partial, fix="dataset.partial=true")


def _partial_note(dataset: FlowDataset) -> str:
    shortfall = dataset.shortfall()
    return f"; partial: {shortfall}" if shortfall else ""


def flow_opener(config: ShardConfig) -> Callable[[str], Artifact]:
    """What opens the flow artifact of clips with a PLAN8."""
    out = config.flow or default_out(config.out, "flow", TEACHER)
    settings = {"teacher": TEACHER, "layout": config.layout, "steps_per_px": SCALE}
    return lambda plan8: Artifact.open(out, kind="flow", config=settings, inputs={"clips": plan8})


def _check(clips: Artifact, windows: list[Window], config: ShardConfig) -> dict[str, Checked]:
    """What reading showed of every window, from an earlier run where its files are as they were."""
    noted = _read_notes(clips)
    found = {w.id: noted[w.id] for w in windows if w.id in noted and noted[w.id].fingerprint == w.fingerprint()}
    todo = [window for window in windows if window.id not in found]
    batches = _batches(todo)
    progress = Progress("check", sum(len(window.pairs) for window in todo), "pairs")
    done, written = 0, time.monotonic()
    for batch, outcome in engine.run_tasks(_check_batch, batches, max_in_flight=config.num_workers):
        if isinstance(outcome, engine.Failure):
            raise StageError(f"reading {batch[0].id} stops its worker: {outcome.error_class}: {outcome.message}")
        found |= zip((window.id for window in batch), outcome.value, strict=True)
        done += sum(len(window.pairs) for window in batch)
        progress.update(done)
        if time.monotonic() - written > _NOTE_EVERY_S:
            _write_notes(clips, found)
            written = time.monotonic()
    progress.close()
    if todo:
        _write_notes(clips, found)
    return found


def _check_batch(windows: list[Window]) -> list[Checked]:
    return [check_window(window) for window in windows]


def _batches(windows: list[Window]) -> list[list[Window]]:
    """Consecutive windows, enough for a task to be worth starting."""
    batches: list[list[Window]] = []
    size = _PAIRS_PER_TASK
    for window in windows:
        if size >= _PAIRS_PER_TASK:
            batches.append([])
            size = 0
        batches[-1].append(window)
        size += len(window.pairs)
    return batches


def _read_notes(clips: Artifact) -> dict[str, Checked]:
    try:
        stored = json.loads(clips.store.read(_NOTES))
    except (FileNotFoundError, ValueError):
        return {}
    return {
        name: Checked(note["fingerprint"], {k: tuple(v) for k, v in note["bad"].items()}, note["hashes"])
        for name, note in stored.items()
    }


def _write_notes(clips: Artifact, checked: dict[str, Checked]) -> None:
    notes = {name: asdict(found) for name, found in sorted(checked.items())}
    clips.store.write(_NOTES, json_text(notes, sort_keys=True, separators=(",", ":")).encode())


def _settle_quarantine(clips: Artifact, dataset: FlowDataset, bad: dict[str, tuple[str, str]]) -> None:
    """Entries of this run's pairs say what is true now."""
    known = {row["source"]: (row["error_class"], row["message"]) for row in clips.quarantined().to_pylist()}
    clips.clear_quarantine(pair.id for pair in dataset.pairs if pair.id in known and pair.id not in bad)
    clips.quarantine(
        {"source": name, "stage": "scan", "error_class": kind, "message": message}
        for name, (kind, message) in bad.items()
        if known.get(name) != (kind, " ".join(message.split()))
    )


def _plan(
    clips: Artifact, windows: list[Window], checked: dict[str, Checked], config: ShardConfig
) -> list[PlannedClip]:
    planned = []
    for window in windows:
        found = checked[window.id]
        for clip in window.clips(found.bad):
            content = clip.content_hash(found.hashes)
            numbers = clip.frame_numbers
            source = f"{config.layout}/{clip.scene}"
            row = {
                "key": sample_key(source, content, numbers[0], numbers[-1], clips.config_hash),
                "source": source,
                "source_hash": content,
                "clip": numbers[0],
                "num_frames": len(numbers),
                "num_pairs": len(clip.pairs),
                "expected_bytes": clip.expected_bytes(),
            }
            planned.append(PlannedClip(row, clip))
    return planned


def summary(
    clips: Artifact, flow: Artifact, numbers: tuple[int, int, int, int, float], exit_status: int
) -> FlowShardSummary:
    """Args: numbers, pairs, quarantined ones, new clips, built shards, seconds."""
    sources, quarantined, new_clips, built, seconds = numbers
    samples = flow.samples(["num_pairs", "known_share", "mean_flow_px", "num_unstorable"])
    sizes = [sum(record["bytes"] for record in artifact.commits().values()) for artifact in (clips, flow)]
    return FlowShardSummary(
        sources=sources,
        clips=clips.samples(["key"]).num_rows,
        pairs=column_sum(samples, "num_pairs"),
        quarantined=quarantined,
        shards=len(clips.commits()),
        seconds=seconds,
        new_clips=new_clips,
        built_shards=built,
        bytes=sizes[0],
        flow_bytes=sizes[1],
        flow=flow.url,
        known_share=round(column_mean(samples, "known_share"), 6),
        mean_flow_px=round(column_mean(samples, "mean_flow_px"), 6),
        unstorable_pixels=column_sum(samples, "num_unstorable"),
        exit_status=exit_status,
    )
