"""What `make gpu` checks and times for the correlation lookup."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.kernels.correlation_lookup import (
    correlation_lookup,
    correlation_pyramid,
    feature_pyramid,
    lookup_into,
    volume_lookup,
)
from kinema.kernels.correlation_lookup.reference import correlation_lookup_reference
from kinema.kernels.gpu.candidates import Candidates
from kinema.kernels.gpu.cases import GpuCase, relative_error
from kinema.kernels.tuning import Config, Key

RADIUS, CHANNELS, LEVELS = 4, 256, 4
DEVICE = "cuda"
# (B, H, W, dtype): Sintel at 1/8, 1080p at 1/8.
SIZES = {
    "Sintel": (4, 55, 128, torch.float32),
    "1080p": (1, 135, 240, torch.float32),
    "1080p bf16": (1, 135, 240, torch.bfloat16),
}
TRAINING = ((1, 55, 128, torch.float32), (1, 55, 128, torch.bfloat16))
TOYS = tuple((1, 9, 10, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def cases(what: str) -> Iterator[GpuCase]:
    """A lookup at one size; or with its backward; or a whole pair (12 lookups) with all that comes before."""
    if what == "training":
        for size in TRAINING:
            yield _backward_case(*size)
    elif what == "pair":
        yield _pair_case(1, 135, 240, torch.float32, iters=12)
    else:
        yield _lookup_case(*SIZES[what])


def toys(argument: None) -> Iterator[GpuCase]:
    """Small shapes of every dtype: checked, not timed."""
    for size in TOYS:
        yield dataclasses.replace(_backward_case(*size), timed=False, baselines={})


def candidates() -> Iterator[Candidates]:
    """Blocks worth trying for 1080p."""
    from kinema.kernels.correlation_lookup.tuning import choose_config

    for dtype, targets, channels in (
        (torch.float32, (32, 64), (16, 32)),
        (torch.bfloat16, (64, 128), (64, 128)),
    ):
        key = Key("correlation_lookup", "lookup", _kind(dtype), "levels")
        default = choose_config("lookup", dtype, None, torch.device("cpu"))
        options = (Config((t, c), w, s) for t in targets for c in channels for w in (4, 8) for s in (3,))
        configs = tuple(dict.fromkeys((default, *options)))
        yield Candidates(key, configs, "lookup_kernel", functools.partial(_tuned_call, dtype))


def _tuned_call(dtype: torch.dtype, device: str) -> Callable[[], Any]:
    from kinema.kernels.correlation_lookup.op import form_windows, prepare_maps

    fmap1, fmap2, coords = _inputs(1, 135, 240, dtype, device)
    maps = prepare_maps(fmap1, feature_pyramid(fmap2))
    return lambda: form_windows(maps, coords, RADIUS, False)


def _lookup_case(B: int, H: int, W: int, dtype: torch.dtype) -> GpuCase:
    """An iteration's lookup: maps are laid out before, as is the baselines' volume, in float32 as published."""
    fmap1, fmap2, coords = _inputs(B, H, W, dtype)
    pooled = feature_pyramid(fmap2)
    volume = correlation_pyramid(fmap1, fmap2)
    look = lookup_into(fmap1, pooled, RADIUS, impl="triton")
    return GpuCase(
        name=f"B{B} C{CHANNELS} {H}x{W} r{RADIUS} {_kind(dtype)} forward",
        ours=lambda: look(coords),
        check=lambda: _errors(fmap1, pooled, coords, backward=False),
        tolerance=TOLERANCES[dtype],
        baselines={
            "volume, grid_sample": lambda: grid_sampled(volume, coords),
            "volume, gather": lambda: volume_lookup(volume, coords, RADIUS),
            "localcorr, Triton": _localcorr(fmap1, fmap2, coords, "localcorr_triton"),
            "localcorr, CUDA": _localcorr(fmap1, fmap2, coords, "localcorr_cuda"),
        },
        bytes_moved=fmap1.nbytes + sum(t.nbytes for t in pooled) + coords.nbytes + _window_bytes(B, H, W),
        flops=_flops(B, H, W),
        matrix_dtype=dtype,
    )


def _backward_case(B: int, H: int, W: int, dtype: torch.dtype) -> GpuCase:
    fmap1, fmap2, coords = _inputs(B, H, W, dtype)
    leaves = [t.detach().requires_grad_() for t in (fmap1, *feature_pyramid(fmap2))]
    maps = [t.detach().requires_grad_() for t in (fmap1, fmap2)]
    weight = torch.randn_like(_ours(leaves[0], leaves[1:], coords).detach())

    def ours() -> Any:
        return torch.autograd.grad(_ours(leaves[0], leaves[1:], coords), leaves, weight)

    def published() -> Any:
        return torch.autograd.grad(grid_sampled(correlation_pyramid(maps[0], maps[1]), coords), maps, weight)

    feature_bytes = sum(t.nbytes for t in leaves)
    return GpuCase(
        name=f"B{B} C{CHANNELS} {H}x{W} r{RADIUS} {_kind(dtype)} forward + backward",
        ours=ours,
        check=lambda: _errors(fmap1, [t.detach() for t in leaves[1:]], coords, backward=True),
        tolerance=TOLERANCES[dtype],
        baselines={"volume made, grid_sample": published},
        bytes_moved=3 * feature_bytes + 2 * (coords.nbytes + _window_bytes(B, H, W)),
        flops=3 * _flops(B, H, W),
        matrix_dtype=dtype,
    )


def _pair_case(B: int, H: int, W: int, dtype: torch.dtype, iters: int) -> GpuCase:
    """All lookups of a pair: here the memory of the volume counts."""
    fmap1, fmap2, coords = _inputs(B, H, W, dtype)

    def ours() -> Tensor:
        look = lookup_into(fmap1, feature_pyramid(fmap2), RADIUS, impl="triton")
        return [look(coords) for _ in range(iters)][-1]

    def published() -> Tensor:
        volume = correlation_pyramid(fmap1, fmap2)
        return [grid_sampled(volume, coords) for _ in range(iters)][-1]

    return GpuCase(
        name=f"B{B} C{CHANNELS} {H}x{W} r{RADIUS} {_kind(dtype)} pair of {iters} lookups",
        ours=ours,
        check=lambda: _errors(fmap1, feature_pyramid(fmap2), coords, backward=False),
        tolerance=TOLERANCES[dtype],
        baselines={"volume, grid_sample": published},
        bytes_moved=iters * (fmap1.nbytes + fmap2.nbytes * 4 // 3 + coords.nbytes + _window_bytes(B, H, W)),
        flops=iters * _flops(B, H, W),
        matrix_dtype=dtype,
    )


def grid_sampled(pyramid: list[Tensor], coords: Tensor, radius: int = RADIUS) -> Tensor:
    """The published lookup: every window of every pixel through `grid_sample`."""
    B, _, H, W = coords.shape
    offsets = torch.arange(-radius, radius + 1.0, device=coords.device)
    delta = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1)
    centres = coords.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
    rows = []
    for level, volume in enumerate(pyramid):
        h, w = volume.shape[-2:]
        x, y = (centres / 2**level + delta).split(1, dim=-1)
        # Without a tensor of sizes, whose copy to the device no graph can hold.
        grid = torch.cat([2 * x / (w - 1) - 1, 2 * y / (h - 1) - 1], dim=-1)
        rows.append(F.grid_sample(volume.reshape(-1, 1, h, w), grid, align_corners=True).view(B, H, W, -1))
    return torch.cat(rows, -1).permute(0, 3, 1, 2)


def _localcorr(fmap1: Tensor, fmap2: Tensor, coords: Tensor, mode: str) -> Callable[[], Any]:
    """PyPI's `localcorr`: its lookup of RAFT's pyramid, in the maps' own dtype."""
    made: list[Any] = []

    def call() -> Any:
        if not made:
            from localcorr import get_localcorr_block

            made.append(get_localcorr_block(fmap1, fmap2, num_levels=LEVELS, radius=RADIUS, corr_mode=mode))
        return made[0](coords)

    return call


def _inputs(B: int, H: int, W: int, dtype: torch.dtype, device: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Channels-last maps and coords of smooth motion (12 px) with noise of half a pixel, as a network's."""
    torch.backends.cuda.matmul.allow_tf32 = False
    device = device or DEVICE
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    maps = [draw(B, CHANNELS, H, W).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    smooth = F.interpolate(12 * draw(B, 2, 4, 6), size=(H, W), mode="bicubic", align_corners=True)
    y, x = torch.meshgrid(torch.arange(H, device=device), torch.arange(W, device=device), indexing="ij")
    return maps[0], maps[1], torch.stack([x, y]) + smooth + 0.5 * draw(B, 2, H, W)


def _ours(fmap1: Tensor, pooled: list[Tensor], coords: Tensor) -> Tensor:
    return correlation_lookup(fmap1, pooled, coords, RADIUS, impl="triton")


def _errors(fmap1: Tensor, pooled: list[Tensor], coords: Tensor, backward: bool) -> dict[str, float]:
    """Of the result and the gradients, against the reference in float64; also: the same bytes twice."""
    leaves = [t.detach().requires_grad_(backward) for t in (fmap1, *pooled)]
    exact_leaves = [t.detach().double().requires_grad_(backward) for t in leaves]
    found, again = (_ours(leaves[0], leaves[1:], coords) for _ in range(2))
    exact = correlation_lookup_reference(exact_leaves[0], exact_leaves[1:], coords, RADIUS)
    if not torch.equal(found, again):
        raise AssertionError("the results differ between two runs")
    errors = {"out": relative_error(found.detach(), exact.detach())}
    if backward:
        weight = torch.randn_like(found.detach())
        grads, grads_again = (torch.autograd.grad(out, leaves, weight) for out in (found, again))
        if not all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True)):
            raise AssertionError("the gradients differ between two runs")
        exact_grads = torch.autograd.grad(exact, exact_leaves, weight.double())
        names = ["fmap1", *(f"level {level}" for level in range(len(pooled)))]
        for name, a, b in zip(names, grads, exact_grads, strict=True):
            errors[name] = relative_error(a, b)
    return errors


def _flops(B: int, H: int, W: int) -> float:
    """Of the lattice points that are needed; blocks of queries and targets multiply two to four times as many."""
    return 2.0 * B * H * W * LEVELS * (2 * RADIUS + 2) ** 2 * CHANNELS


def _window_bytes(B: int, H: int, W: int) -> int:
    return 4 * B * H * W * LEVELS * (2 * RADIUS + 1) ** 2


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
