"""From a decoded frame of any kind to the picture that is encoded: size, pixel format, colour tags, upright, even.

Colour rule: the YUV numbers of the source are kept, and the clip is tagged with their meaning. A source without a
matrix tag is read as BT.601 (FFmpeg's rule) and the clip says so, so decode(encode(x)) has the colours of decode(x).
"""

from __future__ import annotations

from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from kinema.pipelines.video.orient import Orientation

# ITU-T H.273 matrix coefficients -> swscale's number. 2 (unspecified) and 5 (BT.470BG) mean BT.601.
_SWSCALE_MATRIX = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
_TAG_OF_SWSCALE = {1: 1, 4: 4, 5: 6, 7: 7, 9: 9}
_FULL_RANGE, _LIMITED_RANGE = 2, 1
_PLANAR_8BIT = {"yuv420p", "yuvj420p"}


@dataclass(frozen=True)
class PictureSpec:
    """The pictures of one source as its clips hold them."""

    width: int
    """Encoded width: upright, padded to even where the format asks for it."""
    height: int
    """Encoded height."""
    pad_right: int
    """Columns added at the right (copies of the last one)."""
    pad_bottom: int
    """Rows added at the bottom."""
    pix_fmt: str
    """yuv420p, yuvj420p (mjpeg) or rgb24 (lossless)."""
    matrix: int
    """Matrix coefficients (ITU-T H.273 number); 0 for RGB."""
    color_range: int
    """1 limited, 2 full."""
    primaries: int
    """Colour primaries (H.273), 2 unspecified."""
    transfer: int
    """Transfer characteristics (H.273), 2 unspecified."""
    orientation: Orientation
    """What turns the stored picture upright."""


def picture_spec(frame: av.VideoFrame, orientation: Orientation, codec: str, short_side: int) -> PictureSpec:
    """Decide size and colour of a source's clips from its first frame.

    Args:
        frame: a decoded frame, not turned.
        codec: value of `clip.codec`.
        short_side: shorter side in pixels to shrink to (never enlarged); 0 keeps the size.
    """
    width, height = (frame.height, frame.width) if orientation.swaps_sides else (frame.width, frame.height)
    width, height = _shrink(width, height, short_side)
    planar = codec != "h264_lossless"
    pad_right, pad_bottom = (width % 2, height % 2) if planar else (0, 0)
    matrix, color_range = _colour(frame)
    if codec == "h264_lossless":
        pix_fmt, matrix, color_range = "rgb24", 0, _FULL_RANGE
    elif codec == "mjpeg":
        pix_fmt, matrix, color_range = "yuvj420p", 6, _FULL_RANGE
    else:
        pix_fmt = "yuv420p"
    return PictureSpec(
        width=width + pad_right,
        height=height + pad_bottom,
        pad_right=pad_right,
        pad_bottom=pad_bottom,
        pix_fmt=pix_fmt,
        matrix=matrix,
        color_range=color_range,
        primaries=int(frame.color_primaries),
        transfer=int(frame.color_trc),
        orientation=orientation,
    )


def _shrink(width: int, height: int, short_side: int) -> tuple[int, int]:
    short = min(width, height)
    if not short_side or short <= short_side:
        return width, height
    even = [max(2, 2 * round(side * short_side / short / 2)) for side in (width, height)]
    return even[0], even[1]


def _is_yuv(frame: av.VideoFrame) -> bool:
    return frame.format.name.startswith(("yuv", "nv12", "nv16", "nv21", "p010", "p016", "yuyv", "uyvy"))


def _colour(frame: av.VideoFrame) -> tuple[int, int]:
    """(matrix, range) a YUV clip of this frame gets; sources in RGB or grey become BT.709, limited range."""
    if not _is_yuv(frame):
        return 1, _LIMITED_RANGE
    full = frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")
    matrix = _TAG_OF_SWSCALE[_SWSCALE_MATRIX.get(int(frame.colorspace), 5)]
    return matrix, _FULL_RANGE if full else _LIMITED_RANGE


class PictureMaker:
    """Turns decoded frames into pictures that follow a PictureSpec. Keeps scaler state between frames."""

    def __init__(self, spec: PictureSpec):
        self.spec = spec
        self._scale = VideoReformatter()
        self._to_rgb = VideoReformatter()

    def make(self, frame: av.VideoFrame) -> av.VideoFrame:
        """A new frame of the spec's size, format and tags, upright. The input is not changed visibly."""
        spec = self.spec
        size = (spec.width - spec.pad_right, spec.height - spec.pad_bottom)
        stored = (size[1], size[0]) if spec.orientation.swaps_sides else size
        odd = stored[0] % 2 or stored[1] % 2
        if spec.pix_fmt == "rgb24" or not _is_yuv(frame) or (odd and not spec.orientation.is_identity):
            return self._through_rgb(frame, stored)
        picture = self._reformat(self._scale, frame, stored, spec.pix_fmt)
        if spec.orientation.is_identity and not (spec.pad_right or spec.pad_bottom):
            return self._tag(picture)
        planes = [spec.orientation.apply(plane) for plane in plane_arrays(picture)]
        planes[0] = self._pad(planes[0])
        return self._tag(frame_of_planes(planes, spec.pix_fmt))

    def _through_rgb(self, frame: av.VideoFrame, stored: tuple[int, int]) -> av.VideoFrame:
        """RGB first: for RGB clips and sources, and where subsampled chroma cannot be turned exactly."""
        spec = self.spec
        rgb = self._reformat(self._to_rgb, frame, stored, "rgb24").to_ndarray()
        rgb = np.ascontiguousarray(self._pad(spec.orientation.apply(rgb)))
        picture = av.VideoFrame.from_ndarray(rgb, format="rgb24")
        if spec.pix_fmt == "rgb24":
            return self._tag(picture)
        return self._tag(self._reformat(self._scale, picture, (spec.width, spec.height), spec.pix_fmt))

    def _reformat(
        self, scaler: VideoReformatter, frame: av.VideoFrame, size: tuple[int, int], pix_fmt: str
    ) -> av.VideoFrame:
        resized = (frame.width, frame.height) != size
        rgb = pix_fmt == "rgb24"
        spec = self.spec
        source_matrix, source_range = _colour(frame)
        return scaler.reformat(
            frame,
            width=size[0],
            height=size[1],
            format=pix_fmt,
            # swscale's default filter without resizing, so that RGB equals a plain conversion of the source
            interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND if resized else Interpolation.BILINEAR,
            src_colorspace=Colorspace(_SWSCALE_MATRIX[source_matrix]) if _is_yuv(frame) else None,
            dst_colorspace=None if rgb else Colorspace(_SWSCALE_MATRIX[spec.matrix]),
            src_color_range=source_range if _is_yuv(frame) else None,
            dst_color_range=None if rgb else spec.color_range,
            threads=1,
        )

    def _pad(self, plane: np.ndarray) -> np.ndarray:
        edges = ((0, self.spec.pad_bottom), (0, self.spec.pad_right), *(((0, 0),) * (plane.ndim - 2)))
        return np.pad(plane, edges, mode="edge") if self.spec.pad_right or self.spec.pad_bottom else plane

    def _tag(self, picture: av.VideoFrame) -> av.VideoFrame:
        if self.spec.pix_fmt != "rgb24":
            picture.colorspace = self.spec.matrix
            picture.color_range = self.spec.color_range
        return picture


def plane_arrays(frame: av.VideoFrame) -> list[np.ndarray]:
    """The planes of an 8-bit planar frame as uint8 views [h, w] without the padding at the ends of lines."""
    if frame.format.name not in _PLANAR_8BIT:
        raise ValueError(f"frame is {frame.format.name}; planes are read of {', '.join(sorted(_PLANAR_8BIT))} only")
    return [
        np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
        for plane in frame.planes
    ]


def frame_of_planes(planes: list[np.ndarray], pix_fmt: str) -> av.VideoFrame:
    """A frame from uint8 planes: luma [H, W] and two of chroma [ceil(H/2), ceil(W/2)]."""
    height, width = planes[0].shape
    frame = av.VideoFrame(width, height, pix_fmt)
    for target, plane in zip(frame.planes, planes, strict=True):
        rows = np.zeros((target.buffer_size // target.line_size, target.line_size), np.uint8)
        rows[: plane.shape[0], : plane.shape[1]] = plane
        target.update(rows.tobytes())
    return frame


class Thumbnails:
    """Small upright BGR pictures of decoded frames, for cut detection, hashes and motion. All have one size."""

    def __init__(self, orientation: Orientation, short_side: int):
        self.orientation, self.short_side = orientation, short_side
        self._scale = VideoReformatter()
        self._size: tuple[int, int] | None = None

    def make(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 [h, w, 3] BGR with the shorter side at most `short_side`, area-averaged."""
        if self._size is None:
            scale = min(1.0, self.short_side / min(frame.width, frame.height))
            self._size = max(8, round(frame.width * scale)), max(8, round(frame.height * scale))
        small = self._scale.reformat(
            frame,
            width=self._size[0],
            height=self._size[1],
            format="bgr24",
            interpolation=Interpolation.AREA,
            threads=1,
        )
        return np.ascontiguousarray(self.orientation.apply(small.to_ndarray()))
