"""What a kernel's machine code costs: registers, spills, and the issue cycles of its loops, counted without a GPU.

A sub-partition of a multiprocessor issues one instruction of one of its warps per cycle, so the instructions of a
loop's body, times the warps of a program that share a sub-partition, are the cycles that the loop cannot go below,
whatever the memory and the matrix units do beside it. That is a lower bound and no time: latencies do not count.
Source of the four sub-partitions: CUDA programming guide, section on compute capabilities.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

PARTITIONS = 4
"""Of a multiprocessor; warps are shared out over them."""
MATRIX = re.compile(r"HMMA|HGMMA|IMMA|DMMA|UTCHMMA|UTCMMA|QGMMA|OMMA")
_LINE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_WARP_GROUP = re.compile(r"HGMMA")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    """With its modifiers: `LDG.E.128`."""
    operands: str


@dataclass(frozen=True)
class Loop:
    """An innermost loop."""

    instructions: int
    """Of its body, each counted once."""
    matrix: int
    warp_group: int
    """Matrix instructions of a whole warp group (9.0)."""
    special: int
    """Special functions: exponentials, reciprocals, sines."""
    narrow_loads: int
    """Loads of two bytes or one from global memory, to shared memory or registers."""
    spills: int
    """Loads and stores of local memory."""

    def issue_cycles(self, num_warps: int) -> float:
        """Of one pass through the body by a program of so many warps."""
        return self.instructions * num_warps / PARTITIONS


@dataclass(frozen=True)
class Usage:
    """What the assembler reports of a kernel."""

    registers: int
    stack_bytes: int
    """Of a thread: what did not fit into registers."""


@functools.lru_cache(maxsize=32)
def disassemble(cubin: bytes) -> tuple[Usage, list[Instruction]]:
    """Resources and instructions of a compiled kernel, by the tools that come with triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("-res-usage", path)
        listing = _cuobjdump("-sass", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Usage(int(found[1]), int(found[2])), parse(listing)


def parse(listing: str) -> list[Instruction]:
    """Instructions of a listing, in order."""
    matches = filter(None, map(_LINE.match, listing.splitlines()))
    return [Instruction(int(m[1], 16), m[2], m[3]) for m in matches]


def loops(code: list[Instruction]) -> list[Loop]:
    """Innermost loops, in order of their code: bodies from the target of a backward branch to the branch."""
    spans = []
    for instruction in code:
        if instruction.opcode.split(".")[0] != "BRA":
            continue
        target = re.search(r"0x([0-9a-f]+)", instruction.operands)
        # The end of a kernel is a branch to itself.
        if target and int(target[1], 16) < instruction.address:
            spans.append((int(target[1], 16), instruction.address))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [_loop([i for i in code if first <= i.address <= last]) for first, last in sorted(inner)]


def spills(code: list[Instruction]) -> int:
    """Loads and stores of local memory."""
    return sum(i.opcode.startswith(("LDL", "STL")) for i in code)


def matrix_instructions(code: list[Instruction]) -> int:
    return sum(bool(MATRIX.match(i.opcode)) for i in code)


def _loop(body: list[Instruction]) -> Loop:
    return Loop(
        instructions=len(body),
        matrix=matrix_instructions(body),
        warp_group=sum(bool(_WARP_GROUP.match(i.opcode)) for i in body),
        special=sum(i.opcode.startswith("MUFU") for i in body),
        narrow_loads=sum(i.opcode.startswith("LDG") and bool(re.search(r"\.[US](16|8)\b", i.opcode)) for i in body),
        spills=spills(body),
    )


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        raise FileNotFoundError(f"{tool} is not part of triton {triton.__version__}; install triton 3.9 from its wheel")
    return subprocess.run([str(tool), option, str(path)], capture_output=True, text=True, check=True).stdout
