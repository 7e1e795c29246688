"""Whether factors that were stored are those of a weight: the weight itself says so, in a few passes over it.

    q_i = W^T u_i / sigma_i, made orthonormal from the first on,    W q_i / sigma_i = u_i

for singular triplets. That none larger is left out is what a short search beside them says: of spectra that fall by
less than a few percent over the triplets in question it may miss one.
"""
from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..common.threads import Run, one_thread_each, serial
from ..method.philox import STREAM_SOLVER, philox_normal
from .subspace import CHUNK_BYTES, CHUNK_ROWS, CHUNKS_PER_SLAB, Space, scale_for

COMPANY, LOOKS = 4, 3  # vectors and steps of the search for larger singular values
OVERLOOKED = 1e-3  # one larger by this share than the last that is claimed


@torch.no_grad()
def why_not_of(weight: Tensor, basis: Tensor, sigma: Tensor, tol: float, seed: int) -> str | None:
    """None if these are the leading left singular vectors and values of the weight, else what is wrong, in a few words.

    Args:
        weight: [m, n], dense, on a device with float64.
        basis, sigma: U^T [r, m] and [r], in one dtype.
        tol: as in truncated_svd.
        seed: of chance, from the weight's hash.
    """
    if not bool(torch.isfinite(basis).all()) or not bool(torch.isfinite(sigma).all()):
        return "they hold NaN or infinity"
    if not bool((sigma > 0).all()) or not bool((sigma[:-1] >= sigma[1:]).all()):
        return "the singular values are not positive and falling"
    rounding = 4 * torch.finfo(basis.dtype).eps
    u, s = basis.to(weight.device, torch.float64), sigma.to(weight.device, torch.float64).unsqueeze(1)
    if not float((u @ u.T - torch.eye(len(s), device=u.device)).abs().max()) <= tol:
        return "the vectors are not orthonormal"
    with one_thread_each() as run, torch.autocast(weight.device.type, enabled=False):
        v = _passed(weight, run, lambda rows, w: u[:, rows] @ w, _sum) / s  # [r, n]
        q, triangle = torch.linalg.qr(v.T)
        q = (q * triangle.diagonal().sign()).T
        # An error of u along u_1, of the size of rounding, is sigma_1 / sigma_i times as large in v.
        if not bool(((v - q).norm(dim=1) <= 2 * tol + rounding * (s[0] / s).squeeze(1)).all()):
            return "W^T u is not sigma v"
        y = _passed(weight, run, lambda rows, w: q @ w.T, functools.partial(torch.cat, dim=1))  # [r, m]
        if not bool(((y / s - u).norm(dim=1) <= 2 * tol + rounding).all()):
            return "W v is not sigma u"
        claimed = float(s[-1]) * (1 + OVERLOOKED) + tol * float(s[0])
        return "a larger singular value is missing" if _largest_beside(weight, q, s, seed, run) > claimed else None


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


def _passed(
    weight: Tensor, run: Run, product: Callable[[slice, Tensor], Tensor], joined: Callable[[list[Tensor]], Tensor]
) -> Tensor:
    """product(rows, weight[rows] in float64) of all rows, some at a time while they are in cache, joined in order."""
    m, n = weight.shape
    chunk_rows = CHUNK_BYTES[weight.device.type] // (8 * n)
    step = max(1, chunk_rows // CHUNK_ROWS) * CHUNK_ROWS

    def slab(first: int) -> Tensor:
        buffer = torch.empty(min(step, m), n, dtype=torch.float64, device=weight.device)
        products = []
        for begin in range(first, min(first + step * CHUNKS_PER_SLAB, m), step):
            rows = slice(begin, min(begin + step, m))
            products.append(product(rows, buffer[: rows.stop - begin].copy_(weight[rows])))
        return joined(products)

    run = run if weight.device.type == "cpu" else serial
    return joined(run(slab, range(0, m, step * CHUNKS_PER_SLAB)))


def _largest_beside(weight: Tensor, q: Tensor, s: Tensor, seed: int, run: Run) -> float:
    """The largest singular value that a few steps from chance find at right angles to the rows of q."""
    room = weight.shape[1] - len(q)
    if room == 0:
        return 0.0
    count = room if room <= LOOKS * COMPANY else COMPANY  # of a small matrix all there is
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scale = scale_for(float(s[0]), weight.dtype)
    space = Space(weight, count, scale, run)

    def beside(rows: Tensor) -> Tensor:
        for _ in range(2):  # the second time for what rounding left
            rows = torch.linalg.qr((rows - (rows @ q.T) @ q).T).Q.T
        return rows

    fresh = beside(philox_normal(seed, 0, count, weight.shape[1], STREAM_SOLVER).to(weight.device))
    largest = 0.0
    for _ in range(LOOKS):
        space.extend(fresh, dtype)
        ritz = space.ritz()
        largest = float(ritz.theta[0].sqrt()) / scale
        fresh = space.next_directions(ritz, count)
        if not len(fresh) or space.size + len(fresh) > room:
            break
        fresh = beside(fresh)
    return largest
