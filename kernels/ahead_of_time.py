"""Compile every kernel and tuning configuration for given GPUs, without having one, and report what came out.

    python -m kinema.kernels.ahead_of_time [--op local_correlation] [--capability 9.0] [--json]

prints registers, spilled bytes, shared memory and matrix instructions of each. Shared memory is what a program
asks for at launch; matrix instructions are counted in the machine code (HMMA, HGMMA; IMMA and such are not used here).
Not for a process that runs the interpreter: triton then compiles nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OPS = ("local_correlation", "correlation_lookup", "cosine_attention")
CAPABILITIES = ((8, 0), (9, 0))
SHARED_LIMIT_BYTES = {(8, 0): 163 * 1024, (9, 0): 227 * 1024}
"""Largest shared memory of a program: CUDA programming guide, table of technical specifications."""


@dataclass(frozen=True)
class Case:
    """One kernel with one configuration."""

    name: str
    """What it is, for the table; unique within an operation."""
    kernel: Any
    """The function under `triton.jit`."""
    signature: dict[str, str]
    """Type of each runtime argument, in triton's spelling: `*fp16`, `i32`, `fp32`."""
    constexprs: dict[str, Any]
    """Value of each compile-time argument."""
    num_warps: int = 4
    """Warps of a program."""
    num_stages: int = 2
    """Depth of the software pipeline."""
    has_dot: bool = False
    """Matrix instructions are expected."""
    chosen: bool = True
    """A default: it must not spill."""
    divisible: tuple[str, ...] = field(default=())
    """Arguments that are multiples of 16, as launches see most pointers and strides."""


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case."""

    op: str
    case: str
    capability: str
    chosen: bool
    has_dot: bool
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: int


def cases_of(op: str) -> list[Case]:
    """The cases of an operation, from its `triton_impl`."""
    return importlib.import_module(f"kinema.kernels.{op}.triton_impl").ahead_of_time_cases()


def compile_case(op: str, case: Case, capability: tuple[int, int]) -> Report:
    """Compile for one GPU generation. Raises what triton or the assembler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.kernel.arg_names)
    missing = set(names) - set(case.signature) - set(case.constexprs)
    assert not missing, f"{op} {case.name}: no type or value for {sorted(missing)}"
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    compiled = triton.compile(
        ASTSource(case.kernel, signature, case.constexprs, attrs=attributes),
        target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    registers, spilled = _assemble(compiled.asm["ptx"], capability)
    return Report(
        op=op,
        case=case.name,
        capability=".".join(map(str, capability)),
        chosen=case.chosen,
        has_dot=case.has_dot,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=_matrix_instructions(compiled.asm["cubin"]),
    )


def _assemble(ptx: str, capability: tuple[int, int]) -> tuple[int, int]:
    """Registers of a thread and spilled bytes, as the assembler reports them."""
    # The newer of the two bundled assemblers: triton writes PTX for 9.0 that the other refuses.
    generation = "sm_90a" if capability == (9, 0) else f"sm_{capability[0]}{capability[1]}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        target = str(Path(folder) / "kernel.cubin")
        command = [_tool("ptxas-blackwell"), "-v", "--gpu-name", generation, str(source), "-o", target]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", text)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    return int(registers), sum(map(int, spills))


def _matrix_instructions(cubin: bytes) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [_tool("cuobjdump"), "-sass", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"\b(?:HMMA|HGMMA)\b", text))


def _tool(name: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is not part of triton {triton.__version__}; install triton 3.9 from its wheel")
    return str(path)


def main(arguments: list[str] | None = None) -> int:
    """Print a line per case; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compile the kernels without a GPU and report registers and spills.")
    parser.add_argument("--op", choices=OPS, action="append", help="only this operation (may be repeated)")
    parser.add_argument("--capability", action="append", help="only this compute capability, such as 9.0")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    # Unset, triton warns and promises to change its mind; set before the first compilation.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    chosen = options.capability or (".".join(map(str, pair)) for pair in CAPABILITIES)
    capabilities = [(int(major), int(minor)) for major, minor in (text.split(".") for text in chosen)]
    if not options.json:
        print(f"{'operation':<20}{'case':<44}{'cc':>4}{'registers':>11}{'spilled B':>11}{'shared B':>10}{'matrix':>8}")
    for op in options.op or OPS:
        for case in cases_of(op):
            for capability in capabilities:
                row = compile_case(op, case, capability)
                if options.json:
                    print(json.dumps(dataclasses.asdict(row)), flush=True)
                    continue
                name = f"{row.case}{'' if row.chosen else ' (alternative)'}"
                figures = (
                    f"{row.registers:>11}{row.spilled_bytes:>11}{row.shared_bytes:>10}{row.matrix_instructions:>8}"
                )
                print(f"{row.op:<20}{name:<44}{row.capability:>4}{figures}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
