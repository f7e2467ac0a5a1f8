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
    return [Skip(TOO_SHORT) if sample is None else _make(sample, frames, times, config) for sample in drawn]


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
    drawn: _Drawn, frames: dict[int, UInt8[np.ndarray, "H W 3"]], times: np.ndarray, config: DisMoConfig
) -> Sample:
    motion_rule, content_rule = _rules(config)
    sources = drawn.motion[: len(drawn.targets)]
    motion = _augment(_stack(frames, [drawn.motion]), motion_rule, drawn.generator, config)
    pairs = _stack(frames, list(zip(sources, drawn.targets, strict=True)))
    source, target = _augment(pairs, content_rule, drawn.generator, config).unbind(dim=1)
    seconds = times[drawn.targets] - times[sources]
    return {
        "motion": motion[0],
        "source": source.contiguous(),
        "target": target.contiguous(),
        "delta_time": torch.from_numpy(seconds * config.fps).float(),
    }


def _rules(config: DisMoConfig) -> tuple[tuple[WarpRule, ColourRule], tuple[WarpRule, ColourRule]]:
    """Of the motion branch, and of the content branch."""
    size, limits = (config.frame_px, config.frame_px), config.aspect_limits
    turn = (-config.motion_angle_deg, config.motion_angle_deg)
    motion = WarpRule(size, True, config.motion_scale, config.motion_aspect, angle=turn, aspect_limits=limits)
    content = WarpRule(size, True, config.content_scale, aspect_limits=limits)
    strong, weak = config.motion_colours, config.content_colours
    return (motion, ColourRule(strong, strong, strong)), (content, ColourRule(brightness=weak, saturation=weak))


def _stack(frames: dict[int, np.ndarray], groups: Sequence[Sequence[int]]) -> Float[Tensor, "B T 3 H W"]:
    """Groups of frames, in 0..1."""
    pixels = torch.from_numpy(np.stack([np.stack([frames[t] for t in group]) for group in groups]))
    return rearrange(pixels, "b t h w c -> b t c h w").float() / 255


def _augment(
    groups: Float[Tensor, "B T 3 H W"],
    rules: tuple[WarpRule, ColourRule],
    generator: torch.Generator,
    config: DisMoConfig,
) -> UInt8[Tensor, "B T S S 3"]:
    """Each group under one warp and one change of colours of its own."""
    warp, colours = rules
    height, width = groups.shape[-2:]
    maps = torch.stack([draw_warp(warp, height, width, generator) for _ in groups])
    changes = [draw_colours(colours, generator) for _ in groups]
    changed = change_colours(warp_clips(groups, maps, warp.size), changes)
    return rearrange((changed * 255).round().to(torch.uint8), "b t c h w -> b t h w c")
