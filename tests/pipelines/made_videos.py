"""Small videos whose frames carry their own number, so that a test can say which frame it sees."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from kinema.configs import ClipConfig
from kinema.pipelines.video.encode import ClipEncoder
from kinema.pipelines.video.orient import Orientation
from kinema.pipelines.video.packets import to_rgb
from kinema.pipelines.video.picture import PictureMaker, picture_spec

CELL = 16
"""Side in pixels of one bit of the number; 8 bits along the top, then 2 corner marks below."""
HEIGHT, WIDTH = 96, 128


CODECS = ("h264", "h264_lossless", "hevc", "av1", "mjpeg", "mpeg4")


def encode(frames: Sequence[np.ndarray], fps: Fraction = Fraction(24), **clip) -> bytes:
    """A clip as the stage writes it."""
    config = ClipConfig(**{"preset": "ultrafast", **clip})
    pictures = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames]
    spec = picture_spec(pictures[0], Orientation(), config.codec, config.short_side)
    maker = PictureMaker(spec)
    with ClipEncoder(config, spec, fps) as encoder:
        for picture in pictures:
            encoder.add(maker.make(picture))
        return encoder.finish()


def decode(mp4: bytes) -> list[np.ndarray]:
    """Every frame as RGB."""
    with av.open(io.BytesIO(mp4)) as container:
        return [to_rgb(frame) for frame in container.decode(video=0)]


def texture(seed: int, height: int, width: int) -> np.ndarray:
    """Smooth random colours, uint8 [height, width, 3]."""
    noise = np.random.default_rng(seed).uniform(30, 225, (6, 8, 3)).astype(np.float32)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)


def paint(number: int, *, seed: int = 0, height: int = HEIGHT, width: int = WIDTH, shift: int = 0) -> np.ndarray:
    """RGB [H, W, 3]: a texture moved right by `shift` px, the number's bits, the most significant first."""
    wide = texture(seed, height, width + 256)
    picture = wide[:, 128 - shift : 128 - shift + width].copy()
    for bit in range(8):
        picture[:CELL, bit * CELL : (bit + 1) * CELL] = 235 if number >> (7 - bit) & 1 else 20
    return picture


def number_of(picture: np.ndarray) -> int:
    """The number painted into a picture; -1 for one too narrow to hold it."""
    if picture.shape[1] < 8 * CELL:
        return -1
    cells = picture[4 : CELL - 4, : 8 * CELL].reshape(CELL - 8, 8, CELL, 3).mean((0, 2, 3))
    return int(sum(1 << (7 - bit) for bit in range(8) if cells[bit] > 128))


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    fps: Fraction | int = 24,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    audio: bool = False,
) -> Path:
    """Write frames; `pts` in ticks of `time_base` make the rate variable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[:2]
    base = {"crf": "12", "preset": "ultrafast"} if codec == "libx264" else {}
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options={**base, **(options or {})})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.time_base = time_base or 1 / Fraction(fps)
        stream.codec_context.thread_count = 1
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format=pix_fmt, threads=1)
            frame.pts = index if pts is None else pts[index]
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _write_silence(container, sound)
    return path


def write_sound(path: Path) -> Path:
    """A file with a sound stream only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        _write_silence(container, container.add_stream("aac", rate=16000, layout="mono"))
    return path


def _write_silence(container, stream) -> None:
    for index in range(8):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, index * 1024
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def numbered(path: Path, num_frames: int, *, seed: int = 0, speed: int = 1, **options) -> Path:
    """A video of frames 0, 1, 2, ... whose texture moves right by `speed` px each."""
    size = {name: options.pop(name) for name in ("height", "width") if name in options}
    frames = [paint(i, seed=seed, shift=(i * speed) % 128, **size) for i in range(num_frames)]
    return write_video(path, frames, **options)


def set_display_matrix(path: Path, matrix: Sequence[int]) -> Path:
    """Overwrite the display matrix (a, b, c, d as whole numbers) in an MP4's track header."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") - 4 + 48
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))
    return path


def tree(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, by relative name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
