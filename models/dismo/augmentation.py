"""What DisMo does to clips before it sees them: one affine warp and one change of colours per clip.

Parameters are drawn per clip, from a generator of its own; warps and colour changes are applied to whole batches, on
any device. The published code's order of draws is kept, so that its generator states give its pictures.

Source: Ressler-Antal et al., arXiv:2511.23428, appendix, and its published code. Deviation: a clip's generator is
seeded by what the clip is, not by the clock.

Shape legend: B clips, T frames, H W pixels, h w pixels of the result.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

Range = tuple[float, float]
CROP_TRIES = 10
LUMA = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class WarpRule:
    """How a clip is cropped, stretched and turned. Ranges are (least, greatest)."""

    size: tuple[int, int]
    """Width and height of the result in pixels."""
    random_crop: bool = False
    """Crop a random part by area (`scale`) and shape (`aspect_ratio`); otherwise zoom and shift about the centre."""
    scale: Range = (1.0, 1.0)
    """Share of the area that a random crop keeps; otherwise the magnification."""
    aspect_ratio: Range = (1.0, 1.0)
    """Width over height of a random crop, drawn evenly in the logarithm."""
    translate: Range = (0.0, 0.0)
    """Largest shift over width and height, for zooms."""
    angle: Range = (0.0, 0.0)
    """Rotation in degrees, clockwise in the picture."""
    shear: Range = (0.0, 0.0)
    """Shear along x in degrees."""
    aspect_limits: Range | None = None
    """Width over height that a clip is trimmed to, about its centre, before anything else."""


MOTION_WARP = WarpRule((256, 256), random_crop=True, scale=(0.25, 1.0), aspect_ratio=(0.666, 1.5), angle=(-30.0, 30.0))
CONTENT_WARP = WarpRule((256, 256), random_crop=True, scale=(0.7, 1.0))


def draw_warp(rule: WarpRule, height: int, width: int, generator: torch.Generator) -> Float[Tensor, "2 3"]:
    """The affine map from the result's pixels to a clip's, both counted from the centre of the picture."""
    if rule.aspect_limits is not None:
        width = min(width, round(height * rule.aspect_limits[1]))
        height = min(height, round(width / rule.aspect_limits[0]))
    if rule.random_crop:
        top, left, rows, cols = _draw_crop(rule, height, width, generator)
        centre = (left + cols / 2 - width / 2, top + rows / 2 - height / 2)
        shift = (-centre[0], -centre[1])
        magnification = 1.0
    else:
        rows, cols, centre = height, width, (0.0, 0.0)
        magnification = _uniform(rule.scale, generator)
        along_x, along_y = (_uniform(rule.translate, generator) for _ in range(2))
        shift = (along_x * width, along_y * height)
    angle = _uniform(rule.angle, generator)
    shear = _uniform(rule.shear, generator)
    stretch = (magnification * rule.size[0] / cols, magnification * rule.size[1] / rows)
    return inverse_affine(centre, angle, shift, stretch, (shear, 0.0))


def inverse_affine(
    centre: tuple[float, float],
    angle_deg: float,
    translate: tuple[float, float],
    scale_xy: tuple[float, float],
    shear_deg: tuple[float, float],
) -> Float[Tensor, "2 3"]:
    """Inverse of: scale and shear about the centre, rotate, translate. Points (x, y), angles clockwise with y down."""
    # In plain numbers: a clip needs several maps, and as tensors of 2 x 2 each would cost more than its warp.
    rotation = math.radians(angle_deg)
    shear_x, shear_y = map(math.radians, shear_deg)
    leaning = rotation - shear_y
    a, c = math.cos(leaning) / math.cos(shear_y), math.sin(leaning) / math.cos(shear_y)
    b, d = -a * math.tan(shear_x) - math.sin(rotation), -c * math.tan(shear_x) + math.cos(rotation)
    across, down = scale_xy
    size = (a * d - b * c) * across * down
    rows = ((d * down / size, -b * down / size), (-c * across / size, a * across / size))
    moved = (centre[0] + translate[0], centre[1] + translate[1])
    return torch.tensor(
        [
            [along_x, along_y, at - along_x * moved[0] - along_y * moved[1]]
            for (along_x, along_y), at in zip(rows, centre, strict=True)
        ]
    )


def warp_clips(
    clips: Float[Tensor, "B T 3 H W"],
    maps: Float[Tensor, "B 2 3"],
    size: tuple[int, int],
    outside: Literal["border", "zeros"] = "border",
) -> Float[Tensor, "B T 3 h w"]:
    """Clips seen through maps of `draw_warp`, bilinearly; every frame of a clip alike.

    Args: size is width and height of the result; outside says what lies beyond the edge of a frame.
    """
    height, width = clips.shape[-2:]
    columns, rows = (torch.arange(n, device=clips.device, dtype=torch.float32) + 0.5 - n / 2 for n in size)
    points = torch.stack(
        [columns.expand(size[1], -1), rows[:, None].expand(-1, size[0]), torch.ones_like(columns).expand(size[1], -1)],
        dim=-1,
    )
    half = torch.tensor([width / 2, height / 2], device=clips.device)
    grid = torch.einsum("hwk,bck->bhwc", points, maps.to(clips.device)) / half
    frames = rearrange(clips, "b t c h w -> b (t c) h w")
    warped = F.grid_sample(frames, grid, mode="bilinear", padding_mode=outside, align_corners=False)
    return rearrange(warped, "b (t c) h w -> b t c h w", c=clips.shape[2])


@dataclass(frozen=True)
class ColourRule:
    """Ranges of the factors of a colour change; None leaves an operation out."""

    brightness: Range | None = None
    """Factor of all values."""
    contrast: Range | None = None
    """Factor of the distance from a frame's mean grey."""
    saturation: Range | None = None
    """Factor of the distance from each pixel's grey."""
    hue: Range | None = None
    """Turn of the hue, as a share of the full circle."""

    def ranges(self) -> dict[str, Range]:
        """The operations there are, in the order their factors are drawn."""
        every = {name: getattr(self, name) for name in ("brightness", "contrast", "saturation", "hue")}
        return {name: limits for name, limits in every.items() if limits is not None}


MOTION_COLOURS = ColourRule(brightness=(0.5, 1.5), contrast=(0.5, 1.5), saturation=(0.5, 1.5))
CONTENT_COLOURS = ColourRule(brightness=(0.8, 1.2), saturation=(0.8, 1.2))

ColourChange = tuple[tuple[str, float], ...]
"""Operations with their factors, in the order they are applied."""


def draw_colours(rule: ColourRule, generator: torch.Generator) -> ColourChange:
    """Factors of a clip, and the order of the operations."""
    drawn = [(name, _uniform(limits, generator)) for name, limits in rule.ranges().items()]
    order = torch.randperm(len(drawn), generator=generator).tolist()
    return tuple(drawn[index] for index in order)


def change_colours(clips: Float[Tensor, "B T 3 H W"], changes: Sequence[ColourChange]) -> Float[Tensor, "B T 3 H W"]:
    """Clips in 0..1 with their colours changed, each by its own change; the result stays in 0..1."""
    if len(changes) != len(clips):
        raise ValueError(f"{len(changes)} colour changes for {len(clips)} clips; give one for each")
    clips = clips.clone()
    for step in range(max(map(len, changes), default=0)):
        for name, operation in _OPERATIONS.items():
            members = [i for i, change in enumerate(changes) if step < len(change) and change[step][0] == name]
            if members:
                factors = torch.tensor([changes[i][step][1] for i in members], device=clips.device)
                index = torch.tensor(members, device=clips.device)
                clips[index] = operation(clips[index], rearrange(factors, "b -> b 1 1 1 1")).clamp_(0, 1)
    return clips


def _draw_crop(rule: WarpRule, height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a part of the picture; the largest central one if no try fits."""
    areas = [_between(rule.scale, share) * height * width for share in _shares(CROP_TRIES, generator)]
    least, greatest = (math.log(ratio) for ratio in rule.aspect_ratio)
    ratios = [math.exp(_between((least, greatest), share)) for share in _shares(CROP_TRIES, generator)]
    for area, ratio in zip(areas, ratios, strict=True):
        rows, cols = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < cols <= width:
            top = int(torch.randint(0, height - rows + 1, (1,), generator=generator))
            return top, int(torch.randint(0, width - cols + 1, (1,), generator=generator)), rows, cols
    rows = min(height, round(width / rule.aspect_ratio[0]))
    cols = min(width, round(height * rule.aspect_ratio[1]))
    return (height - rows) // 2, (width - cols) // 2, rows, cols


def _uniform(limits: Range, generator: torch.Generator) -> float:
    return _between(limits, _shares(1, generator)[0])


def _shares(count: int, generator: torch.Generator) -> list[float]:
    return torch.rand(count, generator=generator).tolist()


def _between(limits: Range, share: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * share


def _grey(clips: Float[Tensor, "B T 3 H W"]) -> Float[Tensor, "B T 1 H W"]:
    weights = rearrange(torch.tensor(LUMA, device=clips.device, dtype=clips.dtype), "c -> c 1 1")
    return (clips * weights).sum(dim=2, keepdim=True)


def _brightness(clips: Tensor, factor: Tensor) -> Tensor:
    return clips * factor


def _contrast(clips: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grey(clips).mean(dim=(2, 3, 4), keepdim=True), clips, factor)


def _saturation(clips: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grey(clips), clips, factor)


def _hue(clips: Tensor, turn: Tensor) -> Tensor:
    """Colours with their hue turned, value and saturation kept (HSV)."""
    red, green, blue = clips.unbind(dim=2)
    value, chroma = clips.amax(dim=2), clips.amax(dim=2) - clips.amin(dim=2)
    divisor = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sixths = (sixths + 6 * turn.squeeze(2)) % 6
    # A channel holds the value around its own hue and falls by the chroma beyond a sixth of the circle.
    channels = [value - chroma * (((sixths - own + 3) % 6 - 3).abs() - 1).clamp(0, 1) for own in (0.0, 2.0, 4.0)]
    return torch.stack(channels, dim=2)


_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
}
