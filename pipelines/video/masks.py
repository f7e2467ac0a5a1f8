"""Object masks of frame folders: palette and grey PNGs as they are, RGB ones by their colours."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, UnidentifiedImageError

from kinema.pipelines.video.errors import Corrupt, Missing

_VOID = 255
_VOC_VOID = (224, 224, 192)
_SHOWN_COLOURS = 8  # colours that a message lists
Palette = Mapping[int, int]
"""Label of each colour (0xRRGGBB) or 16-bit number."""


@cache
def voc_palette() -> dict[int, int]:
    """The colours of PASCAL VOC, which DAVIS and YouTube-VOS use too: bits of the label, spread over the channels."""
    colours = {}
    for label in range(256):
        channels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                channels[channel] |= (label >> (3 * bit + channel) & 1) << (7 - bit) if 3 * bit + channel < 8 else 0
        colours[_code(*channels)] = label
    return {**colours, _code(*_VOC_VOID): _VOID}


def _code(red: int, green: int, blue: int) -> int:
    return red << 16 | green << 8 | blue


def parse_palette(entries: Sequence[str]) -> dict[int, int]:
    """Labels by colour from `RRGGBB=LABEL` (hexadecimal) or `NUMBER=LABEL` with a leading `id` (`id300=2`).

    Raises: ValueError naming the entry.
    """
    palette = {}
    for entry in entries:
        colour, _, label = str(entry).partition("=")
        colour = colour.strip().lower().removeprefix("#")
        try:
            number = int(colour.removeprefix("id"), 10 if colour.startswith("id") else 16)
            palette[number] = int(label)
        except ValueError:
            raise ValueError(f"masks.palette={entry} is no `RRGGBB=LABEL` or `idNUMBER=LABEL`") from None
        if not 0 <= palette[number] <= 255:
            raise ValueError(f"masks.palette={entry} is out of range: labels are 0 to 255")
    return palette


def check_masks(masks: Sequence[str | None], read: Callable[[str], bytes], palette: Palette) -> None:
    """Raises: Corrupt, Missing for the first mask that cannot be read as labels."""
    for path in masks:
        if path is not None:
            _read_mask(path, read, palette)


def read_masks(
    masks: Sequence[str | None],
    size: tuple[int, int],
    padding: tuple[int, int],
    read: Callable[[str], bytes],
    palette: Palette,
) -> tuple[UInt8[np.ndarray, "T H W"], Bool[np.ndarray, "T"]]:
    """Object masks of a clip's frames at the clip's size.

    Args:
        masks: path of each frame's PNG, or None where the frame is not annotated.
        size: width and height of the clip, padding included; masks are resized by nearest neighbour where they differ.
        padding: columns at the right and rows at the bottom.
        read: reads all bytes of one path.
        palette: labels of colours that are not those of a known palette; empty for none.

    Returns: labels (0 where not annotated), and which frames are annotated.
    Raises: Corrupt, Missing.
    """
    (width, height), (pad_right, pad_bottom) = size, padding
    labels = np.zeros((len(masks), height, width), np.uint8)
    annotated = np.array([path is not None for path in masks])
    inner = (width - pad_right, height - pad_bottom)
    for index, path in enumerate(masks):
        if path is None:
            continue
        mask = _read_mask(path, read, palette)
        if mask.shape != inner[::-1]:
            mask = cv2.resize(mask, inner, interpolation=cv2.INTER_NEAREST)
        labels[index] = np.pad(mask, ((0, pad_bottom), (0, pad_right)), mode="edge")
    return labels, annotated


def _read_mask(path: str, read: Callable[[str], bytes], palette: Palette) -> UInt8[np.ndarray, "H W"]:
    """A PNG as label numbers; the palette of a palette PNG is dropped."""
    name = path.rpartition("/")[2]
    try:
        with Image.open(io.BytesIO(read(path))) as image:
            if image.mode in ("P", "L", "1", "LA") and not palette:
                plain = image if image.mode in ("P", "L") else image.convert("L")
                return np.asarray(plain, np.uint8)
            if image.mode in ("P", "L"):
                return (
                    np.asarray(image, np.uint8) if image.mode == "P" else _by_number(np.asarray(image), palette, name)
                )
            if image.mode.startswith("I"):
                return _by_number(np.asarray(image).astype(np.int64), palette, name)
            rgb = np.asarray(image.convert("RGB")).astype(np.int64)
    except (UnidentifiedImageError, SyntaxError) as error:
        raise Corrupt(f"mask {name} does not decode: {error}") from None
    except OSError as error:
        raise Missing(f"mask {name} cannot be read: {error}") from None
    return _by_colour(rgb, palette, name)


def _by_colour(rgb: np.ndarray, palette: Palette, name: str) -> UInt8[np.ndarray, "H W"]:
    """Labels of an RGB mask: by the given palette, VOC's, or, where all is grey, the grey values."""
    codes = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
    found = np.unique(codes)
    for known in (palette,) if palette else (voc_palette(),):
        if all(int(code) in known for code in found):
            return _mapped(codes, found, known)
    if not palette and bool(((rgb[..., 0] == rgb[..., 1]) & (rgb[..., 1] == rgb[..., 2])).all()):
        return rgb[..., 0].astype(np.uint8)
    unknown = [f"{int(code):06x}" for code in found if int(code) not in (palette or voc_palette())]
    raise Corrupt(_unknown(name, "colours", unknown))


def _by_number(numbers: np.ndarray, palette: Palette, name: str) -> UInt8[np.ndarray, "H W"]:
    """Labels of a grey mask of any depth: by the given palette, else the numbers themselves where they fit."""
    found = np.unique(numbers)
    if palette and all(int(number) in palette for number in found):
        return _mapped(numbers, found, palette)
    if found.min() >= 0 and found.max() <= 255:
        return numbers.astype(np.uint8)
    unknown = [f"id{int(number)}" for number in found if int(number) not in palette]
    raise Corrupt(_unknown(name, "numbers", unknown))


def _mapped(codes: np.ndarray, found: np.ndarray, palette: Palette) -> UInt8[np.ndarray, "H W"]:
    labels = np.array([palette[int(code)] for code in found], np.uint8)
    return labels[np.searchsorted(found, codes)]


def _unknown(name: str, what: str, unknown: list[str]) -> str:
    shown, more = ", ".join(unknown[:_SHOWN_COLOURS]), len(unknown) - _SHOWN_COLOURS
    others = f" and {more} more" if more > 0 else ""
    example = ",".join(f"{colour}={label}" for label, colour in enumerate(unknown[:2], start=1))
    return f"mask {name} has {what} of no known palette: {shown}{others}; name them: masks.palette=[{example},...]"


def masks_npz(labels: UInt8[np.ndarray, "T H W"], annotated: Bool[np.ndarray, "T"]) -> bytes:
    """Payload of `KEY.masks.npz`: arrays `masks` and `annotated`; the same bytes every time."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, masks=labels, annotated=annotated)
    return buffer.getvalue()
