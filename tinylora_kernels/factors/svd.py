"""The frozen factors of a weight: its leading left singular vectors U and singular values S.

An adapter of a few numbers moves between machines only if both compute the same U. So the triplets are proven by their
residual (subspace.py), signs are fixed, vectors that no solver can pin down are reported, and everything is cached on
disk by the weight's content (cache.py).
"""
from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..common.threads import one_thread_each
from ..common.words import dtype_name
from ..method.philox import STREAM_SKETCH, philox_normal
from . import cache as factor_cache
from . import proof
from .cache import weight_fingerprint
from .subspace import DEGENERATE_GAP, OVERSAMPLING, Triplets, leading_triplets, scale_for

ALGORITHM = 3  # part of the cache key: raise it when the factors of any matrix may change
DIRECT_SIZE = 192  # up to this min(out, in) a full decomposition is quicker
NEGLIGIBLE = 1e-5  # a singular value below this share of the largest makes S^-1 useless
TOLERANCE = 1e-5  # residual that every triplet reaches, where no other is asked for
SIGN_MARGIN = 1e-3
PIECE_ELEMENTS = 1 << 24  # looked at by one thread at a time
SKETCH_COLUMNS = 4
# Accepted deviation of a recomputed basis, as compare_sketch estimates it: the solver proves 1e-6 and rounds to
# float32; the update then agrees to about this.
SKETCH_TOLERANCE = 1e-5
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class RankError(ValueError):
    """A weight that cannot carry the rank asked for."""


@dataclass(frozen=True)
class Factors:
    """Truncated SVD W = U S V^T of a weight [out, in].

    Attributes:
        basis: [r, out] U^T, contiguous, on the CPU; fp32, or fp64 for an fp64 weight.
        sigma: [r] singular values, falling, dtype of basis.
        degenerate: some of the first r + 1 singular values coincide: U is arbitrary within their span.
        residual: largest ||W^T u - sigma v|| / sigma, before rounding to the dtype of basis.
    """

    basis: Tensor
    sigma: Tensor
    degenerate: bool
    residual: float


def truncated_svd(
    weight: Tensor, rank: int, *, name: str = "weight", cache: bool = True, tol: float = TOLERANCE
) -> Factors:
    """The leading `rank` left singular vectors and values of a weight.

    Args:
        weight: [out, in], bf16, fp16, fp32 or fp64, any device and strides; only read, never copied whole unless small.
        rank: 1 <= rank <= min(out, in).
        name: the module, for messages.
        cache: read and write the disk cache.
        tol: residual every triplet must reach; the vectors of separate singular values are then right to about 1e-6.

    Signs: the largest entry of each u in magnitude is positive. Entries within 0.1% of the largest count as equal and
    the first of them decides, so that rounding cannot choose between two of equal size.

    Raises:
        ValueError: one line naming the module: not 2-D, empty, not floating point, NaN or infinite, rank out of range,
            or numerical rank below `rank` (saying the usable rank).

    Warns:
        UserWarning: singular values coincide.
    """
    weight = weight.detach()
    _check(weight, rank, name)
    factors = _cached(weight, rank, name, tol) if cache else _compute(weight, rank, name, tol, None)
    if factors.degenerate:
        warnings.warn(
            f"{name}: leading singular values coincide (relative gap below {DEGENERATE_GAP:g}), so the basis is one of "
            "many; adapter files must carry it",
            stacklevel=2,
        )
    return factors


def factorize_many(
    items: Iterable[tuple[str, Tensor | Callable[[], Tensor]]],
    rank: int,
    *,
    progress: bool = True,
    cache: bool = True,
    tol: float = TOLERANCE,
    without_rank: list[str] | None = None,
) -> Iterator[tuple[str, Factors]]:
    """truncated_svd of many weights, one in memory at a time: yields (name, Factors) in order.

    Args:
        items: (name, weight) or (name, function that returns the weight); the function is called when its turn comes.
        progress: show a bar on a terminal once the work has taken a second.
        without_rank: takes the names of weights that cannot carry the rank, which are an error where it is None.
    """
    items = list(items)
    with tqdm(total=len(items), desc="Factorising", unit="matrix", delay=1, disable=None if progress else True) as bar:
        for name, source in items:
            weight = source() if callable(source) else source
            try:
                factors = truncated_svd(weight, rank, name=name, cache=cache, tol=tol)
            except RankError:
                if without_rank is None:
                    raise
                without_rank.append(name)
                continue
            finally:
                del weight
                bar.update()
            yield name, factors


def basis_sketch(basis: Tensor) -> Tensor:
    """A few numbers that tell two bases apart: basis [r, out] -> [r, 4] fp32, products with fixed random vectors."""
    directions = _sketch_directions(basis.shape[1])  # [out, 4]
    return (basis.detach().double().cpu() @ directions).float()


def compare_sketch(a: Tensor, b: Tensor) -> float:
    """Largest relative deviation between rows of two sketches [r, 4]: an estimate of ||u - u'|| for the worst u."""
    if a.shape != b.shape:
        raise ValueError(f"sketches must have one shape, got {list(a.shape)} and {list(b.shape)}")
    a, b = a.double(), b.double()
    deviation = ((a - b).norm(dim=1) / torch.maximum(a.norm(dim=1), b.norm(dim=1))).max().item()
    return math.inf if math.isnan(deviation) else deviation


@functools.lru_cache(maxsize=16)
def _sketch_directions(features: int) -> Tensor:
    return philox_normal(0, 0, SKETCH_COLUMNS, features, STREAM_SKETCH).T


def _check(weight: Tensor, rank: int, name: str) -> None:
    if weight.dim() != 2:
        raise ValueError(f"{name}: expected a 2-D weight [out, in], found shape {list(weight.shape)}")
    if weight.dtype not in DTYPES:
        raise ValueError(f"{name}: expected a bf16, fp16, fp32 or fp64 weight, found {weight.dtype}; dequantise it")
    if weight.is_meta:
        raise ValueError(f"{name}: expected a weight with values, found one on the meta device; load the weights first")
    if weight.numel() == 0:
        raise ValueError(f"{name}: the weight is empty, shape {list(weight.shape)}")
    if not 1 <= rank <= min(weight.shape):
        raise RankError(
            f"{name}: rank must be from 1 to min(out, in) = {min(weight.shape)}, got {rank}; leave it out otherwise"
        )


def _cached(weight: Tensor, rank: int, name: str, tol: float) -> Factors:
    """From the disk, or computed and put there."""
    precision = 64 if weight.dtype == torch.float64 else 32
    fingerprint = weight_fingerprint(weight)
    key = f"{fingerprint}-r{rank}-tol{tol:g}-fp{precision}-v{ALGORITHM}"
    factors = _load(key, weight, rank, tol)
    if factors is None or why_not_of(weight, factors, tol, fingerprint) is not None:
        factors = _compute(weight, rank, name, tol, fingerprint)
        _store(key, factors)
    return factors


def why_not_of(weight: Tensor, factors: Factors, tol: float = TOLERANCE, fingerprint: str | None = None) -> str | None:
    """None if stored factors are those of the weight [m, n], else what is wrong with them in a few words; proof.py."""
    weight = _with_fp64(weight.detach())
    return proof.why_not_of(weight, factors.basis, factors.sigma, tol, _seed(weight, fingerprint))


def _seed(weight: Tensor, fingerprint: str | None) -> int:
    """64 bits of the weight's own hash: no weight can be built against a start that is drawn by them."""
    return int((fingerprint or weight_fingerprint(weight))[:16], 16)


def _with_fp64(weight: Tensor) -> Tensor:
    """The weight where there is arithmetic in fp64."""
    return weight if weight.device.type in ("cpu", "cuda") else weight.cpu()


def _compute(weight: Tensor, rank: int, name: str, tol: float, fingerprint: str | None) -> Factors:
    weight = _with_fp64(weight)
    largest = _largest_magnitude(weight)
    if not math.isfinite(largest):
        raise ValueError(f"{name}: the weight holds NaN or infinite values")
    if largest == 0.0:
        raise RankError(f"{name}: the weight is zero; its usable rank is 0, below {rank}; leave it out")
    scale = scale_for(largest, weight.dtype)
    triplets = _triplets(weight, rank, tol, scale, fingerprint)
    sigma = triplets.sigma
    usable = int((sigma > _threshold(weight) * sigma[0]).sum())
    if usable < rank:
        raise RankError(
            f"{name}: numerical rank is {usable}, below rank {rank}; use a rank of at most {usable} or leave it out"
        )
    gaps = 1 - sigma[1 : rank + 1] / sigma[:rank][: len(sigma) - 1]
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with one_thread_each():  # two threads would wait for each other longer than this takes
        basis = canonical_signs(triplets.left[:rank].cpu()).to(dtype).contiguous()
    return Factors(
        basis=basis,
        sigma=_in_range(sigma[:rank].cpu() / scale, dtype, name),
        degenerate=bool((gaps < DEGENERATE_GAP).any()),
        residual=triplets.residual[:rank].max().item(),
    )


def _in_range(sigma: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Falling singular values in a dtype that holds them with all its digits."""
    limits = torch.finfo(dtype)
    if not limits.tiny <= sigma[-1].item() <= sigma[0].item() <= limits.max:
        raise ValueError(
            f"{name}: its singular values, {sigma[-1]:.2g} to {sigma[0]:.2g}, are outside the range of "
            f"{dtype_name(dtype)}; scale the weight, or leave the module out of target_modules"
        )
    return sigma.to(dtype)


def _largest_magnitude(weight: Tensor) -> float:
    """Of the entries [m, n]; NaN where one is NaN."""
    m, n = weight.shape
    rows = max(1, PIECE_ELEMENTS // n)
    with one_thread_each() as run:
        limits = run(lambda begin: weight[begin : begin + rows].aminmax(), range(0, m, rows))
    low, high = (torch.stack(values) for values in zip(*limits, strict=True))
    return torch.maximum(-low.amin(), high.amax()).item()


def _threshold(weight: Tensor) -> float:
    """Share of the largest singular value below which one is noise: the rounding of the entries to their dtype.

    Rounding the entries of a product of few factors adds singular values of 0.2 to 0.6 (measured, Gaussian and uniform
    factors, fp16 and bf16) times eps (1 / sqrt(m) + 1 / sqrt(n)) times the largest.
    """
    m, n = weight.shape
    rounding = 0.75 * torch.finfo(weight.dtype).eps * (m**-0.5 + n**-0.5)
    return max(NEGLIGIBLE, rounding)


def _triplets(weight: Tensor, rank: int, tol: float, scale: float, fingerprint: str | None) -> Triplets:
    """By block Lanczos, or in full where that is quicker or where Lanczos ran out of steps."""
    if min(weight.shape) <= max(DIRECT_SIZE, 4 * (rank + OVERSAMPLING)):
        return _direct(weight, scale)
    search = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with one_thread_each() as run, torch.autocast(weight.device.type, enabled=False):
        triplets = leading_triplets(weight, rank, tol, search, scale, run, _seed(weight, fingerprint))
    sigma, residual = triplets.sigma[:rank], triplets.residual[:rank]
    absent = sigma <= _threshold(weight) * sigma[0]  # refused by the caller
    found = triplets.resolved and bool(((residual < tol) | absent).all())
    return triplets if found else _direct(weight, scale)


def _direct(weight: Tensor, scale: float) -> Triplets:
    """Full decomposition in fp64."""
    w = weight.double() * scale
    left, sigma, right = torch.linalg.svd(w, full_matrices=False)
    # ||W^T u - s v|| / s
    residual = (left.T @ w - sigma.unsqueeze(1) * right).norm(dim=1) / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
    return Triplets(left.T, sigma, residual, resolved=True)


def canonical_signs(left: Tensor) -> Tensor:
    """Rows [r, out] with the first entry within SIGN_MARGIN of the row's largest magnitude made positive."""
    magnitude = left.abs()
    close = magnitude >= (1 - SIGN_MARGIN) * magnitude.amax(dim=1, keepdim=True)
    deciding = close.int().argmax(dim=1, keepdim=True)  # the first of equals
    return left * torch.where(left.gather(1, deciding) < 0, -1.0, 1.0)


def _load(key: str, weight: Tensor, rank: int, tol: float) -> Factors | None:
    """What the cache has under the key, if it has the form of factors; whose they are is for the weight to say."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    shapes = {"basis": (rank, weight.shape[0]), "sigma": (rank,), "degenerate": (), "residual": ()}
    dtypes = {"basis": dtype, "sigma": dtype, "degenerate": torch.bool, "residual": torch.float64}
    stored = factor_cache.load(key, at_most=rank * (weight.shape[0] + 1) * dtype.itemsize)
    if stored is None or {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} != {
        name: (shape, dtypes[name]) for name, shape in shapes.items()
    }:
        return None
    degenerate, residual = bool(stored["degenerate"]), stored["residual"].item()
    if not 0 <= residual < tol or not torch.equal(canonical_signs(stored["basis"]), stored["basis"]):
        return None
    return Factors(stored["basis"], stored["sigma"], degenerate, residual)


def _store(key: str, factors: Factors) -> None:
    factor_cache.store(key, {
        "basis": factors.basis,
        "sigma": factors.sigma,
        "degenerate": torch.tensor(factors.degenerate, device="cpu"),
        "residual": torch.tensor(factors.residual, dtype=torch.float64, device="cpu"),
    })  # fmt: skip
