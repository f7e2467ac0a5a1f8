"""A training step of the Flow Poke Transformer against the same model with a dense boolean attention mask.

The baseline is plain PyTorch: normalised and rotated queries and keys, `scaled_dot_product_attention` with a boolean
[L, L] mask over 128 pokes and their 15 queries each, made once, and norms and gates whose intermediate results are kept
for the backward pass, as PyTorch does by itself. All else is shared. Both sides compute in float32; beside them, where
the CPU has instructions for it, ours with products in bf16 (`train.precision=bf16`) against the same baseline.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.configs import FPTConfig
from kinema.configs.json_text import json_text
from kinema.kernels import cosine_attention
from kinema.kernels.cosine_attention import as_pattern
from kinema.models.fpt import layers as fpt_layers
from kinema.models.fpt.layers import prepare
from kinema.models.fpt.model import FlowPokeTransformer
from kinema.pipelines.bench.cosine_attention import dense_mask
from kinema.pipelines.bench.paired import paired
from kinema.pipelines.precision import autocast, cpu_multiplies_bf16
from kinema.pipelines.train.recipes.fpt.recipe import FPTRecipe

# As wide as the published model, on a small image. Layers repeat and so do ratios of time, but much of the memory
# belongs to no layer: that is measured with all of the published ones.
LAYERS_TIMED, LAYERS_MEASURED = 2, 12
MODEL = {"width": 768, "head_dim": 64, "image_encoder": "tiny_vit8", "image_size": 96}
CONFIG = FPTConfig(image_px=96)
SIDES = ("ours", "dense mask")
IN_BF16 = "ours in bf16"


def run(batch_size: int = 1, rounds: int = 4, memory: bool = True) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, processor_ratio, unit}; ratio = baseline / ours.

    Peak memory (Linux) is how far a step goes above what a process of its own for each side held before.
    """
    sides = (*SIDES, IN_BF16) if cpu_multiplies_bf16() else SIDES
    steps = {side: Step(side, batch_size) for side in sides}
    losses: dict[str, float] = {}

    def keep(side: str) -> None:
        losses[side] = steps[side]()

    times = paired({side: partial(keep, side) for side in sides}, rounds)
    name = f"FPT step, {CONFIG.num_pokes} pokes x {CONFIG.queries_per_poke} queries, batch {batch_size}"
    rows = [times.row(f"{name}, {side}: time", side, SIDES[1], "s", 1) for side in sides if side != SIDES[1]]
    if memory:
        peaks = {side: _peak_mb(side, batch_size) for side in SIDES}
        rows.append(_row(f"{name}, {LAYERS_MEASURED} layers: peak memory", peaks, "MB"))
    if IN_BF16 in losses:
        compared = {"ours": losses[IN_BF16], "dense mask": losses["dense mask"]}
        rows.append(_row("loss in bf16 against float32, untrained weights", compared, "nats"))
    difference = abs(losses["ours"] - losses["dense mask"])
    allowed = {"ours": max(difference, 1e-12), "dense mask": 1e-5}
    return [*rows, _row("difference of the two losses after the same steps", allowed, "against the allowed 1e-5")]


class Step:
    """Forward and backward pass of the training loss on fixed data; the model stays as it was built."""

    def __init__(self, side: str, batch_size: int, depth: int = LAYERS_TIMED):
        torch.manual_seed(0)
        self.way = _dense_way if side == "dense mask" else contextlib.nullcontext
        self.precision = "bf16" if side == IN_BF16 else "fp32"
        self.recipe = FPTRecipe(CONFIG)
        self.model = FlowPokeTransformer(**MODEL, depth=depth)  # type: ignore[arg-type]
        P, n = CONFIG.num_pokes, CONFIG.queries_per_poke
        self.batch = {
            "image": torch.randint(0, 256, (batch_size, 96, 96, 3), dtype=torch.uint8),
            "poke_pos": torch.rand(batch_size, P, 2),
            "poke_flow": 0.1 * torch.randn(batch_size, P, 2),
            "query_pos": torch.rand(batch_size, P, n, 2),
            "query_flow": 0.1 * torch.randn(batch_size, P, n, 2),
            "camera_static": torch.zeros(batch_size, dtype=torch.bool),
        }

    def __call__(self) -> float:
        """The loss."""
        self.model.zero_grad(set_to_none=True)
        with self.way():
            with autocast(self.precision, "cpu"):
                value = self.recipe.loss(self.model, self.batch).value
            value.backward()
        return value.item()


@contextlib.contextmanager
def _dense_way() -> Iterator[None]:
    """Attention through a dense boolean mask, and every intermediate result kept."""
    with (
        mock.patch.object(fpt_layers, "cosine_attention", _dense_attention),
        mock.patch.object(fpt_layers, "made_again", lambda work, x: work(x)),
    ):
        yield


def _dense_attention(
    q: Tensor, k: Tensor, v: Tensor, theta_q: Tensor, theta_k: Tensor, scale: Tensor, pattern: Any
) -> Tensor:
    pattern = as_pattern(pattern)
    if pattern.kind != "query_causal":
        return cosine_attention(q, k, v, theta_q, theta_k, scale, pattern)
    mask = _mask("query-causal", pattern.num_pokes, q.shape[2])
    return F.scaled_dot_product_attention(
        prepare(q, theta_q, scale), prepare(k, theta_k, scale), v, attn_mask=mask, scale=1.0
    )


@cache
def _mask(kind: str, num_pokes: int, length: int) -> Tensor:
    return dense_mask(kind, num_pokes, length)


def _peak_mb(side: str, batch_size: int) -> float:
    command = [sys.executable, "-m", __name__, side, str(batch_size), str(torch.get_num_threads())]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure_peak(side: str, batch_size: int) -> float:
    """MB that this process's resident memory grows by at the height of one step."""
    step = Step(side, batch_size, LAYERS_MEASURED)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status_mb("VmRSS")
    step()
    return _status_mb("VmHWM") - before


def _status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def _row(name: str, values: dict[str, float], unit: str) -> dict[str, Any]:
    ours, baseline = (values[side] for side in SIDES)
    return {"name": name, "value": ours, "baseline": baseline, "ratio": baseline / ours, "unit": unit}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json_text(_measure_peak(sys.argv[1], int(sys.argv[2]))))
