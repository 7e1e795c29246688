"""Instruction -> a function of the machine: operands, memory and warps; arithmetic comes from arithmetic.py."""
from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from . import arithmetic
from .arithmetic import NUMPY
from .errors import LocalMemory, Race, UnsupportedInstruction
from .memory import ADDRESS_BITS, SHARED_WINDOW
from .parser import BITS, Instruction, Kernel

_RAW = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}  # how a register keeps its bits
POISON = 0xCBCBCBCBCBCBCBCB  # in registers that nobody has written: a NaN, and far outside any buffer
_HINTS = re.compile(
    r"global|shared|shared::cta|param|nc|volatile|relaxed|weak|cta|gpu|sys|v2|v4|v8|"
    r"L1::\w+|L2::\w+|ca|cg|cs|cv|lu|wb|wt|[busf]\d+|bf16|entry|func"
)  # modifiers of ld and st that change neither the value nor the order; acquire and release are refused


def program(kernel: Kernel) -> list:
    """The kernel's code as steps; decoded once."""
    if not hasattr(kernel, "_program"):
        kernel._program = [_step(kernel, i) for i in kernel.code]
    return kernel._program


def _step(kernel: Kernel, i: Instruction):
    from .machine import Step

    build = _CONTROL.get(i.name)
    control = build is not None
    build = build or _MEMORY.get(i.name) or _arithmetic
    return Step(build(kernel, i), i.guard, i.negated, control, i.where)


# operands


def source(kernel: Kernel, i: Instruction, text: str, kind: str) -> Callable:
    """machine -> the operand as this type: one number per thread, or one for all."""
    raw, dtype = _RAW[BITS[kind]], NUMPY[kind]
    if text in kernel.registers or kernel.register_type(text):
        held = BITS[kernel.register_type(text)]
        if held == BITS[kind]:
            return lambda m: m.read(text).view(dtype)
        if held > BITS[kind] > 1:
            return lambda m: m.read(text).astype(raw).view(dtype)
        raise UnsupportedInstruction(f"{i.where}: {i.opcode} reads {text} ({held} bits) as {kind}")
    if text.startswith("%"):
        return lambda m: m.special[text].astype(raw).view(dtype)
    if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
        bits = np.array(int(match[1], 16), {8: np.uint32, 16: np.uint64}[len(match[1])])
        number = bits.view({4: np.float32, 8: np.float64}[bits.itemsize])[()]
        constant = number.astype(dtype) if kind in arithmetic.FLOATS else bits.astype(raw).view(dtype)[()]
        return lambda m: constant
    if match := re.fullmatch(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?", text):
        number = int(match[1], 0)
        if kind in ("f32", "f64"):
            raise UnsupportedInstruction(f"{i.where}: integer {text} as {kind}")
        constant = np.array(number & (1 << BITS[kind]) - 1).astype(raw).view(dtype)[()]
        return lambda m: constant
    if match := re.fullmatch(r"([\w$]+)(?:\+(\d+))?", text):
        return lambda m: np.array(m.symbols[match[1]] + int(match[2] or 0)).astype(raw).view(dtype)[()]
    raise UnsupportedInstruction(f"{i.where}: operand {text}")


def destination(kernel: Kernel, i: Instruction, text: str, kind: str) -> Callable:
    """(machine, value) -> None: value, of this type, into the register, extended where the register is wider."""
    if text == "_":
        return lambda m, value: None
    declared = kernel.register_type(text)
    if declared is None:
        raise UnsupportedInstruction(f"{i.where}: destination {text}")
    held, dtype = _RAW[BITS[declared]], NUMPY[kind]
    if BITS[declared] == BITS[kind]:
        return lambda m, value: m.write(text, np.asarray(value, dtype).view(held), held)
    if BITS[declared] > BITS[kind]:
        extended = np.dtype(f"{'i' if kind.startswith('s') else 'u'}{BITS[declared] // 8}")
        narrow = dtype if kind.startswith("s") else _RAW[BITS[kind]]
        return lambda m, value: m.write(
            text, np.asarray(value, dtype).view(narrow).astype(extended).view(held), held
        )  # fmt: skip
    raise UnsupportedInstruction(f"{i.where}: {i.opcode} writes {kind} to the narrower {text}")


def _elements(text: str) -> list[str]:
    """'{%r1, %r2}' -> ['%r1', '%r2']; '%r1' -> ['%r1']."""
    return [part.strip() for part in text.strip("{} ").split(",")]


def _address(kernel: Kernel, i: Instruction, text: str) -> Callable:
    """'[%rd1+16]' -> machine -> int64 addresses of the active threads."""
    match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
    if not match:
        raise UnsupportedInstruction(f"{i.where}: address {text}")
    name, offset = match[1], int(match[2] or "0", 0)
    held = kernel.register_type(name)
    base = source(kernel, i, name, "u64" if held is None or BITS[held] == 64 else "u32")

    def addresses(m):
        return m.of_threads(base(m)).astype(np.int64) + offset

    return addresses


# arithmetic and moves


def _arithmetic(kernel: Kernel, i: Instruction) -> Callable:
    if i.name == "mov" and "{" in "".join(i.operands):
        return _move_parts(kernel, i)
    if i.name == "cvta":
        return _convert_address(kernel, i)
    meaning = arithmetic.semantics(i)
    if i.name == "setp" and "|" in i.operands[0]:
        raise UnsupportedInstruction(f"{i.where}: {i.opcode} with two results")
    write = destination(kernel, i, i.operands[0], meaning.result)
    if len(i.operands) != 1 + len(meaning.sources):
        raise UnsupportedInstruction(f"{i.where}: {i.opcode} with {len(i.operands)} operands")
    read = [source(kernel, i, text, kind) for text, kind in zip(i.operands[1:], meaning.sources, strict=True)]
    compute = meaning.compute
    if len(read) == 1:
        (first,) = read
        return lambda m: write(m, compute(first(m)))
    if len(read) == 2:
        first, second = read
        return lambda m: write(m, compute(first(m), second(m)))
    return lambda m: write(m, compute(*(operand(m) for operand in read)))


def _convert_address(kernel: Kernel, i: Instruction) -> Callable:
    """Generic addresses are global ones as they are; shared memory sits in a window of its own."""
    kind = i.types[-1]
    read, write = source(kernel, i, i.operands[1], kind), destination(kernel, i, i.operands[0], kind)
    shift = (-SHARED_WINDOW if "to" in i.modifiers else SHARED_WINDOW) if "shared" in i.modifiers else 0
    return lambda m: write(m, (read(m).astype(np.int64) + shift).astype(NUMPY[kind]))


def _move_parts(kernel: Kernel, i: Instruction) -> Callable:
    """mov.b32 %r1, {%rs1, %rs2} and its inverse: the first element is the lowest."""
    whole_kind = i.types[-1]
    parts = _elements(i.operands[0] if "{" in i.operands[0] else i.operands[1])
    width = BITS[whole_kind] // len(parts)
    part, whole = _RAW[width], _RAW[BITS[whole_kind]]
    element_mask = (1 << width) - 1
    if "{" in i.operands[0]:
        read = source(kernel, i, i.operands[1], whole_kind)
        writes = [destination(kernel, i, name, f"b{width}") for name in parts]

        def unpack(m):
            value = read(m)
            for n, write in enumerate(writes):
                write(m, (value >> whole(n * width)).astype(part))

        return unpack
    reads = [(name, source(kernel, i, name, f"b{width}")) for name in parts]
    write = destination(kernel, i, i.operands[0], whole_kind)

    def pack(m):
        value = whole(0)
        for n, (name, read) in enumerate(reads):
            # LLVM leaves the unused half of a pair undefined: it is poison, which must not reach a result
            element = read(m) if name in m.registers or not name.startswith("%") else part(POISON & element_mask)
            value = value | element.astype(whole) << whole(n * width)
        write(m, value)

    return pack


# memory


def _space(i: Instruction) -> str:
    if "local" in i.modifiers:
        raise LocalMemory(f"{i.where}: {i.opcode}: the kernel keeps data in local memory")
    return "shared" if any(m.startswith("shared") for m in i.modifiers) else "global" if "global" in i.modifiers else ""


def _check_hints(i: Instruction) -> None:
    for modifier in i.modifiers:
        if not _HINTS.fullmatch(modifier):
            raise UnsupportedInstruction(f"{i.where}: {i.opcode} (modifier {modifier})")


def _by_space(space: str, addresses: np.ndarray) -> tuple[str, np.ndarray]:
    """A generic address says itself where it points; all threads of an instruction must agree."""
    if space:
        return space, addresses
    return ("shared", addresses - SHARED_WINDOW) if (addresses >= SHARED_WINDOW).all() else ("global", addresses)


def _load(kernel: Kernel, i: Instruction) -> Callable:
    if "param" in i.modifiers:
        return _load_parameter(kernel, i)
    space, kind = _space(i), i.types[-1]
    _check_hints(i)
    names = _elements(i.operands[0])
    writes = [destination(kernel, i, name, kind) for name in names]
    address = _address(kernel, i, i.operands[1])
    itemsize, dtype = BITS[kind] // 8, NUMPY[kind]
    size, opcode, cached = itemsize * len(names), i.opcode, "nc" in i.modifiers

    def load(m):
        threads = m.threads()
        where, addresses = _by_space(space, address(m))
        access = m.access(threads, size, opcode)
        values = np.zeros((len(names), len(m.active)), dtype)
        for region, chosen, offsets in m.locate(where, access, addresses):
            access.thread = threads[chosen]
            region.check_read(access, offsets, cached)
            if where == "global":
                m.traffic.record(m.where, opcode, region.name, access.thread, offsets, size)
            items = region.data.view(dtype)
            at = offsets // itemsize
            for n in range(len(names)):
                values[n, access.thread] = items[at + n]
        for write, value in zip(writes, values, strict=True):
            write(m, value)

    return load


def _load_parameter(kernel: Kernel, i: Instruction) -> Callable:
    kind = i.types[-1]
    match = re.fullmatch(r"\[\s*([\w$]+)\s*(?:\+\s*(\d+))?\s*\]", i.operands[1])
    if i.operands[1].startswith("[%"):
        return _load_chosen_parameter(kernel, i)
    if not match or match[1] not in kernel.parameters:
        raise UnsupportedInstruction(f"{i.where}: {i.opcode} {i.operands[1]}")
    writes = [destination(kernel, i, name, kind) for name in _elements(i.operands[0])]
    dtype, start = np.dtype(NUMPY[kind]), int(match[2] or 0)

    def load(m):
        for n, write in enumerate(writes):
            write(m, np.frombuffer(m.parameters[match[1]], dtype, 1, start + n * dtype.itemsize)[0])

    return load


def _load_chosen_parameter(kernel: Kernel, i: Instruction) -> Callable:
    """By address: what a selection of two parameters becomes, and a structure that is passed on."""
    dtype, address = np.dtype(NUMPY[i.types[-1]]), _address(kernel, i, i.operands[1])
    writes = [destination(kernel, i, name, i.types[-1]) for name in _elements(i.operands[0])]

    def load(m):
        held = b"".join(m.parameters.values())
        places, place = np.unique(address(m), return_inverse=True)
        for n, write in enumerate(writes):
            values = np.zeros(len(m.active), dtype)
            found = [np.frombuffer(held, dtype, 1, at + n * dtype.itemsize)[0] for at in places]
            values[m.threads()] = np.array(found, dtype)[place]
            write(m, values)

    return load


def _store(kernel: Kernel, i: Instruction) -> Callable:
    kind = i.types[-1]
    names = _elements(i.operands[1])
    reads = [source(kernel, i, name, kind) for name in names]
    if "param" in i.modifiers:
        target = i.operands[0].strip("[] ")
        return lambda m: m.outgoing.update({target: np.broadcast_to(reads[0](m), m.active.shape)[m.active]})
    space = _space(i)
    _check_hints(i)
    address = _address(kernel, i, i.operands[0])
    itemsize = BITS[kind] // 8
    size, opcode = itemsize * len(names), i.opcode

    def store(m):
        threads = m.threads()
        where, addresses = _by_space(space, address(m))
        access = m.access(threads, size, opcode)
        values = np.stack([m.of_threads(read(m)) for read in reads], axis=1)  # [n, v]
        values = values.view(_RAW[BITS[kind]])
        for region, chosen, offsets in m.locate(where, access, addresses):
            access.thread = threads[chosen]
            items = region.data.view(values.dtype)
            at = (offsets // itemsize)[:, None] + np.arange(len(names))
            mine = values[chosen]
            region.check_write(access, offsets, lambda: (items[at] != mine).any(axis=1))
            if where == "global":
                m.traffic.record(m.where, opcode, region.name, access.thread, offsets, size)
            items[at] = mine
            clash = items[at] != mine
            if clash.any():
                message = f"another thread of this {opcode} writes another value"
                raise access.fail(Race, offsets, clash.any(axis=1), message)

    return store


_ATOMICS = {
    "add": lambda old, x, _: old + x, "exch": lambda old, x, _: x, "cas": lambda old, x, y: y if old == x else old,
    "min": lambda old, x, _: min(old, x), "max": lambda old, x, _: max(old, x),
    "inc": lambda old, x, _: type(old)(0) if old >= x else old + type(old)(1),
}  # fmt: skip


def _atomic(kernel: Kernel, i: Instruction) -> Callable:
    """One thread after the other, in thread order or, on request, in reverse."""
    space, kind = _space(i), i.types[-1]
    how = next((m for m in i.modifiers if m in _ATOMICS), None)
    if how is None or kind.endswith("x2"):
        raise UnsupportedInstruction(f"{i.where}: {i.opcode}")
    operands = i.operands if i.name == "red" else i.operands[1:]
    write = destination(kernel, i, "_" if i.name == "red" else i.operands[0], kind)
    address = _address(kernel, i, operands[0])
    first = source(kernel, i, operands[1], kind)
    second = source(kernel, i, operands[2], kind) if how == "cas" else first
    size, dtype, opcode = BITS[kind] // 8, NUMPY[kind], i.opcode
    release, acquire = ("acq_rel" in i.modifiers or name in i.modifiers for name in ("release", "acquire"))

    def atomic(m):
        threads = m.threads()
        where, addresses = _by_space(space, address(m))
        access = m.access(threads, size, opcode)
        x, y = (np.broadcast_to(read(m), m.active.shape) for read in (first, second))
        old = np.zeros(len(m.active), dtype)
        if release:
            m.clock.fence(threads)
        for region, chosen, offsets in m.locate(where, access, addresses):
            order = np.arange(len(chosen))
            for n in order[::-1] if m.reverse else order:
                thread = threads[chosen[n]]
                access.thread = np.array([thread])
                region.check_write(access, offsets[n : n + 1], None, atomic=True)
                items, at = region.data.view(dtype), offsets[n] // size
                old[thread] = items[at]
                items[at] = _ATOMICS[how](items[at], x[thread], y[thread])
                m.clock.atomic(int(thread), int(addresses[chosen[n]]) if where == "global" else -int(offsets[n]) - 1)
            if where == "global":
                m.traffic.record(m.where, opcode, region.name, threads[chosen], offsets, size)
        if acquire:
            m.clock.fence(threads)
        write(m, old)

    return atomic


def _matrix(kernel: Kernel, i: Instruction) -> Callable:
    """ldmatrix, stmatrix: 8x8 matrices of 16-bit elements; threads 8q..8q+7 of a warp address the rows of the q-th.

    Thread l holds elements 2(l % 4) and 2(l % 4) + 1 of row l / 4 (of the transpose, with .trans).
    """
    known = {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16"}
    if set(i.modifiers) - known:
        raise UnsupportedInstruction(f"{i.where}: {i.opcode}")
    loads, transposed, opcode = i.name == "ldmatrix", "trans" in i.modifiers, i.opcode
    registers, place = (i.operands[0], i.operands[1]) if loads else (i.operands[1], i.operands[0])
    registers = _elements(registers)
    address = _address(kernel, i, place)
    writes = [destination(kernel, i, name, "b32") for name in registers] if loads else []
    reads = [] if loads else [source(kernel, i, name, "b32") for name in registers]
    lane = np.arange(32)
    row, column = lane // 4, lane % 4 * 2

    def matrix(m):
        warps = np.nonzero(m.active.reshape(-1, 32).all(axis=1))[0]
        addresses = address(m).reshape(-1, 32)
        for q in range(len(registers)):
            threads = (warps[:, None] * 32 + np.arange(8 * q, 8 * q + 8)).ravel()
            access = m.access(threads, 16, opcode)
            ((region, _, offsets),) = m.shared.locate(access, addresses[:, 8 * q : 8 * q + 8].ravel())
            items = region.data.view(np.uint16)
            at = (offsets // 2)[:, None] + np.arange(8)  # [8 * warps, 8]
            if loads:
                region.check_read(access, offsets)
                tiles = items[at].reshape(-1, 8, 8)
                tiles = tiles.swapaxes(1, 2) if transposed else tiles
                pairs = tiles[:, row, column].astype(np.uint32) | tiles[:, row, column + 1].astype(np.uint32) << 16
                values = np.zeros((len(m.active) // 32, 32), np.uint32)
                values[warps] = pairs
                writes[q](m, values.ravel())
            else:
                values = np.broadcast_to(reads[q](m), m.active.shape).reshape(-1, 32)[warps]
                tiles = np.zeros((len(warps), 8, 8), np.uint16)
                tiles[:, row, column], tiles[:, row, column + 1] = values & 0xFFFF, values >> 16
                tiles = (tiles.swapaxes(1, 2) if transposed else tiles).reshape(-1, 8)
                region.check_write(access, offsets, lambda: (items[at] != tiles).any(axis=1))
                items[at] = tiles

    return matrix


def _fence(kernel: Kernel, i: Instruction) -> Callable:
    """membar.cta orders nothing between blocks; every wider fence does."""
    if "cta" in i.modifiers:
        return lambda m: None
    return lambda m: m.clock.fence(np.nonzero(m.active)[0])


# control flow and warps


def _branch(kernel: Kernel, i: Instruction) -> Callable:
    target = kernel.labels[i.operands[0]]
    return lambda m: m.branch(target)


def _barrier(kernel: Kernel, i: Instruction) -> Callable:
    if "warp" in i.modifiers:
        members = source(kernel, i, i.operands[0], "b32")

        def warp_barrier(m):
            if m.gather_warp(_members(m, members)):
                m.clock.warp_barrier(np.nonzero(m.active)[0])
                m.proceed()

        return warp_barrier
    if set(i.modifiers) <= {"red", "or", "pred", "cta", "aligned"} and len(i.operands) == 3 and i.operands[1] == "0":
        holds = source(kernel, i, i.operands[2], "pred")
        write = destination(kernel, i, i.operands[0], "pred")
        return lambda m: m.block_barrier(holds(m), write)
    plain = set(i.modifiers) <= {"sync", "cta", "aligned"} and len(i.operands) == 1 and i.operands[0] == "0"
    if not plain:
        raise UnsupportedInstruction(f"{i.where}: {i.opcode} {', '.join(i.operands)}")
    return lambda m: m.block_barrier()


def _members(m, members: Callable) -> np.ndarray:
    return np.broadcast_to(members(m), m.active.shape).astype(np.uint32)


def _shuffle(kernel: Kernel, i: Instruction) -> Callable:
    mode = i.modifiers[1]
    target, _, found = i.operands[0].partition("|")
    write = destination(kernel, i, target, "b32")
    write_found = destination(kernel, i, found or "_", "pred")
    value, by, clamp, members = (source(kernel, i, text, "b32") for text in i.operands[1:5])
    if i.modifiers[0] != "sync" or mode not in ("up", "down", "bfly", "idx"):
        raise UnsupportedInstruction(f"{i.where}: {i.opcode}")

    def shuffle(m):
        if not m.gather_warp(_members(m, members)):
            return
        lane = np.arange(len(m.active)) % 32
        step, control = (np.broadcast_to(x(m), lane.shape).astype(np.int64) for x in (by, clamp))
        segment, limit = control >> 8 & 31, control & 31
        lowest = lane & segment
        highest = lowest | limit & ~segment
        partner = {"up": lane - step, "down": lane + step, "bfly": lane ^ step, "idx": lowest | step & ~segment}[mode]
        inside = partner >= highest if mode == "up" else partner <= highest
        origin = np.arange(len(lane)) - lane + np.where(inside, partner, lane)
        m.require_present(origin)
        write(m, np.broadcast_to(value(m), lane.shape)[origin])
        write_found(m, inside)
        m.proceed()

    return shuffle


def _vote(kernel: Kernel, i: Instruction) -> Callable:
    mode = i.modifiers[1]
    if i.modifiers[0] != "sync" or mode not in ("all", "any", "ballot"):
        raise UnsupportedInstruction(f"{i.where}: {i.opcode}")
    holds, members = source(kernel, i, i.operands[1], "pred"), source(kernel, i, i.operands[2], "b32")
    write = destination(kernel, i, i.operands[0], "b32" if mode == "ballot" else "pred")

    def vote(m):
        if not m.gather_warp(_members(m, members)):
            return
        yes = (np.broadcast_to(holds(m), m.active.shape) & m.active).reshape(-1, 32)
        active = m.active.reshape(-1, 32)
        if mode == "ballot":
            result = (yes.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
        else:
            result = yes.any(axis=1) if mode == "any" else (yes | ~active).all(axis=1)
        write(m, result.repeat(32))
        m.proceed()

    return vote


def _call(kernel: Kernel, i: Instruction) -> Callable:
    """The only function a kernel of ours may call is the one that reports a failed assertion."""
    if "__assertfail" not in i.operands:
        raise UnsupportedInstruction(f"{i.where}: {i.opcode} {' '.join(i.operands)}")

    def fail(m):
        message = next((int(m.outgoing[name][0]) for name in sorted(m.outgoing) if len(m.outgoing[name])), 0)
        which = (message >> ADDRESS_BITS) - 1
        data = m.memory.regions[which].data[message & (1 << ADDRESS_BITS) - 1 :].tobytes() if which >= 0 else b""
        m.trap(data.split(b"\0")[0].decode() or "assertion failed")

    return fail


_CONTROL = {
    "bra": _branch, "bar": _barrier, "barrier": _barrier, "shfl": _shuffle, "vote": _vote, "call": _call,
    "ret": lambda kernel, i: lambda m: m.exit(), "exit": lambda kernel, i: lambda m: m.exit(),
    "trap": lambda kernel, i: lambda m: m.trap("the kernel stops itself"),
}  # fmt: skip
_MEMORY = {
    "ld": _load, "ldu": _load, "st": _store, "atom": _atomic, "red": _atomic, "ldmatrix": _matrix, "stmatrix": _matrix,
    "membar": _fence, "fence": _fence,
}  # fmt: skip
