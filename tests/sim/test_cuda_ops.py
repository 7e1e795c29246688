"""The CUDA entry points (csrc/cuda/ops.cu) behind torch's dispatcher, on CPU tensors and the emulator.

Arguments, strides, allocation and the refusals that come before any launch.
"""
import pytest
import torch

from tests.cases import CASES, assert_within_budget, make_case, run_ops
from tests.part_cases import PartCase, check_parts, drawn, make_part_case, run_parts
from tinylora_kernels.ops.schema import (
    LOW_RANK,
    REFRESH_RIGHT,
    UPDATE,
    UPDATE_BACKWARD,
    UPDATE_INPUT_GRAD,
    UPDATE_PARTS,
    UPDATE_PARTS_BACKWARD,
)

from . import checks
from .checks import draws, same_bits
from .host import emulator
from .host.emulator import Emulated
from .test_cuda_parts import CASES as PART_CASES

pytestmark = pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))


@pytest.fixture(scope="module")
def ops():
    library = torch.library.Library("tinylora_emulated", "DEF")
    for schema in (
        UPDATE, UPDATE_BACKWARD, LOW_RANK, UPDATE_INPUT_GRAD, REFRESH_RIGHT, UPDATE_PARTS, UPDATE_PARTS_BACKWARD
    ):  # fmt: skip
        library.define(schema)
    torch.ops.load_library(emulator.build_torch_ops())
    yield torch.ops.tinylora_emulated
    library._destroy()


OPS_CASES = [c for c in CASES if c.rank in emulator.RANKS and c.features < 2000]


@pytest.mark.parametrize("case", OPS_CASES, ids=str)
def test_within_the_error_budget(ops, case):
    inputs = draws(case, torch.bfloat16)
    assert_within_budget([run_ops(ops, i) for i in inputs], inputs)


@pytest.mark.parametrize("case", [c for c in OPS_CASES if c.rank == 2 and c.rows > 3], ids=str)
def test_around_the_product(ops, case):
    checks.around(lambda: ops, dtypes=(torch.bfloat16,), cases=(case,))


@pytest.mark.parametrize("case", PART_CASES.values(), ids=PART_CASES)
def test_parts(ops, case):
    """The arguments of ops.cpp are those that the simulators are given: the same bits, within the budget."""
    inputs = drawn(case, torch.bfloat16)
    found = [run_parts(ops, one) for one in inputs]
    check_parts(found, inputs, case)
    emulated = Emulated(emulator.build("plain", ranks=(2,), dtypes=(torch.bfloat16,)))
    again = run_parts(emulated, inputs[0])
    assert all(same_bits(getattr(found[0], name), getattr(again, name)) for name in vars(again))


def test_parts_of_more_dimensions_of_none_and_of_too_many(ops):
    one = make_part_case(PartCase(24, (40, 24), (0, 1), numbers=3), torch.float32)
    flat = run_parts(ops, one)
    y, g = (rows.clone().view(2, 3, 4, -1) for rows in (one.y, one.g))
    t = ops.update_parts(y, *one.forward())
    g0, dv = ops.update_parts_backward(g, *one.backward(t)[1:])
    assert y.shape == g0.shape == (2, 3, 4, 64) and t.shape == (2, 24, 2)
    assert same_bits(y.view(24, -1), flat.y) and same_bits(g0.view(24, -1), flat.g0) and same_bits(dv, flat.dv)
    empty = make_part_case(PartCase(0, (16, 8), (0, 0)), torch.float32)
    assert not run_parts(ops, empty).dv.any()
    for count, refusal in ((16, None), (17, "parts: the CUDA kernels take at most 16, found 17; use the triton")):
        many = make_part_case(PartCase(3, (4,) * count, (0,) * count), torch.float32)
        if refusal is None:
            run_parts(ops, many)
        else:
            with pytest.raises((ValueError, RuntimeError), match=refusal):
                run_parts(ops, many)


def test_what_is_not_finite(ops):
    checks.not_finite(lambda **_: ops, dtypes=(torch.bfloat16,))


def test_leading_dimensions_collapse_and_shapes_come_back(ops):
    inputs = make_case(CASES[10], torch.float32)  # 64 rows
    flat = run_ops(ops, inputs)
    operands = inputs.basis, inputs.v, inputs.projection
    y, g = (x.clone().view(2, 4, 8, -1) for x in (inputs.y, inputs.g))
    t = ops.update(y, *operands, inputs.offset, None, None)
    g0, dv = ops.update_backward(g, *operands, t, None, True)
    assert y.shape == g0.shape == (2, 4, 8, CASES[10].features) and t.shape == (64, 2)
    assert same_bits(y.view(64, -1), flat.y) and same_bits(g0.view(64, -1), flat.g0) and same_bits(dv, flat.dv)
    right = torch.randn(2, 24)
    z, t = ops.low_rank(torch.randn(4, 16, 24), right, *operands, None, None)
    dx = torch.zeros(2, 4, 8, 24)
    dv = ops.update_input_grad(dx, right, g, *operands, t, None, True)
    assert z.shape == (4, 16, CASES[10].features) and t.shape == (64, 2)
    assert dx.any(-1).all() and dv.shape == inputs.v.shape


def test_a_gradient_without_row_stride(ops):
    """The gradient of a sum is one element, expanded; .contiguous() of it and one expanded row agree."""
    inputs = make_case(CASES[10], torch.float32)
    g = inputs.g[:1].expand(64, -1)
    t = torch.randn(64, 2)
    operands = inputs.basis, inputs.v, inputs.projection
    for found, expected in zip(
        ops.update_backward(g, *operands, t, None, True),
        ops.update_backward(g.contiguous(), *operands, t, None, True),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_no_columns(ops):
    """D = 0: nothing to update; t = -c."""
    t = ops.update(torch.empty(3, 0), torch.empty(2, 0), torch.ones(1), torch.ones(1, 2, 2), torch.ones(2), None, None)
    assert torch.equal(t, -torch.ones(3, 2))


def _good() -> dict:
    return dict(
        y=torch.zeros(4, 8), basis=torch.zeros(2, 8), v=torch.zeros(3), projection=torch.zeros(3, 2, 2),
        offset=torch.zeros(2), bias=None, adapter_ids=None,
    )  # fmt: skip


REFUSED = [
    ("float64", dict(y=torch.zeros(4, 8).double(), basis=torch.zeros(2, 8).double(), v=torch.zeros(3).double(),
                     projection=torch.zeros(3, 2, 2).double(), offset=None), "float64; use the reference backend"),
    ("integer", dict(y=torch.zeros(4, 8).int()), "y: expected dtype"),
    ("rank 3", dict(basis=torch.zeros(3, 8), projection=torch.zeros(3, 3, 3), offset=None),
     "ranks 1, 2, 4 and 8, found 3"),
    ("u = 0", dict(v=torch.zeros(0), projection=torch.zeros(0, 2, 2)), "v: expected .* at least one number"),
    ("scalar", dict(y=torch.zeros(())), r"y: expected \[..., D\]"),
    ("width", dict(y=torch.zeros(4, 9)), "y: expected last dimension 8"),
    ("column stride", dict(y=torch.zeros(8, 4).T), "y: expected last stride 1"),
    ("row strides", dict(y=torch.zeros(4, 2, 8).transpose(0, 1)), "one row stride"),
    ("overlap", dict(y=torch.zeros(1, 8).expand(4, 8)), "rows that do not overlap"),
    ("basis type", dict(basis=torch.zeros(2, 8).half()), "basis: expected dtype float32"),
    ("basis strides", dict(basis=torch.zeros(8, 2).T), "basis: expected a contiguous tensor"),
    ("projection", dict(projection=torch.zeros(3, 2, 3)), "projection: expected"),
    ("offset", dict(offset=torch.zeros(3)), "offset: expected shape"),
    ("ids without K", dict(adapter_ids=torch.zeros(4, dtype=torch.int64)), r"v: expected \[K, 3\]"),
    ("ids type", dict(v=torch.zeros(2, 3), adapter_ids=torch.zeros(4)), "adapter_ids: expected"),
    ("ids length", dict(v=torch.zeros(2, 3), adapter_ids=torch.zeros(3, dtype=torch.int64)), "divides the 4 rows"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused_before_any_launch(ops, change, message):
    arguments = _good() | change
    before = arguments["y"].clone()
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.update(**arguments)
    assert torch.equal(arguments["y"], before)


def test_refused_in_the_backward_too(ops):
    good = {name: value for name, value in _good().items() if name not in ("y", "offset", "bias")}
    with pytest.raises((ValueError, RuntimeError), match="t: expected shape"):
        ops.update_backward(torch.zeros(4, 8), **(good | {"t": torch.zeros(3, 2)}), need_input_grad=True)
    many = {"basis": torch.zeros(2, 1), "v": torch.zeros(3), "projection": torch.zeros(3, 2, 2)}
    one_element = torch.zeros(1, 1).expand(2**30 + 1, 1)
    with pytest.raises((ValueError, RuntimeError), match="rows: the CUDA kernels take at most 1073741824"):
        ops.update_backward(one_element, **many, t=None, adapter_ids=None, need_input_grad=False)


def test_a_kept_right_factor_follows_its_weight(ops):
    checks.kept_right(lambda: ops)


def test_a_kept_right_factor_is_checked(ops):
    weight, basis = torch.zeros(8, 70), torch.zeros(2, 8)
    good = dict(right=torch.zeros(2, 70), samples=torch.zeros(2, 256, dtype=torch.int32), weight=weight, basis=basis)
    ops.refresh_right(**good, force=True)
    for change, message in (
        (dict(right=torch.zeros(2, 69)), r"right: expected shape \(2, 70\)"),
        (dict(samples=torch.zeros(1, 256, dtype=torch.int32)), r"samples: expected contiguous int32 \(2, 256\)"),
        (dict(samples=torch.zeros(2, 256)), "samples: expected contiguous int32"),
        (dict(basis=torch.zeros(2, 9)), r"basis: expected \[r, 8\]"),
        (dict(weight=torch.zeros(70)), r"weight: expected \[D, E\]"),
        (dict(weight=weight.double(), basis=basis.double(), right=torch.zeros(2, 70).double()), "use the reference"),
        (dict(basis=torch.zeros(3, 8), right=torch.zeros(3, 70)), "ranks 1, 2, 4 and 8, found 3"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            ops.refresh_right(**(good | change), force=False)
