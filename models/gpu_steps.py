"""Whole models as `make gpu` times them: training steps, and pairs of frames through RAFT, on random data.

A step is the work on the device that `kinema train` does with a batch that is there: forward, backward, fused AdamW,
averaged weights, products in bfloat16 through autocast, at the published size and with untrained weights. Left out are
metrics, the norm of the gradient and its clipping, and reading the loss, for which training waits for the device.
Without a CUDA device the smallest models stand in, which shows that everything runs and says nothing about speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kinema.kernels.gpu.timing import time_steps
from kinema.models.cuda_graphs import Graphed

LEARNING_RATE = 1e-4
RAFT_ITERS = 12


@dataclass(frozen=True)
class Step:
    """One thing that is done over and over."""

    name: str
    """Model, sizes, precision: the row's case."""
    count: int
    """Samples or pairs of one time."""
    run: Callable[[], Tensor]
    """Does it once; gives the loss, or the flow."""
    way: str = "ours"
    """How it is run: `ours` is as written; layers compiled by torch.compile, or a CUDA graph, are others."""
    graph: Graphed | None = None
    """What `run` calls, where it is meant to repeat a graph."""
    note: str = ""
    """What a reader of the row should know besides."""


def rows(what: str) -> Iterator[dict[str, Any]]:
    """A row per step of a model: milliseconds, samples or pairs per second, MiB allocated at the height in all.

    Of a CUDA graph no MiB: PyTorch counts what a repetition works in as allocated only while it is recorded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        for step in STEPS[what](device):
            yield row_of(step)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "kinema":
            raise
        note = f"left out: {error.name} is not installed; WHEELS=folder with its wheel brings it"
        yield {"case": what, "way": "ours", "status": "missing", "note": note}


def row_of(step: Step) -> dict[str, Any]:
    """Time a step; wrong if what it gives is not finite, failed if it was to repeat a graph and there is none."""
    row: dict[str, Any] = {"case": step.name, "way": step.way}
    if step.graph is not None:
        for _ in range(2):  # the second call records
            step.run()
        if step.graph.why_not:
            return {**row, "status": "failed", "note": f"no graph: {step.graph.why_not}"}
    step_ms, peak_mb = time_steps(step.run)
    right = bool(step.run().isfinite().all())
    peak = {"peak_mb": round(peak_mb, 1)} if step.graph is None else {}
    notes = ["untrained", step.note, "" if step.graph is None else "a graph's memory is not measured"]
    notes.append("" if right else "the result is not finite")
    return {
        **{**row, "status": "ok" if right else "wrong"},
        **{"timer": "clock", "warm_ms": round(step_ms, 3), "per_second": round(1e3 * step.count / step_ms, 2)},
        **{**peak, "note": "; ".join(filter(None, notes))},
    }


def _flowfeat(device: str) -> Iterator[Step]:
    from kinema.models.flowfeat.training import FlowFeatTraining, random_crop_matrix

    backbone, batch, crop = ("dinov2_vits14", 32, 224) if device == "cuda" else ("conv_small", 2, 32)
    module = FlowFeatTraining(backbone, input_size=(crop, crop)).to(device)
    rng = np.random.default_rng(0)
    size = (2 * crop, 2 * crop)
    images, flow = _normal(device, batch, 3, *size), _normal(device, batch, 2, crop, crop)
    crops = [torch.stack([random_crop_matrix(size, rng) for _ in range(batch)]).to(device) for _ in range(2)]
    yield _training(
        f"FlowFeat {backbone} {crop}x{crop} B{batch} bf16 step", batch, module,
        lambda: module(images, flow, *crops).total, module.update_ema,
    )  # fmt: skip


def _fpt(device: str) -> Iterator[Step]:
    from kinema.models.fpt.model import PRESETS, FlowPokeTransformer

    preset, batch, pokes, queries = ("fpt_base", 8, 128, 15) if device == "cuda" else ("fpt_nano", 2, 6, 3)
    with torch.device(device):  # a CPU draws the weights for seconds, which the compiled row needs
        model = FlowPokeTransformer(**PRESETS[preset]).to(device)  # type: ignore[arg-type]
    for unused in model.unused_parameters():
        unused.requires_grad_(False)
    side = int(PRESETS[preset]["image_size"])
    points = (_uniform(device, batch, pokes, 2), 0.1 * _normal(device, batch, pokes, 2))
    asked = (_uniform(device, batch, pokes, queries, 2), 0.1 * _normal(device, batch, pokes, queries, 2))
    static = torch.zeros(batch, dtype=torch.bool, device=device)
    image = 2 * _uniform(device, batch, 3, side, side) - 1
    step = _training(
        f"FPT {preset} {pokes} pokes x {queries} queries B{batch} bf16 step", batch, model,
        lambda: model.negative_log_likelihood(*points, *asked, static, image).mean(),
    )  # fmt: skip
    yield step
    if device == "cuda":
        yield _compiled(step, model.transformer.layer_list())


def _dinoflow(device: str) -> Iterator[Step]:
    from kinema.models.dinoflow.loss import endpoint_loss
    from kinema.models.dinoflow.model import FlowModel, FlowModelConfig

    backbone, batch, side = ("vits16", 16, 512) if device == "cuda" else ("nano_vit8", 2, 64)
    width = 256 if device == "cuda" else 32
    model = FlowModel(FlowModelConfig(backbone, width, image_size=(side, side))).to(device).train()
    pair = [_uniform(device, batch, 3, side, side) for _ in range(2)]
    flow, valid = 4 * _normal(device, batch, 2, side, side), torch.ones(batch, side, side, device=device)
    yield _training(
        f"DinoFlow {backbone} {side}x{side} B{batch} bf16 step", batch, model,
        lambda: endpoint_loss(model(*pair), flow, valid)[0].mean(),
    )  # fmt: skip


def _dismo(device: str) -> Iterator[Step]:
    from kinema.models.dismo import DisMo
    from kinema.models.dismo.presets import PRESETS
    from kinema.models.ema import EMA

    preset, batch, side = ("dismo_large", 4, 256) if device == "cuda" else ("dismo_nano", 2, 32)
    with torch.device(device):  # over a thousand million weights to draw
        model = DisMo(**PRESETS[preset])
    average = EMA(model.to(device))
    extractor, channels = model.motion_extractor, model.frame_generator.latent_channels
    pairs = extractor.window - extractor.max_delta_time
    motion = 2 * _uniform(device, batch, extractor.window, side, side, 3) - 1
    latents = _normal(device, batch * pairs, side // 8, side // 8, channels)
    delta = torch.ones(batch, pairs, device=device)
    yield _training(
        f"DisMo {preset} {extractor.window} frames {side}x{side} B{batch} bf16 step", batch, model,
        lambda: model(motion, motion[:, :pairs], latents, delta).loss, average.update,
    )  # fmt: skip


def _raft(device: str) -> Iterator[Step]:
    from kinema.models.flow.raft.network import raft, raft_small

    # Sintel, and 1080p.
    sizes = ((4, 436, 1024), (1, 1080, 1920)) if device == "cuda" else ((1, 128, 128),)
    networks = {"RAFT": raft, "RAFT-small": raft_small} if device == "cuda" else {"RAFT-small": raft_small}
    iters = RAFT_ITERS if device == "cuda" else 2
    for name, build in networks.items():
        network = build().to(device).eval()
        for batch, height, width in sizes:
            pair = [_uniform(device, batch, 3, height, width) for _ in range(2)]
            for precision in ("fp32", "bf16"):
                title = f"{name} {height}x{width} B{batch} {iters} iterations {precision} pairs"
                run = _without_gradient(network, iters, precision)
                note = "without TF32" if precision == "fp32" else ""
                yield Step(title, batch, partial(run, *pair), note=note)
                if device == "cuda":
                    graphed = Graphed(run)
                    yield Step(title, batch, partial(graphed, *pair), "CUDA graph", graphed, note)


STEPS: dict[str, Callable[[str], Iterator[Step]]] = {
    "FlowFeat": _flowfeat,
    "FPT": _fpt,
    "DinoFlow": _dinoflow,
    "DisMo": _dismo,
    "RAFT": _raft,
}


def _training(
    name: str, count: int, module: nn.Module, loss: Callable[[], Tensor], after: Callable[[], Any] = lambda: None
) -> Step:
    """A training step of what asks for gradients."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with _products("bf16", device):
            value = loss()
        value.backward()
        optimizer.step()
        after()
        return value.detach()

    return Step(name, count, run)


def _compiled(step: Step, layers: Iterable[nn.Module]) -> Step:
    """The same step with these layers compiled; what was measured before is not touched by it."""
    for layer in layers:
        layer.compile()
    return replace(step, way="layers compiled")


def _without_gradient(network: nn.Module, iters: int, precision: str) -> Callable[..., Tensor]:
    @torch.no_grad()
    def run(*pair: Tensor) -> Tensor:
        with _products(precision, pair[0].device):
            return network(*pair, iters=iters)

    return run


def _products(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else _without_tf32()


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """float32 is float32 inside: by default PyTorch lets cuDNN's convolutions round their inputs to TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _normal(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device)


def _uniform(device: str, *shape: int) -> Tensor:
    return torch.rand(*shape, device=device)
