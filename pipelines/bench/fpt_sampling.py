"""Predictions of the Flow Poke Transformer against the published way to compute them (`plain_fpt.py`).

A joint sample: both keep keys and values of the tokens seen; the published way projects the image again in every step
and draws one sample at a time, so that n samples are n times the time of one. Many queries at once: the published way
projects the image in every call. Ours projects an image in the first call about it: rows of an image seen before, and
of a new one in every call. Both sides compute in float32; beside them ours with weights in fp16 (x86 CPUs), and in
bf16 where the CPU has instructions for it, against the same in float32, with how far their numbers are off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kinema.models.backbones.inference_linear import can_keep_fp16
from kinema.models.fpt.mixture import GaussianMixture
from kinema.models.fpt.model import PRESETS, FlowPokeTransformer
from kinema.pipelines.bench.paired import Paired, paired
from kinema.pipelines.bench.plain_fpt import plain_joint_sample, plain_parallel
from kinema.pipelines.precision import cpu_multiplies_bf16

MODEL: Mapping[str, Any] = PRESETS["fpt_base"]
NUM_POKES = 2
NUM_IN_ORDER, NUM_AT_ONCE = 16, 256
BATCHES = (1, 8, 64)
"""Samples of one image."""
NUM_COMPARED = 2
"""Samples of a batch whose numbers are compared: the plain way takes its time for each."""

ImageData = Mapping[str, Tensor]


@torch.inference_mode()
def run(model: Mapping[str, Any] = MODEL, batches: tuple[int, ...] = BATCHES, rounds: int = 3) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, processor_ratio, unit}: seconds; ratio = baseline / ours."""
    torch.manual_seed(0)
    network = FlowPokeTransformer(**model)
    for parameter in network.parameters():
        # gates that are zero at first would hide what is wrong; with much more every sample amplifies its rounding
        parameter.add_(0.005 * torch.randn_like(parameter))
    image = network.embed_image(2 * torch.rand(1, 3, model["image_size"], model["image_size"]) - 1)
    networks = {"ours": network}
    if can_keep_fp16():
        networks["fp16 weights"] = network.with_fp16_weights()
    if cpu_multiplies_bf16():
        networks["bf16"] = network.in_bf16()
    # Projected beforehand: a model remembers few images, fewer than there are sides here.
    images = {side: network.project_image(image) for side, network in networks.items()}
    rows = [row for batch in batches for row in _in_order(networks, images, batch, rounds)]
    return [*rows, *_at_once(networks, images, rounds)]


def _in_order(
    networks: Mapping[str, FlowPokeTransformer], images: Mapping[str, ImageData], batch: int, rounds: int
) -> list[dict[str, Any]]:
    network, image = networks["ours"], images["ours"]
    pokes, queries = _points(batch, NUM_IN_ORDER)

    def ours(side: str, image: ImageData) -> Tensor:
        return networks[side].predict_autoregressive(*pokes, queries, False, image, generator=_generator())

    def plain(which: int) -> Tensor:
        one = slice(which, which + 1)
        poke_pos, poke_flow = (values[one] for values in pokes)
        return plain_joint_sample(network, poke_pos, poke_flow, queries[one], image, _generator())

    sides: dict[str, Callable[[], Any]] = {side: partial(ours, side, images[side]) for side in networks}
    sides["new image"] = lambda: ours("ours", _as_new(image))
    times = paired({**sides, "one": lambda: plain(0)}, rounds)
    times.sum("plain", {"one": batch})
    with mock.patch.object(GaussianMixture, "sample", lambda mixture, generator: mixture.mean):
        found, expected = ours("ours", image), torch.cat([plain(i) for i in range(min(batch, NUM_COMPARED))])
    # Samples of narrow networks say nothing of their error: each is a poke of the next, which amplifies rounding.
    name = f"{batch} joint sample{'s' * (batch > 1)} of {NUM_IN_ORDER} queries"
    return [*_times(name, times, networks), _difference(f"{name} (means drawn)", found[: len(expected)], expected)]


def _at_once(
    networks: Mapping[str, FlowPokeTransformer], images: Mapping[str, ImageData], rounds: int
) -> list[dict[str, Any]]:
    image = images["ours"]
    (poke_pos, poke_flow), queries = _points(1, NUM_AT_ONCE)
    means: dict[str, Tensor] = {}

    def predict(side: str, network: str, image: ImageData) -> None:
        means[side] = networks[network].predict_parallel(poke_pos, poke_flow, queries, False, image).mean

    def plain() -> None:
        means["plain"] = plain_parallel(networks["ours"], poke_pos, poke_flow, queries, image).mean

    sides: dict[str, Callable[[], None]] = {side: partial(predict, side, side, images[side]) for side in networks}
    sides["new image"] = lambda: predict("new image", "ours", _as_new(image))
    times = paired({**sides, "plain": plain}, rounds)
    name = f"{NUM_AT_ONCE} queries at once"
    rows = [*_times(name, times, networks), _difference(name, means["ours"], means["plain"])]
    size = means["plain"].square().mean().sqrt().item()
    for side in [side for side in networks if side != "ours"]:
        error = (means[side] - means["plain"]).square().mean().sqrt().item()
        about = {"value": error, "baseline": size, "ratio": error / size}
        rows.append({"name": f"{name}, {side}: rms error of the mean against its rms", **about, "unit": "of the side"})
    return rows


def _times(name: str, times: Paired, networks: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = {
        "ours": name,
        "fp16 weights": f"{name}, ours with fp16 weights",
        "bf16": f"{name}, ours in bf16",
        "new image": f"{name}, a new image in every call",
    }
    return [times.row(names[side], side, "plain", "s", 1) for side in (*networks, "new image")]


def _as_new(d_img: ImageData) -> dict[str, Tensor]:
    """The same image, of which nothing is remembered."""
    return {"feat": d_img["feat"].clone(), "pos": d_img["pos"]}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _points(batch: int, num_queries: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(Positions, flow) of the pokes and positions of the queries."""
    generator = torch.Generator().manual_seed(1)
    pos = torch.rand(batch, NUM_POKES + num_queries, 2, generator=generator)
    flow = 0.1 * torch.randn(batch, NUM_POKES, 2, generator=generator)
    return (pos[:, :NUM_POKES], flow), pos[:, NUM_POKES:]


def _difference(name: str, found: Tensor, expected: Tensor) -> dict[str, Any]:
    value = (found - expected).abs().max().item()
    return {
        "name": f"{name}: largest difference",
        "value": value,
        "baseline": 1e-4,
        "ratio": value / 1e-4,
        "unit": "of the image's side, against the allowed 1e-4",
    }
