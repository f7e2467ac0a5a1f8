"""What DisMo learns from: a clip for the motion branch, and pairs of source and target frames of the same clip.

Both branches are augmented here, in the loader: warps and colour changes are drawn from the sample's own generator and
applied to all frames of a sample at once.

Source: Ressler-Antal et al., arXiv:2511.23428, appendix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from kinema.configs import DisMoConfig
from kinema.models.dismo.augmentation import (
    ColourChange,
    ColourRule,
    WarpRule,
    change_colours,
    draw_colours,
    draw_warp,
    warp_clips,
)
from kinema.models.dismo.target_offset import clip_frames, draw_target, frame_times
from kinema.pipelines.loader import Clip, Skip

Sample = dict[str, Any]
PIXELS_AT_ONCE = 1 << 20
"""Pixels of samples that are warped together: for small frames it is the number of calls that takes time, and large
ones would fill memory."""
TOO_SHORT = "too short, or fewer frames a second than dismo.fps"


@dataclass(frozen=True)
class _Drawn:
    """Which frames of a clip a sample is made of."""

    motion: list[int]
    targets: list[int]
    generator: torch.Generator

    @property
    def frames(self) -> set[int]:
        return {*self.motion, *self.targets}


def read_samples(
    clip: Clip, rngs: Sequence[np.random.Generator], config: DisMoConfig, window: int, max_offset: int
) -> list[Sample | Skip]:
    """One sample for each generator; groups of pictures are read and decoded once for all of them.

    Args: window, T, frames of the motion branch; max_offset, how many of them have no embedding. There are
        P = T - max_offset pairs, whose sources are the first frames of the motion branch.
    Returns: motion uint8 [T, S, S, 3], source and target uint8 [P, S, S, 3], delta_time float32 [P] in frames of the
        motion branch.
    """
    times = frame_times(clip.meta["pts"], clip.meta["time_base"])
    drawn = [_draw(times, rng, config, window, max_offset) for rng in rngs]
    wanted = sorted(set().union(*(sample.frames for sample in drawn if sample is not None)))
    frames = dict(zip(wanted, clip.frames(wanted), strict=True))
    usable = [sample for sample in drawn if sample is not None]
    at_once = max(1, PIXELS_AT_ONCE // (2 * window * frames[wanted[0]][..., 0].size)) if usable else 1
    groups = [usable[i : i + at_once] for i in range(0, len(usable), at_once)]
    made = iter([sample for group in groups for sample in _make(group, frames, times, config)])
    return [Skip(TOO_SHORT) if sample is None else next(made) for sample in drawn]


def drawn_frames(
    times: np.ndarray, rng: np.random.Generator, config: DisMoConfig, window: int, max_offset: int
) -> set[int]:
    """The frames of a clip that a sample is made of; none if the clip is too short."""
    drawn = _draw(times, rng, config, window, max_offset)
    return set() if drawn is None else drawn.frames


def _draw(
    times: np.ndarray, rng: np.random.Generator, config: DisMoConfig, window: int, max_offset: int
) -> _Drawn | None:
    motion = clip_frames(times, config.fps, window, rng)
    if motion is None:
        return None
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
    sources = motion[: window - max_offset]
    reach_s, rate = max_offset / config.fps, config.offset_rate_per_s
    targets = [draw_target(times, int(source), reach_s, generator, rate) for source in sources]
    return _Drawn(motion.tolist(), targets, generator)


def _make(
    samples: Sequence[_Drawn], frames: dict[int, UInt8[np.ndarray, "H W 3"]], times: np.ndarray, config: DisMoConfig
) -> list[Sample]:
    """Warps and colours of all samples at once."""
    num_pairs = len(samples[0].targets)
    pairs = [list(zip(sample.motion, sample.targets, strict=False)) for sample in samples]
    height, width = next(iter(frames.values())).shape[:2]
    drawn: list[list[_Change]] = [[], []]
    for sample in samples:  # a sample's own generator draws for its motion branch first
        for changes, rule, count in zip(drawn, _rules(config), (1, num_pairs), strict=True):
            changes += _draw_changes(rule, height, width, count, sample.generator)
    size = (config.frame_px, config.frame_px)
    motion = _augment(_stack(frames, [sample.motion for sample in samples]), drawn[0], size)
    content = _augment(_stack(frames, [pair for group in pairs for pair in group]), drawn[1], size)
    source, target = rearrange(content, "(b p) two h w c -> two b p h w c", p=num_pairs)
    return [
        {
            "motion": motion[i],
            "source": source[i].contiguous(),
            "target": target[i].contiguous(),
            "delta_time": torch.tensor([(times[b] - times[a]) * config.fps for a, b in pairs[i]], dtype=torch.float32),
        }
        for i in range(len(samples))
    ]


def _rules(config: DisMoConfig) -> tuple[tuple[WarpRule, ColourRule], tuple[WarpRule, ColourRule]]:
    """Of the motion branch, and of the content branch."""
    size, limits = (config.frame_px, config.frame_px), config.aspect_limits
    turn = (-config.motion_angle_deg, config.motion_angle_deg)
    motion = WarpRule(size, True, config.motion_scale, config.motion_aspect, angle=turn, aspect_limits=limits)
    content = WarpRule(size, True, config.content_scale, aspect_limits=limits)
    strong, weak = config.motion_colours, config.content_colours
    hue = (-config.motion_hue, config.motion_hue) if config.motion_hue else None
    return (motion, ColourRule(strong, strong, strong, hue)), (content, ColourRule(brightness=weak, saturation=weak))


def _stack(frames: dict[int, np.ndarray], groups: Sequence[Sequence[int]]) -> Float[Tensor, "B T 3 H W"]:
    """Groups of frames, in 0..1."""
    pixels = torch.from_numpy(np.stack([np.stack([frames[t] for t in group]) for group in groups]))
    return rearrange(pixels, "b t h w c -> b t c h w").float() / 255


_Change = tuple[Float[Tensor, "2 3"], ColourChange]
"""What one group of frames undergoes: a warp and a change of colours."""


def _draw_changes(
    rules: tuple[WarpRule, ColourRule], height: int, width: int, count: int, generator: torch.Generator
) -> list[_Change]:
    warps = [draw_warp(rules[0], height, width, generator) for _ in range(count)]
    return list(zip(warps, [draw_colours(rules[1], generator) for _ in warps], strict=True))


def _augment(
    groups: Float[Tensor, "B T 3 H W"], changes: Sequence[_Change], size: tuple[int, int]
) -> UInt8[Tensor, "B T S S 3"]:
    """Each group under one warp and one change of colours of its own."""
    maps = torch.stack([warp for warp, _ in changes])
    changed = change_colours(warp_clips(groups, maps, size), [colours for _, colours in changes])
    return rearrange((changed * 255).round().to(torch.uint8), "b t c h w -> b t h w c")
