"""Leading singular triplets of a large matrix by block Lanczos: fp32 finds them, fp64 proves them.

The iteration runs on A = W^T W. One pass over W gives both W x and W^T (W x), block by block of rows while they are in
cache, for a whole block of vectors x: the matrix is read from memory once a step. The search multiplies in fp32 until
rounding stops it; the vectors found are then multiplied in fp64, refined there, and accepted on their true residual.
A block, not a single vector, because equal singular values hide from a single one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .projection import STREAM_SOLVER, philox_normal
from .threads import Run, serial

OVERSAMPLING = 6  # vectors in a block beyond the rank
BLOCKS_KEPT = 12  # blocks in the space before it is compressed
MAX_STEPS = 400
PATIENCE = 12  # steps of the search without progress: its products are less exact than fp32 (TF32, bf16)
CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 27}  # of W in the product's dtype, multiplied at a time: half a CPU's L2
CHUNKS_PER_SLAB = 8  # summed in the precision at hand; slabs are summed in fp64, in order, whatever the threads
ANGLE_TOL = 3e-6  # accepted bound on the error of a singular vector, radians; the error is below a third of it
ROUNDING = {torch.float32: 5e-7, torch.float64: 4e-15}  # a residual below this share of ||A|| may be rounding
DEGENERATE_GAP = 1e-6  # closer relative to each other, two singular values have no vectors of their own


@dataclass
class Triplets:
    """Leading singular triplets, largest first.

    left      [b, m] rows u_i, orthonormal, fp64
    sigma     [b] fp64
    residual  [b] ||W^T u_i - sigma_i v_i|| / sigma_i
    resolved  whether the first `rank` are good enough; False: the steps ran out
    """

    left: Tensor
    sigma: Tensor
    residual: Tensor
    resolved: bool


def leading_triplets(
    weight: Tensor, rank: int, tol: float, search_dtype: torch.dtype, scale: float = 1.0, run: Run = serial
) -> Triplets:
    """Triplets of scale * weight [m, n] on cpu or cuda; the first `rank` good enough unless MAX_STEPS ran out.

    run  maps a function over pieces of the weight, perhaps on several threads.
    """
    block = rank + OVERSAMPLING
    space = _Space(weight, block, scale, run if weight.device.type == "cpu" else serial)
    start = philox_normal(0, 0, block, weight.shape[1], STREAM_SOLVER).to(weight.device)
    fresh = torch.linalg.qr(start.T).Q.T  # [block, n]
    if search_dtype != torch.float64:
        ritz = space.grow(fresh, rank, tol, search_dtype, PATIENCE)
        fresh = space.restart(ritz)
    ritz = space.grow(fresh, rank, tol, torch.float64, MAX_STEPS)
    sigma = ritz.theta.sqrt()
    left = (ritz.mix.T @ space.left[: space.size]) / sigma.unsqueeze(1)
    return Triplets(left, sigma, ritz.residual, ritz.good_enough(rank, tol, ROUNDING[torch.float64]))


@dataclass
class _Ritz:
    """Approximate eigenvectors of A: theta [b] falling, mix [k, b] their coefficients in the space."""

    theta: Tensor
    mix: Tensor
    rows: Tensor  # [b, n] A x - theta x
    residual: Tensor  # [b] ||A x - theta x|| / theta

    def good_enough(self, rank: int, tol: float, rounding: float) -> bool:
        """Whether the first `rank` are resolved to tol and ANGLE_TOL, or as far as rounding allows.

        Against a spectrum outside the block at relative distance d, a relative residual rho leaves an error rho / d in
        the vector. Against a neighbour inside it at distance g, whose residual is rho', the error is rho rho' / (d g).
        """
        theta, rho = self.theta.tolist(), self.residual.tolist()
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
            others = [other for j, other in enumerate(rho) if j != i]
            if any(rho[i] * other > ANGLE_TOL * distance * gap for other, gap in zip(others, gaps)) and rho[i] > floor:
                return False
        return True


class _Space:
    """An orthonormal basis of right vectors with their images W x and A x, grown block by block."""

    def __init__(self, weight: Tensor, block: int, scale: float, run: Run):
        m, n = weight.shape
        self.weight, self.block, self.scale, self.run = weight, block, scale, run
        self.capacity = min(BLOCKS_KEPT * block, n)
        empty = {"dtype": torch.float64, "device": weight.device}
        self.right = torch.empty(self.capacity, n, **empty)  # X
        self.left = torch.empty(self.capacity, m, **empty)  # X W^T
        self.image = torch.empty(self.capacity, n, **empty)  # X A
        self.gram = torch.zeros(self.capacity, self.capacity, **empty)  # X A X^T
        self.size = 0

    def grow(self, fresh: Tensor, rank: int, tol: float, dtype: torch.dtype, patience: int) -> _Ritz:
        """Extend from the rows given until the first `rank` are good enough, or nothing gets better any more."""
        best, waited = float("inf"), 0
        for _ in range(MAX_STEPS):
            self.extend(fresh, dtype)
            ritz = self.ritz()
            worst = ritz.residual[:rank].max().item()
            best, waited = (worst, 0) if worst < best else (best, waited + 1)
            if waited > patience or ritz.good_enough(rank, tol, ROUNDING[dtype]):
                break
            fresh = self.next_directions(ritz)
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

    def next_directions(self, ritz: _Ritz) -> Tensor:
        """Orthonormal rows [p, n] along the residuals, orthogonal to the space; none when the space is exhausted."""
        norms = ritz.rows.norm(dim=1, keepdim=True)
        alive = norms.squeeze(1) > 1e-15 * ritz.theta[0]
        rows = self._project_out(ritz.rows[alive] / norms[alive])
        if not len(rows):
            return rows
        _, strength, directions = torch.linalg.svd(rows, full_matrices=False)
        rows = self._project_out(directions[strength > 1e-10])
        return torch.linalg.qr(rows.T).Q.T if len(rows) else rows

    def restart(self, ritz: _Ritz) -> Tensor:
        """Empty the space; return orthonormal rows [b, n] along A x for its best vectors x: a power step for free."""
        best = ritz.mix.T @ self.image[: self.size] / ritz.theta.unsqueeze(1)
        self.size = 0
        return torch.linalg.qr(best.T).Q.T

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
        for _ in range(2):
            rows = rows - (rows @ basis.T) @ basis
        return rows


def multiply(space: _Space, rows: Tensor, dtype: torch.dtype, left: Tensor, image: Tensor) -> None:
    """left = X W^T and image = X W^T W for rows X [b, n], in one pass over W [m, n]."""
    weight, scale = space.weight, space.scale
    m, n = weight.shape
    x = rows.to(dtype)
    step = max(16, CHUNK_BYTES[weight.device.type] // (n * x.element_size()))
    slab = step * CHUNKS_PER_SLAB

    def multiply_slab(first: int) -> Tensor:
        total = torch.zeros_like(x)
        last = min(first + slab, m)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            chunk = weight[begin:end].to(dtype)  # [step, n]
            if scale != 1.0:
                chunk = chunk * scale
            y = x @ chunk.T  # [b, step]
            left[:, begin:end] = y
            total.addmm_(y, chunk)
        return total

    image.zero_()
    for partial in space.run(multiply_slab, range(0, m, slab)):
        image.add_(partial)
