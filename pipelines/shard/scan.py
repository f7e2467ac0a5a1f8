"""Scan: decode a source once, keep what planning needs (timestamps, cuts, signatures), nothing of the pictures.

A record takes about 90 bytes per frame and is cached under `_scan/`, so that an unchanged source is never scanned
again. Sources that cannot be used get a record too, with the reason.
"""

from __future__ import annotations

import faulthandler
import hashlib
import io
import json
import os
import time
import zipfile
import zlib
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from typing import Any

import av
import numpy as np

from kinema.configs import ClipConfig
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.shard.media import Source, content_hash, fingerprint, open_source
from kinema.pipelines.video.cuts import CutDetector
from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.encode import ClipEncoder
from kinema.pipelines.video.errors import Empty, SourceError, TooShort, Undecodable
from kinema.pipelines.video.frame_folder import FrameFolder
from kinema.pipelines.video.orient import Orientation, orientation_of
from kinema.pipelines.video.picture import PictureMaker, PictureSpec, Thumbnails, picture_spec
from kinema.pipelines.video.signature import frame_signature
from kinema.pipelines.video.timeline import ClipSpan, Rate, divide_shots, measure_rate, output_rate

THUMBNAIL_SIDE = 144
"""Shorter side in pixels of the small frames that cuts, signatures and motion are computed on."""
_VERSION = 1
_TRIAL_EVERY, _TRIAL_FRAMES = 240, 12  # frames: part of the video that is encoded to estimate sizes


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
    """Container, codec, size, rate, time base, picture spec, cuts, estimated bytes per frame, dropped pieces; empty
    for a source in quarantine."""

    @property
    def ok(self) -> bool:
        return not self.error_class

    def to_bytes(self) -> bytes:
        """The same record gives the same bytes."""
        plain = {f.name: getattr(self, f.name) for f in fields(Scan)}
        header = json.dumps({**plain, "facts": self.facts or None, "version": _VERSION}, sort_keys=True).encode()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, header=np.frombuffer(header, np.uint8), **self._arrays())
        return buffer.getvalue()

    def _arrays(self) -> dict[str, Any]:
        return {}


@dataclass(kw_only=True)
class FrameScan(Scan):
    """The whole record of a good source: something about every frame."""

    pts: np.ndarray
    """int64 [N]: sorted timestamps in ticks."""
    signatures: np.ndarray
    """int8 [N, 64]: perceptual signature of every frame."""
    checks: np.ndarray
    """uint32 [N]: checksum of every small frame, which shows whether a seek landed exactly."""
    keyframes: np.ndarray
    """int64: frames at which decoding can start."""

    @property
    def time_base(self) -> Fraction:
        return Fraction(*self.facts["time_base"])

    @property
    def rate(self) -> Rate:
        return Rate(Fraction(*self.facts["fps"]), self.facts["variable_rate"], self.facts["rounding"])

    @property
    def spec(self) -> PictureSpec:
        values = dict(self.facts["spec"])
        return PictureSpec(**{**values, "orientation": Orientation(**values["orientation"])})

    def clips(self, clip: ClipConfig) -> tuple[list[ClipSpan], Fraction, int]:
        """The clips of this source, their rate, and how many pieces were too short."""
        fps = output_rate(self.rate, clip.fps)
        spans, dropped = divide_shots(
            self.pts,
            self.facts["cuts"],
            self.facts["last_duration"],
            self.rate,
            self.time_base,
            fps=fps,
            seconds=clip.seconds,
            min_frames=clip.min_frames,
        )
        return spans, fps, dropped

    def _arrays(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _ARRAYS}


_ARRAYS = ("pts", "signatures", "checks", "keyframes")


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
            arrays = {name: data[name] for name in _ARRAYS} if has_frames else {}
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


def scan_task(task: ScanTask) -> tuple[str, str]:
    """Scan one source and save its record. Returns: (error class, message), both empty for a good source."""
    scan = scan_source(task.source, task.clip, task.frames_fps, stall_watch(task.stall_s))
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


def scan_source(source: Source, clip: ClipConfig, frames_fps: float, alive: Callable[[], None] = lambda: None) -> Scan:
    """Hash and decode a source from beginning to end. What is wrong with it is part of the result."""
    found = ""
    scan: Scan
    try:
        found = content_hash(source, alive)
        with open_source(source, frames_fps) as video:
            scan = decoded = _decode(video, source.id, clip, alive)
        spans, _, dropped = decoded.clips(clip)
        decoded.facts["dropped_short"] = dropped
        if not spans:
            raise TooShort(f"{len(decoded.pts)} frames in {len(decoded.facts['cuts']) + 1} shots; {_needed(clip)}")
    except SourceError as error:
        scan = Scan(source.id, found, error_class=type(error).__name__, message=str(error))
    scan.content_hash, scan.fingerprint = found, fingerprint(source)
    return scan


def _needed(clip: ClipConfig) -> str:
    at = f" at {clip.fps:g} frames per second" if clip.fps else ""
    return f"a clip needs {clip.min_frames} frames{at} (clip.min_frames)"


def _decode(video: VideoFile | FrameFolder, source_id: str, clip: ClipConfig, alive: Callable[[], None]) -> FrameScan:
    pts, checks, keyframes, signatures = array("q"), array("I"), array("q"), bytearray()
    cuts, sizes = CutDetector(clip), None
    last_duration = 0
    for index, frame in enumerate(video.frames()):
        alive()
        if sizes is None:
            orientation = orientation_of(frame)
            facts = _facts_of(frame, video)
            spec = picture_spec(frame, orientation, clip.codec, clip.short_side)
            thumbnails = Thumbnails(orientation, THUMBNAIL_SIDE)
            sizes = _SizeTrial(clip, spec)
        try:
            small = thumbnails.make(frame)
            sizes.add(index, frame)
        except (av.FFmpegError, ValueError) as error:
            raise Undecodable(f"frame {index} ({frame.format.name}) cannot be converted: {error}") from None
        assert frame.pts is not None  # video.frames() sees to that
        pts.append(frame.pts)
        checks.append(zlib.crc32(small.data))
        if frame.key_frame or isinstance(video, FrameFolder):
            keyframes.append(index)
        signatures += frame_signature(small).tobytes()
        cuts.add(small)
        last_duration = frame.duration or 0
    if sizes is None:
        raise Empty("there are no frames")
    ticks = np.array(pts, np.int64)
    rate = measure_rate(ticks, video.time_base, last_duration, video.rates)
    usual = round(1 / (rate.fps * video.time_base))
    facts |= {
        "fps": [rate.fps.numerator, rate.fps.denominator],
        "variable_rate": rate.variable,
        "rounding": rate.rounding,
        "last_duration": last_duration or max(1, usual),
        "cuts": cuts.finish(),
        "bytes_per_frame": sizes.bytes_per_frame(),
        "seeks": video.seeks and not video.invented_pts and bool((np.diff(ticks) > 0).all()),
        "spec": asdict(spec),
    }
    return FrameScan(
        source=source_id,
        content_hash="",
        facts=facts,
        pts=ticks,
        signatures=np.frombuffer(bytes(signatures), np.int8).reshape(-1, 64),
        checks=np.array(checks, np.uint32),
        keyframes=np.array(keyframes, np.int64),
    )


def _facts_of(frame: av.VideoFrame, video: VideoFile | FrameFolder) -> dict[str, Any]:
    return {
        "container": video.format_name,
        "codec": video.codec_name,
        "stream": video.stream_index,
        "stored_width": frame.width,
        "stored_height": frame.height,
        "stored_pix_fmt": frame.format.name,
        "pixel_aspect_ratio": [video.aspect_ratio.numerator, video.aspect_ratio.denominator],
        "time_base": [video.time_base.numerator, video.time_base.denominator],
        "start": video.start,
    }


class _SizeTrial:
    """Encodes one short stretch in every ten seconds or so as the clips will be, to know how large they get."""

    def __init__(self, clip: ClipConfig, spec: PictureSpec):
        self._clip, self._spec = clip, spec
        self._maker = PictureMaker(spec)
        self._encoder: ClipEncoder | None = None
        self._num_bytes = self._num_frames = 0

    def add(self, index: int, frame: av.VideoFrame) -> None:
        """The next frame of the source."""
        if index % _TRIAL_EVERY == 0:
            self._encoder = ClipEncoder(self._clip, self._spec, Fraction(25))
        if self._encoder is not None:
            self._encoder.add(self._maker.make(frame))
            if self._encoder.num_frames == _TRIAL_FRAMES:
                self._finish()

    def _finish(self) -> None:
        if self._encoder is not None:
            with self._encoder as encoder:
                self._num_bytes += len(encoder.finish())
                self._num_frames += encoder.num_frames
            self._encoder = None

    def bytes_per_frame(self) -> int:
        """Mean over the stretches."""
        self._finish()
        return max(1, self._num_bytes // max(1, self._num_frames))
