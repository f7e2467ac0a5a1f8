"""Times without launch overhead: a call is captured as a CUDA graph and replayed, with warm and with cold L2."""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REPEATS = 15
CALLS_PER_GRAPH = 8
"""Of the warm timing: what a graph's start costs is shared by as many."""
LONG_MS = 2.0
"""Calls that take longer are timed one at a time, and those ten times as long `FEW_REPEATS` times."""
FEW_REPEATS = 5
BUSY_CYCLES = 200_000
"""The device waits so long, about 0.1 ms, before a timing begins: what follows is queued by then."""
COPIED_BYTES = 516 * 2**20
"""Of the copy that is rated. As nodes of a graph, copies of exactly 512 MiB, 1 GiB and 2 GiB take twice as long on some
cards; this size does not (pytorch issue 191284)."""
LAUNCH_MS, LEAST_OF_EVENTS = 0.2, 0.25
"""A graph that takes less than this part of what the call itself does, which is longer than launches take, is empty."""
STEP_ROUNDS, STEPS_PER_ROUND, STEPS_BEFORE = 3, 4, 3
MATRIX_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Times:
    """Medians of one call, in milliseconds."""

    warm_ms: float
    """With what the last call left in the L2."""
    cold_ms: float
    """After the L2 was overwritten."""
    timer: str
    """graph; events, where a call cannot be captured; or clock, without a device."""


def time_call(function: Callable[[], Any]) -> Times:
    """Median times of a call.

    Raises: RuntimeError if its graph does not hold what it does, as of a call that queues its work on another stream.
    """
    if not torch.cuda.is_available():
        seconds = [_clocked(function) for _ in range(3)]
        return Times(1e3 * statistics.median(seconds), 1e3 * statistics.median(seconds), "clock")
    function()  # compiles
    _event_ms(function)
    estimate = _event_ms(function)
    calls = CALLS_PER_GRAPH if estimate < LONG_MS else 1
    repeats = REPEATS if estimate < 10 * LONG_MS else FEW_REPEATS
    once: Callable[[], Any]
    often: Callable[[], Any]
    try:
        once = _captured(function, 1)
        often = _captured(function, calls) if calls > 1 else once
        timer = "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        once, often = function, lambda: [function() for _ in range(calls)]
        timer = "events"
    warm = statistics.median(_event_ms(often, _wait) for _ in range(repeats)) / calls
    cold = statistics.median(_event_ms(once, _flush) for _ in range(repeats))
    if timer == "graph" and estimate > LAUNCH_MS and warm < LEAST_OF_EVENTS * estimate:
        alone = statistics.median(_event_ms(function, _wait) for _ in range(FEW_REPEATS))  # not one slow call
        if alone > LAUNCH_MS and warm < LEAST_OF_EVENTS * alone:
            raise RuntimeError(f"its graph takes {warm:.4f} ms and the call {alone:.4f}: not all of it was recorded")
    return Times(warm, cold, timer)


def time_steps(function: Callable[[], Any]) -> tuple[float, float]:
    """Of a whole step, with all that the host does: median milliseconds, and MiB allocated at its height in all."""
    device = torch.cuda.is_available()
    for _ in range(STEPS_BEFORE):
        function()
    if device:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(STEP_ROUNDS):
        start = time.perf_counter()
        for _ in range(STEPS_PER_ROUND):
            function()
        if device:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / STEPS_PER_ROUND)
    return 1e3 * statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**20 if device else 0.0


def peak_mb(function: Callable[[], Any]) -> float:
    """MiB above what was allocated before; the first call, which compiles, does not count."""
    function()
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def rates_rows(argument: None) -> Iterator[dict[str, Any]]:
    """What the card reaches on plain work: copies of 516 MiB, matrix products of 8192 x 8192 (fp32 without TF32)."""
    torch.backends.cuda.matmul.allow_tf32 = False
    size = COPIED_BYTES if torch.cuda.is_available() else 2**20
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_call(lambda: target.copy_(source))
    yield {
        **_measured("copy", times),
        "mbytes": 2 * size / 1e6,
        "gbytes_per_s": round(2 * size / times.warm_ms / 1e6, 1),
    }
    del source, target
    n = 8192 if torch.cuda.is_available() else 128
    for dtype in MATRIX_DTYPES:
        a = torch.randn(n, n, device=device, dtype=dtype)
        times = time_call(functools.partial(torch.matmul, a, a))
        name = f"matrix {str(dtype).removeprefix('torch.')}"
        yield {
            **_measured(name, times),
            "gflop": round(2 * n**3 / 1e9, 1),
            "tflops": round(2 * n**3 / times.warm_ms / 1e9, 4),
        }


def save_rates(path: Path, rows: list[dict[str, Any]]) -> None:
    """For the workers that come later: copy rate in GB/s, matrix rates in TFLOP/s."""
    rates = {row["case"]: row.get("gbytes_per_s") or row.get("tflops") for row in rows}
    path.write_text(json.dumps(rates, allow_nan=False))


def load_rates(path: Path) -> dict[str, float]:
    """Empty where they were not measured."""
    return json.loads(path.read_text()) if path.exists() else {}


def _measured(name: str, times: Times) -> dict[str, Any]:
    return {
        "case": name,
        "way": "torch",
        "status": "measured",
        "timer": times.timer,
        "warm_ms": round(times.warm_ms, 5),
        "cold_ms": round(times.cold_ms, 5),
    }


def _clocked(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _captured(function: Callable[[], Any], calls: int) -> Callable[[], None]:
    """A graph of some calls; what compiles does so before the capture, on another stream as capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph.replay


@functools.cache
def _wipe() -> torch.Tensor:
    """Twice what the L2 of the largest cards holds."""
    return torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")


def _flush() -> None:
    _wipe().zero_()


def _wait() -> None:
    torch.cuda._sleep(BUSY_CYCLES)


def _event_ms(function: Callable[[], Any], before: Callable[[], None] | None = None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if before is not None:
        before()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
