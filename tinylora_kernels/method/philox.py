"""The fixed random matrices P: a pure function of (seed, module index, i), the same bits everywhere.

An adapter of 13 numbers means something only together with P, so P is defined here down to the bit. Every step is a
32-bit integer operation or one IEEE-754 double operation (+ - * / sqrt, each rounded on its own, never fused), so any
conforming machine, torch, numpy or compiler gives the same result. tests/method/philox.h is the same definition in C++.

Generator: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    key      (seed mod 2^32, seed div 2^32)                    seed: 64 bits
    counter  (block, row, index, stream)                       four 32-bit words
    output   words 4*block .. 4*block+3 of row `row`

    stream   0  P        index = module index in named_modules order, row = i, word = j*r + k for P_i[j, k]
             1  v        index = tie group, row = 0, word = position in v             (init="uniform")
             2  solver   the start block of the truncated SVD; key: the weight's hash (factors/subspace.py)
             3  sketch   the directions of a basis sketch                             (factors/svd.py)

So P_i does not depend on u: a larger u appends matrices and keeps the first ones.

Word to N(0, 1): p = (word + 1/2) / 2^32, z = the inverse normal distribution function at p by Wichura's algorithm
AS 241 (Applied Statistics 37(3), 1988, routine PPND16). Its outermost branch starts at p < e^-25, below the smallest
p here, 2^-33, and is left out. Its logarithm is `_log` below. |z| <= 6.3379. Finally P = fp32(z / sqrt(r)).

Test vectors. Philox4x32-10 (Random123, kat_vectors): counter 0 0 0 0, key 0 0 gives
6627e8d5 e169c58d bc57ac4c 9b00dbd8. philox_projection(seed, index, u, r) in reading order:

    seed 0, index 0, u 1, r 2                     -0x1.72760ap-3 0x1.aa5564p-1 0x1.c84d3cp-2 0x1.8378b6p-3
    seed 0x0123456789abcdef, index 195, u 1, r 2  0x1.a2f32ap+0 -0x1.538854p-3 0x1.35617p+0 0x1.1f8ba6p-1
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint32]
Doubles = NDArray[np.float64]

STREAM_PROJECTION, STREAM_VECTOR, STREAM_SOLVER, STREAM_SKETCH = range(4)

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORDS_AT_ONCE = 1 << 17  # of P; each takes some hundred bytes on its way to a number
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
_LOG_TERMS = 12  # (s^2)^12 / 25 < 2e-20 at the largest s^2 = 0.0295
# AS 241, numerator and denominator, constant term first: central branch in 0.425^2 - q^2, tail branch in w - 1.6
_CENTRE_P = (
    3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
    4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3,
)  # fmt: skip
_CENTRE_Q = (
    1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
    2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3,
)  # fmt: skip
_TAIL_P = (
    1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
    1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4,
)  # fmt: skip
_TAIL_Q = (
    1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
    1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9,
)  # fmt: skip


def philox_projection(seed: int, index: int, u: int, r: int) -> Tensor:
    """The matrices P_1..P_u of one module (paper, section on the update: R = sum_i v_i P_i).

    Args:
        seed: 0 <= seed < 2^64.
        index: module index in named_modules order, 0 <= index < 2^32.
        u, r: trained numbers and rank, >= 1.

    Returns:
        [u, r, r] fp32 on the CPU, entries N(0, 1/r).

    Raises:
        ValueError: it names the argument out of range.
    """
    _check_range("trainable_dim u", u, 1, 2**32)
    _check_range("rank r", r, 1, 2**16)
    projection = np.empty((u, r * r), dtype=np.float32)
    step = max(1, _WORDS_AT_ONCE // (r * r))
    for first in range(0, u, step):
        rows = slice(first, min(first + step, u))
        normals = normal_from_words(_random_words(seed, index, rows.stop - first, r * r, STREAM_PROJECTION, first))
        projection[rows] = normals / np.sqrt(np.float64(r))
    return torch.from_numpy(projection).view(u, r, r)


def philox_uniform(seed: int, index: int, count: int, bound: float) -> Tensor:
    """Starting values of v for tie group `index`: [count] fp32, uniform on (-bound, bound)."""
    words = _random_words(seed, index, 1, count, STREAM_VECTOR)[0]
    # x = bound ((word + 1/2) / 2^31 - 1), exact up to the product with bound
    symmetric = (words.astype(np.float64) + 0.5) * 2.0**-31 - 1.0
    return torch.from_numpy((symmetric * float(bound)).astype(np.float32))


def philox_normal(seed: int, index: int, rows: int, columns: int, stream: int) -> Tensor:
    """Independent N(0, 1) numbers of one stream: [rows, columns] fp64 on the CPU."""
    return torch.from_numpy(normal_from_words(_random_words(seed, index, rows, columns, stream)))


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10: counter [..., 4] of 32-bit words, key two 32-bit words -> [..., 4] uint32."""
    c0, c1, c2, c3 = np.moveaxis(counter.astype(np.uint64), -1, 0)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def normal_from_words(words: Words) -> Doubles:
    """32-bit words -> N(0, 1) in fp64 of the same shape, by the inverse distribution function."""
    # q = p - 1/2, exact in a double
    q = (words.astype(np.float64) + 0.5) * 2.0**-32 - 0.5
    z = np.empty_like(q)
    centre = np.abs(q) <= 0.425
    qc = q[centre]
    x = 0.180625 - qc * qc
    z[centre] = qc * _polynomial(_CENTRE_P, x) / _polynomial(_CENTRE_Q, x)
    qt = q[~centre]
    # distance to the nearer end of (0, 1): exact, at least 2^-33
    x = np.sqrt(-_log(0.5 - np.abs(qt))) - 1.6
    z[~centre] = np.copysign(_polynomial(_TAIL_P, x) / _polynomial(_TAIL_Q, x), qt)
    return z


def _random_words(seed: int, index: int, rows: int, columns: int, stream: int, first_row: int = 0) -> Words:
    _check_range("seed", seed, 0, 2**64)
    _check_range("module index", index, 0, 2**32)
    blocks = -(-columns // 4)
    counter = np.empty((rows, blocks, 4), dtype=np.uint32)
    counter[..., 0] = np.arange(blocks, dtype=np.uint32)
    counter[..., 1] = np.arange(first_row, first_row + rows, dtype=np.uint32)[:, None]
    counter[..., 2] = index
    counter[..., 3] = stream
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return words.reshape(rows, 4 * blocks)[:, :columns]


def _log(p: Doubles) -> Doubles:
    """Natural logarithm in double operations only: p = m 2^e with m in [sqrt(1/2), sqrt(2)), s = (m - 1) / (m + 1)."""
    m, e = np.frexp(p)
    low = m < _SQRT_HALF
    m = np.where(low, m + m, m)
    e = (e - low).astype(np.float64)
    s = (m - 1.0) / (m + 1.0)
    # log m = 2 atanh s = 2 s (1 + s^2/3 + s^4/5 + ...)
    series = _polynomial([1.0 / (2 * term + 1) for term in range(_LOG_TERMS)], s * s)
    return e * _LN2 + 2.0 * s * series


def _polynomial(coefficients: Sequence[float], x: Doubles) -> Doubles:
    value = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _check_range(what: str, value: int, low: int, end: int) -> None:
    if not low <= value < end:
        raise ValueError(f"{what} must be at least {low} and below {end}, got {value}")
