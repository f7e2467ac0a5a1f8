"""The stage: find sources, scan what is new, plan, build what is not committed, write the tables.

Every step leaves its result in the artifact, so a run that was killed goes on where it stopped and ends with the
same bytes, and a run with nothing to do decodes nothing.

Quarantine rules: a source that cannot be used is recorded with the reason and not tried again until its bytes
change. Where the decoder crashed or hung (which may have been the machine's fault) it is tried again by later runs,
up to MAX_ATTEMPTS times in all. A source that fails only while clips are cut costs its rows of that shard.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from kinema.configs import ShardConfig
from kinema.pipelines import engine
from kinema.pipelines.artifacts import Artifact, quarantine_row
from kinema.pipelines.errors import StageError
from kinema.pipelines.progress import Progress
from kinema.pipelines.shard.build import BuildTask, Built, build_shard, try_source
from kinema.pipelines.shard.media import Source, content_hash, fingerprint
from kinema.pipelines.shard.plan import Duplicates, PlannedClip, new_rows, plan_source
from kinema.pipelines.shard.scan import FrameScan, Scan, ScanTask, load_scan, save_scan, scan_task
from kinema.pipelines.shard.sources import Found, find_sources
from kinema.pipelines.video.errors import SourceError
from kinema.pipelines.video.masks import parse_palette

MAX_ATTEMPTS = 6
"""Times a source is tried, over all runs, whose decoder crashes or hangs."""
_RETRIES = 2  # within one run
_RETRIED = frozenset({"WorkerCrashed", "NodeLost", "OutOfMemory", "Timeout"})
_HASH_THREADS = 8


@dataclass(frozen=True)
class ShardSummary:
    """What `kinema shard --json` prints."""

    sources: int
    """Videos found, unusable ones included."""
    clips: int
    """Clips in the artifact."""
    quarantined: int
    """Sources of this run that are in quarantine, wholly or in part."""
    shards: int
    """Committed shards of the artifact."""
    seconds: float
    """Wall time of this run."""
    new_clips: int
    """Clips that this run planned."""
    built_shards: int
    """Shards that this run built."""
    dropped_short: int
    """Pieces of shots left out for having fewer than clip.min_frames frames."""
    duplicates: int
    """Clips that repeat an earlier one exactly."""
    near_duplicates: int
    """Clips that look like an earlier one."""
    bytes: int
    """Of all shards."""
    ignored_files: int
    """Files that are not videos."""
    out: str
    """Where the artifact is."""
    copied: int = 0
    """Clips that took over their source's packets (`clip.codec=copy`); the others were encoded."""
    exit_status: int = field(default=0, metadata={"json": False})
    """0, or 3 when more than the allowed share of sources is quarantined."""


def run(config: ShardConfig, *, report: Callable[[str], None] | None = None) -> ShardSummary:
    """Make or continue the clips artifact at `config.out` from `config.videos`.

    Args: report: gets one sentence at each step; None writes them to stderr.
    Raises: ValueError for bad settings, no video, or an artifact made with another config; StageError when the disk
    is full or Ray cannot be reached.
    """
    started = time.monotonic()
    if not config.out:
        raise ValueError("out= is empty; give a folder or URL, for example out=workspace/clips")
    say = report or (lambda line: print(f"shard: {line}", file=sys.stderr, flush=True))
    parse_palette(config.masks.palette)
    found = find_sources(config.videos, config.layout, exclude=config.out, root=config.root)
    if Artifact.is_new(config.out) and engine.backend() == "ray":
        engine.connect()  # an engine that cannot start leaves no folder behind
    artifact = Artifact.open(config.out, kind="clips", config=content_config(config))
    say(f"{len(found.sources)} videos in {config.videos}, {found.ignored_files} other files ignored")
    with artifact.swept_on_failure():
        scans, new_scans = scan_sources(artifact, found.sources, config)
        new_clips = plan_sources(artifact, found.sources, scans, config)
        built = build_shards(artifact, found.sources, config)
    _settle_quarantine(artifact, scans, found)
    artifact.finalize()
    if not (new_scans or new_clips or built):
        say("nothing to do: every clip of every video is in the artifact")
    dropped = sum(scan.facts["dropped_short"] for scan in scans.values() if scan.ok)
    seconds = round(time.monotonic() - started, 3)
    return _summary(artifact, found, config, (new_clips, built, dropped, seconds), say)


def content_config(config: ShardConfig) -> dict[str, Any]:
    """The settings that decide what is in the clips, not where they come from or how they are packed."""
    content = {
        "clip": config.clip.content(),
        "frames_fps": config.frames_fps,
        "motion": config.motion,
        "near_duplicate_bits": config.near_duplicate_bits,
    }
    if config.stream >= 0:
        content["stream"] = config.stream
    if config.masks.palette:
        content["palette"] = list(config.masks.palette)
    return content


def scan_sources(artifact: Artifact, sources: list[Source], config: ShardConfig) -> tuple[dict[str, Scan], int]:
    """Scan every source that is new, changed, or worth another try.

    Returns: source id -> its record without arrays, and how many were scanned.
    """
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        states = list(pool.map(lambda source: _up_to_date(artifact, source), sources))
    scans = {source.id: scan for source, scan in zip(sources, states, strict=True) if scan is not None}
    wanted = [source for source in sources if source.id not in scans]
    tasks = [
        ScanTask(
            artifact,
            source,
            config.clip,
            config.frames_fps,
            _stall_s(config),
            config.stream,
            config.masks.palette,
            _memory_bytes(config),
            config.motion,
        )
        for source in wanted
    ]
    progress = Progress("scan", len(tasks), "videos")
    for done, (task, outcome) in enumerate(_run_tasks(scan_task, tasks, config), start=1):
        if isinstance(outcome, engine.Failure):
            _record_failed_scan(artifact, task.source, outcome)
        scan = load_scan(artifact, task.source.id, header_only=True)
        assert scan is not None  # written by the worker or just above
        scans[task.source.id] = scan
        progress.update(done)
    progress.close()
    return scans, len(wanted)


def _up_to_date(artifact: Artifact, source: Source) -> Scan | None:
    """The source's record if it still holds, else None."""
    scan = load_scan(artifact, source.id, header_only=True)
    if scan is None or (scan.error_class in _RETRIED and scan.attempts < MAX_ATTEMPTS):
        return None
    if scan.fingerprint and scan.fingerprint == fingerprint(source):
        return scan
    try:
        return scan if content_hash(source) == scan.content_hash else None
    except SourceError:
        return None if scan.content_hash else scan


def _record_failed_scan(artifact: Artifact, source: Source, failure: engine.Failure) -> None:
    """The worker left no record: write one, with all attempts so far on these bytes."""
    try:
        found = content_hash(source)
    except SourceError:
        found = ""
    before = load_scan(artifact, source.id)
    tried = before.attempts if before and before.content_hash == found and before.error_class in _RETRIED else 0
    message = f"{failure.message} ({failure.where})" if failure.where else failure.message
    scan = Scan(source.id, found, fingerprint(source), failure.error_class, message, tried + failure.attempts)
    save_scan(artifact, scan)


def plan_sources(artifact: Artifact, sources: list[Source], scans: dict[str, Scan], config: ShardConfig) -> int:
    """Append the clips of sources that are not in the plan yet. Returns: how many."""
    existing = artifact.plan
    planned = set()
    if existing.num_rows:
        planned = set(zip(existing["source"].to_pylist(), existing["source_hash"].to_pylist(), strict=True))
    new: list[PlannedClip] = []
    for source in sources:
        scan = scans[source.id]
        if scan.ok and (source.id, scan.content_hash) not in planned:
            whole = load_scan(artifact, source.id)
            assert isinstance(whole, FrameScan)  # its header was good
            new.extend(plan_source(source, whole, config.clip, artifact.config_hash))
    if not new:
        return 0
    duplicates = Duplicates(config.near_duplicate_bits)
    for clip in _planned_before(artifact, config):
        duplicates.add(clip)
    first = max(artifact.planned_shards(), default=-1) + 1
    rows = new_rows(new, duplicates, first=first, shard_mb=config.shard_mb, min_shards=config.min_shards)
    artifact.append_plan(rows)
    return rows.num_rows


def _planned_before(artifact: Artifact, config: ShardConfig) -> Iterator[PlannedClip]:
    """Clips of the plan whose source's record is still that of the planned bytes."""
    plan = artifact.plan
    if not plan.num_rows:
        return
    known = dict(zip(plan["source"].to_pylist(), plan["source_hash"].to_pylist(), strict=True))
    for source_id, source_hash in known.items():
        scan = load_scan(artifact, source_id)
        if isinstance(scan, FrameScan) and scan.content_hash == source_hash:
            yield from plan_source(Source(source_id, ""), scan, config.clip, artifact.config_hash)


def build_shards(artifact: Artifact, sources: list[Source], config: ShardConfig) -> int:
    """Build every shard without a valid commit. Returns: how many."""
    pending = artifact.pending()
    if not pending:
        return 0
    by_id = {source.id: source for source in sources}
    tasks = [_build_task(artifact, shard, by_id, config) for shard in pending]
    progress = Progress("shard", sum(len(task.rows) for task in tasks), "clips")
    done = 0
    failed: list[tuple[BuildTask, engine.Failure]] = []
    for task, outcome in _run_tasks(build_shard, tasks, config, retries=1):
        if isinstance(outcome, engine.Failure):
            failed.append((task, outcome))
            continue
        done += len(task.rows)
        progress.update(done, _lost_note(outcome.value))
    for task, failure in failed:
        _build_without_culprits(task, failure, config)
        done += len(task.rows)
        progress.update(done)
    progress.close()
    return len(pending)


def _lost_note(built: Built) -> str:
    return f"{len(built.quarantined)} videos quarantined" if built.quarantined else ""


def _build_task(artifact: Artifact, shard: int, by_id: dict[str, Source], config: ShardConfig) -> BuildTask:
    rows = artifact.plan_of(shard).to_pylist()
    named = {row["source"] for row in rows}
    return BuildTask(
        artifact,
        shard,
        rows,
        {name: by_id[name] for name in sorted(named) if name in by_id},
        config.clip,
        config.frames_fps,
        config.motion,
        _stall_s(config),
        config.stream,
        config.masks.palette,
        _memory_bytes(config),
    )


def _build_without_culprits(task: BuildTask, failure: engine.Failure, config: ShardConfig) -> None:
    """A shard that keeps stopping its worker: try its sources one by one, then build it without those that fail.

    Raises: the failure, when the shard cannot even be built without any source.
    """
    singles = [
        replace(task, rows=[row for row in task.rows if row["source"] == name])
        for name in dict.fromkeys(row["source"] for row in task.rows)
    ]
    excluded = {}
    for single, outcome in _run_tasks(try_source, singles, config, retries=0):
        if isinstance(outcome, engine.Failure):
            excluded[single.rows[0]["source"]] = _reason(outcome, failure.attempts)
    everything = {single.rows[0]["source"]: _reason(failure, failure.attempts) for single in singles}
    for choice in (excluded, everything):
        for _, outcome in _run_tasks(build_shard, [replace(task, excluded=choice)], config, retries=0):
            if not isinstance(outcome, engine.Failure):
                return
            failure = outcome
    raise StageError(f"shard {task.shard} cannot be built: {failure.error_class}: {failure.message}")


def _reason(failure: engine.Failure, attempts: int) -> tuple[str, str, int]:
    where = f" ({failure.where})" if failure.where else ""
    return failure.error_class, f"{failure.message}{where}", attempts + failure.attempts


def _run_tasks(fn: Callable, tasks: list, config: ShardConfig, retries: int = _RETRIES) -> Iterator[tuple]:
    return engine.run_tasks(
        fn, tasks, max_in_flight=config.num_workers, retries=retries, timeout_s=config.source_timeout_s
    )


def _memory_bytes(config: ShardConfig) -> int:
    return int(config.source_memory_gb * 2**30)


def _stall_s(config: ShardConfig) -> float | None:
    """Workers end themselves when they stall; this process must not."""
    return config.source_timeout_s if engine.backend() == "ray" else None


def _settle_quarantine(artifact: Artifact, scans: dict[str, Scan], found: Found) -> None:
    """Make the entries of this run's sources say what is true now."""
    listed = ("source", "error_class", "message", "attempts")
    known = {tuple(row[name] for name in listed) for row in artifact.quarantined().to_pylist()}
    good, bad = [], []
    for source in found.sources:
        scan = scans[source.id]
        if scan.ok:
            good.append(source.id)
        else:
            bad.append((source.id, scan.error_class, scan.message, scan.attempts))
    bad += [(name, found.classes.get(name, "Missing"), why, 1) for name, why in found.missing.items()]
    artifact.clear_quarantine(good)
    artifact.quarantine(
        quarantine_row(source=name, stage="scan", error_class=error_class, message=message, attempts=attempts)
        for name, error_class, message, attempts in bad
        if (name, error_class, " ".join(message.split()), attempts) not in known
    )


def _summary(
    artifact: Artifact, found: Found, config: ShardConfig, done: tuple[int, int, int, float], say: Callable
) -> ShardSummary:
    new_clips, built_shards, dropped_short, seconds = done
    ids = {source.id for source in found.sources} | set(found.missing)
    entries = [row for row in artifact.quarantined().to_pylist() if row["source"] in ids]
    quarantined = {row["source"] for row in entries}
    commits = artifact.commits()
    samples = artifact.samples()
    marks = {name: _count(samples, name) for name in ("duplicate_of", "near_duplicate_of")}
    share = len(quarantined) / len(ids)
    if quarantined:
        classes = Counter({row["source"]: row["error_class"] for row in entries}.values())
        listed = ", ".join(f"{count} {name}" for name, count in sorted(classes.items()))
        say(f"{len(quarantined)} of {len(ids)} videos quarantined ({listed}); see quarantine.parquet")
    copied = _count_copied(artifact, found, config)
    if config.clip.codec == "copy":
        say(f"{copied} of {samples.num_rows} clips take over their source's packets; the others were encoded")
    return ShardSummary(
        sources=len(ids),
        clips=samples.num_rows,
        quarantined=len(quarantined),
        shards=len(commits),
        seconds=seconds,
        new_clips=new_clips,
        built_shards=built_shards,
        dropped_short=dropped_short,
        duplicates=marks["duplicate_of"],
        near_duplicates=marks["near_duplicate_of"],
        bytes=sum(record["bytes"] for record in commits.values()),
        ignored_files=found.ignored_files,
        out=artifact.url,
        copied=copied,
        exit_status=3 if share > config.allowed_quarantine else 0,
    )


def _count_copied(artifact: Artifact, found: Found, config: ShardConfig) -> int:
    if config.clip.codec != "copy":
        return 0
    scans = (load_scan(artifact, source.id) for source in found.sources)
    return sum(span.copied for scan in scans if isinstance(scan, FrameScan) for span in scan.clips(config.clip)[0])


def _count(samples, name: str) -> int:
    return samples.num_rows - samples[name].null_count if name in samples.column_names else 0
