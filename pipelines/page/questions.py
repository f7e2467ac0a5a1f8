"""What the page asks: JSON bodies checked into plain records, pictures decoded from uploads."""

from __future__ import annotations

import io
import json
import math
import re
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_POKES = 128
"""As many as the model is trained with."""
MAX_FLOW = 2.0
"""Longest component of a poke's flow, in sides of the square."""
MAX_SAMPLES = 32
MIN_SIDE_PX = 16
REDUCE_ABOVE_PX = 2048
"""Squares with a longer side are averaged over whole blocks of pixels first; the model sees far less."""

# MPO is what many phones call a JPEG with a second picture inside; the first one is meant.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_SINGLE_PICTURE = ("JPEG", "MPO", "BMP")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_UNDECODABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
_IMAGE_ID = re.compile(r"[0-9a-f]{32}")


class TooLarge(ValueError):
    """A body or picture above the limit."""


class NotAnImage(ValueError):
    """Bytes that no accepted picture format explains."""


@dataclass(frozen=True)
class Question:
    """What every prediction is conditioned on."""

    image: str
    """Id of the image."""
    pokes: tuple[tuple[float, float, float, float], ...]
    """(x, y, dx, dy) each, positions in 0..1 of the square."""
    camera_static: bool
    """Whether the camera stands still."""


def read_json(body: bytes) -> Mapping[str, Any]:
    """The mapping in a request's body; ValueError if there is none."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the request's body is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"the request's body is a JSON {type(value).__name__}, not an object")
    return value


def read_question(body: Mapping[str, Any]) -> Question:
    """Image, pokes and camera switch of a request.

    Raises: ValueError naming what is wrong.
    """
    image = body.get("image")
    if not isinstance(image, str) or not _IMAGE_ID.fullmatch(image):
        raise ValueError("image is not the id of an image; load one first")
    pokes = body.get("pokes", [])
    if not isinstance(pokes, list) or len(pokes) > MAX_POKES:
        raise ValueError(f"pokes must be a list of at most {MAX_POKES}")
    static = body.get("static", False)
    if not isinstance(static, bool):
        raise ValueError(f"static={static!r} must be true or false")
    return Question(image, tuple(_read_poke(poke) for poke in pokes), static)


def read_point(value: Any) -> tuple[float, float]:
    """A position (x, y) in 0..1."""
    x, y = _numbers(value, 2, "point")
    _inside(x, y, "point")
    return x, y


def read_int(body: Mapping[str, Any], name: str, low: int, high: int, default: int) -> int:
    """A whole number between two limits."""
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be a whole number from {low} to {high}")
    return value


def decode_upload(data: bytes, max_megapixels: float) -> UInt8[np.ndarray, "S S 3"]:
    """The central square of a picture that somebody sent, upright, in RGB, reduced if very large.

    Raises: NotAnImage for anything but one still picture in JPEG, PNG, WebP or BMP; TooLarge above `max_megapixels`.
    """
    accepted = "use a still JPEG, PNG, WebP or BMP picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is judged below, before any pixel is decoded
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > max_megapixels * 1e6:
                    size = f"{width} x {height} pixels"
                    raise TooLarge(f"the picture has {size}, above {max_megapixels:g} million; make it smaller")
                if min(width, height) < MIN_SIDE_PX:
                    raise NotAnImage(f"the picture has {width} x {height} pixels; use sides of {MIN_SIDE_PX} or more")
                if image.format not in _SINGLE_PICTURE and getattr(image, "n_frames", 1) > 1:
                    raise NotAnImage(f"the picture is animated; {accepted}")
                square = _upright_square(image)
                return np.array(_as_rgb(square))
    except (TooLarge, NotAnImage):
        raise
    except Image.DecompressionBombError:
        raise TooLarge(f"the picture has more than {max_megapixels:g} million pixels; make it smaller") from None
    except _UNDECODABLE:
        raise NotAnImage(f"this is not a picture that can be read; {accepted}") from None


def _upright_square(image: Image.Image) -> Image.Image:
    from kinema.models.fpt.data_rules import central_square

    image = ImageOps.exif_transpose(image)
    top, left, side = central_square(image.height, image.width)
    square = image.crop((left, top, left + side, top + side))
    factor = side // REDUCE_ABOVE_PX + 1
    if factor > 1:
        square = (_as_rgb(square) if square.mode in ("P", "1", *_SIXTEEN_BITS) else square).reduce(factor)
    return square


def _as_rgb(image: Image.Image) -> Image.Image:
    """RGB; transparent parts become white, 16 bits become 8."""
    if image.mode in _SIXTEEN_BITS:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise NotAnImage(f"the picture has pixels of mode {image.mode}; use one with 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _read_poke(value: Any) -> tuple[float, float, float, float]:
    x, y, dx, dy = _numbers(value, 4, "a poke")
    _inside(x, y, "a poke's position")
    if max(abs(dx), abs(dy)) > MAX_FLOW:
        raise ValueError(f"a poke's flow ({dx:g}, {dy:g}) is longer than {MAX_FLOW:g} sides of the image")
    return x, y, dx, dy


def _numbers(value: Any, count: int, what: str) -> Sequence[float]:
    fits = isinstance(value, list) and len(value) == count
    if not fits or any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
        raise ValueError(f"{what} must be a list of {count} numbers")
    try:
        numbers = [float(v) for v in value]
    except OverflowError:
        numbers = [math.inf]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{what} has a number that is not finite")
    return numbers


def _inside(x: float, y: float, what: str) -> None:
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(f"{what} ({x:g}, {y:g}) lies outside the image; both must be in 0..1")
