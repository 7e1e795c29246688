"""Triton device code of `tinylora::update` and `tinylora::update_backward`. Imported only when a kernel is wanted.

One program owns a few tiles of ROWS rows. A row that fits one tile (SINGLE) is read from memory once and written once:
it waits in registers between the projection and the update. A longer row is read twice, column block by column block.
All sums are in fp32, in an order fixed by the shapes alone. There are no atomics. r is small, so every contraction
over it is a handful of multiplications and additions, never tl.dot.

Where a product is to be fused with an addition tl.fma says so; the compiler may not fuse on its own. It would fuse
products into the butterfly that sums them across lanes, a b + shuffled(c d), and the two partners, each with the
other's product rounded, would end with sums that differ in the last bit. Triton takes them for equal: it lets all of
them write the sum to one place in shared memory, and which bits win is up to the hardware.
"""
import triton
import triton.language as tl


@triton.jit
def _adapter_ids(ids_ptr, rows, row_ok, rows_per_id, num_adapters):
    """Adapter of each row: [ROWS]; -1 (no adapter) past the end. Any other id outside [0, K) stops the kernel."""
    ids = tl.load(ids_ptr + rows // rows_per_id, mask=row_ok, other=-1)
    tl.device_assert((ids >= -1) & (ids < num_adapters), "tinylora: adapter id outside [-1, K)")
    return ids


@triton.jit
def _mixing(v_ptr, projection_ptr, ids, u, R: tl.constexpr, BLOCK_U: tl.constexpr, LORA_XS: tl.constexpr):
    """M = sum_i v_i P'_i for every adapter id in ids [A]: [A, R, R]; zero where the id is -1."""
    RR: tl.constexpr = R * R
    entries = tl.arange(0, RR)
    chosen = (ids >= 0)[:, None]
    v_row = v_ptr + tl.maximum(ids, 0).to(tl.int64)[:, None] * u  # [A, 1]
    if LORA_XS:
        # M = projection * v, entry by entry
        v = tl.load(v_row + entries[None, :], mask=chosen, other=0.0)  # [A, R*R]
        mixing = v * tl.load(projection_ptr + entries)[None, :]
    else:
        mixing = tl.zeros([ids.shape[0], RR], tl.float32)
        for start in range(0, u, BLOCK_U):
            i = start + tl.arange(0, BLOCK_U)
            v = tl.load(v_row + i[None, :], mask=chosen & (i < u)[None, :], other=0.0)  # [A, BLOCK_U]
            p = tl.load(projection_ptr + i[:, None] * RR + entries[None, :], mask=(i < u)[:, None], other=0.0)
            mixing += tl.sum(v[:, :, None] * p[None, :, :], axis=1)
    return tl.reshape(mixing, [ids.shape[0], R, R])


@triton.jit
def _basis_row(basis_ptr, j, cols, D, ROWS: tl.constexpr):
    """Row j of U^T, repeated: [ROWS, BLOCK_D]. The shape of x, so that both get one layout and never change it."""
    same = tl.zeros([ROWS, 1], tl.int32)
    return tl.load(basis_ptr + j * D + (same + cols[None, :]), mask=(same + cols[None, :]) < D, other=0.0)


@triton.jit
def _project(x, basis_ptr, cols, D, R: tl.constexpr):
    """x U over these columns: [ROWS, BLOCK_D] -> [ROWS, R]."""
    column = tl.arange(0, R)[None, :]
    coeff = tl.zeros([x.shape[0], R], tl.float32)
    for j in tl.static_range(R):
        x_u = tl.sum(x * _basis_row(basis_ptr, j, cols, D, x.shape[0]), axis=1)  # [ROWS]
        coeff = tl.where(column == j, x_u[:, None], coeff)
    return coeff


@triton.jit
def _add_delta(x, s, basis_ptr, cols, D, R: tl.constexpr):
    """x + s U^T over these columns: [ROWS, BLOCK_D]."""
    column = tl.arange(0, R)[None, :]
    for j in tl.static_range(R):
        s_j = tl.sum(tl.where(column == j, s, 0.0), axis=1)  # [ROWS]
        b = _basis_row(basis_ptr, j, cols, D, x.shape[0])
        x = tl.fma(tl.broadcast_to(s_j[:, None], x.shape), b, x)
    return x


@triton.jit
def _load_rows(x_ptr, x_stride, rows, row_ok, cols, D):
    """x[rows, cols] as fp32: [ROWS, BLOCK_D]; zero outside."""
    at = x_ptr + rows.to(tl.int64)[:, None] * x_stride + cols[None, :]
    return tl.load(at, mask=row_ok[:, None] & (cols < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_rows(x_ptr, x_stride, rows, row_ok, cols, D, x):
    """x[rows, cols] = x, rounded once to the element type."""
    at = x_ptr + rows.to(tl.int64)[:, None] * x_stride + cols[None, :]
    tl.store(at, x.to(x_ptr.dtype.element_ty), mask=row_ok[:, None] & (cols < D)[None, :])


@triton.jit
def update_kernel(
    y_ptr,  # [N, D], updated in place
    basis_ptr,  # [R, D] fp32
    v_ptr,  # [u] or [K, u] fp32
    projection_ptr,  # [u, R, R] or [R, R] fp32
    offset_ptr,  # [R] fp32, if HAS_OFFSET
    ids_ptr,  # [N / rows_per_id] int32 or int64, if HAS_IDS
    t_ptr,  # [N, R] fp32, written
    y_stride, N, D, u, tiles_per_program, rows_per_id, num_adapters,
    R: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_U: tl.constexpr,
    SINGLE: tl.constexpr, LORA_XS: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """t = y0 U - c;  y = y0 + (t M^T) U^T."""
    rank = tl.arange(0, R)
    cols = tl.arange(0, BLOCK_D)
    if not HAS_IDS:
        mixing = _mixing(v_ptr, projection_ptr, tl.zeros([1], tl.int32), u, R, BLOCK_U, LORA_XS)  # [1, R, R]

    first = tl.program_id(0) * tiles_per_program
    for tile in range(first, first + tiles_per_program):
        rows = tile * ROWS + tl.arange(0, ROWS)
        row_ok = rows < N

        # t = y0 U - c
        if SINGLE:
            y = _load_rows(y_ptr, y_stride, rows, row_ok, cols, D)  # [ROWS, BLOCK_D]
            t = _project(y, basis_ptr, cols, D, R)  # [ROWS, R]
        else:
            t = tl.zeros([ROWS, R], tl.float32)
            for start in range(0, D, BLOCK_D):
                y = _load_rows(y_ptr, y_stride, rows, row_ok, start + cols, D)
                t += _project(y, basis_ptr, start + cols, D, R)
        if HAS_OFFSET:
            t -= tl.load(offset_ptr + rank)[None, :]
        tl.store(t_ptr + rows.to(tl.int64)[:, None] * R + rank[None, :], t, mask=row_ok[:, None])

        # s = t M^T:  s[n, j] = sum_k t[n, k] M[j, k]
        if HAS_IDS:
            ids = _adapter_ids(ids_ptr, rows, row_ok, rows_per_id, num_adapters)  # [ROWS]
            mixing = _mixing(v_ptr, projection_ptr, ids, u, R, BLOCK_U, LORA_XS)  # [ROWS, R, R]
            row_ok = row_ok & (ids >= 0)  # a row without an adapter is not written
        s = tl.sum(t[:, None, :] * mixing, axis=2)  # [ROWS, R]

        # y = y0 + s U^T
        if SINGLE:
            _store_rows(y_ptr, y_stride, rows, row_ok, cols, D, _add_delta(y, s, basis_ptr, cols, D, R))
        else:
            for start in range(0, D, BLOCK_D):
                y = _load_rows(y_ptr, y_stride, rows, row_ok, start + cols, D)
                y = _add_delta(y, s, basis_ptr, start + cols, D, R)
                _store_rows(y_ptr, y_stride, rows, row_ok, start + cols, D, y)


@triton.jit
def update_backward_kernel(
    g_ptr,  # [N, D], read only
    g0_ptr,  # [N, D] contiguous, written if NEED_G0
    basis_ptr,  # [R, D] fp32
    v_ptr,  # [u] or [K, u] fp32
    projection_ptr,  # [u, R, R] or [R, R] fp32
    t_ptr,  # [N, R] fp32, read if NEED_DV
    ids_ptr,  # [N / rows_per_id] int32 or int64, if HAS_IDS
    scratch_ptr,  # written if NEED_DV: dM of each program [programs, R*R], or with HAS_IDS a = g U [N, R]
    g_stride, N, D, u, tiles_per_program, rows_per_id, num_adapters,
    R: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_U: tl.constexpr,
    SINGLE: tl.constexpr, LORA_XS: tl.constexpr, HAS_IDS: tl.constexpr,
    NEED_G0: tl.constexpr, NEED_DV: tl.constexpr,
):  # fmt: skip
    """a = g U;  g0 = g + (a M) U^T;  first stage of dM = a^T t."""
    rank = tl.arange(0, R)
    cols = tl.arange(0, BLOCK_D)
    if NEED_G0 and not HAS_IDS:
        mixing = _mixing(v_ptr, projection_ptr, tl.zeros([1], tl.int32), u, R, BLOCK_U, LORA_XS)  # [1, R, R]
    d_mixing = tl.zeros([R, R], tl.float32)

    first = tl.program_id(0) * tiles_per_program
    for tile in range(first, first + tiles_per_program):
        rows = tile * ROWS + tl.arange(0, ROWS)
        row_ok = rows < N
        rank_at = rows.to(tl.int64)[:, None] * R + rank[None, :]  # [ROWS, R]

        # a = g U
        if SINGLE:
            g = _load_rows(g_ptr, g_stride, rows, row_ok, cols, D)  # [ROWS, BLOCK_D]
            a = _project(g, basis_ptr, cols, D, R)  # [ROWS, R]
        else:
            a = tl.zeros([ROWS, R], tl.float32)
            for start in range(0, D, BLOCK_D):
                g = _load_rows(g_ptr, g_stride, rows, row_ok, start + cols, D)
                a += _project(g, basis_ptr, start + cols, D, R)

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
                _store_rows(g0_ptr, D, rows, row_ok, cols, D, _add_delta(g, s, basis_ptr, cols, D, R))
            else:
                for start in range(0, D, BLOCK_D):
                    g = _load_rows(g_ptr, g_stride, rows, row_ok, start + cols, D)
                    g = _add_delta(g, s, basis_ptr, start + cols, D, R)
                    _store_rows(g0_ptr, D, rows, row_ok, start + cols, D, g)

    if NEED_DV and not HAS_IDS:
        at = tl.program_id(0) * R * R + rank[:, None] * R + rank[None, :]
        tl.store(scratch_ptr + at, d_mixing)


@triton.jit
def reduce_dv_kernel(
    scratch_ptr,  # dM of each program [count, R*R], or with HAS_IDS a = g U [count, R]
    t_ptr,  # [count, R] fp32, if HAS_IDS
    ids_ptr,  # [count / rows_per_id], if HAS_IDS
    projection_ptr,  # [u, R, R] or [R, R] fp32
    dv_ptr,  # [u] or [K, u] fp32, written
    count, u, rows_per_id, num_adapters,
    R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, LORA_XS: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """Second stage: dM of adapter program_id(1), summed over the scratch in a fixed order;  dv_i = <P'_i, dM>."""
    RR: tl.constexpr = R * R
    entries = tl.arange(0, RR)
    rank = tl.arange(0, R)
    adapter = tl.program_id(1)

    d_mixing = tl.zeros([BLOCK_N, RR], tl.float32)
    for start in range(0, count, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        if HAS_IDS:
            ids = _adapter_ids(ids_ptr, n, n < count, rows_per_id, num_adapters)
            mine = (ids == adapter)[:, None]
            at = n.to(tl.int64)[:, None] * R + rank[None, :]
            a = tl.load(scratch_ptr + at, mask=mine, other=0.0)  # [BLOCK_N, R]
            t = tl.load(t_ptr + at, mask=mine, other=0.0)
            d_mixing += tl.reshape(a[:, :, None] * t[:, None, :], [BLOCK_N, RR])
        else:
            d_mixing += tl.load(scratch_ptr + n[:, None] * RR + entries[None, :], mask=(n < count)[:, None], other=0.0)
    d_mixing = tl.sum(d_mixing, axis=0)  # [R*R]

    i = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    if LORA_XS:
        # dv = projection * dM, entry by entry
        tl.store(dv_ptr + adapter.to(tl.int64) * u + entries, tl.load(projection_ptr + entries) * d_mixing)
    else:
        # dv_i = <P'_i, dM>
        p = tl.load(projection_ptr + i[:, None] * RR + entries[None, :], mask=(i < u)[:, None], other=0.0)
        tl.store(dv_ptr + adapter.to(tl.int64) * u + i, tl.sum(p * d_mixing[None, :], axis=1), mask=i < u)
