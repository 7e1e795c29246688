"""launch(kernel, grid, block, arguments): run a PTX kernel on numpy and torch memory; raise on any finding."""
from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .clock import Clock
from .errors import SimulationError
from .machine import Machine
from .memory import Buffer, GlobalMemory, SharedMemory
from .parser import Kernel
from .traffic import Traffic


def launch(
    kernel: Kernel,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Buffer | int | float | bytes | Callable | None],
    *,
    dynamic_shared: int = 0,
    reverse: bool = False,
    buffers: Mapping[int, Buffer] | None = None,
) -> Traffic:
    """Run the kernel; buffers are updated in place. Returns what it read and wrote.

    Args:
        arguments: in the order of the kernel's parameters. A Buffer is passed as a pointer, None as a null pointer, a
        float
            as f32, bytes as they are (a struct passed by value).
        dynamic_shared: bytes of extern shared memory. buffers: memory that a struct points to, by the pointer in use.
        An argument may be a function from a lookup of those
            pointers (real -> simulated address) to the bytes of the struct.
        reverse: let atomics happen in descending instead of ascending thread order.

    Raises:
        SimulationError: one of the findings in errors.py.
    """
    grid, block = ((*extents, 1, 1)[:3] for extents in (grid, block))
    if len(arguments) != len(kernel.parameters):
        raise SimulationError(
            f"{kernel.name}: expected {len(kernel.parameters)} arguments, found {len(arguments)}"
        )
    threads, blocks = int(np.prod(block)), int(np.prod(grid))
    if kernel.threads is not None and threads > kernel.threads:
        raise SimulationError(f"{kernel.name}: {threads} threads a block, compiled for {kernel.threads}")

    constants = [
        Buffer(name, np.frombuffer(data, np.uint8).copy(), 1, read_only=True) for name, data in kernel.constants.items()
    ]
    pointed_to = dict(buffers or {})
    buffers = list({id(a): a for a in (*arguments, *pointed_to.values()) if isinstance(a, Buffer)}.values())
    memory = GlobalMemory(buffers + constants, kernel.narrowest["global"])
    shared = SharedMemory(blocks, kernel.static_shared + dynamic_shared, kernel.narrowest["shared"])
    symbols = {name: memory.address(len(buffers) + n) for n, name in enumerate(kernel.constants)} | kernel.shared

    address = {id(buffer): memory.address(n) for n, buffer in enumerate(buffers)}
    parameters = {}
    for (name, size), value in zip(kernel.parameters.items(), arguments, strict=True):
        if callable(value):
            value = value(lambda pointer: address[id(pointed_to[pointer])])
        symbols[name] = sum(map(len, parameters.values()))  # an address in the space of parameters
        parameters[name] = _bytes(name, size, address.get(id(value), value))

    traffic = Traffic()
    clock = Clock(blocks, threads)
    Machine(kernel, grid, block, parameters, memory, shared, clock, traffic, symbols, reverse=reverse).run()
    memory.write_back()
    return traffic


def _bytes(name: str, size: int, value: int | float | bytes | None) -> bytes:
    if isinstance(value, bytes):
        data = value
    elif isinstance(value, float):
        data = struct.pack("<f" if size == 4 else "<d", value)
    else:
        data = ((value or 0) & (1 << 8 * size) - 1).to_bytes(size, "little")
    if len(data) != size:
        raise SimulationError(f"{name}: expected {size} bytes, found {len(data)}")
    return data
