"""What can be read off the compiled CUDA kernels: no spills, registers and shared memory in budget, access counts.

Here bfloat16 with r = 2 and 8 for every architecture, and the PTX of every type; bench/gpu_evidence.py tabulates all.
"""
import pytest

from . import static
from .host.plan import TILES, plan_rows, shape
from .nvcc import needs_nvcc

pytestmark = needs_nvcc
needs_cuobjdump = pytest.mark.skipif(static.cuobjdump() is None, reason="needs cuobjdump (it comes with triton)")


@needs_cuobjdump
@pytest.mark.parametrize("architecture", static.ARCHITECTURES)
def test_compiled_code(architecture):
    kernels = static.inspect("bfloat16", (2, 8), architecture)
    assert len(kernels) == 2 * (len(TILES) + 1)
    for name, kernel in kernels.items():
        rank, tile = int(name[1]), name.split()[1]
        threads = 256 if tile == "dv" else shape(tile, 2).threads
        assert kernel.stack == kernel.local == 0, f"{name}: local memory"
        assert kernel.registers <= min(255, static.REGISTERS_OF_A_BLOCK // threads), f"{name}: a block does not fit"
        assert kernel.shared <= static.SHARED_LIMIT, f"{name}: {kernel.shared} bytes of shared memory"
        counts = kernel.instructions
        assert not [op for op in counts if op.startswith(("LDL", "STL", "RED", "LD.", "ST."))], f"{name}: {counts}"
        if tile == "dv":
            assert counts["ATOMG.ADD"] == sum(n for op, n in counts.items() if op.startswith("ATOM")) == 1, counts
            continue
        expected = static.expected_packets(tile, 2, rank)
        wide = shape(tile, 2).width > 1
        assert not [op for op in counts if op.startswith("ATOM")], f"{name}: {counts}"
        assert counts["LDG.128"] == (expected["row loads"] if wide else 0), f"{name}: {counts}"
        assert counts["LDG.128.CONSTANT"] == (expected["basis loads"] if wide else 0), f"{name}: {counts}"
        assert counts["STG.128"] == (expected["row stores"] if wide else 0), f"{name}: {counts}"


@pytest.mark.parametrize("element", static.ELEMENTS)
def test_accesses_in_the_ptx(element):
    """Every packet of a row is loaded once and stored once, past L1; the basis comes through the read-only cache."""
    size = static.ELEMENTS[element][1]
    for name, counts in static.ptx_counts(element, (2, 4)).items():
        rank, tile = int(name[1]), name.split()[1]
        if tile == "dv":
            assert counts["atom.global.add.u32"] + counts["atom.global.inc.u32"] == 1, counts
            continue
        expected = static.expected_packets(tile, size, rank)
        if shape(tile, size).width > 1:
            assert counts["ld.global.cg.v4.u32"] == expected["row loads"], f"{name}: {counts}"
            assert counts["ld.global.nc.v4.f32"] == expected["basis loads"], f"{name}: {counts}"
            assert counts["st.global.v4.u32"] == expected["row stores"], f"{name}: {counts}"
        else:
            assert sum(n for op, n in counts.items() if op.startswith("ld.global.cg")) == expected["row loads"]
            assert not [op for op in counts if ".v4" in op], f"{name}: {counts}"
        assert not [op for op in counts if op.startswith(("atom", "red"))], f"{name}: {counts}"


def test_shapes_reach_the_lengths_they_are_named_for():
    for size in (2, 4):
        columns = {tile: shape(tile, size).columns for tile in TILES}
        assert columns["Short"] * size == 4096 and columns["Medium"] * size == 16384
        assert columns["Long"] >= 32768 and columns["Scalar"] == 16384
        for tile in TILES:
            assert shape(tile, size).width * size == 16 or shape(tile, size).width == 1
            assert shape(tile, size).threads % 32 == 0


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_plans_cover_every_row_and_column_and_no_more_blocks_than_needed(size, aligned):
    lengths = [1, 7, 64, 576, 1000, 2048, 2056, 4096, 8192, 8200, 14336, 16384, 18944, 32768, 32776, 152064, 2**30]
    for columns in lengths:
        for rows in (1, 2, 5, 16, 17, 1000, 8192, 2**20, 2**30):
            plan = plan_rows(rows, columns, size, aligned)
            s = shape(plan.tile, size)
            assert plan.team % 32 == 0 and 32 <= plan.team and plan.team * plan.teams <= s.threads
            assert plan.team * s.vectors * s.width >= columns or not s.resident
            assert s.resident == (columns <= (32768 if aligned else 16384))
            block_rows = plan.tiles_per_block * plan.teams * s.rows
            assert (plan.blocks - 1) * block_rows < rows <= plan.blocks * block_rows and plan.blocks <= 2048
            assert (s.width > 1) == aligned
