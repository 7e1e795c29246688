"""Leading singular triplets of a large matrix by block Lanczos: fp32 finds them, fp64 proves them.

The iteration runs on A = W^T W. One pass over W gives both W x and W^T (W x), a few rows at a time while they are in
cache, for a whole block of vectors x: the matrix is read from memory once a step. The search multiplies in fp32, on a
CPU by a kernel of the library (csrc/cpu/products.inl), until rounding stops it; the vectors found are then multiplied
in fp64, refined there, and accepted on their true residual. A block, not a single vector, because equal singular
values hide from a single one. The first block comes from a few steps on a sample of the rows.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.threads import Run, serial
from ..method.philox import STREAM_SOLVER, philox_normal
from ..ops.native import library as native

Product = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # rows W [m, n], X [b, n] -> X W^T [b, m], X W^T W [b, n]

OVERSAMPLING = 6  # vectors in a block beyond the rank
SETTLED = 1e-2  # from this residual on the space grows along the wanted vectors
COMPANY = 2  # and so many more: half a block takes three quarters of the time of a whole one, and no more passes
BLOCKS_KEPT = 12  # blocks in the space before it is compressed
MAX_STEPS = 400
PATIENCE = 12  # steps of the search without progress: its products are less exact than fp32 (TF32, bf16)
SAMPLE_STRIDE = 8  # every 8th row of W makes the sample
SAMPLE_STEPS = 3
SAMPLE_BLOCKS = 8  # a sample has at least as many rows as this many blocks, or there is none
RANDOM_SHARE = 0.5  # length of the random vector added to each one found in the sample
POWER_STEP = 0.5  # what is wrong with a vector shrinks to this share of the bound in _Ritz.good_enough, measured
CHUNK_BYTES = {"cpu": 3 << 19, "cuda": 1 << 27}  # of W in the product's dtype, multiplied at a time: about a CPU's L2
CHUNK_ROWS = 16  # a chunk is a multiple of: the products' inner kernels waste what is left over
FUSED_SLAB = 256  # rows multiplied at a time by the library's kernel, to be shared among threads
CHUNKS_PER_SLAB = 6  # summed in the precision at hand; slabs are summed in fp64, in order, whatever the threads
ANGLE_TOL = 2e-6  # accepted bound on the error of a singular vector, radians; the error is below half of it
ROUNDING = {torch.float32: 5e-7, torch.float64: 4e-15}  # a residual below this share of ||A|| may be rounding
DEGENERATE_GAP = 1e-6  # closer relative to each other, two singular values have no vectors of their own


@dataclass
class Triplets:
    """Leading singular triplets, largest first.

    Attributes:
        left: [b, m] rows u_i, orthonormal, fp64.
        sigma: [b] fp64.
        residual: [b] ||W^T u_i - sigma_i v_i|| / sigma_i.
        resolved: whether the first `rank` are good enough; False: the steps ran out.
    """

    left: Tensor
    sigma: Tensor
    residual: Tensor
    resolved: bool


def leading_triplets(
    weight: Tensor, rank: int, tol: float, search_dtype: torch.dtype, scale: float = 1.0, run: Run = serial,
    seed: int = 0,
) -> Triplets:  # fmt: skip
    """Triplets of scale * weight [m, n] on cpu or cuda; the first `rank` good enough unless MAX_STEPS ran out.

    Args:
        run: maps a function over pieces of the weight, perhaps on several threads.
        seed: of the random start, 64 bits of the weight's own hash: against a start that is known a weight can be built
            whose largest singular value no search from it finds.
    """
    block = rank + OVERSAMPLING
    space = Space(weight, block, scale, run)
    fresh = _first_block(weight, block, search_dtype, scale, run, seed)
    if search_dtype != torch.float64:
        ritz = space.grow(fresh, rank, tol, search_dtype, PATIENCE, power_step_follows=True)
        fresh = space.restart(ritz)
    ritz = space.grow(fresh, rank, tol, torch.float64, MAX_STEPS)
    sigma = ritz.theta.sqrt()
    left = (ritz.mix.T @ space.left[: space.size]) / sigma.unsqueeze(1)
    return Triplets(left, sigma, ritz.residual, ritz.good_enough(rank, tol, ROUNDING[torch.float64]))


def scale_for(largest: float, dtype: torch.dtype) -> float:
    """A power of two that brings numbers of this size where their squares stay inside the range of the arithmetic."""
    most = 1000 if dtype == torch.float64 else 100  # the scale itself stays inside that of fp32
    return 1.0 if 1e-12 < largest < 1e12 else 2.0 ** min(-math.frexp(largest)[1], most)


def _first_block(weight: Tensor, block: int, dtype: torch.dtype, scale: float, run: Run, seed: int) -> Tensor:
    """Orthonormal rows [block, n] to start from: the leading right vectors of a sample of W's rows, and chance.

    Three steps on an eighth of the rows save one or two passes over all of them (slowly falling spectra). The random
    part holds a share of what the sampled rows say nothing about.
    """
    random = _orthonormal(philox_normal(seed, 0, block, weight.shape[1], STREAM_SOLVER).to(weight.device))
    sample = weight[::SAMPLE_STRIDE]
    if len(sample) < SAMPLE_BLOCKS * block:
        return random
    space, fresh = Space(sample, block, scale, run), random
    for _ in range(SAMPLE_STEPS):
        space.extend(fresh, dtype)
        ritz = space.ritz()
        fresh = space.next_directions(ritz, block)
        if not len(fresh):
            break
    return _orthonormal(space.restart(ritz) + RANDOM_SHARE * random)


@dataclass
class _Ritz:
    """Approximate eigenvectors of A: theta [b] falling, mix [k, b] their coefficients in the space."""

    theta: Tensor
    mix: Tensor
    rows: Tensor  # [b, n] A x - theta x
    residual: Tensor  # [b] ||A x - theta x|| / theta

    def good_enough(self, rank: int, tol: float, rounding: float, power_step_follows: bool = False) -> bool:
        """Whether the first `rank` are resolved to tol and ANGLE_TOL, or as far as rounding allows.

        Args:
            power_step_follows: not as they are but after one multiplication of the block by A, as far as can be told.
                What is wrong with x_i lies along vectors outside the block, of eigenvalues below theta_b, and shrinks
                to at most theta_b / theta_i of itself.

        Against a spectrum outside the block at relative distance d, a relative residual rho leaves an error rho / d in
        the vector. Against a neighbour inside it at distance g, whose residual is rho', the error is rho rho' / (d g).
        """
        theta, rho = self.theta.tolist(), self.residual.tolist()
        if power_step_follows:
            rho = [residual * POWER_STEP * theta[-1] / value for residual, value in zip(rho, theta, strict=True)]
        for i in range(min(rank, len(theta))):
            floor = rounding * theta[0] / max(theta[i], 1e-300)
            gaps = [abs(theta[i] - other) / theta[i] for j, other in enumerate(theta) if j != i]
            if rho[i] > max(tol, floor):
                return False
            if min(gaps, default=1.0) < 2 * DEGENERATE_GAP:
                continue
            distance = max(1.0 - theta[-1] / theta[i], DEGENERATE_GAP) if len(theta) > 1 else 1.0
            if rho[i] > max(ANGLE_TOL * distance, floor):
                return False
            others = zip((other for j, other in enumerate(rho) if j != i), gaps, strict=True)
            if rho[i] > floor and any(rho[i] * other > ANGLE_TOL * distance * gap for other, gap in others):
                return False
        return True


class Space:
    """An orthonormal basis of right vectors with their images W x and A x, grown block by block."""

    def __init__(self, weight: Tensor, block: int, scale: float, run: Run):
        m, n = weight.shape
        self.weight, self.block, self.scale = weight, block, scale
        self.run = run if weight.device.type == "cpu" else serial
        self.capacity = min(BLOCKS_KEPT * block, n)
        self.right = torch.empty(self.capacity, n, dtype=torch.float64, device=weight.device)  # X
        self.left = self.right.new_empty(self.capacity, m)  # X W^T
        self.image = self.right.new_empty(self.capacity, n)  # X A
        self.gram = self.right.new_zeros(self.capacity, self.capacity)  # X A X^T
        self.size = 0

    def grow(
        self, fresh: Tensor, rank: int, tol: float, dtype: torch.dtype, patience: int, power_step_follows: bool = False
    ) -> _Ritz:
        """Extend from the rows given until the first `rank` are good enough, or nothing gets better any more."""
        best, waited = float("inf"), 0
        for _ in range(MAX_STEPS):
            self.extend(fresh, dtype)
            ritz = self.ritz()
            worst = ritz.residual[:rank].max().item()
            best, waited = (worst, 0) if worst < best else (best, waited + 1)
            if waited > patience or ritz.good_enough(rank, tol, ROUNDING[dtype], power_step_follows):
                break
            fresh = self.next_directions(ritz, self.block if worst > SETTLED else rank + COMPANY)
            if not len(fresh):
                break
        return ritz

    def extend(self, fresh: Tensor, dtype: torch.dtype) -> None:
        """Add orthonormal rows [p, n], multiplied by W and A in the given precision; make room for them first."""
        if self.size + len(fresh) > self.capacity:
            self._compress()
        old, new = self.size, self.size + len(fresh)
        self.right[old:new] = fresh
        multiply(self, fresh, dtype, self.left[old:new], self.image[old:new])
        self.gram[:new, old:new] = self.left[:new] @ self.left[old:new].T
        self.gram[old:new, :old] = self.gram[:old, old:new].T
        self.size = new

    def ritz(self) -> _Ritz:
        k = self.size
        theta, mix = torch.linalg.eigh(self.gram[:k, :k])
        count = min(self.block, k)
        theta, mix = theta.flip(0)[:count].clamp_min(1e-300), mix.flip(1)[:, :count]
        rows = mix.T @ self.image[:k] - theta.unsqueeze(1) * (mix.T @ self.right[:k])
        return _Ritz(theta, mix, rows, rows.norm(dim=1) / theta)

    def next_directions(self, ritz: _Ritz, count: int) -> Tensor:
        """Orthonormal rows [p, n] along the first `count` residuals that are not zero, orthogonal to the space."""
        rows = ritz.rows[:count]
        norms = rows.norm(dim=1, keepdim=True)
        alive = norms.squeeze(1) > 1e-15 * ritz.theta[0]
        rows = rows[alive] / norms[alive]
        for _ in range(2):  # the second time for what rounding left, and for rows that were parallel
            rows = self._project_out(rows)
            rows = _orthonormal(rows) if len(rows) else rows
        return rows

    def restart(self, ritz: _Ritz) -> Tensor:
        """Empty the space; return orthonormal rows [b, n] along A x for its best vectors x: a power step for free."""
        best = ritz.mix.T @ self.image[: self.size]
        self.size = 0
        return _orthonormal(best)

    def _compress(self) -> None:
        """Keep the best three blocks: the vectors wanted, and enough company for the convergence to go on."""
        k, keep = self.size, min(3 * self.block, self.size)
        theta, mix = torch.linalg.eigh(self.gram[:k, :k])
        theta, mix = theta.flip(0)[:keep], mix.flip(1)[:, :keep]
        for stored in (self.right, self.left, self.image):
            stored[:keep] = mix.T @ stored[:k]
        self.gram[:keep, :keep] = torch.diag(theta)
        self.size = keep

    def _project_out(self, rows: Tensor) -> Tensor:
        basis = self.right[: self.size]
        return rows - (rows @ basis.T) @ basis


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.T).Q.T


def multiply(space: Space, rows: Tensor, dtype: torch.dtype, left: Tensor, image: Tensor) -> None:
    """left = X W^T and image = X W^T W for rows X [b, n], in one pass over W [m, n]."""
    weight, scale = space.weight, space.scale
    x = rows.to(dtype)
    fused = dtype == torch.float32 and scale == 1.0 and native.can_multiply(weight)
    x = x.contiguous() if fused else x  # once, not for every slab
    slab, product = (FUSED_SLAB, native.products) if fused else _by_chunks(weight, x, scale)

    def multiply_slab(first: int) -> Tensor:
        y, total = product(weight[first : first + slab], x)
        left[:, first : first + slab] = y
        return total

    image.zero_()
    for partial in space.run(multiply_slab, range(0, len(weight), slab)):
        image.add_(partial)


def _by_chunks(weight: Tensor, x: Tensor, scale: float) -> tuple[int, Product]:
    """Rows in a slab, and their product by torch: a chunk is widened, and multiplied twice while it is in cache."""
    chunk_rows = CHUNK_BYTES[weight.device.type] // (weight.shape[1] * x.element_size())
    step = max(1, chunk_rows // CHUNK_ROWS) * CHUNK_ROWS

    def product(slab: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        # S = sum over chunks of (X chunk^T) chunk
        total = torch.zeros_like(x)
        y = x.new_empty(len(x), len(slab))
        as_is = slab.dtype == x.dtype and scale == 1.0
        buffer = slab if as_is else torch.empty_like(slab[:step], dtype=x.dtype)  # one for all chunks
        for begin in range(0, len(slab), step):
            chunk = slab[begin : begin + step]  # [step, n]
            if not as_is:
                chunk = buffer[: len(chunk)].copy_(chunk)
                if scale != 1.0:
                    chunk *= scale
            part = x @ chunk.T  # [b, step]
            y[:, begin : begin + step] = part
            total.addmm_(part, chunk)
        return y, total

    return step * CHUNKS_PER_SLAB, product
