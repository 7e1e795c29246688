"""Triton device code of the ops. Imported only when a kernel is wanted.

One program owns a few tiles of ROWS rows. A row that is updated itself and fits one tile (SINGLE) is read from memory
once and written once: it waits in registers between its coefficients and the update. Any other is read column block by
column block, and what is written, a longer row or one of the other side of the layer, passes in a second loop.
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
def _factor_row(factor_ptr, j, cols, width, ROWS: tl.constexpr):
    """Row j of U^T or B^T, repeated: [ROWS, BLOCK]. The shape of x, so that both get one layout and never change it."""
    same = tl.zeros([ROWS, 1], tl.int32)
    return tl.load(factor_ptr + j * width + (same + cols[None, :]), mask=(same + cols[None, :]) < width, other=0.0)


@triton.jit
def _coefficients(x, factor_ptr, cols, width, R: tl.constexpr):
    """x U over these columns: [ROWS, BLOCK] -> [ROWS, R]."""
    column = tl.arange(0, R)[None, :]
    found = tl.zeros([x.shape[0], R], tl.float32)
    for j in tl.static_range(R):
        x_u = tl.sum(x * _factor_row(factor_ptr, j, cols, width, x.shape[0]), axis=1)  # [ROWS]
        found = tl.where(column == j, x_u[:, None], found)
    return found


@triton.jit
def _add_term(x, gains, factor_ptr, cols, width, R: tl.constexpr):
    """x + gains U^T over these columns: [ROWS, BLOCK]."""
    column = tl.arange(0, R)[None, :]
    for j in tl.static_range(R):
        gain = tl.sum(tl.where(column == j, gains, 0.0), axis=1)  # [ROWS]
        b = _factor_row(factor_ptr, j, cols, width, x.shape[0])
        x = tl.fma(tl.broadcast_to(gain[:, None], x.shape), b, x)
    return x


@triton.jit
def _finite(x):
    """x, and zero where it is not finite."""
    return tl.where(x - x == 0.0, x, 0.0)


@triton.jit
def _load_rows(x_ptr, x_stride, rows, row_ok, cols, width):
    """x[rows, cols] as fp32: [ROWS, BLOCK]; zero outside."""
    at = x_ptr + rows.to(tl.int64)[:, None] * x_stride + cols[None, :]
    return tl.load(at, mask=row_ok[:, None] & (cols < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_rows(x_ptr, x_stride, rows, row_ok, cols, width, x):
    """x[rows, cols] = x, rounded once to the element type."""
    at = x_ptr + rows.to(tl.int64)[:, None] * x_stride + cols[None, :]
    tl.store(at, x.to(x_ptr.dtype.element_ty), mask=row_ok[:, None] & (cols < width)[None, :])


@triton.jit
def rows_kernel(
    x_ptr,  # [N, E] the rows that are read: y0, g or x
    y_ptr,  # [N, D] the rows that are written, if WRITES: y, g0 or dx
    read_ptr,  # [R, E] fp32, the factor of the rows that are read
    write_ptr,  # [R, D] fp32, the factor of those that are written
    v_ptr,  # [u] or [K, u] fp32
    projection_ptr,  # [u, R, R] or [R, R] fp32
    offset_ptr,  # [R] fp32, if HAS_OFFSET
    bias_ptr,  # [D], if HAS_BIAS
    ids_ptr,  # [N / rows_per_id] int32 or int64, if HAS_IDS
    t_ptr,  # [N, R] fp32, read if NEED_DV
    kept_ptr,  # [N, R] fp32, written if KEEPS: the coefficients; with NEED_DV [programs, R * R]: dM of each program
    x_stride, y_stride, N, E, D, u, tiles_per_program, rows_per_id, num_adapters,
    R: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_U: tl.constexpr, SINGLE: tl.constexpr,
    ONTO: tl.constexpr,  # what the term is added to: 0 the rows that are read, 1 those that are written, 2 nothing
    TRANSPOSED: tl.constexpr, ONLY_FINITE: tl.constexpr, IN_PLACE: tl.constexpr, LORA_XS: tl.constexpr,
    HAS_OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IDS: tl.constexpr, WRITES: tl.constexpr, KEEPS: tl.constexpr,
    NEED_DV: tl.constexpr,
):  # fmt: skip
    """t = y0 U - c;  y = y0 + b + (t M^T) U^T.   a = g U;  g0 = g + (a M) U^T;  dM = a^T t.   And with another side."""
    rank = tl.arange(0, R)
    cols = tl.arange(0, BLOCK)
    mixing = tl.zeros([ROWS if HAS_IDS else 1, R, R], tl.float32)
    d_mixing = tl.zeros([R, R], tl.float32)

    first = tl.program_id(0) * tiles_per_program
    for tile in range(first, first + tiles_per_program):
        rows = tile * ROWS + tl.arange(0, ROWS)
        row_ok = rows < N
        rank_at = rows.to(tl.int64)[:, None] * R + rank[None, :]  # [ROWS, R]
        if SINGLE:
            x = _load_rows(x_ptr, x_stride, rows, row_ok, cols, E)  # [ROWS, BLOCK]

        # M, while the rows are on their way
        if HAS_IDS:
            ids = _adapter_ids(ids_ptr, rows, row_ok, rows_per_id, num_adapters)  # [ROWS]
            if WRITES:
                mixing = _mixing(v_ptr, projection_ptr, ids, u, R, BLOCK_U, LORA_XS)  # [ROWS, R, R]
        elif WRITES:
            if tile == first:
                mixing = _mixing(v_ptr, projection_ptr, tl.zeros([1], tl.int32), u, R, BLOCK_U, LORA_XS)  # [1, R, R]

        # t = y0 U - c
        if SINGLE:
            t = _coefficients(x, read_ptr, cols, E, R)  # [ROWS, R]
        else:
            t = tl.zeros([ROWS, R], tl.float32)
            for start in range(0, E, BLOCK):
                x = _load_rows(x_ptr, x_stride, rows, row_ok, start + cols, E)
                t += _coefficients(x, read_ptr, start + cols, E, R)
        if ONLY_FINITE:
            lost = tl.sum(tl.where(t - t == 0.0, 0.0, 1.0), axis=1)  # [ROWS]: coefficients that are not finite
            if tl.sum(lost, axis=0) > 0.0:
                if SINGLE:
                    finite = _coefficients(_finite(x), read_ptr, cols, E, R)
                else:
                    finite = tl.zeros([ROWS, R], tl.float32)
                    for start in range(0, E, BLOCK):
                        x = _load_rows(x_ptr, x_stride, rows, row_ok, start + cols, E)
                        finite += _coefficients(_finite(x), read_ptr, start + cols, E, R)
                t = tl.where((lost > 0.0)[:, None], finite, t)
        if HAS_OFFSET:
            t -= tl.load(offset_ptr + rank)[None, :]
        if KEEPS:
            tl.store(kept_ptr + rank_at, t, mask=row_ok[:, None])
        if NEED_DV:
            # dM[j, k] += sum_n a[n, j] t[n, k]
            saved = tl.load(t_ptr + rank_at, mask=row_ok[:, None], other=0.0)
            d_mixing += tl.sum(t[:, :, None] * saved[:, None, :], axis=0)

        if WRITES:
            tl.debug_barrier()  # read the factor again: kept from above, its r rows would spill out of the registers
            if TRANSPOSED:
                # gains = a M:  gains[n, k] = sum_j a[n, j] M[j, k]
                gains = tl.sum(t[:, :, None] * mixing, axis=1)  # [ROWS, R]
            else:
                # gains = t M^T:  gains[n, j] = sum_k t[n, k] M[j, k]
                gains = tl.sum(t[:, None, :] * mixing, axis=2)  # [ROWS, R]
            if HAS_IDS and IN_PLACE and not HAS_BIAS:
                row_ok = row_ok & (ids >= 0)  # a row without an adapter stays as it is

            # y = y0 + b + gains U^T
            if SINGLE:
                if HAS_BIAS:
                    x += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
                x = _add_term(x, gains, write_ptr, cols, D, R)
                _store_rows(y_ptr, y_stride, rows, row_ok, cols, D, x)
            else:
                for start in range(0, D, BLOCK):
                    at = start + cols
                    if ONTO == 0:
                        y = _load_rows(x_ptr, x_stride, rows, row_ok, at, D)
                    elif ONTO == 1:
                        y = _load_rows(y_ptr, y_stride, rows, row_ok, at, D)
                    else:
                        y = tl.zeros([ROWS, BLOCK], tl.float32)
                    if HAS_BIAS:
                        y += tl.load(bias_ptr + at, mask=at < D, other=0.0).to(tl.float32)[None, :]
                    y = _add_term(y, gains, write_ptr, at, D, R)
                    _store_rows(y_ptr, y_stride, rows, row_ok, at, D, y)

    if NEED_DV:
        at = tl.program_id(0) * R * R + rank[:, None] * R + rank[None, :]
        tl.store(kept_ptr + at, d_mixing)


@triton.jit
def reduce_dv_kernel(
    kept_ptr,  # dM of each program [count, R * R], or with HAS_IDS a [count, R]
    t_ptr,  # [count, R] fp32, if HAS_IDS
    ids_ptr,  # [count / rows_per_id], if HAS_IDS
    projection_ptr,  # [u, R, R] or [R, R] fp32
    dv_ptr,  # [u] or [K, u] fp32, written
    count, u, rows_per_id, num_adapters,
    R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, LORA_XS: tl.constexpr, HAS_IDS: tl.constexpr,
    BY_ID: tl.constexpr,  # program_id(1) counts ids, of which there are fewer than adapters
):  # fmt: skip
    """dM of an adapter, summed in a fixed order;  dv_i = <P'_i, dM>. By id, the first of an adapter sums for all."""
    RR: tl.constexpr = R * R
    entries = tl.arange(0, RR)
    rank = tl.arange(0, R)
    adapter = tl.program_id(1).to(tl.int64)
    end, numbers = count, u
    if BY_ID:
        adapter = tl.load(ids_ptr + tl.program_id(1)).to(tl.int64)
        before = 0.0
        for start in range(0, tl.program_id(1), BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            other = tl.load(ids_ptr + i, mask=i < tl.program_id(1), other=-2)
            before += tl.sum((other == adapter).to(tl.float32), axis=0)
        wanted = (adapter >= 0) & (before == 0.0)
        end, numbers = tl.where(wanted, count, 0), tl.where(wanted, u, 0)

    d_mixing = tl.zeros([BLOCK_N, RR], tl.float32)
    for start in range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        if HAS_IDS:
            ids = tl.load(ids_ptr + n // rows_per_id, mask=n < count, other=-1)
            mine = (ids == adapter)[:, None] & (ids >= 0)[:, None]
            at = n.to(tl.int64)[:, None] * R + rank[None, :]
            a = tl.load(kept_ptr + at, mask=mine, other=0.0)  # [BLOCK_N, R]
            t = tl.load(t_ptr + at, mask=mine, other=0.0)
            d_mixing += tl.reshape(a[:, :, None] * t[:, None, :], [BLOCK_N, RR])
        else:
            d_mixing += tl.load(kept_ptr + n[:, None] * RR + entries[None, :], mask=(n < count)[:, None], other=0.0)
    d_mixing = tl.sum(d_mixing, axis=0)  # [R*R]

    i = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    if LORA_XS:
        # dv = projection * dM, entry by entry
        found = tl.load(projection_ptr + entries) * d_mixing
        tl.store(dv_ptr + adapter * u + entries, found, mask=entries < numbers)
    else:
        # dv_i = <P'_i, dM>
        p = tl.load(projection_ptr + i[:, None] * RR + entries[None, :], mask=(i < u)[:, None], other=0.0)
        tl.store(dv_ptr + adapter * u + i, tl.sum(p * d_mixing[None, :], axis=1), mask=i < numbers)


@triton.jit
def refresh_right_kernel(
    weight_ptr,  # W [D, E]
    basis_ptr,  # [R, D] fp32
    right_ptr,  # [R, E] fp32, written where the weight is another
    samples_ptr,  # [programs, SAMPLES] int32, alike
    D, E, row_stride, column_stride,
    R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SAMPLES: tl.constexpr, FORCE: tl.constexpr,
):  # fmt: skip
    """B^T = U^T W over COLUMNS columns, if any of the samples of them differs. reference.py says where they lie."""
    first = tl.program_id(0) * COLUMNS
    i = tl.arange(0, SAMPLES)
    golden = i.to(tl.uint32) * 0x9E3779B9
    row = (i.to(tl.int64) * D + (golden.to(tl.int64) * D >> 32)) // SAMPLES
    column = tl.minimum(first + (golden >> 26).to(tl.int32), E - 1)
    element = tl.load(weight_ptr + row * row_stride + column * column_stride)
    if weight_ptr.dtype.element_ty.primitive_bitwidth == 16:
        sample = element.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    else:
        sample = element.to(tl.int32, bitcast=True)
    kept = samples_ptr + tl.program_id(0) * SAMPLES + i
    stale = True
    if not FORCE:
        stale = tl.sum((tl.load(kept) != sample).to(tl.float32), axis=0) > 0.0
    if stale:
        cols = first + tl.arange(0, COLUMNS)
        inside = cols < E
        sums = tl.zeros([R, COLUMNS], tl.float32)
        for start in range(0, D, ROWS):
            d = start + tl.arange(0, ROWS).to(tl.int64)
            at = weight_ptr + d[:, None] * row_stride + cols.to(tl.int64)[None, :] * column_stride
            w = tl.load(at, mask=(d < D)[:, None] & inside[None, :], other=0.0).to(tl.float32)  # [ROWS, COLUMNS]
            u = tl.load(basis_ptr + tl.arange(0, R)[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
            sums += tl.sum(u[:, :, None] * w[None, :, :], axis=1)
        tl.store(right_ptr + tl.arange(0, R)[:, None] * E + cols[None, :], sums, mask=inside[None, :])
        tl.store(kept, sample)
