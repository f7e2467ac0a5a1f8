"""Recordings with a past, drawn from a seed: what every frame is, when it is shown and how large, is known.

A frame carries its number as a pattern that survives coding, turning and scaling (made_videos.paint).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import Colorspace
from made_videos import paint, set_display_matrix

RATES = [Fraction(n) for n in (10, 15, 24, 25, 30, 50, 60)] + [Fraction(24000, 1001), Fraction(30000, 1001)]
SIZES = [(128, 96), (160, 96), (144, 128), (128, 176)]
MATRICES = {2: 6, 1: 1, 5: 6, 6: 6, 9: 9, 10: 9, 8: 6, 14: 6, 7: 7}
"""Matrix tag -> the one that the clip is tagged with."""
TURNS = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
KINDS = {
    "mp4": ("libx264", "libx265", "mpeg4", "libx264", "libx264"),
    "mov": ("libx264", "mpeg4"),
    "mkv": ("libx264", "libx265", "mjpeg", "libx264"),
    "webm": ("libvpx", "libvpx-vp9"),
    "ts": ("libx264", "mpeg2video", "libx264"),
    "avi": ("mpeg4", "mjpeg"),
}
FILLED = 4  # empty slots that are filled by default


@dataclass
class Part:
    """A run of frames with one size, shape, rate and clock."""

    slots: list[int]
    """Slot of the grid in which each frame lies; ascending from 0."""
    fps: Fraction
    size: tuple[int, int]
    """Width and height upright, with square pixels."""
    pixel_aspect: Fraction = Fraction(1)
    interlaced: bool = False
    matrix: int = 2
    start: Fraction = Fraction(0)
    """Seconds from the beginning of the recording, in a time that goes on over joins."""

    def shots(self) -> list[list[int]]:
        """Positions in the part, divided at holes."""
        shots: list[list[int]] = [[0]]
        for index in range(1, len(self.slots)):
            if self.slots[index] - self.slots[index - 1] > FILLED + 1:
                shots.append([])
            shots[-1].append(index)
        return shots


@dataclass
class Recording:
    """A file and the truth about it."""

    path: Path
    parts: list[Part]
    drawn: dict[str, object] = field(default_factory=dict)
    """What was drawn, for the report of a failure."""


def draw_recording(seed: int, folder: Path) -> Recording:
    """Write the recording of a seed."""
    rng = np.random.default_rng(seed)
    container = str(rng.choice(list(KINDS)))
    codec = str(rng.choice(KINDS[container]))
    fps = RATES[int(rng.integers(len(RATES)))]
    if codec in ("mpeg2video", "mpeg4") and fps < 20:
        fps = Fraction(25)  # MPEG-2 knows no slower rates
    turn = int(rng.choice(list(TURNS))) if container in ("mp4", "mov") and rng.random() < 0.5 else 0
    b_frames = int(rng.integers(0, 4)) if codec in ("libx264", "libx265", "mpeg2video") else 0
    num_parts = int(rng.integers(1, 4)) if container in ("ts", "webm") and rng.random() < 0.6 else 1
    trim = container in ("mp4", "mov") and codec == "libx264" and rng.random() < 0.4
    parts, start = [], Fraction(0)
    for _ in range(num_parts):
        part = _draw_part(rng, container, codec, fps, may_have_holes=not trim and codec != "mpeg2video")
        if container == "webm" and parts:
            others = [size for size in SIZES if size != parts[-1].size]  # otherwise there would be no boundary
            part.size = others[int(rng.integers(len(others)))]
        if codec == "mpeg2video" and parts:  # FFmpeg loses the last frame before a sequence of another size
            part.size, part.pixel_aspect = parts[0].size, parts[0].pixel_aspect
        if codec == "libx264" and parts:
            part.matrix = parts[0].matrix  # FFmpeg keeps tags that a later header does not name
            if _macroblocks(part, turn) == _macroblocks(parts[-1], turn):  # and the cropping of the first header
                part.size, part.pixel_aspect = parts[-1].size, parts[-1].pixel_aspect
        part.interlaced &= stored_size(part, turn)[1] % 4 == 0  # x264 refuses others
        if codec == "mpeg2video" and parts and _macroblocks(part, turn)[1] % 2:
            part.interlaced = parts[0].interlaced  # nor does it keep that frame where fields need another row of blocks
        part.start = start
        start += (part.slots[-1] + 1) / part.fps
        parts.append(part)
    path = folder / f"r{seed}.{container}"
    drawn = {
        "seed": seed, "codec": codec, "turn": turn, "b_frames": b_frames, "trim": trim,
        "parts": [(len(p.slots), str(p.fps), p.size, str(p.pixel_aspect), p.interlaced, p.matrix) for p in parts],
    }  # fmt: skip
    first_number = 0
    pieces = []
    for number, part in enumerate(parts):
        piece = folder / f"r{seed}-{number}.{container}"
        _write(piece, part, first_number, codec, b_frames, turn, gop=int(rng.integers(4, 30)))
        pieces.append(piece)
        first_number += len(part.slots)
    _join(path, pieces, parts)
    if turn:
        set_display_matrix(path, TURNS[turn])
    if trim:
        _trim(path, parts[0], rng, drawn)
    return Recording(path, parts, drawn)


def _draw_part(rng: np.random.Generator, container: str, codec: str, fps: Fraction, may_have_holes: bool) -> Part:
    num_slots = int(rng.integers(16, 60))
    present = np.ones(num_slots, bool)
    if may_have_holes and container not in ("avi",) and rng.random() < 0.5:
        present = rng.random(num_slots) >= rng.choice([0.04, 0.2])
        if num_slots > 40 and rng.random() < 0.5:
            hole = int(rng.integers(7, 14))
            present[18 : 18 + hole] = False
        present[[0, 1, -2, -1]] = True
    aspect = Fraction(1)
    if container in ("mp4", "mov", "mkv", "ts") and codec in ("libx264", "mpeg4", "mpeg2video") and rng.random() < 0.3:
        aspect = Fraction(*[(4, 3), (3, 4), (8, 9)][int(rng.integers(3))])
        aspect = Fraction(1) if codec == "mpeg2video" else aspect  # it knows shapes of the whole picture only
    interlaced = codec in ("libx264", "mpeg2video") and rng.random() < 0.25
    tagged = codec == "libx264" and rng.random() < 0.5
    matrix = int(rng.choice(list(MATRICES))) if tagged else 2
    size = SIZES[int(rng.integers(len(SIZES)))]
    slots = [int(slot) for slot in np.flatnonzero(present)]
    return Part(slots, fps, size, aspect, interlaced, matrix)


def stored_size(part: Part, turn: int) -> tuple[int, int]:
    """Width and height as coded: turned back, and squeezed where pixels are not square."""
    width, height = part.size if turn % 180 == 0 else part.size[::-1]
    if part.pixel_aspect > 1:
        return 2 * round(width / part.pixel_aspect / 2), height
    return width, 2 * round(height * part.pixel_aspect / 2)


def _macroblocks(part: Part, turn: int) -> tuple[int, ...]:
    return tuple(-(-side // 16) for side in stored_size(part, turn))


def _write(path: Path, part: Part, first: int, codec: str, b_frames: int, turn: int, gop: int) -> None:
    width, height = stored_size(part, turn)
    options = {"bf": str(b_frames), "g": str(gop)}
    if codec in ("libx264", "libx265"):
        options |= {"preset": "ultrafast", "crf": "16"}
    if codec == "libx265":
        options = {
            "preset": "ultrafast",
            "crf": "16",
            "x265-params": f"log-level=error:bframes={b_frames}:keyint={gop}",
        }
    if codec.startswith("libvpx"):
        options = {"g": str(gop), "crf": "10", "b": "2M", "deadline": "realtime", "cpu-used": "8"}
    if part.interlaced:
        options["flags"] = "+ildct+ilme"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=part.fps, options=options)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        context = stream.codec_context
        context.thread_count, context.time_base = 1, 1 / part.fps
        if codec in ("mpeg4", "mjpeg", "mpeg2video"):
            context.bit_rate = 3_000_000
        if part.pixel_aspect != 1:
            context.sample_aspect_ratio = part.pixel_aspect
        if part.matrix != 2:
            context.colorspace = part.matrix
        for index, slot in enumerate(part.slots):
            upright = paint((first + index) % 256, width=part.size[0], height=part.size[1], shift=index % 100)
            picture = np.ascontiguousarray(np.rot90(upright, -_turns(turn)))
            if (picture.shape[1], picture.shape[0]) != (width, height):
                picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            known = {6: 5, 2: 5, 10: 9, 8: 5, 14: 5}.get(part.matrix, part.matrix)
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace=Colorspace(known), threads=1)
            if part.matrix != 2:
                frame.colorspace = part.matrix
            frame.pts, frame.time_base = slot, 1 / part.fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _turns(turn: int) -> int:
    """Counter-clockwise quarter turns that show the stored picture upright."""
    return {0: 0, 90: 3, 180: 2, 270: 1}[turn]


def _join(path: Path, pieces: list[Path], parts: list[Part]) -> None:
    if path.suffix == ".ts" or len(pieces) == 1:  # transport streams are joined by `cat`: their clock starts anew
        path.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
        return
    with av.open(str(path), "w") as target:
        with av.open(str(pieces[0])) as source:
            stream = target.add_stream_from_template(source.streams.video[0])
        for piece, part in zip(pieces, parts, strict=True):
            with av.open(str(piece)) as source:
                for packet in source.demux(video=0):
                    if packet.size:
                        shift = round(part.start / packet.time_base)
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = stream
                        target.mux(packet)


def _trim(path: Path, part: Part, rng: np.random.Generator, drawn: dict[str, object]) -> None:
    """Hide frames at both ends by the edit list, as phones trim. Changes the part to what is left."""
    head, tail = int(rng.integers(0, len(part.slots) // 2)), int(rng.integers(0, len(part.slots) // 4))
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 4
    media_scale = _timescale(data, b"mdhd")
    movie_scale = _timescale(data, b"mvhd")
    kept = len(part.slots) - head - tail
    media_time = struct.unpack_from(">i", data, at + 12)[0] + round(head / part.fps * media_scale)
    struct.pack_into(">Ii", data, at + 8, int(kept / part.fps * movie_scale), media_time)
    path.write_bytes(bytes(data))
    drawn["head"], drawn["tail"] = head, tail
    part.slots = part.slots[:kept]


def _timescale(data: bytearray, box: bytes) -> int:
    return struct.unpack_from(">I", data, data.index(box) + 4 + 12)[0]
