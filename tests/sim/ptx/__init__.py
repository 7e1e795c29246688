"""Runs the PTX that nvcc and Triton emit, unmodified, on numpy, and reports what a GPU would let pass.

    kernel = parse(ptx_text, "update_kernel")
    traffic = launch(kernel, grid, block, [Buffer.of("y", y), ..., 576])

All threads of all blocks advance together, one numpy operation per instruction. Found: accesses outside a buffer or
between its rows, misaligned accesses, races within and between blocks, barriers and shuffles that some threads never
reach, reads of memory nobody wrote, writes to inputs, local memory (spills), traps, unknown instructions. Counted:
bytes and 32-byte sectors per buffer and instruction. Not modelled: timing, weak memory (a missing fence is found by
the happens-before rule, not by a stale value), tensor cores, asynchronous copies, clusters; and it stops at PTX: what
ptxas makes of it, the driver and the stream are not tested. Approximate instructions are computed exactly; all other
arithmetic is bit-exact for float32.
"""
from .errors import (
    DivergentBarrier,
    DivergentShuffle,
    LocalMemory,
    Misaligned,
    OutOfBounds,
    Race,
    ReadOnly,
    SimulationError,
    Trap,
    Uninitialised,
    UnsupportedInstruction,
)
from .launch import launch
from .memory import Buffer
from .parser import Kernel, parse
from .traffic import Requests, Traffic

__all__ = [
    "Buffer", "DivergentBarrier", "DivergentShuffle", "Kernel", "LocalMemory", "Misaligned", "OutOfBounds", "Race",
    "ReadOnly", "Requests", "SimulationError", "Traffic", "Trap", "Uninitialised", "UnsupportedInstruction", "launch",
    "parse",
]  # fmt: skip
