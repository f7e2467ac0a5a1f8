"""Scan: decode a source once, keep what planning needs (timestamps, cuts, signatures), nothing of the pictures.

A record takes about 90 bytes per frame and is cached under `_scan/`, so that an unchanged source is never scanned
again. Sources that cannot be used get a record too, with the reason.
"""

from __future__ import annotations

import faulthandler
import hashlib
import io
import json
import math
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import cached_property
from typing import Any

import av
import numpy as np

from kinema.configs import ClipConfig
from kinema.configs.json_text import json_text
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.shard.limits import memory_limited, needs_more, one_thread
from kinema.pipelines.shard.media import AnyVideo, Source, content_hash, fingerprint, open_source, read_all
from kinema.pipelines.shard.motion_samples import MotionSamples
from kinema.pipelines.shard.runs import PerFrame, Runs
from kinema.pipelines.shard.size_trial import SizeTrial
from kinema.pipelines.shard.stretches import SourceStretch, keeps_pictures, with_groups
from kinema.pipelines.video.copy import ClosedGroups
from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.errors import Empty, SourceError, TooMuchMemory, TooShort, Undecodable
from kinema.pipelines.video.frame_folder import FrameFolder
from kinema.pipelines.video.masks import check_masks, parse_palette
from kinema.pipelines.video.timeline import ClipSpan, Division, divide_shots, longest_clip, output_rate

_VERSION = 2
_BRIEFEST_MS = 2
_SEEN_EVERY = 3  # frames, for signatures of clips that are not decoded when they are cut


@dataclass
class Scan:
    """What is known about one source; of one that can be used, `FrameScan` says more."""

    source: str
    """Its id."""
    content_hash: str
    """Of its bytes; empty when they cannot be read."""
    fingerprint: str | None = None
    """Of the remote object, where the store gives one."""
    error_class: str = ""
    """Why it is quarantined; empty for a good source."""
    message: str = ""
    """Of the error."""
    attempts: int = 1
    """Times it was tried."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Container, codec, time base, stretches, cuts, estimated bytes per frame, dropped pieces; empty for a source in
    quarantine."""

    @property
    def ok(self) -> bool:
        return not self.error_class

    def to_bytes(self) -> bytes:
        """The same record gives the same bytes."""
        plain = {f.name: getattr(self, f.name) for f in fields(Scan)}
        header = json_text({**plain, "facts": self.facts or None, "version": _VERSION}, sort_keys=True).encode()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, header=np.frombuffer(header, np.uint8), **self._arrays())
        return buffer.getvalue()

    def _arrays(self) -> dict[str, Any]:
        return {}


@dataclass(kw_only=True)
class FrameScan(Scan):
    """The whole record of a good source: something about every frame."""

    pts: np.ndarray
    """int64 [N]: timestamps in ticks as the file has them; ascending, except where its clock starts anew."""
    signatures: np.ndarray
    """int8 [N, 64]: perceptual signature of every frame."""
    checks: np.ndarray
    """uint32 [N]: checksum of every small frame, which shows whether a seek landed exactly."""
    keyframes: np.ndarray
    """int64: frames at which decoding can start."""
    interlaced: np.ndarray
    """bool [N]: frames that are flagged as made of two fields."""
    motion_shares: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    """float32 [N]: motion score at some frames, nan at the others, of a source whose packets are taken over; [0]
    otherwise."""

    @property
    def time_base(self) -> Fraction:
        return Fraction(*self.facts["time_base"])

    @cached_property
    def stretches(self) -> list[SourceStretch]:
        """Runs of frames with one kind of picture and one clock, in order."""
        return [SourceStretch.from_json(values) for values in self.facts["stretches"]]

    @cached_property
    def ticks(self) -> np.ndarray:
        """int64 [N]: times that go on where the file's clock starts anew."""
        added = np.zeros_like(self.pts)
        for stretch in self.stretches:
            added[stretch.first : stretch.last] = stretch.clock_offset
        return self.pts + added

    def clips(self, clip: ClipConfig) -> tuple[list[ClipSpan], int]:
        """The clips of this source, and how many pieces were too short: in frames, or for an MP4, which counts its
        length in milliseconds."""
        division = Division(clip.fps, clip.seconds, clip.min_frames, clip.fill_slots)
        last_duration = self.facts["last_duration"]
        spans, dropped = divide_shots(
            self.ticks, self.facts["cuts"], last_duration, list(self.stretches), self.time_base, division
        )
        kept = [span for span in spans if 1000 * len(span.frames) >= _BRIEFEST_MS * span.fps]
        return kept, dropped + len(spans) - len(kept)

    def _arrays(self) -> dict[str, Any]:
        sampled = {"motion_shares": self.motion_shares} if len(self.motion_shares) else {}
        return {name: getattr(self, name) for name in _ARRAYS} | sampled


_ARRAYS = ("pts", "signatures", "checks", "keyframes", "interlaced")
_SOMETIMES = ("motion_shares",)


def scan_name(source_id: str) -> str:
    """Name of a source's record inside the artifact."""
    return f"_scan/{hashlib.blake2b(source_id.encode(), digest_size=12).hexdigest()}.npz"


def load_scan(artifact: Artifact, source_id: str, *, header_only: bool = False) -> Scan | None:
    """The record of a source; None when there is none or another version of the program wrote it.

    Returns: a FrameScan for a good source; a plain Scan for one in quarantine, and for all with `header_only`, which
    leaves what is known about every frame unread.
    """
    try:
        with np.load(io.BytesIO(artifact.store.read(scan_name(source_id))), allow_pickle=False) as data:
            header = json.loads(data["header"].tobytes())
            has_frames = not header_only and not header["error_class"]
            there = (*_ARRAYS, *(name for name in _SOMETIMES if name in data)) if has_frames else ()
            arrays = {name: data[name] for name in there}
    except (FileNotFoundError, zipfile.BadZipFile, KeyError, ValueError):
        return None  # never scanned, or damaged: it is made again
    if header.pop("version") != _VERSION or header["source"] != source_id:
        return None
    header["facts"] = header["facts"] or {}
    return FrameScan(**header, **arrays) if has_frames else Scan(**header)


def save_scan(artifact: Artifact, scan: Scan) -> None:
    """Write the record, all or nothing."""
    artifact.store.write(scan_name(scan.source), scan.to_bytes())


@dataclass(frozen=True)
class ScanTask:
    """What a worker needs to scan one source."""

    artifact: Artifact
    source: Source
    clip: ClipConfig
    frames_fps: float
    stall_s: float | None
    """Seconds without a new frame after which the worker ends itself; None: never."""
    stream: int = -1
    """Index of the video stream to take; -1 chooses."""
    palette: tuple[str, ...] = ()
    """Labels of masks' colours."""
    memory_bytes: int = 0
    """What decoding it may allocate; 0: anything."""
    motion: str = "none"
    """How the motion of clips is measured that need not be decoded again."""


@one_thread()
def scan_task(task: ScanTask) -> tuple[str, str]:
    """Scan one source and save its record. Returns: (error class, message), both empty for a good source."""
    settings = (task.clip, task.frames_fps, stall_watch(task.stall_s), task.stream, task.palette, task.motion)
    try:
        with memory_limited(task.memory_bytes):
            scan = scan_source(task.source, *settings)
    except MemoryError:
        why = needs_more("decoding it", task.memory_bytes)
        scan = Scan(task.source.id, content_hash(task.source), fingerprint(task.source), TooMuchMemory.__name__, why)
    save_scan(task.artifact, scan)
    return scan.error_class, scan.message


def stall_watch(stall_s: float | None) -> Callable[[], None]:
    """A function to call at every step forward; the process ends when it is not called for `stall_s` seconds.

    The engine reports such an end as a timeout. Native code that hangs cannot be stopped otherwise.
    """
    if stall_s is None:
        return lambda: None
    nowhere = open(os.devnull, "w")  # stays open as long as the watch
    armed = float("-inf")

    def alive() -> None:
        nonlocal armed
        now = time.monotonic()
        if now - armed > min(1.0, stall_s / 4):  # arming starts a thread: not for every frame
            faulthandler.dump_traceback_later(stall_s, exit=True, file=nowhere)
            armed = now

    return alive


def scan_source(
    source: Source,
    clip: ClipConfig,
    frames_fps: float,
    alive: Callable[[], None] = lambda: None,
    stream: int = -1,
    palette: tuple[str, ...] = (),
    motion: str = "none",
) -> Scan:
    """Hash and decode a source from beginning to end. What is wrong with it is part of the result."""
    found = ""
    scan: Scan
    try:
        found = content_hash(source, alive)
        check_masks(source.masks, read_all, parse_palette(palette))
        with open_source(source, frames_fps, stream, clip.deinterlace) as video:
            scan = decoded = _decode(video, source.id, clip, alive, motion)
        spans, dropped = decoded.clips(clip)
        decoded.facts["dropped_short"] = dropped
        if not spans:
            raise TooShort(_why_no_clip(decoded, clip))
    except SourceError as error:
        scan = Scan(source.id, found, error_class=type(error).__name__, message=str(error))
    scan.content_hash, scan.fingerprint = found, fingerprint(source)
    return scan


def _why_no_clip(scan: FrameScan, clip: ClipConfig) -> str:
    num_frames = len(scan.pts)
    slowest = min(output_rate(stretch.rate, clip.fps) for stretch in scan.stretches)
    if num_frames >= clip.min_frames and longest_clip(clip.seconds, slowest) < clip.min_frames:
        needed = math.ceil(max(2, clip.min_frames) / slowest)
        return (
            f"{num_frames} frames at {float(slowest):g} frames per second: clip.seconds={clip.seconds:g} holds fewer "
            f"than {max(2, clip.min_frames)} of them; use clip.seconds={needed} or more"
        )
    if 1000 * num_frames < _BRIEFEST_MS * slowest:
        length_ms = float(1000 * num_frames / slowest)
        return (
            f"{num_frames} frames at {float(slowest):g} frames per second last {length_ms:.1f} ms, and a clip cannot "
            f"be shorter than {_BRIEFEST_MS} ms; set clip.fps to a true rate, or correct the file's time base"
        )
    shots = len(scan.facts["cuts"]) + len(scan.stretches)
    at = f" at {clip.fps:g} frames per second" if clip.fps else ""
    return f"{num_frames} frames in {shots} shots; a clip needs {clip.min_frames} frames{at} (clip.min_frames)"


def _decode(video: AnyVideo, source_id: str, clip: ClipConfig, alive: Callable[[], None], motion: str) -> FrameScan:
    """Where packets may be taken over, once without the loop filter; with it where that shows that they may not."""
    groups = video.closed_groups() if clip.codec == "copy" and isinstance(video, VideoFile) else None
    if groups is not None and isinstance(video, VideoFile):
        if not clip.fps and groups.longest * video.time_base <= clip.seconds:
            video.skip_loop_filter(True)
            scan = _decode_once(video, source_id, clip, alive, groups, MotionSamples(motion, groups.starts))
            if scan is not None:
                return scan
            video.skip_loop_filter(False)
    scan = _decode_once(video, source_id, clip, alive, groups)
    assert scan is not None  # only quick ones give up
    return scan


def _decode_once(
    video: AnyVideo,
    source_id: str,
    clip: ClipConfig,
    alive: Callable[[], None],
    groups: ClosedGroups | None,
    samples: MotionSamples | None = None,
) -> FrameScan | None:
    """Args: samples, of a source whose clips will all be taken over. Returns: None where they cannot be."""
    frames = PerFrame(1 if samples is None else _SEEN_EVERY)
    sizes, runs = SizeTrial(clip), Runs(clip)
    for index, picture in enumerate(video.pictures()):
        alive()
        frame = picture.frame
        try:
            if runs.begins_at(picture):
                spec = runs.begin(index, picture)
                if samples is not None and not keeps_pictures(spec, picture.look):
                    return None
                sizes.look_like(spec)
            small = runs.thumbnails.make(frame)
            if samples is None:
                sizes.add(index, frame)
        except (av.FFmpegError, ValueError) as error:
            raise Undecodable(f"frame {index} ({frame.format.name}) cannot be converted: {error}") from None
        frames.add(index, picture, small, is_start=isinstance(video, FrameFolder))
        runs.add(frame, small)
        if samples is not None:
            if picture.interlaced:
                return None
            samples.add(index, frames.pts[-1], small)
    if not frames.pts:
        raise Empty("there are no frames")
    arrays: dict[str, Any] = frames.arrays()
    stretches = runs.stretches(arrays["pts"], arrays["keyframes"], video)
    if groups is not None:
        stretches = with_groups(stretches, arrays["pts"], arrays["interlaced"], groups.starts)
    facts = {
        "container": video.format_name,
        "codec": video.codec_name,
        "stream": video.stream_index,
        "time_base": [video.time_base.numerator, video.time_base.denominator],
        "start": video.start,
        "stretches": [stretch.to_json() for stretch in stretches],
        "last_duration": runs.last_duration or max(1, round(1 / (stretches[-1].rate.fps * video.time_base))),
        "cuts": runs.finish_cuts(),
        "bytes_per_frame": groups.bytes_per_frame if groups and samples else sizes.bytes_per_frame(),
        "dropped_damaged": video.num_dropped,
        "seeks": video.seeks and not video.invented_pts and bool((np.diff(arrays["pts"]) > 0).all()),
    }
    if samples is not None:
        arrays["motion_shares"] = samples.shares(len(frames.pts))
    scan = FrameScan(source=source_id, content_hash="", facts=facts, **arrays)
    return scan if samples is None or all(span.copied for span in scan.clips(clip)[0]) else None
