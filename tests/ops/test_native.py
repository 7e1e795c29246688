"""The native CPU kernels, on every instruction set this machine has: error budget, bit-equality, rounding, errors."""
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.cases import CASES, DTYPES, Case, assert_within_budget, error, make_case, run_ops
from tinylora_kernels.ops import reference
from tinylora_kernels.ops.native import library as native

pytestmark = pytest.mark.skipif(native.load().error is not None, reason=f"native library: {native.load().error}")

ISAS = [name for name in native.CPU_ISAS if native.load().error is None and native.use_isa(name)]
GRID = [pytest.param(case, id=str(case)) for case in CASES]


@pytest.fixture(params=ISAS)
def isa(request):
    before = native.load().isa
    assert native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def simple(rows=5, features=40, rank=2, numbers=3, dtype=torch.float32, **shape):
    """Arguments of `update` by name."""
    torch.manual_seed(0)
    acc = torch.float64 if dtype is torch.float64 else torch.float32
    return {
        "y": torch.randn(rows, features).to(dtype),
        "basis": torch.randn(rank, features, dtype=acc) / features**0.5,
        "v": torch.randn(numbers, dtype=acc),
        "projection": torch.randn(numbers, rank, rank, dtype=acc),
        "offset": torch.randn(rank, dtype=acc),
        "bias": None,
        "adapter_ids": None,
    } | shape


@pytest.mark.parametrize("case", GRID)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_budget(isa, case, dtype):
    # dv may be a single number: errors are pooled over many draws where a draw is cheap.
    draws = [make_case(case, dtype, draw) for draw in range(16 if case.rows * case.features < 2**16 else 4)]
    assert_within_budget([run_ops(native, inputs) for inputs in draws], draws)


@pytest.mark.parametrize("case", GRID)
def test_float64_equals_the_reference(isa, case):
    inputs = make_case(case, torch.float64)
    found, truth = vars(run_ops(native, inputs)), vars(run_ops(reference, inputs))
    for name in truth:
        torch.testing.assert_close(found[name], truth[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_bits_do_not_depend_on_run_or_threads(isa, dtype, two_threads):
    for case in (c for c in CASES if c.rows * c.features > 2**15):  # above the threshold for a second thread
        inputs = make_case(case, dtype)
        torch.set_num_threads(1)
        first, again = run_ops(native, inputs), run_ops(native, inputs)
        torch.set_num_threads(2)
        threaded = run_ops(native, inputs)
        for name, expected in vars(first).items():
            assert torch.equal(getattr(again, name), expected), name
            assert torch.equal(getattr(threaded, name), expected), name


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(isa, dtype, rank):
    call = simple(rows=13, features=117, rank=rank, dtype=dtype)
    alone = [row.clone() for row in call["y"]]
    together = call["y"]
    t = native.update(**call)
    for n, row in enumerate(alone):
        t_row = native.update(**call | {"y": row})
        assert torch.equal(row, together[n]) and torch.equal(t_row[0], t[n])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_that_of_torch(isa, dtype):
    # y = 0 and c = -1 give t = 1; with M = 1 the result is the basis itself, rounded once.
    patterns = torch.randint(-(2**31), 2**31, (2**18,), generator=torch.Generator().manual_seed(0)).int()
    ties = (torch.arange(2**16).int() << 16) + 0x8000  # half way between bfloat16 neighbours
    half_ties = (torch.arange(2**18).int() << 13) + 0x1000  # half way between float16 neighbours
    values = torch.cat([patterns, ties, half_ties]).view(torch.float32)
    values = values[values.isfinite() & (values.abs() >= torch.finfo(torch.float32).tiny)]
    y, one = torch.zeros(1, len(values), dtype=dtype), torch.ones(1)
    native.update(y, values[None].contiguous(), one, one.view(1, 1, 1), -one, None, None)
    assert torch.equal(y[0], values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_zero_update_keeps_every_16_bit_number(isa, dtype):
    y = torch.arange(-(2**15), 2**15).short().view(dtype)
    if isa == "avx512_bf16":  # its narrowing instruction treats subnormal numbers as zero
        y = torch.where(y.abs() < torch.finfo(y.dtype).tiny, 0, y)
    y = y[y.isfinite()].view(-1, 1)
    before = y.clone()
    native.update(y, torch.ones(1, 1), torch.zeros(1), torch.ones(1, 1, 1), None, None, None)
    assert torch.equal(y, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_what_is_not_finite_stays_where_it_is_in_y_and_spreads_over_a_gradient(isa, dtype, bad):
    call = simple(dtype=dtype)
    call["y"][3, 7] = bad
    g, at = call["y"].clone(), torch.zeros(5, 40, dtype=torch.bool)
    at[3, 7] = True
    expected = call | {"y": torch.where(at, 0, g)}
    reference.update(**expected)
    t = native.update(**call)
    assert torch.equal(call["y"].isfinite(), ~at) and t.isfinite().all()
    assert error(call["y"][~at], expected["y"][~at]) < 2 * torch.finfo(dtype).eps
    rows = torch.arange(5) == 3
    g0, dv = native.update_backward(g, call["basis"], call["v"], call["projection"], t, None, True)
    assert not g0[rows].isfinite().all() and g0[~rows].isfinite().all() and not dv.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_and_strides(isa, dtype):
    call = simple(rows=12, dtype=dtype)
    flat = call["y"].clone()
    native.update(**call | {"y": flat})
    wide = torch.full((3, 8, 41), 9.0, dtype=dtype)  # rows of 40 with odd starts, every second used
    view = wide[:, ::2, 1:]
    view.copy_(call["y"].view(3, 4, 40))
    native.update(**call | {"y": view})
    assert torch.equal(view, flat.view(3, 4, 40))
    assert bool((wide[:, 1::2] == 9).all()) and bool((wide[:, :, 0] == 9).all())
    # g may repeat one row
    g = call["y"][:1].expand(12, 40)
    rest = (call["basis"], call["v"], call["projection"])
    found = native.update_backward(g, *rest, None, None, True)[0]
    expected = native.update_backward(g.contiguous(), *rest, None, None, True)[0]
    assert found.is_contiguous() and torch.equal(found, expected)


def test_a_bare_row_keeps_its_bits(isa):
    call = simple(v=torch.randn(2, 3), adapter_ids=torch.tensor([-1, 0, -1, 1, -1]))
    call["basis"][0, 3] = float("inf")  # 0 * inf would show
    before = call["y"].clone()
    native.update(**call)
    assert torch.equal(call["y"][::2], before[::2]) and not call["y"][1::2].isfinite().any(1).all()


@pytest.mark.parametrize("adapters", [3, 5000], ids=["few", "many"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_ids_in_any_order_of_few_or_many_adapters(isa, adapters, rank):
    """Whether the ids are marked or sorted to find the adapters in use."""
    ids = torch.tensor([2, -1, 0, adapters - 1, 2, 1, 0])
    call = simple(rows=14, rank=rank, v=torch.randn(adapters, 3), adapter_ids=ids, dtype=torch.float64)
    call = {name: value.double() if name == "v" else value for name, value in call.items()}
    ours, truth = call | {"y": call["y"].clone()}, call | {"y": call["y"].clone()}
    t, expected = native.update(**ours), reference.update(**truth)
    rest = (call["basis"], call["v"], call["projection"], expected, ids, True)
    pairs = [(ours["y"], truth["y"]), (t, expected)]
    pairs += zip(native.update_backward(call["y"], *rest), reference.update_backward(call["y"], *rest), strict=True)
    for found, value in pairs:
        torch.testing.assert_close(found, value, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("need_input_grad", [True, False])
@pytest.mark.parametrize("need_v_grad", [True, False])
def test_only_what_is_asked_for(isa, need_input_grad, need_v_grad):
    call = simple()
    g, rest = call["y"], (call["basis"], call["v"], call["projection"])
    t = torch.randn(5, 2) if need_v_grad else None
    g0, dv = native.update_backward(g, *rest, t, None, need_input_grad)
    truth = reference.update_backward(g, *rest, t, None, need_input_grad)
    for found, expected in zip((g0, dv), truth, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected)


ERRORS = {
    "y dtype": (
        lambda c: c | {"y": c["y"].int()},
        r"y: expected dtype float32, bfloat16, float16 or float64, found int32",
    ),
    "y width": (
        lambda c: c | {"y": c["y"][:, 1:]},
        r"y: expected last dimension 40 as in basis \(2, 40\), found \(5, 39\)",
    ),
    "y scalar": (lambda c: c | {"y": torch.tensor(1.0)}, r"y: expected \[\.\.\., D\], found a scalar"),
    "y columns": (lambda c: c | {"y": torch.randn(40, 5).T}, r"y: expected last stride 1, found 5"),
    "y strides": (
        lambda c: c | {"y": torch.randn(2, 9, 40)[:, :3]},
        r"y: expected leading dimensions with one row stride, found stride 360 instead of 120 in dimension 0",
    ),
    "y overlap": (lambda c: c | {"y": torch.randn(40).expand(5, 40)}, r"y: expected rows that do not overlap"),
    "basis dtype": (lambda c: c | {"basis": c["basis"].double()}, r"basis: expected dtype float32 beside float32 y"),
    "basis layout": (lambda c: c | {"basis": torch.randn(40, 2).T}, r"basis: expected a contiguous tensor"),
    "basis dims": (lambda c: c | {"basis": c["basis"][None]}, r"basis: expected \[r, D\]"),
    "v numbers": (lambda c: c | {"v": torch.randn(4)}, r"v: expected \[3\], at least one number, found \(4\)"),
    "v adapters": (
        lambda c: c | {"adapter_ids": torch.zeros(5).long()},
        r"v: expected \[K, 3\] with adapter_ids, at least one number, found \(3\)",
    ),
    "projection": (
        lambda c: c | {"projection": torch.randn(3, 2, 3)},
        r"projection: expected \[u, 2, 2\] or \[2, 2\] for a basis of rank 2, found \(3, 2, 3\)",
    ),
    "lora-xs": (
        lambda c: c | {"projection": torch.randn(2, 2)},
        r"v: expected \[4\], at least one number, found \(3\)",
    ),
    "offset": (lambda c: c | {"offset": torch.randn(3)}, r"offset: expected shape \(2\), found \(3\)"),
    "bias": (lambda c: c | {"bias": torch.randn(39)}, r"bias: expected a contiguous tensor of shape \(40\)"),
    "bias dtype": (lambda c: c | {"bias": torch.randn(40).bfloat16()}, "bias: expected the dtype of y, found bfloat16"),
    "ids dtype": (
        lambda c: c | {"v": torch.randn(2, 3), "adapter_ids": torch.zeros(5)},
        r"adapter_ids: expected a contiguous 1-D int32 or int64 tensor, found float32 \(5\)",
    ),
    "ids length": (
        lambda c: c | {"v": torch.randn(2, 3), "adapter_ids": torch.zeros(3).long()},
        r"adapter_ids: expected a length that divides the 5 rows, found 3",
    ),
    "ids none": (
        lambda c: c | {"v": torch.randn(2, 3), "adapter_ids": torch.zeros(0).long()},
        r"adapter_ids: expected a length that divides the 5 rows, found 0",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument_and_leave_y_alone(name):
    change, message = ERRORS[name]
    call = change(simple())
    before = call["y"].clone()
    with pytest.raises(ValueError, match=message) as caught:
        native.update(**call)
    assert "\n" not in str(caught.value)
    assert torch.equal(call["y"], before)


@pytest.mark.parametrize("bad", [2, -2])
def test_an_id_out_of_range_leaves_y_alone(bad):
    call = simple(v=torch.randn(2, 3), adapter_ids=torch.tensor([0, 1, -1, 0, bad], dtype=torch.int32))
    before = call["y"].clone()
    with pytest.raises(IndexError, match=rf"adapter_ids: expected -1 or an id below 2, found {bad} at position 4"):
        native.update(**call)
    assert torch.equal(call["y"], before)


def test_backward_errors():
    call = simple()
    rest = (call["basis"], call["v"], call["projection"])
    with pytest.raises(ValueError, match=r"t: expected shape \(5, 2\), found \(4, 2\)"):
        native.update_backward(call["y"], *rest, torch.randn(4, 2), None, True)
    with pytest.raises(ValueError, match=r"g: expected last stride 1, found 0"):
        native.update_backward(torch.ones(1, 1).expand(5, 40), *rest, None, None, True)


@pytest.mark.parametrize("case", GRID)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_dx_along_the_basis_is_g0(isa, case, dtype):
    """With W the identity, B^T = U^T and g W = g."""
    inputs = make_case(case, dtype)
    t = torch.randn(case.rows, case.rank).to(inputs.v)
    shared = inputs.basis, inputs.v, inputs.projection, t, inputs.adapter_ids
    g0, dv = native.update_backward(inputs.g, *shared, True)
    dx = inputs.g.clone()
    found = native.update_input_grad(dx, inputs.basis, inputs.g, *shared, True)
    assert torch.equal(found, dv) and torch.equal(dx, g0)


RANKS_AND_WIDTHS = [(rank, width) for rank in (1, 2, 3, 4, 8) for width in (1, 40, 333)]


@pytest.mark.parametrize("rank, width", RANKS_AND_WIDTHS)
@pytest.mark.parametrize("adapters", [0, 3])
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_dx_of_another_width(isa, dtype, add, adapters, rank, width):
    inputs = make_case(Case(13, 65, rank=rank, numbers=3, adapters=adapters, pad=2), dtype)
    right, t = torch.randn(rank, width).to(inputs.v), torch.randn(13, rank).to(inputs.v)
    shared = inputs.basis, inputs.v, inputs.projection, t, inputs.adapter_ids
    rows = torch.randn(13, width + 5).to(dtype) if add else torch.full((13, width + 5), torch.nan, dtype=dtype)
    dx, before = rows[:, :width], rows.clone()
    exact = before[:, :width].double()
    exact_dv = reference.update_input_grad(exact, right.double(), *in_float64(inputs.g, *shared), add)
    dv = native.update_input_grad(dx, right, inputs.g, *shared, add)
    assert_rounded_once(dx, exact)
    assert error(dv, exact_dv) <= 3 * sums(dtype)
    assert torch.equal(rows[:, width:].nan_to_num(), before[:, width:].nan_to_num())


@pytest.mark.parametrize("rank, width", RANKS_AND_WIDTHS)
@pytest.mark.parametrize("adapters", [0, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_low_rank(isa, dtype, bias, adapters, rank, width):
    inputs = make_case(Case(13, 65, rank=rank, numbers=3, adapters=adapters), dtype)
    right, x = torch.randn(rank, width).to(inputs.v), torch.randn(13, width + 5).to(dtype)[:, :width]
    b = torch.randn(65).to(dtype) if bias else None
    shared = right, inputs.basis, inputs.v, inputs.projection, b, inputs.adapter_ids
    exact_y, exact_t = reference.low_rank(*in_float64(x, *shared))
    y, t = native.low_rank(x, *shared)
    assert y.shape == (13, 65) and y.dtype is dtype and y.is_contiguous()
    assert_rounded_once(y, exact_y)
    assert error(t, exact_t) <= sums(dtype)
    if adapters:
        alone = (inputs.adapter_ids == -1).repeat_interleave(13 // len(inputs.adapter_ids))
        assert torch.equal(y[alone], (torch.zeros(65, dtype=dtype) if b is None else b).expand(13, 65)[alone])


def sums(dtype: torch.dtype) -> float:
    """The error of sums over what these cases have."""
    return 1e-14 if dtype is torch.float64 else 2e-6


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert error(found, exact) <= 0.6 * torch.finfo(found.dtype).eps + sums(found.dtype)


def in_float64(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def test_errors_of_dx():
    inputs = make_case(Case(5, 40), torch.float32)
    shared = inputs.g, inputs.basis, inputs.v, inputs.projection, None, None
    right, dx = torch.randn(2, 7), torch.randn(5, 7)
    for bad_dx, bad_right, message in (
        (dx.bfloat16(), right, r"dx: expected (the dtype of g|torch.float32 on cpu as g), found"),
        (dx[:4], right, r"dx: expected (5 rows as in g|the rows of g \(5, 40\)), found \(4, 7\)"),
        (dx, right[:1], r"right: expected .*\(2, 7\).* found .*\(1, 7\)"),
        (dx, right.double(), "right: expected "),
    ):
        before = bad_dx.clone()
        for backend in (native, reference):
            with pytest.raises(ValueError, match=message):
                backend.update_input_grad(bad_dx, bad_right, *shared, True)
        assert torch.equal(bad_dx, before)
    with pytest.raises(ValueError, match="dx: expected rows that do not overlap"):
        native.update_input_grad(torch.zeros(1, 7).expand(5, 7), right, *shared, True)


def test_errors_of_low_rank():
    inputs = make_case(Case(5, 40), torch.float32)
    shared = inputs.v, inputs.projection
    x, right, basis, bias = torch.randn(5, 7), torch.randn(2, 7), inputs.basis, torch.randn(40)
    for call, message in (
        ((x[:, :6], right, basis, *shared, bias), r"x: expected last dimension 7 as in right \(2, 7\), found \(5, 6\)"),
        ((x, right.double(), basis, *shared, bias), "right: expected"),
        ((x, right, basis[:1], *shared, bias), r"basis: expected .*\(2, E\).*, found .*\(1, 40\)"),
        ((x, right, basis.double(), *shared, bias), "basis: expected"),
        ((x, right, basis, *shared, bias[1:]), r"bias: expected .*\(40,?\).*, found .*\(39,?\)"),
        ((x, right, basis, *shared, bias.double()), "bias: expected .*, found .*float64"),
        ((x, right, basis, shared[0][:0], shared[1], bias), "v: expected"),
    ):
        for backend in (native, reference):
            with pytest.raises(ValueError, match=message) as caught:
                backend.low_rank(*call, None)
            assert "\n" not in str(caught.value)


def test_empty_batch_with_empty_ids():
    call = simple(rows=0, v=torch.randn(2, 3), adapter_ids=torch.zeros(0).long())
    assert native.update(**call).shape == (0, 2)
    rest = (call["basis"], call["v"], call["projection"], torch.zeros(0, 2), call["adapter_ids"])
    g0, dv = native.update_backward(call["y"], *rest, True)
    assert g0.shape == (0, 40) and dv.shape == (2, 3) and not dv.any()


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MALLOC_PERTURB_ belongs to glibc")
@pytest.mark.skipif("neon" in ISAS, reason="torch has an allocator of its own on aarch64, mimalloc")
def test_outputs_are_written_whole():
    """The library allocates past torch's NaN poisoning, so here malloc itself fills fresh memory, with -1.7e38."""
    code = """
import torch
from tests.cases import CASES, make_case, run_ops
from tinylora_kernels.ops import reference
from tinylora_kernels.ops.native import library as native
assert not torch.randn(64, 64).add(1).isnan().any() and torch.empty(999).min() < -1e38, "memory is not poisoned"
for isa in native.CPU_ISAS:
    if not native.use_isa(isa):
        continue
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            inputs = make_case(case, dtype)
            for found, truth in zip(vars(run_ops(native, inputs)).values(), vars(run_ops(reference, inputs)).values()):
                torch.testing.assert_close(found, truth, rtol=2e-2, atol=2e-2)
print("whole")
"""
    assert run_python(code, MALLOC_PERTURB_="1", OMP_NUM_THREADS="1") == "whole"  # fills with the complement, 0xfe


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts how often a thread ran, in /proc")
@pytest.mark.skipif("TINYLORA_REMOTE" in os.environ, reason="the kernels run on another machine than the threads here")
def test_beside_other_work_an_update_waits_for_no_thread():
    """Both threads of a region and a busy process share one core: the second is asked now and then, not always."""
    code = """
import os, subprocess, sys, threading
import torch
from tests.cases import Case, make_case, run_ops
from tinylora_kernels.ops.native import library as native

def times_run():
    runs = 0
    for thread in set(os.listdir("/proc/self/task")) - {str(threading.get_native_id())}:
        with open(f"/proc/self/task/{thread}/schedstat") as file:
            runs += int(file.read().split()[2])
    return runs

torch.set_num_threads(2)
i = make_case(Case(512, 1024), torch.float32)
call = i.g, i.basis, i.v, i.projection, run_ops(native, i).t, None, True
expected = native.update_backward(*call)
core = {min(os.sched_getaffinity(0))}
for thread in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(thread), core)
with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:  # on this core, like its parent
    try:
        before = times_run()
        for _ in range(400):
            found = native.update_backward(*call)
        print(times_run() - before)
    finally:
        other.kill()
assert all(torch.equal(one, two) for one, two in zip(found, expected))
"""
    assert int(run_python(code)) < 100


def test_isa_from_the_environment():
    code = """
from tinylora_kernels.ops.native import library
print(library.load().isa, library.load().error, sep="|")
"""
    assert run_python(code, TINYLORA_CPU_ISA="portable") == "portable|None"
    isa, error = run_python(code, TINYLORA_CPU_ISA="mmx").split("|")
    assert isa == "None" and re.match(r"TINYLORA_CPU_ISA: expected portable, .*, found 'mmx'", error)


def test_use_isa_refuses_unknown_names():
    with pytest.raises(ValueError, match="isa: expected one of portable, avx2, .*, sve256, found 'sse'"):
        native.use_isa("sse")


def test_why_not():
    assert native.why_not_cpu("cpu", torch.bfloat16, 3) is None
    assert native.why_not_cpu("cuda", torch.bfloat16, 2) == "it runs on the CPU, the tensors are on cuda"
    assert native.why_not_cpu("cpu", torch.int8, 2) == (
        "torch.int8 activations: expected float32, bfloat16, float16 or float64"
    )
    assert native.why_not_cuda("cpu", torch.float32, 2) == "it runs on NVIDIA GPUs, the tensors are on cpu"
    if native.load().has_cuda:
        assert native.why_not_cuda("cuda", torch.float32, 3) == (
            "rank 3: the CUDA kernels exist for ranks 1, 2, 4, 8"
        )
    else:
        assert native.why_not_cuda("cuda", torch.float32, 2).startswith("built without CUDA: ")


def test_a_missing_library_is_a_reason_not_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libtinylora.so")
    monkeypatch.setattr(native, "RECORD", tmp_path / "record.json")
    (tmp_path / "record.json").write_text('{"reason": "no C++ compiler found", "fix": "apt install g++"}')
    status = native.load.__wrapped__()
    assert status.error == "not built: no C++ compiler found. To change that: apt install g++"
    (tmp_path / "libtinylora.so").write_bytes(b"not a library")
    assert native.load.__wrapped__().error.startswith("libtinylora.so does not load: ")


with_products = pytest.mark.parametrize("isa", [name for name in ISAS if name != "portable"], indirect=True)
PRODUCT_SHAPES = [(1, 1), (3, 5), (16, 32), (17, 31), (33, 64), (100, 97), (40, 1000)]


@with_products
@pytest.mark.parametrize("vectors", [1, 3, 4, 8, 10])
@pytest.mark.parametrize("dtype", native.PRODUCT_DTYPES)
def test_products_of_the_factorisation(isa, dtype, vectors):
    torch.manual_seed(0)
    for count, width in PRODUCT_SHAPES:
        rows = torch.randn(3 * count, width).to(dtype)[::3]  # the sample of a weight skips rows
        x = torch.randn(vectors, width)
        y, total = native.products(rows, x)
        w = rows.double()
        assert y.shape == (vectors, count) and total.shape == (vectors, width)
        assert (y - x.double() @ w.T).norm() <= 5e-7 * x.norm() * w.norm()
        assert (total - y.double() @ w).norm() <= 5e-7 * y.norm() * w.norm()


@with_products
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_a_16_bit_weight_are_those_of_its_fp32_copy(isa, dtype):
    torch.manual_seed(0)
    rows, x = torch.randn(37, 301).to(dtype), torch.randn(6, 301)
    for half, single in zip(native.products(rows, x), native.products(rows.float(), x), strict=True):
        assert torch.equal(half, single)


def test_without_wide_registers_torch_multiplies_for_the_factorisation(isa):
    assert native.can_multiply(torch.zeros(2, 2)) == (isa != "portable")


@with_products
def test_which_weights_have_products(isa):
    weight = torch.randn(8, 6)
    assert native.can_multiply(weight) and native.can_multiply(weight[::2]) and native.can_multiply(weight.bfloat16())
    assert not native.can_multiply(weight.T) and not native.can_multiply(weight.double())
    assert not native.can_multiply(weight.to("meta")) and native.can_multiply(torch.nn.Parameter(weight))
    assert not native.can_multiply(weight.as_subclass(SubclassedTensor))


class SubclassedTensor(torch.Tensor):
    """Stands for the quantised weights that are subclasses."""


@with_products
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps memory by Linux's numbers")
def test_products_read_nothing_beyond_the_weight(isa):
    """The last number lies before a page that nobody may read: a process that does is killed."""
    code = """
import ctypes, mmap, torch
from tinylora_kernels.ops.native import library as native
native.use_isa("ISA")
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), 0) == 0
for dtype in native.PRODUCT_DTYPES:
    size = 3 * 37 * dtype.itemsize
    rows = torch.frombuffer(memory, dtype=dtype, offset=page - size, count=3 * 37).view(3, 37)
    native.products(rows, torch.ones(4, 37))
print("unharmed")
""".replace("ISA", isa)
    assert run_python(code) == "unharmed"
