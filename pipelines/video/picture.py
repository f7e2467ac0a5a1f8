"""From a decoded frame of any kind to the picture that is encoded: size, pixel format, colour tags, upright, even.

Colour rule: the YUV numbers of the source are kept, and the clip is tagged with their meaning. A source without a
matrix tag is read as BT.601 (FFmpeg's rule) and the clip says so, so decode(encode(x)) has the colours of decode(x).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from kinema.pipelines.video.orient import Orientation

# ITU-T H.273 matrix coefficients -> swscale's number. 2 (unspecified) and 5 (BT.470BG) mean BT.601.
_SWSCALE_MATRIX = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
_TAG_OF_SWSCALE = {1: 1, 4: 4, 5: 6, 7: 7, 9: 9}
_READ_EXACTLY = frozenset({0, 1, 2, 4, 5, 6, 7, 9})  # matrix tags that need no fallback; 0 is RGB, which has none
_BY_PRIMARIES = {12, 13}  # matrices that follow from the primaries
_MATRIX_OF_PRIMARIES = {1: 1, 4: 4, 7: 7, 9: 9}
_KNOWN_PRIMARIES = frozenset({1, 2, *range(4, 13)})
_KNOWN_TRANSFERS = frozenset({1, 2, *range(4, 19)})
_UNSPECIFIED = 2
_FULL_RANGE, _LIMITED_RANGE = 2, 1
_PLANAR_8BIT = {"yuv420p", "yuvj420p"}


@dataclass(frozen=True)
class PictureSpec:
    """The pictures of one stretch of a source as its clips hold them."""

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
    pixel_aspect: tuple[int, int] = (1, 1)
    """Width and height of a pixel of the clip, upright; not square only where the source's shape is kept."""
    reshaped: bool = False
    """Whether pixels were made square."""


def picture_spec(
    frame: av.VideoFrame,
    orientation: Orientation,
    codec: str,
    short_side: int,
    *,
    pixel_aspect: Fraction = Fraction(1),
    square_pixels: bool = True,
) -> PictureSpec:
    """Decide size and colour of the clips of frames that look like this one.

    Args:
        frame: a decoded frame, not turned.
        codec: value of `clip.codec`.
        short_side: shorter side in pixels to shrink to (never enlarged); 0 keeps the size.
        pixel_aspect: width of a stored pixel over its height.
        square_pixels: resample to square pixels; the side along which there are fewer of them grows.
    """
    width, height, aspect = frame.width, frame.height, pixel_aspect
    reshaped = square_pixels and aspect != 1
    if reshaped:
        width, height = _squared(width, height, aspect)
        aspect = Fraction(1)
    if orientation.swaps_sides:
        width, height, aspect = height, width, 1 / aspect
    width, height = _shrink(width, height, short_side)
    planar = codec != "h264_lossless"
    pad_right, pad_bottom = (width % 2, height % 2) if planar else (0, 0)
    matrix, color_range = _colour(frame)
    if codec == "h264_lossless":
        pix_fmt, matrix, color_range = "rgb24", 0, _FULL_RANGE
    elif codec == "mjpeg":
        pix_fmt, matrix, color_range = "yuvj420p", 6, _FULL_RANGE
    elif codec == "mpeg4":  # its pictures carry no tags
        pix_fmt, matrix, color_range = "yuv420p", 6, _LIMITED_RANGE
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
        primaries=_known(int(frame.color_primaries), _KNOWN_PRIMARIES),
        transfer=_known(int(frame.color_trc), _KNOWN_TRANSFERS),
        orientation=orientation,
        pixel_aspect=(aspect.numerator, aspect.denominator),
        reshaped=reshaped,
    )


def _squared(width: int, height: int, pixel_aspect: Fraction) -> tuple[int, int]:
    """Even size with square pixels and the same shape; no side gets smaller."""
    if pixel_aspect > 1:
        return 2 * round(width * pixel_aspect / 2), height
    return width, 2 * round(height / pixel_aspect / 2)


def _shrink(width: int, height: int, short_side: int) -> tuple[int, int]:
    short = min(width, height)
    if not short_side or short <= short_side:
        return width, height
    even = [max(2, 2 * round(side * short_side / short / 2)) for side in (width, height)]
    return even[0], even[1]


def _known(tag: int, known: frozenset[int]) -> int:
    return tag if tag in known else _UNSPECIFIED


def _is_yuv(pix_fmt: str) -> bool:
    return pix_fmt.startswith(("yuv", "nv12", "nv16", "nv21", "p010", "p016", "yuyv", "uyvy"))


def _colour(frame: av.VideoFrame) -> tuple[int, int]:
    """(matrix, range) a YUV clip of this frame gets; sources in RGB or grey become BT.709, limited range."""
    tags = int(frame.colorspace), int(frame.color_range), int(frame.color_primaries)
    return _colour_of(frame.format.name, *tags)


def _colour_of(pix_fmt: str, matrix: int, color_range: int, primaries: int) -> tuple[int, int]:
    if not _is_yuv(pix_fmt):
        return 1, _LIMITED_RANGE
    full = color_range == _FULL_RANGE or pix_fmt.startswith("yuvj")
    return _read_as(matrix, primaries), _FULL_RANGE if full else _LIMITED_RANGE


def _read_as(matrix: int, primaries: int) -> int:
    """The matrix tag that a tag is read as.

    Of those that nothing implements, BT.2020 with constant luminance is read as BT.2020 without, the two that follow
    from the primaries as theirs, all others (YCgCo, ICtCp, reserved numbers) as BT.601, which is FFmpeg's rule.
    """
    if matrix in _BY_PRIMARIES:
        return _TAG_OF_SWSCALE[_MATRIX_OF_PRIMARIES.get(primaries, 5)]
    return _TAG_OF_SWSCALE[_SWSCALE_MATRIX.get(matrix, 5)]


def matrix_fallback(pix_fmt: str, matrix: int, primaries: int) -> dict[str, int] | None:
    """The matrix tag and the one it is read as, where nothing implements the tag's own."""
    if matrix in _READ_EXACTLY or not _is_yuv(pix_fmt):
        return None
    return {"tag": matrix, "read_as": _read_as(matrix, primaries)}


def source_colours(frame: av.VideoFrame) -> dict[str, Any]:
    """How swscale is to read a frame; the same for pictures and small frames."""
    tags = int(frame.colorspace), int(frame.color_range), int(frame.color_primaries)
    return dict(zip(("src_colorspace", "src_color_range"), _source_colours(frame.format.name, *tags), strict=True))


@lru_cache
def _source_colours(
    pix_fmt: str, matrix: int, color_range: int, primaries: int
) -> tuple[Colorspace | None, int | None]:
    if _is_yuv(pix_fmt):
        matrix, color_range = _colour_of(pix_fmt, matrix, color_range, primaries)
        return Colorspace(_SWSCALE_MATRIX[matrix]), color_range
    return (None if matrix in _READ_EXACTLY else Colorspace(5)), None


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
        if spec.pix_fmt == "rgb24" or not _is_yuv(frame.format.name) or (odd and not spec.orientation.is_identity):
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
        rgb = pix_fmt == "rgb24"
        spec = self.spec
        recoloured = _is_yuv(frame.format.name) and not rgb and _colour(frame) != (spec.matrix, spec.color_range)
        # swscale's default filter elsewhere, so that RGB equals a plain conversion of the source
        filters = Interpolation.BILINEAR
        if recoloured or (frame.width, frame.height) != size:
            filters = Interpolation.BICUBIC | Interpolation.ACCURATE_RND
        if recoloured:  # 47.8 dB of the source in RGB, 45.6 with half of the chroma on the way, 40.8 with the default
            filters |= Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT
        return scaler.reformat(
            frame,
            width=size[0],
            height=size[1],
            format=pix_fmt,
            interpolation=filters,
            dst_colorspace=None if rgb else Colorspace(_SWSCALE_MATRIX[spec.matrix]),
            dst_color_range=None if rgb else spec.color_range,
            threads=1,
            **source_colours(frame),
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
    """Small upright BGR pictures of decoded frames, for cut detection, hashes and motion. All have one size.

    Args:
        spec: of the pictures: small ones have their shape (square pixels where those are made square).
        short_side: of the small pictures, at most.
    """

    def __init__(self, orientation: Orientation, short_side: int, spec: PictureSpec | None = None):
        self.orientation, self.short_side, self._spec = orientation, short_side, spec
        self._scale = VideoReformatter()
        self._size: tuple[int, int] | None = None

    def make(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 [h, w, 3] BGR with the shorter side at most `short_side`, area-averaged."""
        if self._size is None:
            self._size = self._stored_size(frame)
        small = self._scale.reformat(
            frame,
            width=self._size[0],
            height=self._size[1],
            format="bgr24",
            interpolation=Interpolation.AREA,
            threads=1,
            **source_colours(frame),
        )
        return np.ascontiguousarray(self.orientation.apply(small.to_ndarray()))

    def _stored_size(self, frame: av.VideoFrame) -> tuple[int, int]:
        width, height = float(frame.width), float(frame.height)
        if self._spec is not None and self._spec.reshaped:
            upright = self._spec.width - self._spec.pad_right, self._spec.height - self._spec.pad_bottom
            width, height = upright[::-1] if self.orientation.swaps_sides else upright
        scale = min(1.0, self.short_side / min(width, height))
        return max(8, round(width * scale)), max(8, round(height * scale))
