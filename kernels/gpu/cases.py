"""What `make gpu` runs: tasks, each in a process of its own with its own limit, and the cases that a task yields."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

BUDGET_S = 540
"""The limits of all tasks together, with what starting and stopping them takes, stay below this."""


@dataclass(frozen=True)
class GpuCase:
    """One size of one operation in one direction."""

    name: str
    """Sizes, dtype and direction: `B4 C128 55x128 r4 float16 forward`."""
    ours: Callable[[], Any]
    """Runs the kernel; tensors are made beforehand."""
    check: Callable[[], dict[str, float]]
    """Errors by name of what is compared, against the reference in float64."""
    tolerance: float
    """The error that is still right: 1e-5 in fp32, 2e-3 in fp16, 1e-2 in bf16."""
    baselines: dict[str, Callable[[], Any]] = field(default_factory=dict)
    """Other ways to the same result at the same precision, by name; one that raises is reported as not available."""
    bytes_moved: float = 0.0
    """Bytes that must be read and written at least."""
    flops: float = 0.0
    """Multiplications and additions that are needed."""
    matrix_dtype: torch.dtype = torch.float16
    """Whose matrix rate the FLOPs are compared with."""
    timed: bool = True
    """Toy shapes are only checked."""


@dataclass(frozen=True)
class Task:
    """Work for one process."""

    stage: str
    """What `ONLY=` selects by: rates, attention, lookup, local, upsampling, steps, sanitizer, tuning."""
    name: str
    """Unique; the worker finds the task by it."""
    source: str
    """`module:function`; the function takes `argument` and yields `GpuCase`s, or rows (dicts) that it made itself."""
    limit_s: int
    """Seconds of its process, imports included. It may take longer where earlier tasks did not need all of theirs; all
    its own cases come before their baselines, which are skipped when time runs out."""
    argument: Any = None

    def yields(self) -> Iterator[Any]:
        """The cases, made one after another."""
        module, function = self.source.split(":")
        yield from getattr(importlib.import_module(module), function)(self.argument)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference over largest value."""
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def tasks() -> tuple[Task, ...]:
    """Of a real run, in order."""
    attention, lookup, local, upsampling = (
        f"kinema.kernels.{op}.gpu_cases"
        for op in ("cosine_attention", "correlation_lookup", "local_correlation", "convex_upsampling")
    )
    return (
        Task("rates", "rates", "kinema.kernels.gpu.timing:rates_rows", 16),
        Task("attention", "attention toys", f"{attention}:toys", 26),
        *(
            Task("attention", f"attention {what}", f"{attention}:cases", limit, what)
            for what, limit in (
                ("FPT training", 35),
                ("FPT training, other types", 26),
                ("FPT inference", 30),
                ("DisMo motion", 26),
                ("DisMo generator", 26),
                ("causal", 26),
            )
        ),
        Task("lookup", "lookup toys", f"{lookup}:toys", 16),
        *(
            Task("lookup", f"lookup {what}", f"{lookup}:cases", 14, what)
            for what in ("Sintel", "1080p", "1080p bf16", "training", "pair")
        ),
        Task("local", "local toys", f"{local}:toys", 14),
        *(
            Task("local", f"local {what}", f"{local}:cases", 18, what)
            for what in ("1080p fp16", "1080p fp32", "DinoFlow training")
        ),
        Task("upsampling", "upsampling", f"{upsampling}:cases", 17),
        # Named, not imported: models stand above kernels.
        *(
            Task(
                "steps", f"{what} {'pairs' if what == 'RAFT' else 'step'}", "kinema.models.gpu_steps:rows", limit, what
            )
            # FPT last: compiling its layers takes what the others left over.
            for what, limit in (("FlowFeat", 16), ("DinoFlow", 16), ("DisMo", 24), ("RAFT", 18), ("FPT", 20))
        ),
        Task("sanitizer", "sanitizer memcheck", "kinema.kernels.gpu.sanitizer:rows", 14, "memcheck"),
        Task("sanitizer", "sanitizer racecheck", "kinema.kernels.gpu.sanitizer:rows", 14, "racecheck"),
        Task("tuning", "tuning", "kinema.kernels.gpu.candidates:rows", 36),
    )
