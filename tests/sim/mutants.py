"""Small edits of the CUDA sources: deliberate bugs that the checks must find, and constants made small to simulate.

Plain data and one function, shared by the host emulator and the PTX interpreter.
"""
from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Edit:
    """Replace `old`, which must occur exactly once in csrc/cuda/`file`, by `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A bug, and the check and the case (both by name, in tests/sim/checks.py) that have to show it.

    Attributes:
        one_order: it shows where blocks and threads run in one order as well, as in the PTX interpreter, which takes
            equal values that are written twice for one.
    """

    name: str
    file: str
    old: str
    new: str
    check: str
    case: str = "short"
    one_order: bool = True

    @property
    def edit(self) -> Edit:
        return Edit(self.file, self.old, self.new)


def edited_copy(sources: Path, destination: Path, edits: tuple[Edit, ...]) -> Path:
    """Copy the folder of sources and apply the edits; ValueError unless each applies exactly once."""
    destination.mkdir(parents=True, exist_ok=True)
    for path in sources.iterdir():
        if path.is_file():
            shutil.copy2(path, destination / path.name)
    for edit in edits:
        path = destination / edit.file
        text = path.read_text()
        if text.count(edit.old) != 1:
            raise ValueError(f"{edit.file}: expected exactly one {edit.old!r}, found {text.count(edit.old)}")
        path.write_text(text.replace(edit.old, edit.new))
    return destination


MUTANTS = (
    # Barriers and memory order.
    Mutant("no barrier before the coefficients are summed", "rows.cuh",
           "__syncthreads_or(p.only_finite && !is_finite(sum))", "p.only_finite && !is_finite(sum)", "races"),
    Mutant("the next tile's sums over this one's", "rows.cuh",
           "sums + (half * kMaxWarps + team * warps) * C;  // [warps, C]", "sums + team * warps * C;", "races"),
    Mutant("the next tile's M over this one's", "rows.cuh",
           "mixing + (half * kMaxTeams + team) * C * R;", "mixing + team * C * R;", "races", case="adapters"),
    Mutant("M of this tile taken for that of the next", "rows.cuh",
           "held + (half * kMaxTeams + team) * ROWS", "held + team * ROWS", "budget", case="adapters"),
    Mutant("no barrier before what is held is compared", "rows.cuh",
           "held[i] = kBare;\n    __syncthreads();", "held[i] = kBare;", "races", case="adapters"),
    Mutant("barrier in one warp only", "rows.cuh",
           "const bool unsound = __syncthreads_or(p.only_finite && !is_finite(sum));",
           "const bool unsound = warp == 0 && __syncthreads_or(p.only_finite && !is_finite(sum));", "budget",
           case="medium"),
    Mutant("no barrier before the finite coefficients are summed", "rows.cuh",
           "  __syncthreads();\n  return column_sum", "  return column_sum", "races around a NaN"),
    Mutant("the finite sums over the others", "rows.cuh",
           "sums + (2 * kMaxWarps + team * warps) * C", "sums + (half * kMaxWarps + team * warps) * C",
           "races around a NaN"),
    Mutant("no barrier before the last ticket", "rows.cuh",
           "  __syncthreads();  // the block's dM is written\n", "", "races", one_order=False),
    Mutant("the teams' dM over sums that are still read", "rows.cuh",
           "  __syncthreads();  // nobody reads the sums of the last tile any more\n", "", "races"),
    Mutant("no barrier before the teams' dM are added", "rows.cuh",
           "team_dM.store(sums + place.team() * RR);\n  __syncthreads();",
           "team_dM.store(sums + place.team() * RR);",
           "races"),
    Mutant("one team's dM", "rows.cuh", "column_sum(sums + thread, place.teams(), RR)",
           "column_sum(sums + thread, 1, RR)", "budget"),
    Mutant("dM not published before the ticket", "rows.cuh",
           "    __threadfence();  // the block's dM", "    // the block's dM", "races"),
    Mutant("dM not collected after the ticket", "rows.cuh",
           "    __threadfence();  // and those", "    // and those", "races"),
    Mutant("no barrier before dM is summed", "rows.cuh",
           "  if (group < groups) sums[thread] = sum;\n  __syncthreads();", "  if (group < groups) sums[thread] = sum;",
           "races"),
    Mutant("no barrier before dM is contracted", "rows.cuh",
           "    dM[thread] = total;\n  }\n  __syncthreads();", "    dM[thread] = total;\n  }", "races"),
    Mutant("no barrier in the bank's kernel", "bank_grad.cuh",
           "    __syncthreads();\n    if (threadIdx.x < RR) dM", "    if (threadIdx.x < RR) dM", "races",
           case="sequences"),
    Mutant("no barrier before the bank's dM is contracted", "bank_grad.cuh",
           "kWarps, RR);\n    __syncthreads();", "kWarps, RR);", "races", case="sequences"),
    Mutant("no warp barrier around the remembered adapter", "rows.cuh",
           "    __syncwarp();  // every lane has compared\n", "", "races", case="sequences"),
    # Masks and bounds.
    Mutant("loads past the end of a row", "row_tile.cuh",
           "const bool inside = v * kStep < left;\n#pragma unroll\n"
           "      for (int r = 0; r < ROWS; ++r)\n        packet",
           "const bool inside = v * kStep <= left;\n#pragma unroll\n"
           "      for (int r = 0; r < ROWS; ++r)\n        packet",
           "bounds"),
    Mutant("loads rows past the last", "row_tile.cuh",
           "packet[r][v] = inside && r < block.rows ?", "packet[r][v] = inside ?", "bounds"),
    Mutant("loads a factor past its end", "row_tile.cuh", "i * kStep < left, u[i][j]", "true, u[i][j]", "bounds"),
    Mutant("stores rows past the last", "row_tile.cuh",
           "if (inside && r < block.rows) out.store", "if (inside) out.store", "bounds"),
    Mutant("stores past the end of a row", "row_tile.cuh",
           "if (inside && r < block.rows) out.store", "if (r < block.rows) out.store", "bounds"),
    Mutant("reads a bias past its end", "row_tile.cuh", "if (bias && inside)", "if (bias)", "bounds", case="bias"),
    Mutant("writes coefficients past the last row", "rows.cuh",
           "p.coefficients && warp == 0 && lane < C && r < rows", "p.coefficients && warp == 0 && lane < C", "bounds"),
    Mutant("reads t past the last row", "rows.cuh", "!IDS && p.t && r < rows ?", "!IDS && p.t ?", "bounds"),
    Mutant("every warp writes every coefficient of the block", "rows.cuh",
           "p.coefficients && warp == 0 && lane < C && r < rows", "p.coefficients && lane < C && r < rows", "races",
           case="medium", one_order=False),
    Mutant("16-byte accesses whatever the row stride", "launch.cpp",
           "(rows == 1 || side.stride % 4 == 0)", "true", "bounds", case="unaligned rows"),
    Mutant("16-byte accesses whatever the row start", "launch.cpp",
           "starts_on(side.rows, 4 * element_bytes)", "true", "alignment"),
    Mutant("16-byte accesses whatever the width", "launch.cpp",
           "return side.features % 4 == 0 && ", "return ", "bounds", case="scalar"),
    Mutant("16-byte accesses whatever the bias start", "launch.cpp",
           "return bias && aligned_side", "return aligned_side", "alignment"),
    Mutant("skips the tail of a row", "row_tile.cuh",
           "if (g * kStep >= left) continue;", "if (g * kStep + W * 8 >= left) continue;", "budget"),
    Mutant("a target of another width is not walked to its end", "rows.cuh",
           "start < target.features; start += tile.span()", "start < source.features; start += tile.span()", "around"),
    Mutant("adds more dM than there are", "rows.cuh",
           "i < end; i += groups", "i < end + 1; i += groups", "bounds"),
    Mutant("a block's dM at another's place", "rows.cuh",
           "global(p.partial + blockIdx.x * RR + thread)", "global(p.partial + thread)", "races"),
    # Indices.
    Mutant("columns shifted by one packet", "row_tile.cuh",
           "+ threadIdx.x % kWarp) * W;", "+ threadIdx.x % kWarp + 1) * W;", "budget"),
    Mutant("source stride used for the target", "rows.cuh",
           "const RowBlock<T> target(p.target, row, rows);",
           "RowBlock<T> target(p.target, row, rows);\n    target.stride = source.stride;", "budget",
           case="strided"),
    Mutant("rows of a tile one element apart", "row_tile.cuh",
           "load(source + r * block.stride", "load(source + r * (block.stride + W)", "budget"),
    Mutant("teams take the same rows", "rows.cuh",
           "const int row = first + team * ROWS, rows", "const int row = first, rows", "budget"),
    Mutant("blocks overlap by a row", "rows.cuh",
           "end = begin + p.share + (block < p.longer);", "end = min(begin + p.share + 1, p.rows);", "budget",
           case="strided"),
    Mutant("the factor of the first packet for every packet", "row_tile.cuh", "use(v, held[v])", "use(v, held[0])",
           "spread", case="strided"),
    Mutant("the factor of a group's first packet", "row_tile.cuh",
           "block.factor + first + g * kStep, left - g", "block.factor + first, left - g", "budget", case="medium"),
    Mutant("the id lookup is dropped", "mixing.cuh",
           "return id_at(m, row / m.rows_per_id);", "return id_at(m, 0 * row);", "budget", case="sequences"),
    Mutant("one id a row, though there is one a sequence", "mixing.cuh",
           "return id_at(m, row / m.rows_per_id);", "return id_at(m, row);", "bounds", case="sequences"),
    Mutant("32-bit ids read as 64-bit", "mixing.cuh",
           "return m.wide_ids ? ", "return true ? ", "bounds", case="sequences"),
    Mutant("every adapter uses the first one's numbers", "rows.cuh",
           "p.mixing.v + id * p.mixing.numbers", "p.mixing.v", "budget", case="sequences"),
    Mutant("an adapter once mixed is kept for later rows", "rows.cuh",
           "id == held[r] ||", "held[r] != kBare ||", "budget", case="adapters"),
    Mutant("M of the first row for every row", "rows.cuh",
           "matrices[r * RR + corner", "matrices[corner", "budget", case="adapters"),
    # Arithmetic.
    Mutant("M and its transpose swapped", "rows.cuh",
           "corner = p.transposed ? j : j * R, step = p.transposed ? R : 1;",
           "corner = p.transposed ? j * R : j, step = p.transposed ? 1 : R;", "budget"),
    Mutant("one warp's share of M", "rows.cuh",
           "column_sum(mixing + corner + k * step, block_warps(), RR)",
           "column_sum(mixing + corner + k * step, 1, RR)", "budget"),
    Mutant("the offset added", "rows.cuh", "coefficient -= offset;", "coefficient += offset;", "budget"),
    Mutant("the bias forgotten", "row_tile.cuh", "x[w] = bias ? x[w] + b[w] : x[w];", "x[w] = x[w];", "budget",
           case="bias"),
    Mutant("a row without an adapter gets no bias", "row_tile.cuh",
           "(bare >> r * R & 1) && !bias ?", "(bare >> r * R & 1) ?", "budget", case="bare with a bias"),
    Mutant("dM transposed", "rows.cuh", "a, r * R + e / R)", "a, r * R + e % R)", "budget"),
    Mutant("dM of the first row of a tile", "rows.cuh", "t, r * R + e % R), dM", "t, e % R), dM", "budget"),
    Mutant("what dx holds is forgotten", "rows.cuh",
           "if (p.onto == Onto::Nothing) {", "if (p.onto != Onto::Source) {", "around"),
    Mutant("dx is added to what nobody wrote", "rows.cuh",
           "if (p.onto == Onto::Nothing) {", "if (p.onto == Onto::Source) {", "around"),
    Mutant("a row streamed twice is read from its target", "rows.cuh",
           "if (p.onto == Onto::Source) onto.first", "if (p.onto == Onto::Target) onto.first", "budget", case="stream"),
    Mutant("LoRA-XS contracted like TinyLoRA", "mixing.cuh",
           "m.elementwise ? i : i / (R * R);", "i / (R * R);", "budget", case="LoRA-XS"),
    Mutant("LoRA-XS transposed in its gradient", "mixing.cuh",
           "m.projection[i] * dM[i];", "m.projection[i] * dM[i % R * R + i / R];", "budget", case="LoRA-XS"),
    Mutant("half a warp left out of the sums", "reduce.cuh",
           "for (int step = C; step < kWarp; step *= 2)", "for (int step = C; step < kWarp / 2; step *= 2)", "budget"),
    Mutant("lanes give what they should keep", "reduce.cuh",
           "const float keep = upper ? x[c + HALF] : x[c];", "const float keep = upper ? x[c] : x[c + HALF];",
           "budget"),
    Mutant("lanes trade with others than they say", "reduce.cuh",
           "return (lane & BIT ? HALF : 0)", "return (lane & HALF ? HALF : 0)", "budget"),
    Mutant("bfloat16 truncated instead of rounded", "element.cuh",
           "return bfloat16_pair(x[0], x[1]); }",
           "return bits_as<unsigned>(x[0]) >> 16 | (bits_as<unsigned>(x[1]) & 0xffff0000u); }", "rounding"),
    Mutant("rows without an adapter are rewritten", "row_tile.cuh",
           "(bare >> r * R & 1) && !bias ? packet[r][v] :", "(bare >> r * R & 0) && !bias ? packet[r][v] :",
           "bare rows"),
    Mutant("a NaN spreads over its row", "rows.cuh", "if (unsound) {", "if (false) {", "not finite"),
    Mutant("infinities are taken for numbers", "rows.cuh", "if (!is_finite(x)) continue;", "if (x != x) continue;",
           "not finite"),
    Mutant("a NaN's tile is summed anew, all of it", "rows.cuh",
           "if (mask >> r * R & ((1u << R) - 1)) coefficient = finite;", "coefficient = finite;", "not finite"),
    # Launch and reduction.
    Mutant("ids out of range are let through", "rows.cuh",
           "    if (id < kBare || id >= p.mixing.adapters) __trap();\n", "", "bad ids"),
    Mutant("the last block's dM first", "rows.cuh",
           "sum += __ldcg(partial + i * RR + entry);",
           "sum += __ldcg(partial + (i + blockIdx.x) % gridDim.x * RR + entry);", "schedule"),
    Mutant("the ticket is left as it is", "rows.cuh",
           "atomicInc(p.ticket, gridDim.x - 1) ==", "atomicInc(p.ticket, gridDim.x) ==", "budget"),
    Mutant("a graph's ticket is not zero", "launch.cpp",
           "  device.clear(word, 1, stream);\n",
           "", "schedule"),
    Mutant("the last block is never recognised", "rows.cuh", "== gridDim.x - 1;  // the last",
           "== gridDim.x;  // the last",
           "budget"),
    Mutant("one group's dM", "rows.cuh", "g < groups; ++g", "g < 1; ++g", "budget"),
    Mutant("the gradient of a large bank is not cleared", "launch.cpp",
           "    p.cleared = dv;\n    p.cleared_count = numbers;",
           "    p.cleared = dv;", "budget", case="large bank"),
    Mutant("a bank's rows without an adapter are summed", "bank_grad.cuh",
           "bool found = adapter == kBare;", "bool found = false;", "bounds", case="large bank"),
    Mutant("every row of an adapter sums for it", "bank_grad.cuh", "if (__syncthreads_or(found)) return;",
           "if (__syncthreads_or(adapter == kBare)) return;", "races", case="large bank", one_order=False),
    Mutant("one row of an id", "bank_grad.cuh", "n < rows; n += group", "n < 1; n += group", "budget",
           case="sequences"),
    Mutant("ids are skipped", "bank_grad.cuh", "i += kBankThreads / group", "i += kBankThreads", "budget",
           case="many sequences"),
    Mutant("the bank keeps one warp's sum", "bank_grad.cuh",
           "column_sum(sums + threadIdx.x, kWarps, RR)", "column_sum(sums + threadIdx.x, 1, RR)", "budget",
           case="adapters"),
    Mutant("g is updated in place", "rows.cuh",
           "const RowBlock<T> target(p.target, row, rows);",
           "const RowBlock<T> target(p.target.rows ? p.source : p.target, row, rows);", "budget"),
)  # fmt: skip
RIGHT_MUTANTS = (
    Mutant("a weight that has changed is not noticed", "right.cuh", "*kept != sample)) return", "false)) return",
           "kept right"),
    Mutant("B^T is always computed", "right.cuh", "if (!__syncthreads_or(p.force || *kept != sample)) return;",
           "__syncthreads();", "kept right"),
    Mutant("the samples are not kept", "right.cuh", "  *kept = sample;\n", "", "kept right"),
    Mutant("samples of another block", "right.cuh", "p.samples + blockIdx.x * kRightThreads", "p.samples",
           "kept right"),
    Mutant("samples outside the weight", "right.cuh",
           "min(first + static_cast<int>(golden >> 26), p.columns - 1)", "first + static_cast<int>(golden >> 26)",
           "kept right"),
    Mutant("columns outside the weight", "right.cuh",
           "min(first + i * kWarp + lane, p.columns - 1)", "first + i * kWarp + lane", "kept right"),
    Mutant("columns of B^T past its end", "right.cuh", "    if (column < p.columns)\n", "", "kept right"),
    Mutant("rows of one warp", "right.cuh", "column_sum(sums + i, kWarps,", "column_sum(sums + i, 1,", "kept right"),
    Mutant("no barrier before the warps' sums are added", "right.cuh", "  __syncthreads();\n  for (int i = threadIdx.x",
           "  for (int i = threadIdx.x", "kept right"),
    Mutant("strides of the weight exchanged", "right.cuh",
           "[d * p.row_stride + column * p.column_stride]", "[d * p.column_stride + column * p.row_stride]",
           "kept right"),
)  # fmt: skip
# By the checks and the cases of tests/sim/test_cuda_parts.py.
PART_MUTANTS = (
    Mutant("every block the first part's", "parts.cuh", "(&all.part[part])[i]", "(&all.part[0])[i]", "budget", "parts"),
    Mutant("blocks counted from the first part's", "parts.cuh", "blockIdx.x - all.first_block[part]", "blockIdx.x",
           "budget", "parts"),
    Mutant("no barrier before the arguments are read", "parts.cuh", "  __syncthreads();\n  const RowsArguments& p",
           "  const RowsArguments& p", "races", "parts"),
    Mutant("warps counted in the block", "parts.cuh", "threadIdx.x / kWarp % p.warps", "threadIdx.x / kWarp", "budget",
           "one wide"),
    Mutant("one team a block", "parts.cuh", "return threadIdx.x / kWarp / warps();", "return 0;", "races", "parts"),
    Mutant("warps left over take rows", "parts.cuh", "return left_over() ? 0 : min(max(left, 0), most);",
           "return min(max(left, 0), most);", "budget", "long"),
    Mutant("warps left over read for a whole team", "parts.cuh", "return left_over() ? 1 : p.warps;", "return p.warps;",
           "races", "long"),
    Mutant("more teams than there is room for", "parts.cuh", "min(block_warps() / p.warps, kMaxTeams)",
           "block_warps() / p.warps", "races", "wide with adapters"),
    Mutant("dv by the P' of one part", "parts.cuh", "contract_gradient<R>(all.part[q].mixing",
           "contract_gradient<R>(p.mixing",
           "budget", "parts"),
    Mutant("dv of every part to the first group", "parts.cuh", "p.dv + all.group[q] * numbers,", "p.dv,", "budget",
           "parts"),
    Mutant("dv begins with what was there", "parts.cuh", "global(p.dv + g * numbers + i) = 0.0f;", "", "bounds",
           "parts"),
    Mutant("dv of the last part of a group", "parts.cuh", "/*adds=*/true", "/*adds=*/false", "budget", "parts"),
    Mutant("dM of the parts before", "parts.cuh", "(p.partial, all.first_block[q],", "(p.partial, 0,", "budget",
           "parts"),
    Mutant("the factor of a part, as wide as the part", "row_tile.cuh", "hidden(block.factor_stride)",
           "hidden(block.features)", "budget", "parts"),
    Mutant("the same where a row is summed anew", "rows.cuh", "int64_t(j) * source.factor_stride + c",
           "int64_t(j) * source.features + c", "budget", "bare"),
    Mutant("a bank's groups get every part", "bank_grad.cuh", "if (p.group[part] != int(blockIdx.y)) continue;", "",
           "budget", "adapters"),
    Mutant("a bank's t and a of the first part", "bank_grad.cuh", "int64_t(part) * p.rows + int64_t(i)",
           "int64_t(i)", "budget", "adapters"),
    Mutant("a bank's P' of the first part", "bank_grad.cuh", "int64_t(part) * (mixing", "0 * (mixing", "budget",
           "adapters"),
    Mutant("a bank's dv all in group 0", "bank_grad.cuh", "(int64_t(blockIdx.y) * mixing.adapters + adapter)",
           "adapter",
           "bounds", "adapters"),
    Mutant("a bank's last part of a group", "bank_grad.cuh", "/*adds=*/true", "/*adds=*/false", "budget", "adapters"),
    Mutant("a bank's dv begins with what was there", "bank_grad.cuh", "dv[i] = 0.0f;", "", "bounds", "adapters"),
    Mutant("whole packets if the last part allows them", "launch.cpp", "every_aligned = every_aligned && aligned",
           "every_aligned = aligned", "bounds", "first unaligned"),
    Mutant("rows that do not divide are lost", "launch.cpp",
           "all.part[i].longer = blocks ? first.rows % blocks : 0;", "all.part[i].longer = 0;", "budget", "one wide"),
    Mutant("t of the first part", "launch.cpp", "p.t = t + i * coefficients;", "p.t = t;", "budget", "parts"),
    Mutant("a of all parts in one place", "launch.cpp", "p.coefficients = scratch + i * coefficients;",
           "p.coefficients = scratch;", "budget", "adapters"),
    Mutant("a bank knows no groups", "launch.cpp", "bank.group[i] = all.group[i];", "", "budget", "adapters"),
    Mutant("the gradient of a large bank's parts is not cleared", "launch.cpp",
           "      p.cleared_count = numbers;\n", "", "bounds", "large bank"),
)  # fmt: skip
