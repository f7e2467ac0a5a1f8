"""Rendered pairs with exact flow: processor time of a pair, and how many a core makes in a second.

Every pair is rendered three times and the least time counts: programs beside this one share the caches, and can only
make a pair look dearer. Effects come with the probabilities that training uses unless it is told otherwise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import cv2
import numpy as np

from kinema.configs.rendered import EffectsConfig
from kinema.pipelines.scenes.rendered import RenderedShot, RenderSettings

_WANTED = 50.0
_PLAIN_WARPS = 12.0  # that fit into the 20 ms of a pair, at 1.6 ms a warp
_TEXTURES = 8
_TRIES = 3


def run(pairs: int = 40) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, unit}; value: pairs/s of processor time; baseline: the 50 asked for.

    The last row is the cost of a pair in bilinear warps of a frame of three channels, which machines share.
    """
    cv2.setNumThreads(1)
    everything = RenderSettings(num_textures=_TEXTURES)
    plain = replace(everything, effects=EffectsConfig.none())
    always = replace(everything, effects=EffectsConfig(*[1.0] * len(EffectsConfig.__dataclass_fields__)))
    rows = []
    for name, settings, both_ways in (
        ("frames and flow", everything, False),
        ("frames and flow both ways", everything, True),
        ("frames and flow, no effects", plain, False),
        ("frames and flow, every effect in every pair", always, False),
    ):
        render = partial(_pair, settings, both_ways)
        _seconds(render, range(4 * _TEXTURES))  # textures and grain are made once
        seconds = _seconds(render, range(100, 100 + pairs), _TRIES)
        rows.append(_row(f"rendered {name}, 384x512 ({1000 * seconds:.1f} ms a pair)", 1 / seconds, _WANTED, "pairs/s"))
    image = np.random.default_rng(0).integers(0, 256, (720, 1080, 3), dtype=np.uint8)
    matrix = np.array([[1.2, 0.3, 3.0], [-0.3, 1.2, 200.0]])
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warp_s = _seconds(lambda _: cv2.warpAffine(image, matrix, (512, 384), flags=how), range(pairs), _TRIES)
    cost = 1 / rows[0]["value"] / warp_s
    rows.append(_row("a pair with flow, in bilinear warps of a frame", cost, _PLAIN_WARPS, "warps"))
    return rows


def _pair(settings: RenderSettings, both_ways: bool, index: int) -> None:
    shot = RenderedShot(settings, 0, index)
    shot.frame(0)
    shot.frame(1)
    shot.motion(0, 1)
    if both_ways:
        shot.motion(1, 0)


def _seconds(work: Callable[[int], Any], items: range, tries: int = 1) -> float:
    """Processor time of this thread for an item, the least of `tries`, on average over the items."""
    least = [math.inf] * len(items)
    for _ in range(tries):
        for place, item in enumerate(items):
            started = time.thread_time()
            work(item)
            least[place] = min(least[place], time.thread_time() - started)
    return sum(least) / len(least)


def _row(name: str, value: float, baseline: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": value, "baseline": baseline, "ratio": value / baseline, "unit": unit}
