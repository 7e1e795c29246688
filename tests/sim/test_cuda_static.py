"""What can be read off the compiled CUDA kernels: no spills, registers and shared memory in budget, access counts.

Here bfloat16 with r = 2 and 8 for every architecture, and the PTX of every type; bench/gpu_evidence.py tabulates all.
"""
import re

import pytest

from . import static
from .compilers import COMPILERS, needs_compiler
from .host.plan import TILES, plan_rows, shape

pytestmark = needs_compiler
THREADS = static.THREADS
needs_cuobjdump = pytest.mark.skipif(static.cuobjdump() is None, reason="needs cuobjdump (it comes with triton)")


@needs_cuobjdump
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("architecture", static.ARCHITECTURES)
def test_compiled_code(architecture, compiler):
    kernels = static.inspect("bfloat16", (2, 8), architecture, compiler)
    assert len(kernels) == 2 * (4 * len(TILES) + 2)
    for name, kernel in kernels.items():
        rank, tile = int(name[1]), name.split()[1]
        threads = THREADS.get(tile) or shape(tile, 2).threads
        assert kernel.stack == kernel.local == 0, f"{name}: local memory"
        assert kernel.registers <= min(255, static.REGISTERS_OF_A_BLOCK // threads), f"{name}: a block does not fit"
        assert kernel.shared <= static.SHARED_LIMIT, f"{name}: {kernel.shared} bytes of shared memory"
        counts = kernel.instructions
        assert not [op for op in counts if op.startswith(("LDL", "STL", "RED", "LD.", "ST."))], f"{name}: {counts}"
        atomics = sum(n for op, n in counts.items() if op.startswith("ATOM"))
        if tile in THREADS:
            assert atomics == 0
            continue
        # the ticket of a part is chosen among several: the compiler then no longer knows that it is in global memory
        ticket = "ATOM.INC" if name.endswith("parts") else "ATOMG.INC"
        assert atomics == counts[ticket] == (0 if "ids" in name else 1), f"{name}: {counts}"
        expected = static.expected_packets(tile, 2, rank)
        wide = shape(tile, 2).width > 1
        ids = 2 if "ids" in name else 0  # loads of a 64-bit id
        assert counts["LDG.64"] == (expected["row loads"] if wide else 0) + ids, f"{name}: {counts}"
        assert counts["LDG.128.CONSTANT"] == (expected["factor loads"] if wide else 0), f"{name}: {counts}"
        # for some targets the code is there twice, with a bias and without
        assert counts["STG.64"] in ((n := expected["row stores"] if wide else 0), 2 * n), f"{name}: {counts}"


@needs_cuobjdump
def test_three_blocks_of_256_threads_fit_a_multiprocessor_where_rows_are_short():
    """On the card that was measured, at the method's rank, in 16 bits: 80 registers; two blocks where rows are long,
    and of the kernels of several parts.
    """
    for element in ("bfloat16", "float16"):
        for name, kernel in static.inspect(element, (1, 2), 90).items():
            tile = name.split()[1]
            if name.endswith("parts"):
                assert kernel.registers <= 128, name
            elif tile in ("Short", "Medium", "Stream", "Scalar"):
                assert kernel.registers <= 80, name
            elif tile == "Long" and not name.endswith("ids"):
                assert kernel.registers <= 64, name


@needs_cuobjdump
@pytest.mark.parametrize("tile", ["Few", "Short", "Medium", "Long"])
def test_rows_are_asked_for_before_anything_is_waited_for(tile):
    """Every load of a row comes before the first of v and P', the first shuffle, the first barrier."""
    order = static.memory_order("bfloat16", 2, 90, tile)
    rows = [i for i, op in enumerate(order) if op == "LDG.64"][: shape(tile, 2).rows * shape(tile, 2).vectors]
    later = next(i for i, op in enumerate(order) if op.startswith(("SHFL", "BAR", "LDS")))
    assert max(rows) < later
    if tile == "Few":  # the factor too
        assert max(i for i, op in enumerate(order) if op == "LDG.128.CONSTANT") < later


@pytest.mark.parametrize("element", static.ELEMENTS)
def test_accesses_in_the_ptx(element):
    """Every packet of a row is loaded once and stored once, past L1; the factor comes through the read-only cache."""
    size = static.ELEMENTS[element]
    vector = "v4.u32" if size == 4 else "v2.u32"
    for name, counts in static.ptx_counts(element, (2, 4)).items():
        rank, tile = int(name[1]), name.split()[1]
        if tile in THREADS:
            continue
        expected = static.expected_packets(tile, size, rank)
        if shape(tile, size).width > 1:
            assert counts[f"ld.global.cg.{vector}"] == expected["row loads"], f"{name}: {counts}"
            assert counts["ld.global.nc.v4.f32"] == expected["factor loads"], f"{name}: {counts}"
            stores = counts[f"st.global.{vector}"] + counts[f"st.global.{vector.replace('u', 'f')}"]
            n = expected["row stores"]  # of several parts the code is there twice, with a bias and without
            assert stores in ((n, 2 * n) if name.endswith("parts") else (n,)), f"{name}: {counts}"
        else:
            loads = sum(n for op, n in counts.items() if op.startswith("ld.global.cg"))
            assert loads >= expected["row loads"]  # and those of the coefficients over what is finite, one at a time
            assert not [op for op in counts if ".v4" in op or ".v2" in op], f"{name}: {counts}"
        assert not [op for op in counts if op.startswith("red")], f"{name}: {counts}"


@pytest.mark.parametrize("capability", [75, 90])
@pytest.mark.parametrize("element", static.ELEMENTS)
def test_samples_of_a_weight_are_stored_behind_the_factor_that_they_vouch_for(element, capability):
    """Of every thread of the block, for launches on other streams, which no emulator runs beside this one."""
    for rank in (1, 2):
        body = static.ptx_kernels(element, rank, capability)[f"r{rank} right"]
        order = re.findall(r"\b(st\.global|fence|membar|bar\.sync|barrier\.sync)\b[.\w]*", body)
        stores = [i for i, op in enumerate(order) if op == "st.global"]
        *of_right, of_samples = stores
        between = order[of_right[-1] + 1 : of_samples]
        assert of_right and len(between) == 2, order
        assert between[0] in ("fence", "membar") and between[1].endswith("sync"), order


def test_shapes_reach_the_lengths_they_are_named_for():
    for size in (2, 4):
        longest = {tile: shape(tile, size).features for tile in TILES}
        assert longest["Few"] == longest["Short"] == 4096 and longest["Medium"] == 8192
        assert longest["Long"] * size == 65536
        for tile in TILES:
            s = shape(tile, size)
            assert s.width == (1 if tile == "Scalar" else 4) and s.threads % 32 == 0 and s.threads <= 512
        # alike, so that a row's bits are the same in a batch of any size
        few, short = shape("Few", size), shape("Short", size)
        assert (few.vectors, few.width, few.threads) == (short.vectors, short.width, short.threads)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_plans_cover_every_column_and_fill_the_card(size, aligned, stays):
    lengths = [1, 7, 64, 576, 1000, 2048, 2056, 4096, 8192, 8200, 14336, 16384, 18944, 32768, 32776, 152064, 2**30]
    for features in lengths:
        for rows in (1, 2, 5, 16, 17, 132, 133, 1000, 8192, 2**20, 2**30):
            plan = plan_rows(rows, features, size, aligned=aligned, stays=stays)
            s = shape(plan.tile, size)
            assert plan.team % 32 == 0 and 32 <= plan.team and plan.team * plan.teams <= s.threads
            assert plan.team * s.vectors * s.width >= features or not s.resident
            assert s.resident == (stays and aligned and features * size <= 65536)
            assert (s.width > 1) == aligned
            # no more than run at once; every multiprocessor has rows if there are as many; no block is without
            assert plan.blocks <= min(132 * 3, rows) and plan.blocks >= min(rows, 132)
            if rows >= 132 * 3 * plan.teams * s.rows:
                assert plan.blocks == 132 * 3
