"""One image pair with known flow: the files it lies in, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

from kinema.pipelines.sidecars.flow_files import read_flow, valid_pixels


class BadPair(ValueError):
    """A pair that cannot be used; the message says why, the class names what is wrong."""


class BadImage(BadPair):
    """An image is missing, cut short or no picture."""


class BadFlow(BadPair):
    """The flow file is missing, damaged, of another format, or holds no number anywhere."""


class BadMask(BadPair):
    """An occlusion or validity mask is missing or no picture."""


class SizesDiffer(BadPair):
    """Images, flow and masks of the pair do not belong to one size."""


@dataclass(frozen=True)
class FlowSample:
    """A pair as every data set gives it. Sizes are those of the images; flow in pixels, (x, y)."""

    id: str
    scene: str
    group: str
    image1: UInt8[np.ndarray, "H W 3"]
    image2: UInt8[np.ndarray, "H W 3"]
    flow_px: Float32[np.ndarray, "2 H W"] | None
    """From image1 to image2, nan where unknown; None for a test split, whose truth is withheld."""
    valid: Bool[np.ndarray, "H W"] | None
    """Where flow is known."""
    occlusion: Bool[np.ndarray, "H W"] | None
    """Where image1's pixel is hidden, or out of the frame, in image2; None when the data set does not say."""
    masks: Mapping[str, Bool[np.ndarray, "H W"]] = field(default_factory=dict)
    """What else the data set marks; see its layout."""
    candidates_px: Float32[np.ndarray, "K 2 H W"] | None = None
    """Several true flows of a pixel (Spring: four), of which the benchmark takes the one nearest to a prediction."""


@dataclass(frozen=True)
class Truth:
    """What a layout's reader makes of the flow files of a pair."""

    flow_px: Float32[np.ndarray, "2 H W"]
    occlusion: Bool[np.ndarray, "H W"] | None = None
    masks: Mapping[str, Bool[np.ndarray, "H W"]] = field(default_factory=dict)
    candidates_px: Float32[np.ndarray, "K 2 H W"] | None = None


@dataclass(frozen=True)
class FlowFiles:
    """Where one pair lies, before any of it is read."""

    id: str
    """Unique in the data set, for example `clean/alley_1/frame_0001`."""
    scene: str
    """The sequence of frames that the pair belongs to, unique in the data set, for example `clean/alley_1`."""
    frame: int
    """Number of image1 in that sequence."""
    gap: int
    """Frames from image1 to image2; negative for backward flow."""
    image1: Path
    image2: Path
    flow: Path | None = None
    """None where the truth is withheld."""
    masks: Mapping[str, Path] = field(default_factory=dict)
    """Files that the reader needs besides."""
    group: str = ""
    """What figures are averaged over: a pass (`clean`), a benchmark."""
    read_truth: Callable[[FlowFiles], Truth] | None = field(default=None, repr=False, compare=False)
    """How flow and masks are read; by default the flow file alone."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that must exist."""
        return (self.image1, self.image2, *(() if self.flow is None else (self.flow,)), *self.masks.values())

    def read(self) -> FlowSample:
        """Images, flow and masks. Raises: BadPair."""
        image1, image2 = read_image(self.image1), read_image(self.image2)
        if image1.shape != image2.shape:
            raise SizesDiffer(f"{self.id}: images are {_size(image1)} and {_size(image2)}; both must have one size")
        if self.flow is None:
            return FlowSample(self.id, self.scene, self.group, image1, image2, None, None, None)
        truth = self.truth()
        size = image1.shape[:2]
        parts = {"flow": truth.flow_px.shape[1:], **{name: mask.shape for name, mask in truth.masks.items()}}
        if truth.occlusion is not None:
            parts["occlusion"] = truth.occlusion.shape
        for name, found in parts.items():
            if tuple(found) != size:
                raise SizesDiffer(f"{self.id}: {name} is {found[0]}x{found[1]}, the images are {size[0]}x{size[1]}")
        valid = valid_pixels(truth.flow_px)
        return FlowSample(
            *(self.id, self.scene, self.group, image1, image2, truth.flow_px, valid, truth.occlusion),
            masks=truth.masks,
            candidates_px=truth.candidates_px,
        )

    def truth(self) -> Truth:
        """Flow and masks alone. Raises: BadPair."""
        assert self.flow is not None
        try:
            truth = self.read_truth(self) if self.read_truth else Truth(read_flow_file(self.flow))
        except BadPair:
            raise
        except (OSError, ValueError) as error:
            raise BadFlow(f"{self.id}: {error}") from None
        if not valid_pixels(truth.flow_px).any():
            raise BadFlow(f"{self.flow}: no pixel has a flow that is a number; the pair teaches nothing")
        return truth


def read_flow_file(path: Path) -> Float32[np.ndarray, "2 H W"]:
    """Flow of any format. Raises: BadFlow."""
    try:
        return read_flow(path)
    except FileNotFoundError:
        raise BadFlow(f"{path}: the flow is missing; copy the data set again") from None
    except (OSError, ValueError) as error:
        raise BadFlow(str(error)) from None


def read_image(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """A picture as RGB; grey ones in three equal channels, 16 bits reduced to 8. Raises: BadImage."""
    return np.ascontiguousarray(cv2.cvtColor(_decode(path, cv2.IMREAD_COLOR, BadImage), cv2.COLOR_BGR2RGB))


def read_mask(path: Path) -> Bool[np.ndarray, "H W"]:
    """A picture's bright half. Raises: BadMask."""
    return _decode(path, cv2.IMREAD_GRAYSCALE, BadMask) > 127


def read_labels(path: Path) -> np.ndarray:
    """A picture as it is stored, channels in RGB order. Raises: BadMask."""
    found = _decode(path, cv2.IMREAD_UNCHANGED, BadMask)
    return found[..., 2::-1] if found.ndim == 3 else found


def _decode(path: Path, mode: int, error: type[BadPair]) -> np.ndarray:
    try:
        data = path.read_bytes()
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror or reason}") from None
    # OpenCV returns what it got of a file that ends early; the end marks of PNG and JPEG tell.
    if data[:8] == b"\x89PNG\r\n\x1a\n" and b"IEND" not in data[-16:]:
        raise error(f"{path}: the picture is cut short ({len(data)} bytes without its end); copy it again")
    if data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data[-1024:]:
        raise error(f"{path}: the picture is cut short ({len(data)} bytes without its end); copy it again")
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), mode) if data else None
    if picture is None:
        raise error(f"{path}: not a picture that can be decoded ({len(data)} bytes); copy it again")
    return picture


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"
