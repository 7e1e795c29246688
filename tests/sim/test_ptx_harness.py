"""Does the interpreter bite? Every planted bug is reported as what it is; the kernel without it runs clean."""
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from .compilers import needs_compiler, ptx
from .ptx import (
    Buffer,
    DivergentBarrier,
    DivergentShuffle,
    LocalMemory,
    Misaligned,
    OutOfBounds,
    Race,
    ReadOnly,
    Traffic,
    Trap,
    Uninitialised,
    UnsupportedInstruction,
    launch,
    parse,
)
from .ptx.floats import bf16_to_f32, f32_to_bf16, fma_f32

SOURCE = Path(__file__).with_name("planted_bugs.cu")
N = 120
FOUND = {
    "global_out_of_bounds": OutOfBounds,
    "shared_out_of_bounds": OutOfBounds,
    "missing_barrier": Race,
    "missing_warp_barrier": Race,
    "write_after_read": Race,
    "two_writers": Race,
    "divergent_barrier": DivergentBarrier,
    "barrier_without_a_warp": DivergentBarrier,
    "divergent_shuffle": DivergentShuffle,
    "shuffle_from_absent_lane": DivergentShuffle,
    "unordered_blocks": Race,
    "missing_fence": Race,
    "uninitialised_shared": Uninitialised,
    "uninitialised_output": Uninitialised,
    "misaligned_vector": Misaligned,
    "writes_input": ReadOnly,
    "stale_cache": ReadOnly,
    "spills": LocalMemory,
    "traps": Trap,
}
COUNTED = ("uncoalesced", "reads_twice")
_ZEROED = ("unordered_blocks", "missing_fence")  # their y carries a counter
pytestmark = needs_compiler


def _run(name: str, planted: bool, reverse: bool = False) -> Traffic:
    kernel = parse(ptx(SOURCE, 90, f"-DPLANT={int(planted)}"), name)
    x = torch.arange(N, dtype=torch.float32)
    y = torch.zeros(N + {"unordered_blocks": 1, "missing_fence": 3}.get(name, 0))
    first = Buffer.of("x", x, read_only=True)
    second = Buffer.of("y", y, initialised=name in _ZEROED)
    if name == "stale_cache" and planted:
        first = second = Buffer.of("y", y)
    return launch(kernel, (2,), (64,), [first, second, N], reverse=reverse)


@pytest.mark.parametrize("name", FOUND)
def test_planted_bug_is_found(name):
    with pytest.raises(FOUND[name]) as caught:
        _run(name, planted=True)
    if FOUND[name] is not LocalMemory:
        assert "planted_bugs.cu:" in str(caught.value)


@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@pytest.mark.parametrize("name", [*FOUND, *COUNTED])
def test_kernel_without_the_bug_is_clean(name, reverse):
    _run(name, planted=False, reverse=reverse)


def test_uncoalesced_access_shows_in_the_sectors():
    assert _run("uncoalesced", planted=False).of("x").excess == 1.0
    assert _run("uncoalesced", planted=True).of("x").excess > 2.0


def test_second_read_shows_in_the_bytes():
    assert _run("reads_twice", planted=False).bytes_read("x") == 4 * N
    assert _run("reads_twice", planted=True).bytes_read("x") == 8 * N


def test_message_names_instruction_thread_and_place():
    told = r"planted_bugs.cu:\d+\): ld.global.*block 1 thread 56, 4 bytes at offset 480: is outside x"
    with pytest.raises(OutOfBounds, match=told):
        _run("global_out_of_bounds", planted=True)


def test_unknown_instruction_is_named():
    text = ".version 8.0\n.target sm_90\n.visible .entry k() { .reg .b32 %r<3>; sin.approx.f32 %r1, %r2; ret; }"
    with pytest.raises(UnsupportedInstruction, match="sin.approx.f32"):
        launch(parse(text), (1,), (32,), [])


def test_gaps_between_rows_are_out_of_bounds():
    kernel = parse(ptx(SOURCE, 90, "-DPLANT=0"), "writes_input")
    rows = torch.zeros(10, 16)[:, :12]  # 10 rows of 12 floats, 4 floats apart
    with pytest.raises(OutOfBounds):
        launch(kernel, (2,), (64,), [Buffer.of("x", rows), Buffer.of("y", torch.zeros(N)), N])


def _nearest_float32(exact: Fraction) -> float:
    """To nearest even, with the spacing of subnormal numbers below the normal range."""
    exponent = max(math.frexp(float(abs(exact)))[1] - 1, -126)
    spacing = Fraction(2) ** (exponent - 23)
    return float(round(exact / spacing) * spacing)


def test_fma_rounds_once():
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(4000).astype(np.float32) for _ in range(3))
    b[:1000] = 1.5  # half of these products lie between two float32 numbers: c, far below, decides
    c[:1000] *= np.float32(2.0**-60)
    a[1000:2000] *= np.float32(1e-30)  # subnormal results
    b[1000:2000] *= np.float32(1e-12)
    c[1000:2000] *= np.float32(1e-42)
    exact = [[Fraction(float(number)) for number in numbers] for numbers in zip(a, b, c, strict=True)]
    expected = [_nearest_float32(x * y + z) for x, y, z in exact]
    found = fma_f32(a, b, c)
    np.testing.assert_array_equal(found, np.array(expected, np.float32))
    with np.errstate(all="ignore"):
        twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (found != twice).any()  # the cases in which rounding to float64 first goes wrong are among these


def test_bfloat16_rounds_to_nearest_even():
    rng = np.random.default_rng(1)
    edges = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0xFF800000, 0x00000001]  # ties, the largest, -inf, the smallest
    bits = np.concatenate([rng.integers(0, 2**32, 100_000), edges])
    values = bits.astype(np.uint32).view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(f32_to_bf16(values), expected)
    back = torch.from_numpy(expected.view(np.int16)).view(torch.bfloat16).float()
    np.testing.assert_array_equal(bf16_to_f32(expected), back)
