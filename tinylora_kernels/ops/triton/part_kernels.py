"""Triton device code of `tinylora::update_parts` and its backward pass: the kernels of kernels.py, a part a program.

Program (i, p) owns a few tiles of rows of part p. Columns are those of the whole y, so that a row of U^T is found where
it is; what a tile loads beyond the end of its part is zero, and nothing is stored there.
"""

import triton
import triton.language as tl

from .kernels import _adapter_ids, _add_term, _coefficients, _finite, _load_rows, _mixing, _store_rows


@triton.jit
def _chosen(numbers, PARTS: tl.constexpr):
    """numbers[program_id(1)] of a tuple."""
    chosen = numbers[0] + 0
    for p in tl.static_range(1, PARTS):
        chosen = tl.where(tl.program_id(1) == p, numbers[p], chosen)
    return chosen


@triton.jit
def update_parts_kernel(
    y_ptr,  # [N, D], updated in place
    basis_ptr,  # [R, D] fp32
    v_ptr,  # [G, u] or [G, K, u] fp32
    projection_ptr,  # [PARTS, u, R, R] or [PARTS, R, R] fp32
    offset_ptr,  # [PARTS, R] fp32, if HAS_OFFSET
    bias_ptr,  # [D] dtype of y, if HAS_BIAS
    x_ptr,  # [N, E], if HAS_X
    right_ptr,  # [PARTS, R, E] fp32, if HAS_X
    ids_ptr,  # [N / rows_per_id] int32 or int64, if HAS_IDS
    t_ptr,  # [PARTS, N, R] fp32, written
    begins, ends, groups,  # of each part
    y_stride, x_stride, N, D, E, u, tiles_per_program, rows_per_id, num_adapters,
    PARTS: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_U: tl.constexpr,
    SINGLE: tl.constexpr, LORA_XS: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_X: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """t_p = y0_p U_p - c_p or x B_p;  y_p = y0_p + b_p + (t_p M_p^T) U_p^T."""
    part = tl.program_id(1)
    begin, end, group = _chosen(begins, PARTS), _chosen(ends, PARTS), _chosen(groups, PARTS)
    v_ptr += group.to(tl.int64) * num_adapters * u
    projection_ptr += part * (R * R if LORA_XS else u * R * R)
    t_ptr += part.to(tl.int64) * N * R
    rank = tl.arange(0, R)
    block = tl.arange(0, BLOCK_D)
    if not HAS_IDS:
        mixing = _mixing(v_ptr, projection_ptr, tl.zeros([1], tl.int32), u, R, BLOCK_U, LORA_XS)  # [1, R, R]

    first = tl.program_id(0) * tiles_per_program
    for tile in range(first, first + tiles_per_program):
        rows = tile * ROWS + tl.arange(0, ROWS)
        row_ok = rows < N

        # t = y0 U - c, or x B
        if HAS_X:
            t = tl.zeros([ROWS, R], tl.float32)
            for start in range(0, E, BLOCK_D):
                x = _load_rows(x_ptr, x_stride, rows, row_ok, start + block, E)
                t += _coefficients(x, right_ptr + part * R * E, start + block, E, R)
        elif SINGLE:
            y = _load_rows(y_ptr, y_stride, rows, row_ok, begin + block, end)  # [ROWS, BLOCK_D]
            t = _coefficients(_finite(y), basis_ptr, begin + block, D, R)  # [ROWS, R]
        else:
            t = tl.zeros([ROWS, R], tl.float32)
            for start in range(begin, end, BLOCK_D):
                y = _load_rows(y_ptr, y_stride, rows, row_ok, start + block, end)
                t += _coefficients(_finite(y), basis_ptr, start + block, D, R)
        if HAS_OFFSET:
            t -= tl.load(offset_ptr + part * R + rank)[None, :]
        tl.store(t_ptr + rows.to(tl.int64)[:, None] * R + rank[None, :], t, mask=row_ok[:, None])

        # s = t M^T:  s[n, j] = sum_k t[n, k] M[j, k]
        if HAS_IDS:
            ids = _adapter_ids(ids_ptr, rows, row_ok, rows_per_id, num_adapters)  # [ROWS]
            mixing = _mixing(v_ptr, projection_ptr, ids, u, R, BLOCK_U, LORA_XS)  # [ROWS, R, R]
            if not HAS_BIAS:
                row_ok = row_ok & (ids >= 0)  # a row without an adapter is not written; its M is zero
        s = tl.sum(t[:, None, :] * mixing, axis=2)  # [ROWS, R]

        # y = y0 + s U^T
        if SINGLE and not HAS_X:
            y = _add_term(y, s, basis_ptr, begin + block, D, R)
            if HAS_BIAS:
                y += tl.load(bias_ptr + begin + block, mask=begin + block < end, other=0.0).to(tl.float32)[None, :]
            _store_rows(y_ptr, y_stride, rows, row_ok, begin + block, end, y)
        else:
            for start in range(begin, end, BLOCK_D):
                y = _load_rows(y_ptr, y_stride, rows, row_ok, start + block, end)
                y = _add_term(y, s, basis_ptr, start + block, D, R)
                if HAS_BIAS:
                    y += tl.load(bias_ptr + start + block, mask=start + block < end, other=0.0).to(tl.float32)[None, :]
                _store_rows(y_ptr, y_stride, rows, row_ok, start + block, end, y)


@triton.jit
def update_parts_backward_kernel(
    g_ptr,  # [N, D], read only
    g0_ptr,  # [N, D] contiguous, written if NEED_G0
    basis_ptr,  # [R, D] fp32
    v_ptr,  # [G, u] or [G, K, u] fp32
    projection_ptr,  # [PARTS, u, R, R] or [PARTS, R, R] fp32
    t_ptr,  # [PARTS, N, R] fp32, read if NEED_DV
    ids_ptr,  # [N / rows_per_id] int32 or int64, if HAS_IDS
    scratch_ptr,  # if NEED_DV: dM of each program [PARTS, programs, R*R], or with HAS_IDS a = g U [PARTS, N, R]
    begins, ends, groups,  # of each part
    g_stride, N, D, u, tiles_per_program, rows_per_id, num_adapters,
    PARTS: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_U: tl.constexpr,
    SINGLE: tl.constexpr, LORA_XS: tl.constexpr, HAS_IDS: tl.constexpr,
    NEED_G0: tl.constexpr, NEED_DV: tl.constexpr,
):  # fmt: skip
    """a_p = g_p U_p;  g0_p = g_p + (a_p M_p) U_p^T;  first stage of dM_p = a_p^T t_p."""
    part = tl.program_id(1)
    begin, end, group = _chosen(begins, PARTS), _chosen(ends, PARTS), _chosen(groups, PARTS)
    v_ptr += group.to(tl.int64) * num_adapters * u
    projection_ptr += part * (R * R if LORA_XS else u * R * R)
    rank = tl.arange(0, R)
    block = tl.arange(0, BLOCK_D)
    if NEED_G0 and not HAS_IDS:
        mixing = _mixing(v_ptr, projection_ptr, tl.zeros([1], tl.int32), u, R, BLOCK_U, LORA_XS)  # [1, R, R]
    d_mixing = tl.zeros([R, R], tl.float32)

    first = tl.program_id(0) * tiles_per_program
    for tile in range(first, first + tiles_per_program):
        rows = tile * ROWS + tl.arange(0, ROWS)
        row_ok = rows < N
        rank_at = (part.to(tl.int64) * N + rows)[:, None] * R + rank[None, :]  # [ROWS, R]

        # a = g U
        if SINGLE:
            g = _load_rows(g_ptr, g_stride, rows, row_ok, begin + block, end)  # [ROWS, BLOCK_D]
            a = _coefficients(g, basis_ptr, begin + block, D, R)  # [ROWS, R]
        else:
            a = tl.zeros([ROWS, R], tl.float32)
            for start in range(begin, end, BLOCK_D):
                g = _load_rows(g_ptr, g_stride, rows, row_ok, start + block, end)
                a += _coefficients(g, basis_ptr, start + block, D, R)

        if NEED_DV and HAS_IDS:
            tl.store(scratch_ptr + rank_at, a, mask=row_ok[:, None])
        if NEED_DV and not HAS_IDS:
            # dM[j, k] += sum_n a[n, j] t[n, k]
            t = tl.load(t_ptr + rank_at, mask=row_ok[:, None], other=0.0)
            d_mixing += tl.sum(a[:, :, None] * t[:, None, :], axis=0)

        if NEED_G0:
            tl.debug_barrier()  # read the basis again: kept from above, its r rows would spill out of the registers
            # s = a M:  s[n, k] = sum_j a[n, j] M[j, k]
            if HAS_IDS:
                ids = _adapter_ids(ids_ptr, rows, row_ok, rows_per_id, num_adapters)  # [ROWS]
                mixing = _mixing(v_ptr, projection_ptr, ids, u, R, BLOCK_U, LORA_XS)  # [ROWS, R, R]
            s = tl.sum(a[:, :, None] * mixing, axis=1)  # [ROWS, R]

            # g0 = g + s U^T
            if SINGLE:
                g = _add_term(g, s, basis_ptr, begin + block, D, R)
                _store_rows(g0_ptr, D, rows, row_ok, begin + block, end, g)
            else:
                for start in range(begin, end, BLOCK_D):
                    g = _load_rows(g_ptr, g_stride, rows, row_ok, start + block, end)
                    g = _add_term(g, s, basis_ptr, start + block, D, R)
                    _store_rows(g0_ptr, D, rows, row_ok, start + block, end, g)

    if NEED_DV and not HAS_IDS:
        at = (part * tl.num_programs(0) + tl.program_id(0)) * R * R + rank[:, None] * R + rank[None, :]
        tl.store(scratch_ptr + at, d_mixing)


@triton.jit
def reduce_dv_parts_kernel(
    scratch_ptr,  # dM of each program [PARTS, count, R*R], or with HAS_IDS a = g U [PARTS, count, R]
    t_ptr,  # [PARTS, count, R] fp32, if HAS_IDS
    ids_ptr,  # [count / rows_per_id], if HAS_IDS
    projection_ptr,  # [PARTS, u, R, R] or [PARTS, R, R] fp32
    dv_ptr,  # [G, u] or [G, K, u] fp32, written
    groups,  # of each part
    count, u, rows_per_id, num_adapters,
    PARTS: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, LORA_XS: tl.constexpr,
    HAS_IDS: tl.constexpr,
):  # fmt: skip
    """Second stage, of adapter program_id(1) and group program_id(2): dv_i = sum_p <P'_{p,i}, dM_p>, in order of p."""
    RR: tl.constexpr = R * R
    entries = tl.arange(0, RR)
    rank = tl.arange(0, R)
    adapter = tl.program_id(1)
    i = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    dv = tl.zeros([RR if LORA_XS else BLOCK_U], tl.float32)

    for part in tl.static_range(PARTS):
        if groups[part] == tl.program_id(2):
            d_mixing = tl.zeros([BLOCK_N, RR], tl.float32)
            for start in range(0, count, BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                if HAS_IDS:
                    ids = _adapter_ids(ids_ptr, n, n < count, rows_per_id, num_adapters)
                    mine = (ids == adapter)[:, None]
                    at = (tl.full([1], part, tl.int64) * count + n)[:, None] * R + rank[None, :]
                    a = tl.load(scratch_ptr + at, mask=mine, other=0.0)  # [BLOCK_N, R]
                    t = tl.load(t_ptr + at, mask=mine, other=0.0)
                    d_mixing += tl.reshape(a[:, :, None] * t[:, None, :], [BLOCK_N, RR])
                else:
                    at = (part * count + n)[:, None] * RR + entries[None, :]
                    d_mixing += tl.load(scratch_ptr + at, mask=(n < count)[:, None], other=0.0)
            summed = tl.sum(d_mixing, axis=0)  # [R*R]
            if LORA_XS:
                dv += tl.load(projection_ptr + part * RR + entries) * summed
            else:
                own = (part * u + i)[:, None] * RR + entries[None, :]
                dv += tl.sum(tl.load(projection_ptr + own, mask=(i < u)[:, None], other=0.0) * summed[None, :], axis=1)

    dv_ptr += (tl.program_id(2).to(tl.int64) * num_adapters + adapter) * u
    if LORA_XS:
        tl.store(dv_ptr + entries, dv)
    else:
        tl.store(dv_ptr + i, dv, mask=i < u)
