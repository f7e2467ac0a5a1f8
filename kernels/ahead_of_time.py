"""Compile what the operations launch for given GPUs, without having one, and report what came out.

    python -m kinema.kernels.ahead_of_time [--op cosine_attention] [--capability 9.0] [--only TEXT] [--all] [--json]

The operations run on tensors without data, so that every kernel is compiled as its launch specialises it: by the
strides that such tensors have, with the launched configuration. A line per launch gives registers, bytes of stack
(spills), shared memory as asked for at launch, matrix instructions and, per innermost loop with matrix instructions,
issue cycles (`kernels/sass.py`) per 64 x 64 pairs of one pass, then those of the rest of a program. Not for a process
that runs the interpreter: triton then compiles nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kinema.kernels import sass
from kinema.kernels.launch import Launch, noted_launches

OPS = ("local_correlation", "correlation_lookup", "cosine_attention", "convex_upsampling")
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
SHARED_LIMIT_BYTES = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (12, 0): 99 * 1024,
}
"""Largest shared memory of a program: CUDA programming guide, table of technical specifications."""


@dataclass(frozen=True)
class Case:
    """One call of an operation."""

    name: str
    """Sizes, dtype, pattern, layout; unique within an operation."""
    call: Callable[[], Any]
    """Runs the operation on tensors on "meta"."""
    quick: bool = True
    """Compiled by the quick tests too."""


@dataclass(frozen=True)
class Report:
    """What the compiler made of a launch."""

    op: str
    case: str
    kernel: str
    capability: str
    registers: int
    stack_bytes: int
    spills: int
    """Instructions that load or store local memory."""
    shared_bytes: int
    matrix_instructions: int
    has_dot: bool
    loops: list[dict[str, Any]]
    """Innermost loops with matrix instructions: the fields of `sass.Loop`, and `cycles` per 64 x 64 products."""
    other_cycles: int
    """Issue cycles of a program's instructions outside those loops, each counted once."""


def cases_of(op: str) -> list[Case]:
    """The cases of an operation, from its `aot`."""
    return importlib.import_module(f"kinema.kernels.{op}.aot").cases()


def launches_of(case: Case, capability: tuple[int, int]) -> list[Launch]:
    """What a case launches on a GPU of this generation."""
    with noted_launches(capability) as noted:
        case.call()
    return noted


def compile_launch(launch: Launch, capability: tuple[int, int]) -> Any:
    """Compile for one GPU generation. Raises what triton or the assembler raises."""
    import triton

    triton.runtime.driver.set_active(_NoDevice(capability))
    return launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)


def report(op: str, case: Case, launch: Launch, capability: tuple[int, int]) -> Report:
    """Compile a launch and read its machine code."""
    compiled = compile_launch(launch, capability)
    usage, code = sass.disassemble(compiled.asm["cubin"])
    warps = launch.options.get("num_warps", 4)
    tile = _tile(launch.options)
    found = [loop for loop in sass.loops(code) if loop.matrix]
    others = sum(i.opcode != "NOP" for i in code) - sum(loop.instructions for loop in found)
    return Report(
        op=op,
        case=case.name,
        kernel=launch.kernel.__name__,
        capability=".".join(map(str, capability)),
        registers=usage.registers,
        stack_bytes=usage.stack_bytes,
        spills=sass.spills(code),
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=sass.matrix_instructions(code),
        has_dot="tt.dot" in compiled.asm["ttir"],
        loops=[
            {**dataclasses.asdict(loop), "cycles": round(loop.issue_cycles(warps) * 64 * 64 / tile)} for loop in found
        ],
        other_cycles=round(others * warps / sass.PARTITIONS),
    )


def reports(op: str, capability: tuple[int, int], only: str = "", quick: bool = True) -> Iterator[Report]:
    """Of every different launch of an operation."""
    seen = set()
    for case in cases_of(op):
        if only not in case.name or (quick and not case.quick):
            continue
        for launch in launches_of(case, capability):
            row = report(op, case, launch, capability)
            # Levels and directions often launch the same code.
            same = (
                row.kernel,
                row.registers,
                row.shared_bytes,
                str(row.loops),
                str(launch.options),
            )
            if same not in seen:
                seen.add(same)
                yield row


def _tile(options: dict[str, Any]) -> int:
    """Pairs of pixels, or of a row and a key, that one pass through a kernel's loop multiplies."""
    if "BLOCK_ROWS" in options:
        return int(options["BLOCK_ROWS"] * options["BLOCK_KEYS"])
    if "BX" in options:
        return int(options["TILE"] ** 2 * options["BY"] * options["BX"])
    return 64 * 64


class _NoDevice:
    """Stands in for triton's driver: it names a GPU and has none."""

    def __init__(self, capability: tuple[int, int]):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        # Compiled kernels are kept by device.
        return int(self._target.arch)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def main(arguments: list[str] | None = None) -> int:
    """Print a line per launch; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compile the kernels without a GPU and report what came out.")
    parser.add_argument("--op", choices=OPS, action="append", help="only this operation (may be repeated)")
    parser.add_argument("--capability", action="append", help="only this compute capability, such as 9.0")
    parser.add_argument("--only", default="", help="only cases with this text in their name")
    parser.add_argument("--all", action="store_true", help="every case, not only those of the quick tests")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    # Unset, triton warns and promises to change its mind; set before the first compilation.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    # Source lines in the machine code take an eighth of the time, and nobody reads them here.
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")
    chosen = options.capability or (".".join(map(str, pair)) for pair in CAPABILITIES)
    capabilities = [(int(major), int(minor)) for major, minor in (text.split(".") for text in chosen)]
    if not options.json:
        head = f"{'kernel':<24}{'case':<56}{'cc':>5}{'regs':>6}{'stack':>7}{'shared':>8}{'matrix':>8}"
        print(f"{head}  cycles of loops, of the rest")
    for op in options.op or OPS:
        for capability in capabilities:
            for row in reports(op, capability, options.only, not options.all):
                if options.json:
                    print(json.dumps(dataclasses.asdict(row), allow_nan=False), flush=True)
                    continue
                figures = f"{row.registers:>6}{row.stack_bytes:>7}{row.shared_bytes:>8}{row.matrix_instructions:>8}"
                cycles = " ".join(f"{loop['cycles']}" for loop in row.loops)
                rest = f"{cycles}, {row.other_cycles}"
                print(f"{row.kernel:<24}{row.case:<56}{row.capability:>5}{figures}  {rest}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
