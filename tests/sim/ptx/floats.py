"""Floating-point formats and roundings that numpy does not have."""
from __future__ import annotations

import numpy as np

_TIE_BITS, _TIE = np.uint64(0x1FFFFFFF), np.uint64(0x10000000)
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bfloat16 -> float32, exactly."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bits of bfloat16, to nearest even; every NaN becomes 0x7FFF as on the hardware."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    # adding 0x7FFF plus the last bit that is kept carries exactly where nearest-even rounds up
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32 with one rounding.

    The product is exact in float64 and the sum is rounded there once, then again to float32. The second rounding can
    go wrong only where the float64 sum lies exactly between two float32 numbers or below their normal range: there the
    sum is first rounded to odd, after which rounding to float32 is right.
    """
    product = np.asarray(a).astype(np.float64) * np.asarray(b).astype(np.float64)
    addend = np.asarray(c).astype(np.float64)
    total = np.asarray(product + addend)
    bits = total.view(np.uint64)
    suspicious = ((bits & _TIE_BITS) == _TIE) | (np.abs(total) < _SMALLEST_NORMAL) & (total != 0)
    if suspicious.any():
        product, addend = (np.broadcast_to(x, total.shape)[suspicious] for x in (product, addend))
        total[suspicious] = _round_to_odd(product, addend, total[suspicious])
    return total.astype(np.float32)


def _round_to_odd(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """a + b rounded to odd, given the rounded-to-nearest total: the exact error of the sum decides the last bit."""
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)  # Knuth's two-sum: a + b = total + error exactly
    bits = total.view(np.int64)
    away = (error > 0) == (total > 0)  # the truth lies farther from zero than total
    odd = np.where(away, bits + 1, bits - 1)
    return np.where((error != 0) & (bits % 2 == 0) & (total != 0), odd, bits).view(np.float64)
