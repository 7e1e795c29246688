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
    """A bug, and the check and the case (both by name, in tests/sim/checks.py) that have to show it."""

    name: str
    file: str
    old: str
    new: str
    check: str
    case: str = "short"

    @property
    def edit(self) -> Edit:
        return Edit(self.file, self.old, self.new)


# Few blocks and short chunks: a handful of rows then takes several tiles of a block and several blocks for dv.
SMALL = (
    Edit("launch_plan.h", "kMaxBlocks = 2048;", "kMaxBlocks = 3;"),
    Edit("launch_plan.h", "kRowsPerChunk = 4096;", "kRowsPerChunk = 40;"),
)


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
           "    __syncthreads();\n    if (warp == 0) finish_rows", "    if (warp == 0) finish_rows", "races"),
    Mutant("no barrier before the gains are read", "rows.cuh",
           "    __syncthreads();\n    if (!p.target) continue;", "    if (!p.target) continue;", "races"),
    Mutant("no barrier inside the contraction", "mixing.cuh",
           "  __syncthreads();\n  if (thread < R * R) matrix", "  if (thread < R * R) matrix", "races"),
    Mutant("no barrier after the contraction", "rows.cuh",
           "  __syncthreads();\n\n  for (int i = 0; i < p.tiles_per_block", "\n  for (int i = 0; i < p.tiles_per_block",
           "races"),
    Mutant("barrier in one warp only", "rows.cuh",
           "    if (warp == 0) finish_rows<R, ROWS>(p, row, team, bare_rows);\n    __syncthreads();",
           "    if (warp == 0) {\n      finish_rows<R, ROWS>(p, row, team, bare_rows);\n      __syncthreads();\n    }",
           "budget", case="medium"),
    Mutant("no barrier in the dv kernel", "vector_grad.cuh",
           "  __syncthreads();\n  if (threadIdx.x < RR) partial", "  if (threadIdx.x < RR) partial", "races"),
    Mutant("partial sums not published before the ticket", "vector_grad.cuh",
           "    __threadfence();  // the block's partial sum", "    // the block's partial sum", "races"),
    Mutant("partial sums not collected after the ticket", "vector_grad.cuh",
           "    __threadfence();  // and those", "    // and those", "races"),
    Mutant("no warp barrier around the remembered adapter", "rows.cuh",
           "    __syncwarp();  // every lane has compared\n", "", "races", case="sequences"),
    # Masks and bounds.
    Mutant("loads past the end of a row", "row_tile.cuh",
           "const bool inside = v * kStep < left;", "const bool inside = v * kStep <= left;", "bounds"),
    Mutant("loads rows past the last", "row_tile.cuh",
           "packet[r][v] = inside && r < block.rows ?", "packet[r][v] = inside ?", "bounds"),
    Mutant("stores rows past the last", "row_tile.cuh",
           "if (r < block.rows) out.store", "out.store", "bounds"),
    Mutant("writes coefficients past the last row", "rows.cuh",
           "p.coefficients && threadIdx.x < C && row + r < p.rows", "p.coefficients && threadIdx.x < C", "bounds"),
    Mutant("the dv kernel reads past the last row", "vector_grad.cuh",
           "const int end = min((chunk + 1) * kRowsPerChunk, p.rows);", "const int end = (chunk + 1) * kRowsPerChunk;",
           "bounds"),
    Mutant("16-byte accesses whatever the row stride", "launch.cu",
           "return strides && p.columns", "return (strides || true) && p.columns", "bounds", case="unaligned rows"),
    Mutant("16-byte accesses whatever the row start", "launch.cu",
           "&& on_16_bytes(p.source) &&", "&&", "alignment"),
    Mutant("skips the tail of a row", "row_tile.cuh",
           "const bool inside = v * kStep < left;", "const bool inside = v * kStep + W * 8 < left;", "budget"),
    # Indices.
    Mutant("columns shifted by one packet", "row_tile.cuh",
           "+ threadIdx.x % kWarp) * W;", "+ threadIdx.x % kWarp + 1) * W;", "budget"),
    Mutant("source stride used for the target", "row_tile.cuh",
           "target ? target + row * p.target_stride : nullptr", "target ? target + row * p.source_stride : nullptr",
           "budget", case="unaligned rows"),
    Mutant("rows of a tile one element apart", "row_tile.cuh",
           "load(source + r * block.source_stride", "load(source + r * (block.source_stride + W)", "budget"),
    Mutant("tiles of a block overlap", "rows.cuh",
           "(blockIdx.x * p.tiles_per_block + i) * blockDim.y * ROWS", "(blockIdx.x * p.tiles_per_block + i) * ROWS",
           "budget"),
    Mutant("the id lookup is dropped", "mixing.cuh",
           "const int i = row / m.rows_per_id;", "const int i = 0 * row;", "budget", case="sequences"),
    Mutant("one id a row, though there is one a sequence", "mixing.cuh",
           "const int i = row / m.rows_per_id;", "const int i = row;", "bounds", case="sequences"),
    Mutant("32-bit ids read as 64-bit", "mixing.cuh",
           "return m.wide_ids ? ", "return true ? ", "bounds", case="sequences"),
    Mutant("every adapter uses the first one's numbers", "rows.cuh",
           "p.mixing.v + id * p.mixing.numbers", "p.mixing.v", "budget", case="sequences"),
    Mutant("an adapter once mixed is kept for later rows", "rows.cuh",
           "id == team.held[r] ||", "team.held[r] != kBare ||", "budget", case="adapters"),
    # Arithmetic.
    Mutant("M and its transpose swapped", "rows.cuh",
           "p.transposed ? M[k * R + j] : M[j * R + k]", "p.transposed ? M[j * R + k] : M[k * R + j]", "budget"),
    Mutant("the offset added", "rows.cuh", "t -= p.offset[j];", "t += p.offset[j];", "budget"),
    Mutant("LoRA-XS contracted like TinyLoRA", "mixing.cuh",
           "m.elementwise ? i : i / (R * R);", "i / (R * R);", "budget", case="LoRA-XS"),
    Mutant("half a warp left out of the sums", "reduce.cuh",
           "for (int step = C; step < kWarp; step *= 2)", "for (int step = C; step < kWarp / 2; step *= 2)", "budget"),
    Mutant("lanes give what they should keep", "reduce.cuh",
           "const float keep = upper ? x[c + HALF] : x[c];", "const float keep = upper ? x[c] : x[c + HALF];",
           "budget"),
    Mutant("bfloat16 truncated instead of rounded", "element.cuh",
           "bits_as<unsigned>(__floats2bfloat162_rn(x[0], x[1]))",
           "(bits_as<unsigned>(x[0]) >> 16 | (bits_as<unsigned>(x[1]) & 0xffff0000u))", "rounding"),
    Mutant("rows without an adapter are rewritten", "row_tile.cuh",
           "bare >> r & 1 ? packet[r][v] :", "bare >> r & 0 ? packet[r][v] :", "bare rows"),
    # Launch and reduction.
    Mutant("ids out of range are let through", "rows.cuh",
           "    if (id < kBare || id >= p.mixing.adapters) __trap();\n", "", "bad ids"),
    Mutant("chunks added up from the last block's on", "vector_grad.cuh",
           "total += __ldcg(partial + c * RR + threadIdx.x);",
           "total += __ldcg(partial + (c + chunk) % p.chunks * RR + threadIdx.x);", "schedule"),
    Mutant("tickets are not reset", "rows.cuh", "p.tickets[i] = 0;", "static_cast<void>(i);", "budget"),
    Mutant("the last block is never recognised", "vector_grad.cuh", "1u) + 1 == unsigned", "1u) == unsigned", "budget"),
    Mutant("the dv kernel keeps one warp's sum", "vector_grad.cuh",
           "column_sum(sums + threadIdx.x, kWarps, RR)", "column_sum(sums + threadIdx.x, 1, RR)", "budget"),
    Mutant("g is updated in place", "row_tile.cuh",
           "T* const target = static_cast<T*>(p.target);",
           "T* const target = p.target ? static_cast<T*>(const_cast<void*>(p.source)) : nullptr;", "budget"),
)  # fmt: skip
