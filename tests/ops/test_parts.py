"""update_parts: the parts of a fused projection in one call are what update makes of each alone, on every backend."""
import re

import pytest
import torch
import torch._dynamo.testing
from torch.utils.flop_counter import FlopCounterMode

from tests.cases import DTYPES, error, run_ops
from tests.ops.test_native import ISAS
from tests.part_cases import PART_CASES, PartCase, assert_parts_within_budget, make_part_case, one_by_one, run_parts
from tinylora_kernels import ops
from tinylora_kernels.functional import tiny_lora_update, tiny_lora_update_parts
from tinylora_kernels.ops import reference
from tinylora_kernels.ops.native import library as native

AVAILABLE = [name for name, reason in ops.table("cpu") if reason is None]
FROM_Y = [case for case in PART_CASES if not case.inputs]
SHARDS = [case for case in PART_CASES if case.inputs]
SMALL = PartCase(6, (9, 5, 3), (0, 1, 0), numbers=3)
OP = torch.ops.tinylora.update_parts.default


@pytest.fixture(params=ISAS or ["none"])
def isa(request):
    before = native.load().isa
    assert native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


@pytest.mark.parametrize("case", FROM_Y, ids=str)
def test_the_reference_is_update_part_by_part(case):
    inputs = make_part_case(case, torch.float64)
    found, expected = run_parts(reference, inputs), one_by_one(lambda part: run_ops(reference, part), inputs)
    for name, ours in vars(found).items():
        torch.testing.assert_close(ours, getattr(expected, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", SHARDS, ids=str)
def test_a_column_shard_gets_its_columns_of_the_whole_update(case):
    """t = x B on a shard of y0 is t = y0 U of the whole: W = U S V^T x, cut in two by columns of y."""
    inputs = make_part_case(case, torch.float64)
    n_parts, r = len(case.sizes), case.rank
    generator = torch.Generator().manual_seed(0)
    W = [torch.randn(2 * size, case.inputs, generator=generator, dtype=torch.float64) for size in case.sizes]
    U = [torch.linalg.qr(w[:, :r])[0] for w in W]  # [2 D_p, r]
    right = torch.stack([u.T @ w for u, w in zip(U, W, strict=True)])  # B_p^T = U_p^T W_p  [r, E]
    halves = []
    for half in (0, 1):
        rows = [slice(half * size, (half + 1) * size) for size in case.sizes]
        y = torch.cat([inputs.x @ w[s].T for w, s in zip(W, rows, strict=True)], 1)
        basis = torch.cat([u[s].T for u, s in zip(U, rows, strict=True)], 1).contiguous()
        reference.update_parts(
            y, basis, inputs.v, inputs.projection, None, None, inputs.x, right, inputs.adapter_ids, inputs.ends,
            inputs.groups,
        )  # fmt: skip
        halves.append(y.split(case.sizes, dim=1))
    for part in range(n_parts):
        whole = inputs.x @ W[part].T
        reference.update(whole, U[part].T.contiguous(), inputs.v[inputs.groups[part]], inputs.projection[part], None,
                         None, inputs.adapter_ids)  # fmt: skip
        torch.testing.assert_close(torch.cat([half[part] for half in halves], 1), whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FROM_Y, ids=str)
def test_error_budget(isa, case, dtype):
    draws = [make_part_case(case, dtype, draw) for draw in range(8 if case.rows * sum(case.sizes) < 2**15 else 3)]
    assert_parts_within_budget([run_parts(native, inputs) for inputs in draws], draws)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHARDS, ids=str)
def test_shards_on_the_cpu_round_as_the_reference_does(isa, case, dtype):
    inputs = make_part_case(case, dtype)
    found, expected = inputs.clone_y(), inputs.clone_y()
    t = native.update_parts(found, *inputs.forward())
    truth = reference.update_parts(expected, *inputs.forward())
    assert error(t, truth) < 2e-6 and error(found, expected) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("case", PART_CASES, ids=str)
def test_float64_equals_the_reference(isa, case):
    inputs = make_part_case(case, torch.float64)
    found, truth = vars(run_parts(native, inputs)), vars(run_parts(reference, inputs))
    for name in found:
        torch.testing.assert_close(found[name], truth[name], rtol=1e-11, atol=1e-11)


def test_a_part_has_the_bits_of_an_update_of_its_own(isa):
    for dtype in DTYPES:
        inputs = make_part_case(PartCase(40, (64, 32, 48), (0, 1, 1), numbers=5, adapters=3), dtype)
        found, alone = run_parts(native, inputs), one_by_one(lambda part: run_ops(native, part), inputs)
        assert torch.equal(found.y, alone.y) and torch.equal(found.t, alone.t) and torch.equal(found.g0, alone.g0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_run_or_threads(isa, dtype):
    before = torch.get_num_threads()
    try:
        for case in (c for c in PART_CASES if c.rows * sum(c.sizes) > 2**15):
            inputs = make_part_case(case, dtype)
            results = []
            for threads in (1, 1, 2):
                torch.set_num_threads(threads)
                results.append(run_parts(native, inputs))
            for name, expected in vars(results[0]).items():
                assert all(torch.equal(getattr(other, name), expected) for other in results[1:]), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_rows_of_the_bare_base_keep_their_bits(backend):
    inputs = make_part_case(PartCase(24, (40, 24), (0, 1), numbers=3, adapters=3), torch.float32)
    bare = inputs.adapter_ids == -1
    inputs.y[bare] = -0.0
    out = run_parts(ops.BACKENDS[backend], inputs)
    assert bare.any() and torch.equal(out.y[bare], inputs.y[bare])
    in_place = backend not in ("reference", "inductor")
    assert not in_place or torch.signbit(out.y[bare]).all(), "a row to leave alone was written"
    assert torch.equal(out.g0[bare], inputs.g[bare])
    inputs.adapter_ids.fill_(-1)
    assert not run_parts(ops.BACKENDS[backend], inputs).dv.any()


@pytest.mark.parametrize("backend", AVAILABLE)
def test_what_is_not_asked_for_is_empty(backend):
    inputs, run = make_part_case(SMALL, torch.float32), ops.BACKENDS[backend]
    whole = run_parts(run, inputs)
    g0, nothing = run.update_parts_backward(*inputs.backward(None))
    assert torch.equal(g0, whole.g0) and nothing.numel() == 0
    nothing, dv = run.update_parts_backward(*inputs.backward(whole.t, need_input_grad=False))
    assert torch.equal(dv, whole.dv) and nothing.numel() == 0


@pytest.mark.parametrize("case", [SMALL, *FROM_Y[8:10], *SHARDS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(case, dtype):
    inputs = make_part_case(case, dtype)
    torch.library.opcheck(OP, (inputs.clone_y(), *inputs.forward()))
    t = torch.randn(len(case.sizes), case.rows, case.rank).to(inputs.basis.dtype)
    for saved, need_input_grad in ((t, True), (t, False), (None, True)):
        backward = torch.ops.tinylora.update_parts_backward.default
        torch.library.opcheck(backward, inputs.backward(saved, need_input_grad))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("case", [SMALL, FROM_Y[5], FROM_Y[8], FROM_Y[-1]], ids=str)
def test_gradients(backend, case):
    inputs = make_part_case(case, torch.float64)
    y, v = inputs.y.clone().requires_grad_(), inputs.v.clone().requires_grad_()
    bias = None if inputs.bias is None else inputs.bias.clone().requires_grad_()

    def run(y, v, bias):
        return tiny_lora_update_parts(
            y, inputs.basis, v, inputs.projection, inputs.ends, inputs.groups, inputs.offset, inputs.adapter_ids,
            bias=bias, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (y, v, bias))
    for need_y, need_v in ((True, False), (False, True)):
        y.requires_grad_(need_y), v.requires_grad_(need_v)
        assert torch.autograd.gradcheck(run, (y, v, bias))


def test_second_derivatives_are_an_error():
    inputs = make_part_case(SMALL, torch.float32)
    v = inputs.v.clone().requires_grad_()
    out = tiny_lora_update_parts(inputs.y, inputs.basis, v, inputs.projection, inputs.ends, inputs.groups)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(out.square().sum(), v, create_graph=True)


def test_what_torch_takes_apart_is_the_same_function():
    """torch.func, forward mode, and a dispatch mode, which sees y0 as it was."""
    inputs = make_part_case(SMALL, torch.float64)
    y, v = inputs.clone_y(), inputs.v.clone()
    layout = inputs.projection, inputs.ends, inputs.groups, inputs.offset

    def run(y, v):
        return tiny_lora_update_parts(y, inputs.basis, v, *layout)

    expected = run(y, v)
    # M is linear in v
    _, tangent = torch.func.jvp(lambda v: run(y, v), (v,), (torch.ones_like(v),))
    torch.testing.assert_close(tangent, run(y, v + 1) - expected)
    jacobian = torch.func.jacrev(lambda v: run(y, v).sum())(v)
    leaf = v.clone().requires_grad_()
    run(y, leaf).sum().backward()
    torch.testing.assert_close(jacobian, leaf.grad)
    with FlopCounterMode(display=False):
        seen = tiny_lora_update_parts(y, inputs.basis, v, *layout, inplace=True)
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(y, inputs.y)


def test_in_place_is_a_write_that_autograd_sees():
    inputs = make_part_case(SMALL, torch.float32)
    factors = inputs.basis, inputs.v, inputs.projection, inputs.ends, inputs.groups
    y = inputs.clone_y()
    saved = y.clone().requires_grad_() * y  # saves y
    tiny_lora_update_parts(y, *factors, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.parametrize("name", ["basis", "v", "projection", "offset", "bias"])
def test_any_strides_of_any_argument(name):
    inputs = make_part_case(SMALL, torch.float32)
    names = ("basis", "v", "projection", "ends", "groups", "offset")
    arguments = {key: getattr(inputs, key) for key in names} | dict(bias=torch.randn(17))
    wide = torch.stack([arguments[name]] * 2, -1).flatten(-2)[..., ::2]
    expected = tiny_lora_update_parts(inputs.y, **arguments)
    assert torch.equal(tiny_lora_update_parts(inputs.y, **arguments | {name: wide}), expected)


def test_in_place_or_not():
    inputs = make_part_case(SMALL, torch.float32)
    y = inputs.clone_y()
    frozen = inputs.basis, inputs.v, inputs.projection, inputs.ends, inputs.groups, inputs.offset
    fresh = tiny_lora_update_parts(y, *frozen)
    assert torch.equal(y, inputs.y) and fresh.data_ptr() != y.data_ptr()
    written = tiny_lora_update_parts(y, *frozen, inplace=True)
    assert written.data_ptr() == y.data_ptr() and torch.equal(written, fresh)


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph_under_compile_on_the_whole_y(dynamic):
    torch._dynamo.reset()
    inputs = make_part_case(PartCase(12, (40, 24), (0, 1), numbers=3, adapters=3), torch.float32)
    weight = torch.randn(64, 16)

    def layer(x, ids):
        y = x @ weight.T
        OP(y, inputs.basis, inputs.v, inputs.projection, None, None, None, None, ids, inputs.ends, inputs.groups)
        return y[:, 40:].tanh() + y[:, :24]

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for rows in (12, 7, 1):
        x, ids = torch.randn(rows, 16), torch.randint(-1, 3, (rows,))
        torch.testing.assert_close(compiled(x, ids), layer(x, ids))


BAD = {
    "ends descend": (dict(ends=[9, 5, 17]), "ends: expected ascending columns up to 17"),
    "ends stop early": (dict(ends=[9, 14, 16]), "ends: expected ascending columns up to 17, the last dimension of y"),
    "no parts": (dict(ends=[], groups=[]), "ends: expected ascending"),
    "an empty part": (dict(ends=[9, 9, 17]), "ends: expected ascending"),
    "a group too many": (dict(groups=[0, 1, 2]), "expected 3 numbers below 2, the groups of v, found [0, 1, 2]"),
    "a group too few": (dict(groups=[0, 1]), "groups: expected 3 numbers below 2"),
    "a negative group": (dict(groups=[0, -1, 0]), "groups: expected 3 numbers below 2"),
    "v of one group": (dict(v=torch.zeros(3)), "groups: expected 3 numbers below"),
    "numbers": (dict(v=torch.zeros(2, 4)), "v: expected ["),
    "projections": (dict(projection=torch.zeros(2, 3, 2, 2)), "projection: expected [3, u,"),
    "rank of P": (dict(projection=torch.zeros(3, 3, 4, 4)), "projection: expected ["),
    "offset": (dict(offset=torch.zeros(2)), "offset: expected shape "),
    "basis": (dict(basis=torch.zeros(2, 16)), "last dimension 16 as in basis"),
    "dtype": (dict(basis=torch.zeros(2, 17, dtype=torch.float64)), "basis: expected "),
    "bias": (dict(bias=torch.zeros(16), offset=None), "bias: expected "),
    "x alone": (dict(x=torch.zeros(6, 4)), "x and right: expected both or neither"),
    "x and offset": (dict(x=torch.zeros(6, 4), right=torch.zeros(3, 2, 4)), "and no offset beside them"),
    "rows of x": (dict(x=torch.zeros(5, 4), right=torch.zeros(3, 2, 4), offset=None), "x: expected "),
    "right": (dict(x=torch.zeros(6, 4), right=torch.zeros(3, 2, 5), offset=None), "right: expected shape "),
}


@pytest.mark.parametrize("run", [reference.update_parts, OP], ids=["reference", "op"])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_one_line_and_leave_y_alone(name, run):
    changes, message = BAD[name]
    inputs = make_part_case(SMALL, torch.float32)
    names = ("basis", "v", "projection", "offset", "bias", "x", "right", "adapter_ids", "ends", "groups")
    call = dict(zip(names, inputs.forward(), strict=True)) | changes
    y = inputs.clone_y()
    with pytest.raises(ValueError, match=re.escape(message)) as info:
        run(y, **call)
    assert "\n" not in str(info.value) and torch.equal(y, inputs.y)


@pytest.mark.parametrize("run", [reference.update_parts, OP], ids=["reference", "op"])
def test_an_id_that_is_not_there_is_an_error_and_y_is_left_alone(run):
    inputs = make_part_case(PartCase(6, (9, 5), (0, 1), numbers=3, adapters=4), torch.float32)
    inputs.adapter_ids[3] = 4
    y = inputs.clone_y()
    with pytest.raises(IndexError, match="adapter_ids: expected -1 or an id below 4, found 4"):
        run(y, *inputs.forward())
    assert torch.equal(y, inputs.y)


def test_equal_to_separate_updates_through_the_functions():
    inputs = make_part_case(SMALL, torch.float32)
    whole = tiny_lora_update_parts(
        inputs.y, inputs.basis, inputs.v, inputs.projection, inputs.ends, inputs.groups, inputs.offset
    )
    pieces = [tiny_lora_update(p.y, p.basis, p.v, p.projection, p.offset) for p in inputs.parts]
    assert torch.equal(whole, torch.cat(pieces, 1))


@pytest.mark.parametrize("backend", AVAILABLE)
def test_what_is_not_finite_stays_in_its_element(backend):
    inputs = make_part_case(PartCase(9, (40, 24), (0, 1), numbers=3), torch.float32)
    clean = run_parts(ops.BACKENDS[backend], inputs)
    inputs.y[2, 5], inputs.y[4, 50] = torch.inf, torch.nan
    found = run_parts(ops.BACKENDS[backend], inputs)
    wrong = ~torch.isfinite(found.y)
    assert wrong.nonzero().tolist() == [[2, 5], [4, 50]]
    untouched = [row for row in range(9) if row not in (2, 4)]
    assert torch.equal(found.y[untouched], clean.y[untouched])
