"""What `teach` and `track` share: a sidecar artifact with the clips' shards, keys and order, built by a pool of actors.

A sidecar shard is computed when it is pending, or when its commit's `input_hashes` are not the sha256 of the input
shards as they are now: an input was made anew, or the value is RETRY, which no shard has.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import UInt8

from kinema.models.weights import licence_notice
from kinema.pipelines import engine
from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.artifacts.layout import MAKERS
from kinema.pipelines.engine import Failure
from kinema.pipelines.errors import StageError
from kinema.pipelines.progress import Progress
from kinema.pipelines.sidecars.flow_codec import FlowBlob
from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.errors import Corrupt, Missing, SourceError, Truncated
from kinema.pipelines.video.packets import to_rgb

RETRY = "retry"
# What networks, OpenCV and FFmpeg raise on a clip they cannot take, memory included: it costs the clip, not its shard.
_UNFORESEEN = (ValueError, RuntimeError, MemoryError, cv2.error, av.FFmpegError)

Count = Callable[[int, int], None]
Sample = tuple[Mapping[str, bytes], Mapping[str, Any]]


class DamagedStorage(SourceError):
    """An input's bytes cannot be read back as they were written."""


class BadResult(ValueError):
    """What was computed is not fit to be stored; the clip is quarantined until its inputs change."""


@dataclass(frozen=True)
class ShardOutcome:
    """What one shard came to. `units`: what the stage counts besides clips (pairs, tracks)."""

    clips: int
    units: int
    quarantined: int
    bytes: int


def open_input(url: str, kind: str, setting: str = "") -> Artifact:
    """An input artifact that holds something.

    Args: setting, the key that named it, where it is not the kind.
    Raises: ValueError, one line, when it does not.
    """
    setting, maker = setting or kind, f"the folder that `kinema {MAKERS[kind]}` wrote"
    if not url:
        raise ValueError(f"{setting}= is empty; give {maker}")
    check_seen_by_workers(setting, url)
    artifact = Artifact.read(url)
    if artifact.kind != kind:
        raise ValueError(f"{setting}={url} holds {artifact.kind}, not {kind}; give {maker}")
    if not artifact.samples(["key"]).num_rows:
        bad = artifact.quarantined().num_rows
        held = "clip" if kind == "clips" else kind
        raise ValueError(f"{setting}={url} holds no {held} ({bad} inputs are quarantined, see its quarantine.parquet)")
    return artifact


def fullest_flow(flow: Artifact) -> FlowBlob:
    """The blob with the most pairs, which shows what pairs the artifact was made for."""
    columns = ["shard", "flow_offset", "flow_size", "num_pairs"]
    row = max(flow.samples(columns).to_pylist(), key=lambda row: row["num_pairs"])
    url = flow.shard_url(row["shard"])
    return FlowBlob(lambda at, size: read_range(url, row["flow_offset"] + at, size), row["flow_size"], row["num_pairs"])


def check_seen_by_workers(setting: str, url: str) -> None:
    """Raises: ValueError for a place that only this process has, when others do the work."""
    if url.startswith("memory://") and engine.backend() == "ray":
        raise ValueError(
            f"{setting}={url} is memory of this process, which Ray's workers do not see; give a folder or a bucket "
            "URL, or set KINEMA_ENGINE=serial"
        )


def default_out(clips: str, kind: str, name: str) -> str:
    """KIND/NAME beside the clips."""
    parent, slash, _ = clips.rstrip("/").rpartition("/")
    return f"{parent}{slash}{kind}/{name}"


def plan_shards(inputs: Mapping[str, Artifact], sidecar: Artifact) -> list[int]:
    """Plan a sidecar shard for every clip shard that has none yet.

    Args: inputs by kind, "clips" among them.
    Returns: the shards to compute: pending ones, and those with an input shard that was made anew.
    Raises: ValueError when a planned clip shard has got more clips since.
    """
    clips = inputs["clips"]
    samples = clips.samples(["shard", "key", "source"])
    planned = sidecar.plan
    is_planned = pc.is_in(samples["shard"], value_set=pc.unique(planned["shard"]).cast(pa.int32()))
    grown = set(samples.filter(is_planned)["key"].to_pylist()) - set(planned["key"].to_pylist())
    if grown:
        raise ValueError(
            f"{clips.url} has {len(grown)} clips in shards that {sidecar.url} was planned for without them; choose "
            "another out="
        )
    new = samples.filter(pc.invert(is_planned))
    sidecar.append_plan(new.select(["shard", "key", "source"]))
    sources = {name: artifact.commits() for name, artifact in inputs.items()}
    changed = [
        shard
        for shard, record in sidecar.commits().items()
        for name, commits in sources.items()
        if shard in commits and record["input_hashes"].get(name) != commits[shard]["sha256"]
    ]
    return sorted({*sidecar.pending(), *changed})


@dataclass(frozen=True)
class Place:
    """Where a pool of actors runs, and how many there are."""

    device: str
    """cpu or cuda."""
    num_actors: int
    threads: int
    """CPU threads of each."""


def place_actors(device: str, num_actors: int, threads: int, *, uses_gpu: bool, actor_bytes: int = 0) -> Place:
    """Place what `device` (auto, cpu, cuda) and `num_actors` (0: as many as fit) ask for on what Ray has.

    Args: uses_gpu, whether the work can run on one; actor_bytes, memory of an actor on a CPU, 0 where it is small.
    Raises: ValueError when a device or that many CPUs are not there.
    """
    resources = engine.resources(num_gpus=1.0 if device == "cuda" else 0.0)
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    if device == "cuda" and not gpus:
        raise ValueError("device=cuda, but there is no GPU; use device=auto or device=cpu")
    if uses_gpu and gpus and device != "cpu":
        return Place("cuda", num_actors or gpus, threads)
    nodes = [int(node.get("CPU", 0)) for node in engine.resources_of_nodes()]
    largest = max(nodes, default=cpus)
    if threads > largest:
        raise ValueError(f"threads_per_actor={threads}, but there are {largest} CPUs; use at most {largest}")
    fitting = sum(number // threads for number in nodes)
    if actor_bytes:
        fitting = min(fitting, int(resources.get("memory", actor_bytes)) // actor_bytes)
    return Place("cpu", num_actors or max(1, fitting), threads)


def complete(
    sidecar: Artifact,
    inputs: Mapping[str, Artifact],
    title: str,
    prepare: Callable[[], tuple[Callable[[Count], Callable[[int], Any]], Place]],
    *,
    unit: str,
    allowed_quarantine: float,
    started: float,
    say: Callable[[str], None],
    notices: tuple[str, ...] = (),
) -> dict[str, Any]:
    """What teach, track and embed have in common once they know what to do: plan, build what is missing, sum up.

    Args: title, what computes, for people; prepare, called if there is work: `make` and `place` as `build_shards` takes
        them; started, `time.monotonic()` when the stage began; notices, what a user must know of it, is said.
    Returns: the fields of `SidecarSummary`.
    """
    todo = plan_shards(inputs, sidecar)
    num_clips, num_shards = sidecar.plan.num_rows, len(sidecar.planned_shards())
    say(f"{MAKERS[sidecar.kind]}: {title} on {num_clips} clips, {len(todo)} of {num_shards} shards to compute")
    for notice in notices:
        say(f"{MAKERS[sidecar.kind]}: {notice}")
    with sidecar.swept_on_failure():
        if todo:
            make, place = prepare()
            build_shards(sidecar, todo, make, place, unit)
    sidecar.finalize()
    return {**totals(sidecar, allowed_quarantine, len(todo), time.monotonic() - started, say), "notices": notices}


def weights_notices(name: str, weights: str) -> tuple[str, ...]:
    """What must be said of weights of a network of the table: their licence, unless they come from a run of the user's.

    Args: name, in the ledger; weights, as `weights=` gave them.
    """
    notice = "" if weights and Path(weights).expanduser().is_dir() else licence_notice(name)
    return (notice,) if notice else ()


def build_shards(
    sidecar: Artifact,
    todo: list[int],
    make: Callable[[Count], Callable[[int], Any]],
    place: Place,
    unit: str,
) -> None:
    """Build shards on a pool of actors; a shard that cannot be built is quarantined and tried by the next run.

    Args: make, called once per actor with what it tells of finished clips and units: `count(clips, units)`; returns
        the function that builds one shard; unit, what it counts besides clips.
    """
    if not todo:
        return
    stage = MAKERS[sidecar.kind]
    counter = engine.Counter()
    total = pc.sum(pc.is_in(sidecar.plan["shard"], value_set=pa.array(todo, pa.int32()))).as_py()
    progress = Progress(stage, total, "clips")

    def tick() -> None:
        num_clips, num_units = counter.read()
        if progress.done < total:
            progress.update(min(num_clips, total), f"{num_units} {unit}")

    outcomes = engine.run_on_actors(
        partial(make, counter.add),
        todo,
        num_actors=place.num_actors,
        num_cpus=1.0 if place.device == "cuda" else float(place.threads),
        num_gpus=1.0 if place.device == "cuda" else 0.0,
        on_tick=tick,
    )
    for shard, outcome in outcomes:
        if isinstance(outcome, Failure):
            _quarantine_shard(sidecar, shard, outcome)
    tick()
    progress.close()


def _quarantine_shard(sidecar: Artifact, shard: int, failure: Failure) -> None:
    where = f" ({failure.where})" if failure.where else ""
    sidecar.quarantine(
        {
            "source": row["source"],
            "stage": MAKERS[sidecar.kind],
            "error_class": failure.error_class,
            "message": f"the shard's worker failed: {failure.message}{where}",
            "attempts": failure.attempts,
            "key": row["key"],
            "shard": shard,
        }
        for row in sidecar.plan_of(shard).select(["source", "key"]).to_pylist()
    )


def write_shard(
    inputs: Mapping[str, Artifact],
    sidecar: Artifact,
    shard: int,
    schema: pa.Schema,
    sample: Callable[[str, dict[str, dict[str, Any]]], Sample],
    count: Count,
    units: str,
) -> ShardOutcome:
    """Build and commit one sidecar shard.

    Args: sample(key, rows) -> members and row of one clip, where rows[kind] is the key's row in that input and is
        absent when the input does not hold it; units, the column of the row that is counted besides clips, a number or
        a list.
    Raises: ValueError when an input shard was not committed.
    """
    records = {name: _committed(artifact, shard) for name, artifact in inputs.items()}
    rows = {name: {row["key"]: row for row in source.rows_of(shard).to_pylist()} for name, source in inputs.items()}
    num_units, passing = 0, False
    with sidecar.shard_writer(shard, schema) as writer:
        for key in writer.planned:
            try:
                found = {name: of_key[key] for name, of_key in rows.items() if key in of_key}
                if "clips" not in found:
                    raise Missing("the clip is no longer in its shard, which was made anew")
                members, row = sample(key, found)
            except StageError:
                raise
            except (SourceError, *_UNFORESEEN) as error:
                passing |= isinstance(error, (DamagedStorage, *_UNFORESEEN)) and not isinstance(error, BadResult)
                writer.quarantine(key, stage=MAKERS[sidecar.kind], error_class=type(error).__name__, message=str(error))
                count(1, 0)
                continue
            writer.add(key, members, row)
            number = row[units] if isinstance(row[units], int) else len(row[units])
            num_units += number
            count(1, number)
        # RETRY is a hash that no shard has, so the next run tries again what may have passed by then.
        hashes = {name: record["sha256"] for name, record in records.items()}
        committed = writer.commit(input_hashes=hashes | ({"clips": RETRY} if passing else {}))
    return ShardOutcome(committed["num_samples"], num_units, len(writer.quarantined), committed["bytes"])


def _committed(artifact: Artifact, shard: int) -> dict[str, Any]:
    record = artifact.commit_of(shard)
    if record is None:
        what = "clip" if artifact.kind == "clips" else artifact.kind
        maker = MAKERS[artifact.kind]
        raise ValueError(f"{what} shard {shard} of {artifact.url} is not committed; run `kinema {maker}` to the end")
    return record


def read_clip(clips: Artifact, shard: int, row: Mapping[str, Any]) -> bytes:
    """The mp4 of a clip, compared with the hash in its json. Raises: DamagedStorage."""
    url = clips.shard_url(shard)
    try:
        mp4 = read_range(url, row["mp4_offset"], row["mp4_size"])
        expected = json.loads(read_range(url, row["json_offset"], row["json_size"])).get("sha256")
    except (ValueError, AttributeError) as error:
        raise DamagedStorage(f"clip {row['key']} cannot be read: {error}") from None
    if expected and hashlib.sha256(mp4).hexdigest() != expected:
        raise DamagedStorage(
            f"the bytes of {row['key']} in {url} are not those written; run `kinema verify {clips.url}`"
        )
    return mp4


def clip_frames(mp4: bytes, row: Mapping[str, Any]) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Every frame of a clip once, in order, as RGB.

    Raises: SourceError when a frame is damaged, or the clip has another number or size of frames than its row.
    """
    expected = (row["height"], row["width"])
    num_frames = 0
    with VideoFile(io.BytesIO(mp4)) as video:
        for frame in video.frames():
            if (frame.height, frame.width) != expected:
                found = f"{frame.width}x{frame.height}"
                raise Corrupt(f"frame {num_frames} is {found}, the clip is {expected[1]}x{expected[0]}")
            if num_frames == row["num_frames"]:
                raise Corrupt(f"the clip has more than its {row['num_frames']} frames")
            num_frames += 1
            yield to_rgb(frame)
    if num_frames != row["num_frames"]:
        raise Truncated(f"the clip ends after {num_frames} of {row['num_frames']} frames")


@dataclass(frozen=True, kw_only=True)
class SidecarSummary:
    """What a sidecar artifact holds after a run, and what the run did."""

    clips: int
    """Clips that have a blob."""
    quarantined: int
    """Clips without one, each with its reason in quarantine.parquet."""
    seconds: float
    """Duration of this run."""
    shards: int
    """Shards in the artifact."""
    new_shards: int
    """Shards this run computed."""
    bytes: int
    """Size of all shards."""
    out: str
    """Where the artifact is."""
    notices: tuple[str, ...] = ()
    """What a user must know of the network that made it, its weights' licence above all."""
    exit_status: int = 0
    """3 when more than the allowed share of the clips is quarantined."""


def totals(
    sidecar: Artifact, allowed_quarantine: float, new_shards: int, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """The fields of `SidecarSummary`, from commits and quarantine; says what was quarantined."""
    commits = sidecar.commits().values()
    quarantine = sidecar.quarantined()
    num_planned, num_bad = sidecar.plan.num_rows, quarantine.num_rows
    if num_bad:
        classes = Counter(quarantine["error_class"].to_pylist())
        listed = ", ".join(f"{count} {name}" for name, count in sorted(classes.items()))
        example = quarantine["message"][0].as_py()
        say(
            f"{MAKERS[sidecar.kind]}: {num_bad} of {num_planned} clips quarantined ({listed}; the first: {example}); "
            f"see {sidecar.url}/quarantine.parquet"
        )
    return {
        "clips": sidecar.samples(["key"]).num_rows,
        "quarantined": num_bad,
        "seconds": round(seconds, 3),
        "shards": len(commits),
        "new_shards": new_shards,
        "bytes": sum(record["bytes"] for record in commits),
        "out": sidecar.url,
        "exit_status": 3 if num_bad / max(1, num_planned) > allowed_quarantine else 0,
    }


def column_sum(table: pa.Table, name: str) -> int:
    """Sum of a column; 0 where a table without rows lacks it."""
    return int(pc.sum(table[name]).as_py() or 0) if name in table.column_names else 0


def column_mean(table: pa.Table, name: str) -> float:
    """Mean of a column over the rows that have a value; 0 where there is none."""
    return float(pc.mean(table[name]).as_py() or 0.0) if name in table.column_names else 0.0
