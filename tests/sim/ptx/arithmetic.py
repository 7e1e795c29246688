"""What each arithmetic instruction computes: from the opcode to operand types, result type and a numpy function.

Exact: integers, conversions (round to nearest even), fma in float32. Approximate opcodes (rcp.approx, ex2.approx,
div.full) are computed to full precision. A modifier that is not listed for its opcode is refused rather than ignored.
"""
from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .errors import UnsupportedInstruction
from .floats import bf16_to_f32, f32_to_bf16, fma_f32
from .parser import BITS, Instruction

NUMPY = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64, "f16x2": np.uint32,
    "bf16x2": np.uint32, "f32x2": np.uint64, "pred": np.bool_,
}  # fmt: skip
FLOATS = ("f16", "f32", "f64")


class Semantics(NamedTuple):
    """Operand 0 receives compute(operands 1, 2, ...), each read as the type beside it."""

    sources: tuple[str, ...]
    result: str
    compute: Callable[..., np.ndarray]


_TABLE: dict[str, tuple[frozenset[str], Callable[[Instruction], Semantics]]] = {}


def _operation(*names: str, allow: str = ""):
    def register(build):
        for name in names:
            _TABLE[name] = (frozenset(allow.split()), build)
        return build

    return register


def semantics(instruction: Instruction) -> Semantics:
    """Raises UnsupportedInstruction for anything the table does not hold."""
    allowed, build = _TABLE.get(instruction.name, (None, None))
    if build is None:
        raise UnsupportedInstruction(f"{instruction.where}: {instruction.opcode}")
    unknown = [m for m in instruction.modifiers if m not in BITS and m not in allowed]
    if unknown:
        raise UnsupportedInstruction(f"{instruction.where}: {instruction.opcode} (modifier {', '.join(unknown)})")
    try:
        return build(instruction)
    except KeyError as error:
        raise UnsupportedInstruction(f"{instruction.where}: {instruction.opcode} ({error.args[0]})") from None


def _halves(bits: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The two packed floats of a f32x2 or f16x2 register, low half first."""
    bits = np.asarray(bits)
    if width == 64:
        return tuple((bits >> np.uint64(s)).astype(np.uint32).view(np.float32) for s in (0, 32))
    return tuple((bits >> np.uint32(s)).astype(np.uint16).view(np.float16) for s in (0, 16))


def _pack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two equal halves of raw bits or floats -> one register of twice the width, low half first."""
    width = np.asarray(low).dtype.itemsize * 8
    half, whole = {16: (np.uint16, np.uint32), 32: (np.uint32, np.uint64)}[width]
    low, high = (np.asarray(x).view(half).astype(whole) for x in (low, high))
    return low | high << whole(width)


def _fma(a, b, c):
    if np.asarray(a).dtype == np.float32:
        return fma_f32(a, b, c)
    # f16: the float64 result is rounded again only where 53 bits do not hold it; f64: numpy has no fused operation
    return (a.astype(np.float64) * b + c).astype(a.dtype)


_FLOAT_OPERATIONS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "fma": _fma}


@_operation("add", "sub", "fma", allow="rn")
def _arithmetic(i: Instruction) -> Semantics:
    kind, compute = i.types[-1], _FLOAT_OPERATIONS[i.name]
    count = 3 if i.name == "fma" else 2
    if kind in ("f32x2", "f16x2"):
        whole = compute

        def compute(*operands):
            low, high = zip(*(_halves(x, BITS[kind]) for x in operands), strict=True)
            return _pack(whole(*low), whole(*high))

    elif kind == "bf16" or kind == "bf16x2":
        raise KeyError(f"{kind} arithmetic")
    return Semantics((kind,) * count, kind, compute)


@_operation("mul", allow="rn lo hi wide")
def _mul(i: Instruction) -> Semantics:
    kind = i.types[-1]
    if "wide" in i.modifiers:
        wide = _wider(kind)
        return Semantics((kind, kind), wide, lambda a, b: a.astype(NUMPY[wide]) * b.astype(NUMPY[wide]))
    if "hi" in i.modifiers:
        wide = _wider(kind)
        dtype, double, shift = NUMPY[kind], NUMPY[wide], NUMPY[wide](BITS[kind])
        return Semantics((kind, kind), kind, lambda a, b: (a.astype(double) * b.astype(double) >> shift).astype(dtype))
    packed = kind in ("f32x2", "f16x2", "bf16", "bf16x2")
    return _arithmetic(i) if packed else Semantics((kind, kind), kind, operator.mul)


@_operation("mad", allow="lo wide")
def _mad(i: Instruction) -> Semantics:
    kind = i.types[-1]
    if "wide" in i.modifiers:
        wide = _wider(kind)
        return Semantics(
            (kind, kind, wide), wide, lambda a, b, c: a.astype(NUMPY[wide]) * b.astype(NUMPY[wide]) + c
        )
    if kind in FLOATS:
        raise KeyError("float mad")
    return Semantics((kind,) * 3, kind, lambda a, b, c: a * b + c)


def _wider(kind: str) -> str:
    return {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}[kind]


@_operation("div", "rem", allow="rn full approx")
def _divide(i: Instruction) -> Semantics:
    kind = i.types[-1]
    if kind in FLOATS:
        return Semantics((kind, kind), kind, operator.truediv)

    def truncated(a, b):
        """Integer quotient or remainder, rounded towards zero as in C."""
        b = np.where(b == 0, np.ones_like(b), b)
        remainder = np.fmod(a, b)
        return remainder if i.name == "rem" else (a - remainder) // b

    return Semantics((kind, kind), kind, truncated)


@_operation("min", "max", allow="NaN")
def _extremum(i: Instruction) -> Semantics:
    kind = i.types[-1]
    keep_nan = "NaN" in i.modifiers or kind not in FLOATS
    compute = {"min": np.minimum if keep_nan else np.fmin, "max": np.maximum if keep_nan else np.fmax}[i.name]
    return Semantics((kind, kind), kind, compute)


@_operation("and", "or", "xor")
def _bitwise(i: Instruction) -> Semantics:
    kind = i.types[-1]
    return Semantics((kind, kind), kind, {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[i.name])


@_operation("not")
def _not(i: Instruction) -> Semantics:
    return Semantics((i.types[-1],), i.types[-1], np.invert)


@_operation("neg", "abs")
def _sign(i: Instruction) -> Semantics:
    kind = i.types[-1]
    if kind == "f32x2" or kind.startswith("bf16") or kind == "f16x2":
        raise KeyError(kind)
    return Semantics((kind,), kind, np.negative if i.name == "neg" else np.abs)


@_operation("shl", "shr")
def _shift(i: Instruction) -> Semantics:
    kind = i.types[-1]
    dtype, bits = NUMPY[kind], BITS[kind]

    def shift(a, n):
        inside = np.minimum(n, np.uint32(bits - 1)).astype(dtype)
        shifted = a << inside if i.name == "shl" else a >> inside
        if i.name == "shr" and kind.startswith("s"):
            return shifted  # shifting by bits - 1 leaves the sign everywhere
        return np.where(n >= bits, dtype(0), shifted).astype(dtype)

    return Semantics((kind, "u32"), kind, shift)


@_operation("shf", allow="l r wrap clamp")
def _funnel_shift(i: Instruction) -> Semantics:
    def shift(low, high, n):
        n = (n & np.uint32(31) if "wrap" in i.modifiers else np.minimum(n, np.uint32(32))).astype(np.uint64)
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        return (both << n >> np.uint64(32) if "l" in i.modifiers else both >> n).astype(np.uint32)

    return Semantics(("u32", "u32", "u32"), "b32", shift)


@_operation("bfe")
def _bit_field_extract(i: Instruction) -> Semantics:
    kind = i.types[-1]

    def extract(a, start, length):
        start, length = (np.minimum(n & np.uint32(255), np.uint32(32)).astype(np.int64) for n in (start, length))
        # a field that leaves the register continues with its sign (zeros for u32), which is what int64 gives
        field = a.astype(np.int64) >> start & (np.int64(1) << length) - 1
        sign = np.int64(1) << np.maximum(length - 1, 0)
        return np.where(length > 0, (field ^ sign) - sign if kind == "s32" else field, 0).astype(NUMPY[kind])

    if kind not in ("u32", "s32"):
        raise KeyError(kind)
    return Semantics((kind, "u32", "u32"), kind, extract)


@_operation("bfi")
def _bit_field_insert(i: Instruction) -> Semantics:
    def insert(field, into, start, length):
        start, length = (np.minimum(n & np.uint32(255), np.uint32(32)).astype(np.uint64) for n in (start, length))
        mask = ((np.uint64(1) << length) - np.uint64(1)) << start
        return (into.astype(np.uint64) & ~mask | field.astype(np.uint64) << start & mask).astype(np.uint32)

    if i.types[-1] != "b32":
        raise KeyError(i.types[-1])
    return Semantics(("b32", "b32", "u32", "u32"), "b32", insert)


@_operation("lop3")
def _lop3(i: Instruction) -> Semantics:
    table = int(i.operands[4], 0)

    def lookup(a, b, c):
        out = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c)), np.uint32)
        for row in range(8):
            if table >> row & 1:
                out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return out

    return Semantics(("b32", "b32", "b32"), "b32", lookup)


@_operation("prmt")
def _prmt(i: Instruction) -> Semantics:
    def permute(a, b, selector):
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        out = np.uint64(0)
        for byte in range(4):
            control = selector.astype(np.uint64) >> np.uint64(4 * byte) & np.uint64(15)
            picked = both >> (control & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(picked >= 128, np.uint64(255), np.uint64(0))  # control bit 3: spread the sign
            out = out | np.where(control >= 8, sign, picked) << np.uint64(8 * byte)
        return out.astype(np.uint32)

    return Semantics(("b32", "b32", "b32"), "b32", permute)


@_operation("popc", "clz", "brev")
def _count_bits(i: Instruction) -> Semantics:
    def bits(a):
        return np.unpackbits(np.atleast_1d(a).astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)

    compute = {
        "popc": lambda a: bits(a).sum(1).astype(np.uint32),
        "clz": lambda a: np.where(np.atleast_1d(a) == 0, 32, bits(a).argmax(1)).astype(np.uint32),
        "brev": lambda a: np.packbits(bits(a)[:, ::-1], axis=1).view(">u4")[:, 0].astype(np.uint32),
    }[i.name]
    return Semantics(("b32",), "b32", compute)


_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_UNORDERED = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}  # the negated ordered one


@_operation("setp", allow=" ".join([*_COMPARISONS, *_UNORDERED, "nan", "num", "and", "or", "xor"]))
def _setp(i: Instruction) -> Semantics:
    kind, how = i.types[-1], i.modifiers[0]
    if how in ("nan", "num"):
        compare = lambda a, b: (np.isnan(a) | np.isnan(b)) == (how == "nan")  # noqa: E731
    elif how in _UNORDERED:
        compare = lambda a, b: ~_COMPARISONS[_UNORDERED[how]](a, b)  # noqa: E731
    elif how == "ne" and kind in FLOATS:
        compare = lambda a, b: (a < b) | (a > b)  # noqa: E731
    else:
        compare = _COMPARISONS[how]
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(i.modifiers[1])
    if combine is None:
        return Semantics((kind, kind), "pred", compare)
    return Semantics((kind, kind, "pred"), "pred", lambda a, b, c: combine(compare(a, b), c))


@_operation("selp")
def _selp(i: Instruction) -> Semantics:
    return Semantics((i.types[-1],) * 2 + ("pred",), i.types[-1], lambda a, b, p: np.where(p, a, b))


@_operation("mov", "cvta", allow="to global shared const")
def _copy(i: Instruction) -> Semantics:
    kind = i.types[-1]
    return Semantics((kind,), kind, lambda a: a)


@_operation("rcp", "sqrt", "rsqrt", "ex2", "lg2", allow="rn approx")
def _function(i: Instruction) -> Semantics:
    compute = {
        "rcp": lambda a: np.float64(1) / a,
        "sqrt": np.sqrt,
        "rsqrt": lambda a: np.float64(1) / np.sqrt(a.astype(np.float64)),
        "ex2": np.exp2,
        "lg2": np.log2,
    }[i.name]
    kind = i.types[-1]
    return Semantics((kind,), kind, lambda a: compute(a).astype(NUMPY[kind]))


@_operation("cvt", allow="rn rz rzi rni rmi rpi")
def _convert(i: Instruction) -> Semantics:
    if len(i.types) != 2:
        raise KeyError("types")
    target, source = i.types
    if target in ("bf16x2", "f16x2") and source == "f32":
        _require_nearest(i)
        narrow = f32_to_bf16 if target == "bf16x2" else lambda a: a.astype(np.float16)
        return Semantics(("f32", "f32"), target, lambda high, low: _pack(narrow(low), narrow(high)))
    if target == "bf16":
        if source != "f32":
            raise KeyError(f"from {source}")
        _require_nearest(i)
        return Semantics((source,), target, f32_to_bf16)
    if source == "bf16":
        return Semantics((source,), target, lambda a: bf16_to_f32(a).astype(NUMPY[target]))
    if target not in FLOATS and source in FLOATS:
        rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[i.modifiers[0]]
        limits = np.iinfo(NUMPY[target])

        def saturate(a):
            return np.clip(np.nan_to_num(rounding(a.astype(np.float64))), limits.min, limits.max).astype(NUMPY[target])

        return Semantics((source,), target, saturate)
    if target in FLOATS and (BITS[target] < BITS[source] or source not in FLOATS):
        _require_nearest(i)
    return Semantics((source,), target, lambda a: a.astype(NUMPY[target]))


def _require_nearest(i: Instruction) -> None:
    if "rn" not in i.modifiers:
        raise KeyError("rounding other than rn")
