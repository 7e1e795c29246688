"""Registration and gradients on every backend that runs here: opcheck, what each need costs, fullgraph compilation."""
import pytest
import torch
import torch._dynamo.testing

from tests.cases import CASES, DTYPES, Case, Outputs, assert_within_budget, error, exact, make_case
from tinylora_kernels import ops
from tinylora_kernels.functional import tiny_lora_linear, tiny_lora_update

CASE = Case(6, 33, rank=2, numbers=3)
AVAILABLE = [name for name, reason in ops.table("cpu") if reason is None]


def arguments(inputs, *names):
    return tuple(getattr(inputs, name) for name in names)


@pytest.mark.parametrize(
    "case", [CASE, Case(6, 33, numbers=4, lora_xs=True), Case(6, 33, numbers=3, adapters=4)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(case, dtype):
    inputs = make_case(case, dtype)
    frozen = arguments(inputs, "basis", "v", "projection")
    torch.library.opcheck(
        torch.ops.tinylora.update.default, (inputs.clone_y(), *frozen, inputs.offset, inputs.bias, inputs.adapter_ids)
    )
    t = torch.randn(case.rows, case.rank).to(inputs.basis.dtype)
    for saved, need_input_grad in ((t, True), (t, False), (None, True)):
        torch.library.opcheck(
            torch.ops.tinylora.update_backward.default,
            (inputs.g, *frozen, saved, inputs.adapter_ids, need_input_grad),
        )
    right = torch.randn(case.rank, 7).to(inputs.basis)
    for saved, add in ((t, True), (None, True), (t, False)):
        torch.library.opcheck(
            torch.ops.tinylora.update_input_grad.default,
            (torch.randn(case.rows, 7).to(dtype), right, inputs.g, *frozen, saved, inputs.adapter_ids, add),
        )
    for bias in (None, torch.randn(case.features).to(dtype)):
        torch.library.opcheck(
            torch.ops.tinylora.low_rank.default,
            (torch.randn(case.rows, 7).to(dtype), right, *frozen, bias, inputs.adapter_ids),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_within_the_budget(case, dtype):
    draws = [make_case(case, dtype, draw) for draw in range(6)]
    found = []
    for inputs in draws:
        y, v = inputs.clone_y().requires_grad_(), inputs.v.clone().requires_grad_()
        shared = inputs.basis, v, inputs.projection, inputs.offset, inputs.adapter_ids
        out = tiny_lora_update(y, *shared, bias=inputs.bias)
        g0, dv = torch.autograd.grad(out, (y, v), inputs.g)
        assert torch.equal(y, inputs.y), "the caller's tensor was changed without inplace=True"
        found.append(Outputs(out.detach(), exact(inputs).t.to(inputs.basis.dtype), g0, dv))
    assert_within_budget(found, draws)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("need_y, need_v", [(True, True), (True, False), (False, True)])
def test_each_gradient_alone_equals_both(backend, need_y, need_v):
    inputs = make_case(CASE, torch.float32)
    truth = exact(inputs)
    y, v = inputs.clone_y().requires_grad_(need_y), inputs.v.clone().requires_grad_(need_v)
    out = tiny_lora_update(y, inputs.basis, v, inputs.projection, inputs.offset, backend=backend)
    wanted = [x for x in (y, v) if x.requires_grad]
    expected = [g for g, need in ((truth.g0, need_y), (truth.dv, need_v)) if need]
    for found, right in zip(torch.autograd.grad(out, wanted, inputs.g), expected, strict=True):
        assert error(found, right) < 1e-6


@pytest.mark.parametrize("backend", AVAILABLE)
def test_only_r_numbers_a_row_are_saved_for_backward(backend):
    inputs = make_case(CASE, torch.float32)
    y, v = inputs.clone_y().requires_grad_(), inputs.v.clone().requires_grad_()
    parameters = {t.untyped_storage().data_ptr() for t in (inputs.basis, v, inputs.projection)}
    saved = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tiny_lora_update(y, inputs.basis, v, inputs.projection, inputs.offset, backend=backend)
    assert [tuple(t.shape) for t in saved] == [(CASE.rows, CASE.rank)]


@pytest.mark.parametrize("backend", AVAILABLE)
def test_in_place_writes_into_the_output_and_nowhere_else(backend):
    inputs = make_case(CASE, torch.float32)
    y = inputs.clone_y()
    with torch.no_grad():
        out = tiny_lora_update(
            y, inputs.basis, inputs.v, inputs.projection, inputs.offset, inplace=True, backend=backend
        )
    assert out.data_ptr() == y.data_ptr() and error(y, exact(inputs).y) < 1e-6


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("view", ["transposed", "every second column", "expanded", "three strides"])
def test_any_strides(backend, view):
    inputs = make_case(Case(6, 8, numbers=2), torch.float32)
    y = {
        "transposed": torch.randn(8, 6).T,
        "every second column": torch.randn(6, 16)[:, ::2],
        "expanded": torch.randn(1, 8).expand(6, 8),
        "three strides": torch.randn(3, 4, 8)[:, :2],
    }[view]
    out = tiny_lora_update(y, inputs.basis, inputs.v, inputs.projection, inputs.offset, inplace=True, backend=backend)
    truth = tiny_lora_update(
        y.double(), inputs.basis, inputs.v, inputs.projection, inputs.offset, backend="reference"
    )
    assert error(out, truth) < 1e-6


@pytest.mark.parametrize("backend", AVAILABLE)
def test_gradient_of_a_sum_has_stride_zero(backend):
    inputs = make_case(CASE, torch.float32)
    y, v = inputs.clone_y().requires_grad_(), inputs.v.clone().requires_grad_()
    tiny_lora_update(y, inputs.basis, v, inputs.projection, inputs.offset, backend=backend).sum().backward()
    double = dict(dtype=torch.float64)
    y2, v2 = inputs.y.to(**double).requires_grad_(), inputs.v.to(**double).requires_grad_()
    tiny_lora_update(y2, inputs.basis, v2, inputs.projection, inputs.offset, backend="reference").sum().backward()
    assert error(y.grad, y2.grad) < 1e-6 and error(v.grad, v2.grad) < 1e-6


@pytest.mark.parametrize("backend", AVAILABLE)
def test_fullgraph_compilation_gives_the_same_numbers_and_one_graph_over_sequence_lengths(backend):
    inputs = make_case(CASE, torch.float32)
    v = inputs.v.clone().requires_grad_()

    def forward(y):
        return tiny_lora_update(y * 2, inputs.basis, v, inputs.projection, inputs.offset, inplace=True, backend=backend)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(forward, fullgraph=True, backend=counter)
    for length in (3, 6, 11):
        y = torch.randn(2, length, CASE.features, requires_grad=True)
        torch._dynamo.mark_dynamic(y, 1)
        outputs = [f(y) for f in (compiled, forward)]
        gradients = [torch.autograd.grad(out.sin().sum(), (y, v)) for out in outputs]
        torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_the_short_way_into_autograd_is_closed_to_torch_func():
    # Past Function.apply the tensors of a transform would be taken for plain ones, and their gradients would be lost:
    # plain operations run instead.
    inputs, weight = make_case(CASE, torch.float32), torch.randn(33, 5)
    v = inputs.v.clone().requires_grad_()

    def adapted(x):
        return tiny_lora_linear(x, weight, None, inputs.basis, v, inputs.projection).sum()

    x = torch.randn(6, 5)
    expected = torch.autograd.functional.jacobian(adapted, x)
    torch.testing.assert_close(torch.func.grad(adapted)(x), expected)
    torch.testing.assert_close(torch.func.vmap(adapted)(x), torch.stack([adapted(row) for row in x]))


def test_arguments_that_do_not_fit_are_one_line_errors_and_leave_the_output_alone():
    inputs = make_case(CASE, torch.float32)
    good = dict(
        y=inputs.clone_y(), basis=inputs.basis, v=inputs.v, projection=inputs.projection, offset=inputs.offset,
        bias=None, adapter_ids=None,
    )  # fmt: skip
    before = good["y"].clone()
    many = torch.randn(5, CASE.numbers)
    bad = {
        "y": dict(y=torch.randn(6, 32)),
        "basis": dict(basis=inputs.basis.double()),
        "v": dict(v=torch.randn(4)),
        "projection": dict(projection=torch.randn(3, 3, 3)),
        "offset": dict(offset=torch.randn(3)),
        "bias": dict(bias=torch.randn(3)),
        "contiguous": dict(v=torch.randn(2 * CASE.numbers)[::2]),
        "adapter_ids": dict(v=many, adapter_ids=torch.tensor([0, 1, 2, 3, 4, 5])),
        "divides": dict(v=many, adapter_ids=torch.tensor([0, 1, 2, 3])),
        "int32 or int64": dict(v=many, adapter_ids=torch.zeros(6)),
        "meta": dict(basis=inputs.basis.to("meta")),
        "at least one number": dict(v=torch.empty(0), projection=torch.empty(0, 2, 2)),
    }
    for word, change in bad.items():
        for backend in AVAILABLE:
            call = {**good, **change}
            with pytest.raises((ValueError, IndexError, RuntimeError)) as info:
                ops.BACKENDS[backend].update(*call.values())
            first = str(info.value).splitlines()[0]
            assert word in first, f"{backend}: {word!r} not in {first!r}"
            assert torch.equal(good["y"], before)
