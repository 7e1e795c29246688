"""What the compiler made of the CUDA kernels, per architecture: registers, stack, shared memory, memory instructions.

Everything is read from compiled code: resources and SASS through cuobjdump, PTX as the compiler writes it.
"""
from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tinylora_kernels.method.parts import SPECIALISED_RANKS
from tinylora_kernels.ops.native.nvrtc import Target

from . import compilers
from .host.plan import TILES, shape

ARCHITECTURES = (75, 80, 90, 100, 120)  # of the wheels
ELEMENTS = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes; in the order of enum class Element
RANKS = SPECIALISED_RANKS
REGISTERS_OF_A_BLOCK = 65536
SHARED_LIMIT = 48 << 10  # bytes of static shared memory of a block, on every architecture
THREADS = {"bank": 512, "right": 256}  # of a block, of the kernels that have no tiles
RESERVED_SHARED = 1024  # of which the system takes this much from sm_80 on


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture. instructions: how often each global or local memory instruction occurs."""

    registers: int
    stack: int
    local: int
    shared: int
    instructions: Counter


def cuobjdump() -> str | None:
    """The disassembler: on PATH, or the copy that Triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    copy = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    return str(copy) if copy and copy.is_file() else None


def compile_module(element: str, rank: int, target: Target, compiler: str | None = None) -> Path:
    """The code of a module."""
    return compilers.module(list(ELEMENTS).index(element), rank, target, compiler=compiler)


def kernel_name(mangled: str) -> str:
    """rows_kernel<float, 2, Short, true> -> 'r2 Short ids', parts_kernel the same and ' parts'; bank_grad_kernel<2> ->
    'r2 bank'; 'r2 right'.
    """
    if found := re.search(r"(rows|parts)_kernel.*Li(\d)ELNS_4TileE(\d)ELb(\d)E", mangled):
        options = " ids" * (found[4] == "1") + " parts" * (found[1] == "parts")
        return f"r{found[2]} {TILES[int(found[3])]}{options}"
    found = re.search(r"(bank)_grad_kernelILi(\d)E|refresh_(right)_kernel.*Li(\d)E", mangled)
    return f"r{found[2] or found[4]} {found[1] or found[3]}"


def inspect(
    element: str, ranks: tuple[int, ...], architecture: int, compiler: str | None = None
) -> dict[str, Compiled]:
    """Compile for one architecture. Kernel name -> what it became."""
    found = {}
    for rank in ranks:
        cubin = compile_module(element, rank, Target(architecture, ptx=False), compiler)
        resources = _cuobjdump("--dump-resource-usage", cubin)
        used = r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
        counts = _sass_counts(_cuobjdump("-sass", cubin))
        for name, reg, stack, shared, local in re.findall(used, resources):
            found[kernel_name(name)] = Compiled(int(reg), int(stack), int(local), int(shared), counts[name])
    return found


def memory_order(element: str, rank: int, architecture: int, tile: str) -> list[str]:
    """The memory, shuffle and barrier instructions of a kernel without ids, in the order of its code."""
    cubin = compile_module(element, rank, Target(architecture, ptx=False))
    for part in re.split(r"\n\s*Function : ", _cuobjdump("-sass", cubin))[1:]:
        name, body = part.split("\n", 1)
        if kernel_name(name) == f"r{rank} {tile}":
            return [_plain(op) for op in _opcodes(body) if op.startswith(("LDG", "STG", "LDS", "STS", "SHFL", "BAR"))]
    raise ValueError(f"no kernel r{rank} {tile}")


def _cuobjdump(*arguments) -> str:
    return subprocess.run([cuobjdump(), *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def _sass_counts(sass: str) -> dict[str, Counter]:
    counts: dict[str, Counter] = {}
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        name, body = part.split("\n", 1)
        opcodes = _opcodes(body)
        kinds = ("LDG", "STG", "LDL", "STL", "LD.", "ST.", "ATOM", "RED")
        counts[name.strip()] = Counter(_plain(op) for op in opcodes if op.startswith(kinds))
        counts[name.strip()]["instructions"] = len(opcodes)
    return counts


def _opcodes(body: str) -> list[str]:
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", body, re.M)


def _plain(opcode: str) -> str:
    """LDG.E.128.CONSTANT.SYS -> LDG.128.CONSTANT: without what differs between architectures and says nothing here."""
    return ".".join(p for p in opcode.split(".") if p not in ("E", "SYS", "STRONG", "GPU", "U"))


def ptx_kernels(element: str, rank: int, capability: int = 90) -> dict[str, str]:
    """Kernel name -> its PTX."""
    text = compile_module(element, rank, Target(capability, ptx=True)).read_text()
    parts = re.split(r"\.entry\s+", text)[1:]
    return {kernel_name(re.match(r"\w+", part)[0]): part for part in parts}


def ptx_counts(element: str, ranks: tuple[int, ...], capability: int = 90) -> dict[str, Counter]:
    """Kernel name -> how often each global, local or shared memory instruction occurs in the PTX."""
    counts = {}
    for rank in ranks:
        for name, part in ptx_kernels(element, rank, capability).items():
            counts[name] = Counter(re.findall(r"\b(?:ld|st|red|atom)\.(?:global|local)[.\w]*", part))
    return counts


def expected_packets(tile: str, size: int, rank: int) -> dict[str, int]:
    """How many row loads, factor loads and row stores the code of a kernel must hold: each thread's packets, once each.

    The bias counts as a row. A streamed row is loaded twice. A factor is read twice, but for few rows, at the ranks
    where registers hold it.
    """
    s = shape(tile, size)
    packets = s.rows * s.vectors
    return {
        "row loads": packets * (1 if s.resident else 2) + s.vectors,
        "factor loads": s.vectors * rank * (1 if tile == "Few" and rank <= 2 else 2),
        "row stores": packets,
    }
