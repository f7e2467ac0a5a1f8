"""Predictions of the Flow Poke Transformer against plain ways to compute the same.

A joint sample: the plain way predicts one query after the other, each from the whole sequence again and with the image
projected again. Many queries at once: the plain way projects the image in every call and attends through a dense mask;
ours projects it in the first call. Both sides compute in float32; beside them, where the CPU has instructions for it,
ours in bf16 against the same plain way in float32, with how far its numbers are off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kinema.models.fpt.model import FlowPokeTransformer
from kinema.pipelines.bench.fpt_step import dense_attention
from kinema.pipelines.bench.paired import Paired, paired
from kinema.pipelines.precision import cpu_multiplies_bf16

# As wide as the published model and with as many cells of the image (1024), with fewer layers: layers repeat.
MODEL = {"width": 768, "depth": 2, "head_dim": 64, "image_encoder": "tiny_vit8", "image_size": 256}
NUM_POKES = 2
NUM_IN_ORDER, NUM_AT_ONCE = 16, 256
BATCHES = (1, 8)
"""Samples of one image."""

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
    if cpu_multiplies_bf16():
        networks["bf16"] = network.in_bf16()
    rows = [row for batch in batches for row in _in_order(networks, image, batch, rounds)]
    return [*rows, *_at_once(networks, image, rounds)]


def _in_order(
    networks: Mapping[str, FlowPokeTransformer], image: ImageData, batch: int, rounds: int
) -> list[dict[str, Any]]:
    pokes, queries = _points(batch, NUM_IN_ORDER)
    flows: dict[str, Tensor] = {}

    def ours(side: str) -> None:
        flows[side] = _joint(networks[side], pokes, queries, image)

    def plain() -> None:
        with _nothing_kept():
            flows["plain"] = plain_joint_samples(networks["ours"], pokes, queries, _repeated(image, batch))

    times = paired({**{side: partial(ours, side) for side in networks}, "plain": plain}, rounds)
    # Samples in bf16 say nothing of its error: each is a poke of the next, which amplifies rounding.
    name = f"{batch} joint sample{'s' * (batch > 1)} of {NUM_IN_ORDER} queries"
    return [*_times(name, times, networks), _difference(name, flows)]


def _at_once(networks: Mapping[str, FlowPokeTransformer], image: ImageData, rounds: int) -> list[dict[str, Any]]:
    (poke_pos, poke_flow), queries = _points(1, NUM_AT_ONCE)
    means: dict[str, Tensor] = {}

    def predict(side: str, network: FlowPokeTransformer) -> None:
        means[side] = network.predict_parallel(poke_pos, poke_flow, queries, False, image).mean

    def plain() -> None:
        with dense_attention(), _nothing_kept():
            predict("plain", networks["ours"])

    sides = {side: partial(predict, side, network) for side, network in networks.items()}
    times = paired({**sides, "plain": plain}, rounds)
    name = f"{NUM_AT_ONCE} queries at once"
    rows = [*_times(name, times, networks), _difference(name, means)]
    if "bf16" in means:
        error = (means["bf16"] - means["plain"]).square().mean().sqrt().item()
        size = means["plain"].square().mean().sqrt().item()
        about = {"value": error, "baseline": size, "ratio": error / size}
        rows.append({"name": f"{name}, bf16: rms error of the mean against its rms", **about, "unit": "of the side"})
    return rows


def _times(name: str, times: Paired, networks: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = {"ours": name, "bf16": f"{name}, ours in bf16"}
    return [times.row(names[side], side, "plain", "s", 1) for side in networks]


def _nothing_kept() -> contextlib.AbstractContextManager[Any]:
    """What each call projects of the image is not kept for the next."""
    return mock.patch.object(FlowPokeTransformer, "_keys_values", lambda _, d_img: None)


def plain_joint_samples(
    network: FlowPokeTransformer, pokes: tuple[Tensor, Tensor], queries: Tensor, d_img: ImageData
) -> Tensor:
    """Flow [B, Q, 2]: every query asked on its own, given the pokes and what was drawn before."""
    pos, flow = pokes
    generator = torch.Generator().manual_seed(0)
    for query in queries.split(1, dim=1):
        mixture = network.predict_parallel(pos, flow, query, False, d_img)
        drawn = mixture.sample(generator=generator).reshape(len(pos), 1, 2).to(flow.dtype)
        pos, flow = torch.cat([pos, query], dim=1), torch.cat([flow, drawn], dim=1)
    return flow[:, NUM_POKES:]


def _joint(network: FlowPokeTransformer, pokes: tuple[Tensor, Tensor], queries: Tensor, d_img: ImageData) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return network.predict_autoregressive(*pokes, queries, False, d_img, generator=generator)


def _repeated(d_img: ImageData, batch: int) -> dict[str, Tensor]:
    return {name: value.expand(batch, *value.shape[1:]) for name, value in d_img.items()}


def _points(batch: int, num_queries: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(Positions, flow) of the pokes and positions of the queries."""
    generator = torch.Generator().manual_seed(1)
    pos = torch.rand(batch, NUM_POKES + num_queries, 2, generator=generator)
    flow = 0.1 * torch.randn(batch, NUM_POKES, 2, generator=generator)
    return (pos[:, :NUM_POKES], flow), pos[:, NUM_POKES:]


def _difference(name: str, found: Mapping[str, Tensor]) -> dict[str, Any]:
    value = (found["ours"] - found["plain"]).abs().max().item()
    return {
        "name": f"{name}: largest difference",
        "value": value,
        "baseline": 1e-4,
        "ratio": value / 1e-4,
        "unit": "of the image's side, against the allowed 1e-4",
    }
