"""Tuning: candidates compiled in parallel, those that spill left out, the rest timed; winners into kernels/tuning/."""

from __future__ import annotations

import importlib
import importlib.metadata
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from kinema.kernels import tuning
from kinema.kernels.gpu import timing
from kinema.kernels.gpu.rows import identity
from kinema.kernels.tuning import Config, Key

SECONDS = 30
"""From the start on, after which no further candidate is timed."""
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
    """A row per candidate; a better one than the default is written into the card's file."""
    everything = [c for op in OPS for c in importlib.import_module(f"kinema.kernels.{op}.gpu_cases").candidates()]
    deadline = time.monotonic() + SECONDS
    fit = _that_fit(everything)
    winners = []
    for candidates, configs in zip(everything, fit, strict=True):
        if time.monotonic() > deadline:
            yield {"case": _name(candidates.key), "status": "skipped", "note": "no time left; defaults stay"}
            continue
        call, measured = candidates.call("cuda"), {}
        for config in configs:
            row = {"case": _name(candidates.key), "way": str(config)}
            try:
                with tuning.trying(candidates.key, config):
                    measured[config] = timing.time_call(call).warm_ms
            except torch.AcceleratorError:
                raise
            except Exception as error:  # noqa: BLE001 - a candidate that cannot run here is left out
                yield {**row, "status": "missing", "note": f"{type(error).__name__}: {error}"[:200]}
                continue
            yield {**row, "status": "measured", "warm_ms": round(measured[config], 5)}
        if measured:
            best = min(measured, key=lambda config: measured[config])
            winners.append(_row(candidates.key, best, measured[best]))
    if winners:
        tuning.write_rows(tuning.file_of(torch.cuda.get_device_name()), winners)


def _that_fit(everything: list[Candidates]) -> list[list[Config]]:
    """Of each, the configurations whose machine code neither spills nor needs more shared memory than there is."""
    capability = torch.cuda.get_device_capability()
    jobs = [(c, config, capability) for c in everything for config in c.configs]
    # New processes: a CUDA context does not survive a fork, and triton's driver is another one there.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        good = dict(zip(jobs, pool.map(_fits, jobs), strict=True))
    return [[config for config in c.configs if good[c, config, capability]] for c in everything]


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
