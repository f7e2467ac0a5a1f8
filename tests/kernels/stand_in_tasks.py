"""Tasks that behave like those of `make gpu` do when all goes well, and when it does not, on a CPU."""

import os
import signal
import sys
import time

import torch

from kinema.kernels.gpu.cases import GpuCase, Task


def right(name="right", error=1e-6, **options):
    return GpuCase(name, ours=lambda: torch.ones(4).sum(), check=lambda: {"out": error}, tolerance=1e-5, **options)


def good(argument):
    def unavailable():
        raise ImportError("No module named 'localcorr'\nsecond line")

    yield right(baselines={"plain": lambda: torch.ones(4).sum(), "localcorr": unavailable}, flops=8e9, bytes_moved=16e9)


def wrong(argument):
    yield right("over tolerance", error=1e-3)
    yield right("not a number", error=float("nan"))


def raises_while_built(argument):
    yield right("before")
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered\nmore of it")


def raises_in_kernel(argument):
    def ours():
        raise ValueError("out of resource: shared memory")

    yield GpuCase("kernel", ours=ours, check=lambda: {"out": 0.0}, tolerance=1e-5)


def one_of_three_raises(argument):
    def late():
        raise AssertionError("the results differ between two runs")

    baselines = {"plain": lambda: torch.ones(4).sum()}
    yield right("first", baselines=baselines)
    yield GpuCase("second", ours=lambda: torch.ones(1), check=late, tolerance=1e-5)
    yield right("third", baselines=baselines)


def ends_without_a_row(argument):
    sys.exit(1)  # as python itself does when a module is broken


def crashes(argument):
    yield right("before")
    os.kill(os.getpid(), signal.SIGSEGV)
    yield right("never")


def hangs(argument):
    time.sleep(600)
    yield right("never")


def tasks():
    module = "stand_in_tasks"
    return (
        Task("rates", "rates", "kinema.kernels.gpu.timing:rates_rows", 60),
        Task("one", "good", f"{module}:good", 60),
        Task("one", "wrong", f"{module}:wrong", 60),
        Task("one", "raises while built", f"{module}:raises_while_built", 60),
        Task("one", "raises in kernel", f"{module}:raises_in_kernel", 60),
        Task("one", "one of three raises", f"{module}:one_of_three_raises", 60),
        Task("one", "no such module", "no_such_module:cases", 60),
        Task("processes", "ends without a row", f"{module}:ends_without_a_row", 200),
        Task("processes", "crashes", f"{module}:crashes", 200),
        # Twice that, where the others leave time over.
        Task("processes", "hangs", f"{module}:hangs", 4),
        Task("processes", "good at the end", f"{module}:good", 200),
    )
