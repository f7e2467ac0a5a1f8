"""Predictions of the Flow Poke Transformer against plain ways to compute the same.

A joint sample: the plain way predicts one query after the other, each from the whole sequence again and with the image
projected again. Many queries at once: the plain way projects the image in every call and attends through a dense mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kinema.models.fpt.model import FlowPokeTransformer
from kinema.pipelines.bench.fpt_step import dense_attention
from kinema.pipelines.bench.paired import paired

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
    projected = network.project_image(image)
    rows = [row for batch in batches for row in _in_order(network, image, projected, batch, rounds)]
    return [*rows, *_at_once(network, image, projected, rounds)]


def _in_order(
    network: FlowPokeTransformer, image: ImageData, projected: ImageData, batch: int, rounds: int
) -> list[dict[str, Any]]:
    pokes, queries = _points(batch, NUM_IN_ORDER)
    flows: dict[str, Tensor] = {}
    sides: dict[str, Callable[[], None]] = {
        "ours": lambda: flows.update(ours=_joint(network, pokes, queries, projected)),
        "plain": lambda: flows.update(plain=plain_joint_samples(network, pokes, queries, _repeated(image, batch))),
    }
    times = paired(sides, rounds)
    name = f"{batch} joint sample{'s' * (batch > 1)} of {NUM_IN_ORDER} queries"
    return [times.row(name, "ours", "plain", "s", 1), _difference(name, flows)]


def _at_once(network: FlowPokeTransformer, image: ImageData, projected: ImageData, rounds: int) -> list[dict[str, Any]]:
    (poke_pos, poke_flow), queries = _points(1, NUM_AT_ONCE)
    means: dict[str, Tensor] = {}

    def predict(side: str, d_img: ImageData) -> None:
        means[side] = network.predict_parallel(poke_pos, poke_flow, queries, False, d_img).mean

    def plain() -> None:
        with dense_attention():
            predict("plain", image)

    times = paired({"ours": lambda: predict("ours", projected), "plain": plain}, rounds)
    name = f"{NUM_AT_ONCE} queries at once"
    return [times.row(name, "ours", "plain", "s", 1), _difference(name, means)]


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
