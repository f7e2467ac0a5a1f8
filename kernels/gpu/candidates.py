"""Tuning: candidates compiled in parallel, those that spill left out, the rest timed; winners into kernels/tuning/.

The worker copies the card's file beside the rows as well.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinema.kernels import tuning
from kinema.kernels.gpu import timing
from kinema.kernels.gpu.cases import relative_error
from kinema.kernels.gpu.rows import identity
from kinema.kernels.tuning import Config, Key

SECONDS = 26
"""From the start on, after which no further configuration is timed."""
COMPILE_SECONDS = 16
"""Of these, what waiting for compiled candidates may take; those that are not done by then are left out."""
DIFFERENT = 0.03
"""Relative difference of a result to the default's from which on a configuration is no candidate."""
OPS = ("cosine_attention", "correlation_lookup")


@dataclass(frozen=True)
class Candidates:
    """Configurations of one kernel for one kind of call."""

    key: Key
    configs: tuple[Config, ...]
    """The first is the default."""
    kernel: str
    """Name of the kernel's function."""
    call: Callable[[str], Callable[[], Any]]
    """Makes tensors on a device, and gives the call to time."""


def rows(argument: None) -> Iterator[dict[str, Any]]:
    """A row per candidate; the best of a key is written into the card's file before the next key is begun."""
    everything = [c for op in OPS for c in importlib.import_module(f"kinema.kernels.{op}.gpu_cases").candidates()]
    deadline = time.monotonic() + SECONDS
    for candidates, configs in zip(everything, _that_fit(everything), strict=True):
        name = _name(candidates.key)
        if time.monotonic() > deadline:
            yield {"case": name, "status": "skipped", "note": "no time left; the default stays"}
            continue
        call, measured = candidates.call("cuda"), {}
        expected = _tensors(call())
        for config in configs:
            row = {"case": name, "way": str(config)}
            if time.monotonic() > deadline:
                yield {**row, "status": "skipped", "note": "no time left"}
                continue
            try:
                with tuning.trying(candidates.key, config):
                    differs = not _alike(_tensors(call()), expected)
                    measured_ms = timing.time_call(call).warm_ms
            except torch.AcceleratorError:
                raise
            except Exception as error:  # noqa: BLE001 - a candidate that cannot run here is left out
                yield {**row, "status": "missing", "note": f"{type(error).__name__}: {error}"[:200]}
                continue
            if differs:
                yield {**row, "status": "wrong", "note": "its result is not the default's"}
                continue
            measured[config] = measured_ms
            yield {**row, "status": "measured", "warm_ms": round(measured_ms, 5)}
        # Without the default's time nothing is known to be better.
        if candidates.configs[0] in measured:
            best = min(measured, key=lambda config: measured[config])
            tuning.write_rows(
                tuning.file_of(torch.cuda.get_device_name()), [_row(candidates.key, best, measured[best])]
            )


def _that_fit(everything: list[Candidates]) -> list[list[Config]]:
    """Of each, the default, and those whose machine code neither spills nor needs more shared memory than there is."""
    capability = torch.cuda.get_device_capability()
    # New processes: a CUDA context does not survive a fork, and triton's driver is another one there.
    pool = ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))
    jobs = {
        (i, config): pool.submit(_fits, (c, config, capability))
        for i, c in enumerate(everything)
        for config in c.configs
    }
    wait(jobs.values(), COMPILE_SECONDS)
    pool.shutdown(wait=False, cancel_futures=True)
    return [
        [config for config in c.configs if config == c.configs[0] or _is_good(jobs[i, config])]
        for i, c in enumerate(everything)
    ]


def _is_good(job: Future[bool]) -> bool:
    """Whether a configuration compiled, in time, and fits."""
    return job.done() and not job.cancelled() and job.exception() is None and job.result()


def _tensors(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _alike(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether two configurations give the same numbers but for rounding."""
    pairs = zip(found, expected, strict=True)
    return all(relative_error(a, b.double()) <= DIFFERENT for a, b in pairs if b.abs().max() > 0)


def _fits(job: tuple[Candidates, Config, tuple[int, int]]) -> bool:
    from kinema.kernels import ahead_of_time

    candidates, config, capability = job
    with tuning.trying(candidates.key, config):
        case = ahead_of_time.Case("candidate", candidates.call("meta"))
        launches = [x for x in ahead_of_time.launches_of(case, capability) if x.kernel.__name__ == candidates.kernel]
    reports = [ahead_of_time.report(candidates.key.op, case, launch, capability) for launch in launches]
    limit = ahead_of_time.SHARED_LIMIT_BYTES.get(capability, 99 * 1024)
    return all(row.spills == 0 and row.shared_bytes <= limit for row in reports)


def _row(key: Key, config: Config, ms: float) -> dict[str, Any]:
    facts = identity()
    return {
        **key._asdict(),
        **{"blocks": list(config.blocks), "warps": config.num_warps, "stages": config.num_stages, "ms": round(ms, 5)},
        **{"torch": facts["torch"], "triton": facts["triton"], "date": facts["date"], "commit": facts["commit"]},
    }


def _name(key: Key) -> str:
    return " ".join(filter(None, key))
