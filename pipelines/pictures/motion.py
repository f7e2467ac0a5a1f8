"""Pictures and films of motion: arrows, warped differences, track trails, the colour wheel as a legend.

Frames are uint8 [H, W, 3] RGB; flow is float [2, H, W] in pixels of the frame; points are (x, y) in pixels, centres at
integers. What belongs to another size must be resized first (`models.flow.geometry.resize_flow`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8

from kinema.models.flow.geometry import flow_to_colour, known_flow, pixel_grid, warp

ARROW_COLOUR = (255, 235, 59)
SUBPIXEL_BITS = 4
TRAIL_FRAMES = 12


def wheel_picture(side: int = 151) -> UInt8[np.ndarray, "S S 3"]:
    """The legend of flow pictures: each pixel has the colour of the vector from the centre to it; white outside."""
    middle = (side - 1) / 2
    vectors = pixel_grid(side, side, like=torch.empty(0)) - middle
    picture = flow_to_colour(vectors, max_px=middle).numpy()
    picture[vectors.norm(dim=0).numpy() > middle] = 255
    return picture


def arrows_picture(
    frame: UInt8[np.ndarray, "H W 3"], flow_px: Float[np.ndarray, "2 H W"], step_px: int = 0, magnify: float = 1.0
) -> UInt8[np.ndarray, "H W 3"]:
    """The frame, greyed, with an arrow from every `step_px`-th pixel to where it moves.

    Args: step_px, 0 for about 24 arrows along the longer side; magnify, length of the arrows relative to the motion.
    Unknown flow has no arrow; motion under half a pixel is a dot.
    """
    height, width = frame.shape[:2]
    step = step_px or max(4, max(height, width) // 24)
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    picture = cv2.cvtColor((grey // 2 + 40).astype(np.uint8), cv2.COLOR_GRAY2RGB)
    known = known_flow(torch.from_numpy(np.ascontiguousarray(flow_px))).numpy()
    for y in range(step // 2, height, step):
        for x in range(step // 2, width, step):
            if not known[y, x]:
                continue
            dx, dy = (float(v) * magnify for v in flow_px[:, y, x])
            start, end = _fixed(x, y), _fixed(x + dx, y + dy)
            if max(abs(dx), abs(dy)) < 0.5:
                cv2.circle(picture, start, 1 << SUBPIXEL_BITS, ARROW_COLOUR, cv2.FILLED, cv2.LINE_AA, SUBPIXEL_BITS)
            else:
                cv2.arrowedLine(picture, start, end, ARROW_COLOUR, 1, cv2.LINE_AA, SUBPIXEL_BITS, tipLength=0.3)
    return picture


def warped_difference(
    frame1: UInt8[np.ndarray, "H W 3"],
    frame2: UInt8[np.ndarray, "H W 3"],
    flow_px: Float[np.ndarray, "2 H W"],
    occlusion: Bool[np.ndarray, "H W"] | None = None,
    gain: float = 3.0,
) -> UInt8[np.ndarray, "H W 3"]:
    """Where the flow fails to explain frame 1 by frame 2: grey is equal, brighter or darker is not.

    Occluded pixels are tinted blue, pixels whose target lies outside frame 2 are black.
    """
    first, second = (torch.from_numpy(np.ascontiguousarray(f)).permute(2, 0, 1)[None].float() for f in (frame1, frame2))
    warped, inside = warp(second, torch.from_numpy(np.ascontiguousarray(flow_px))[None].float())
    difference = (128 + gain * (first - warped)[0]).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    if occlusion is not None:
        difference[occlusion] = difference[occlusion] // 2 + np.array([0, 0, 120], np.uint8)
    difference[~inside[0].numpy()] = 0
    return difference


def track_trails(
    frames: Iterable[UInt8[np.ndarray, "H W 3"]],
    points_px: Float[np.ndarray, "T N 2"],
    visible: Bool[np.ndarray, "T N"],
    trail_frames: int = TRAIL_FRAMES,
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Each frame with its points, and behind each point the way it came over the last `trail_frames` frames.

    A point keeps its colour, given by where it starts; hidden points are hollow, and their way is not drawn.
    """
    for t, frame in enumerate(frames):
        if t == 0:
            colours = _colours(points_px, frame.shape[:2])
        picture = frame.copy()
        first = max(0, t - trail_frames)
        for n, colour in enumerate(colours):
            for s in range(first, t):
                ends = points_px[s : s + 2, n]
                if visible[s : s + 2, n].all() and np.isfinite(ends).all():
                    cv2.line(picture, _fixed(*ends[0]), _fixed(*ends[1]), colour, 1, cv2.LINE_AA, SUBPIXEL_BITS)
            if np.isfinite(points_px[t, n]).all():
                filled = cv2.FILLED if visible[t, n] else 1
                centre = _fixed(*points_px[t, n])
                cv2.circle(picture, centre, 2 << SUBPIXEL_BITS, colour, filled, cv2.LINE_AA, SUBPIXEL_BITS)
        yield picture


def encode_mp4(frames: Iterable[UInt8[np.ndarray, "H W 3"]], fps: float) -> bytes:
    """A film that browsers play (H.264, 4:2:0). An odd last row or column is repeated once, as 4:2:0 needs even sides.

    Raises: ValueError without frames.
    """
    # A file, not memory: to put the index in front, the muxer opens what it wrote once more.
    with tempfile.TemporaryDirectory(prefix="kinema-film-") as folder:
        path = Path(folder) / "film.mp4"
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            _encode(container, frames, fps)
        return path.read_bytes()


def _encode(container: av.container.OutputContainer, frames: Iterable[UInt8[np.ndarray, "H W 3"]], fps: float) -> None:
    stream = None
    for frame in frames:
        height, width = frame.shape[:2]
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if stream is None:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width, stream.pix_fmt = *even.shape[:2], "yuv420p"
            stream.options = {"crf": "20", "preset": "fast"}
            stream.codec_context.thread_count = 1
        container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
    if stream is None:
        raise ValueError("a film needs at least one frame, and there was none")
    container.mux(stream.encode(None))


def write_mp4(path: str | Path, frames: Iterable[UInt8[np.ndarray, "H W 3"]], fps: float) -> None:
    """Write `encode_mp4` of the frames; the file appears whole or not at all."""
    film, path = encode_mp4(frames, fps), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(film)
    os.replace(temporary, path)


def _fixed(x: float, y: float) -> tuple[int, int]:
    """Pixel position in OpenCV's fixed point; clamped, as far positions would wrap around."""
    return tuple(round(min(max(float(v), -4096.0), 16384.0) * (1 << SUBPIXEL_BITS)) for v in (x, y))  # type: ignore


def _colours(points_px: np.ndarray, size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """A hue per point, by the direction from the middle to its first position: neighbours look alike."""
    height, width = size
    start = np.nan_to_num(points_px[0] / (width, height) - 0.5)
    vectors = torch.from_numpy(start / np.maximum(np.hypot(*start.T)[:, None], 1e-6)).T.float()[:, None]  # [2, 1, N]
    wheel = flow_to_colour(vectors, max_px=1.0)[0].numpy()
    return [(int(r), int(g), int(b)) for r, g, b in wheel]
