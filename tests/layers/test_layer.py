"""One adapted layer: exactness around any linear-like base, and when the update may be in place."""
import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from torch import nn

from tests.cases import error
from tests.paper import delta_weight
from tinylora_kernels import TinyLoRAConfig, ops
from tinylora_kernels.functional import tiny_lora_linear
from tinylora_kernels.layers.layer import TinyLoRALayer
from tinylora_kernels.linear import node, plan, rules
from tinylora_kernels.ops import reference
from tinylora_kernels.ops.native import library
from tinylora_kernels.ops.reference import contract


def adapted(base: nn.Module, weight: torch.Tensor, rank: int = 2, numbers: int = 3, seed: int = 0) -> TinyLoRALayer:
    """A layer with random v around a base whose weight as [out, in] is given."""
    generator = torch.Generator().manual_seed(seed)
    U, S, _ = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    projection = torch.randn(numbers, rank, rank, generator=generator)
    v = nn.Parameter(torch.randn(numbers, generator=generator))
    base.requires_grad_(False)
    return TinyLoRALayer(base, U[:, :rank].T.to(dtype), S[:rank].to(dtype), projection, v)


def linear(bias=True, dtype=torch.float32, out_features=24, in_features=16):
    torch.manual_seed(1)
    base = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    return adapted(base, base.weight)


def dense(layer: TinyLoRALayer, x: torch.Tensor) -> torch.Tensor:
    """(W + delta) x + b in float64."""
    bias = layer.base.bias
    weight = layer.weight_matrix().double() + delta_weight(layer).double()
    return nn.functional.linear(x.double(), weight, None if bias is None else bias.double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (0, 16)], ids=str)
def test_output_equals_the_dense_weight(bias, shape):
    layer, x = linear(bias), torch.randn(shape)
    assert error(layer(x), dense(layer, x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_factors_in_a_layer_that_has_run(dtype):
    """B^T was of the old U: what load_adapter does with a file that brings its basis, and refresh_factors."""
    layer, x = linear(dtype=dtype), torch.randn(5, 16).to(dtype).requires_grad_()
    layer.config = TinyLoRAConfig(trainable_dim=3)
    for _ in range(3):
        layer(x).sum().backward()
    U, S, _ = torch.linalg.svd(layer.base.weight.detach().double(), full_matrices=False)
    layer.set_factors(U[:, 3:5].T.float().contiguous(), S[3:5].float())
    x.grad = None
    y, truth = layer(x), dense(layer, x)
    y.sum().backward()
    twin = x.detach().double().requires_grad_()
    dense(layer, twin).sum().backward()
    bound = 4 * torch.finfo(dtype).eps
    assert error(y.detach(), truth.detach()) < bound and error(x.grad, twin.grad) < bound


def test_delta_weight_is_the_update_of_the_weight():
    layer = linear(dtype=torch.float64)
    U, M = layer.basis.T, contract(layer.v.detach().double(), layer.projection)
    torch.testing.assert_close(delta_weight(layer), U @ M @ U.T @ layer.base.weight)
    torch.testing.assert_close(layer.right_factor(), U.T @ layer.base.weight)


def test_a_conv1d_stores_its_weight_the_other_way_round():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    base = transformers.Conv1D(24, 16)
    layer, x = adapted(base, base.weight.T), torch.randn(3, 16)
    assert layer.weight_matrix().shape == (24, 16) and error(layer(x), dense(layer, x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_v_and_factors_keep_their_precision_whatever_the_model_becomes(dtype):
    layer, x = linear(), torch.randn(4, 16)
    bits = layer.v.detach().clone(), layer.basis.clone()
    layer.to(dtype)
    assert layer.base.weight.dtype == dtype and layer.v.dtype == layer.basis.dtype == torch.float32
    assert torch.equal(layer.v, bits[0]) and torch.equal(layer.basis, bits[1])
    out = layer(x.to(dtype))
    assert out.dtype == dtype and error(out, dense(layer, x.to(dtype))) < 4 * torch.finfo(dtype).eps + 1e-6
    out.float().sum().backward()
    assert layer.v.grad.dtype == torch.float32 and layer.v.grad.any()


def test_the_update_is_in_place_on_a_fresh_output(monkeypatch):
    layer, seen = linear(), []
    run = layer.base.forward
    monkeypatch.setattr(layer.base, "forward", lambda x: seen.append(run(x)) or seen[0])
    with torch.no_grad():
        assert layer(torch.randn(3, 16)).data_ptr() == seen[0].data_ptr()


class Saving(nn.Linear):
    """A linear layer whose own backward needs its output: writing into it would be wrong."""

    def forward(self, x):
        class Save(torch.autograd.Function):
            @staticmethod
            def forward(ctx, y):
                out = y.clone()
                ctx.save_for_backward(out)
                return out

            @staticmethod
            def backward(ctx, g):
                return g + 0 * ctx.saved_tensors[0]

        return Save.apply(super().forward(x))


class Cached(nn.Linear):
    """A linear layer that hands out a tensor it keeps."""

    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


@pytest.mark.parametrize("kind", [Saving, Cached])
def test_an_unknown_base_is_updated_out_of_place(kind):
    base = kind(16, 24)
    layer, x = adapted(base, base.weight), torch.randn(3, 16, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert error(out.detach(), dense(layer, x.detach())) < 1e-6 and x.grad.any()
    if kind is Cached:
        assert error(base.kept.detach(), nn.functional.linear(x, base.weight, base.bias).detach()) < 1e-6


def general(layer: TinyLoRALayer) -> TinyLoRALayer:
    """The same layer with a hook on its base that does nothing: linear and update are two nodes, out of place."""
    twin = copy.deepcopy(layer)
    twin.base.register_forward_hook(lambda module, args, out: None)
    return twin


def gradients(layer: TinyLoRALayer, x: torch.Tensor) -> list[torch.Tensor]:
    x, layer.v.grad = x.detach().requires_grad_(), None
    out = layer(x)
    out = out.mul_(2).relu_()  # in place on the output: nothing may have saved it, and it may be no view
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), x.grad, layer.v.grad]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (0, 16), (2, 1, 3, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_linear_and_update_as_one_node_give_the_results_of_two(bias, shape, dtype):
    layer, draws = linear(bias, dtype), [torch.randn(shape).to(dtype) for _ in range(8)]
    x = draws[0]
    assert "TinyLoRALinear" in layer(x).grad_fn.name() and "TinyLoRAUpdate" in general(layer)(x).grad_fn.name()
    errors = []  # [draws, y dx dv, one node or two]; dv of a single row may be a small difference of large numbers
    for x in draws:
        one, two = gradients(layer, x), gradients(general(layer), x)
        exact = gradients(copy.deepcopy(general(layer)).double(), x.double())
        errors.append([[error(found, truth) for found in pair] for *pair, truth in zip(one, two, exact, strict=True)])
    # x W^T and g W, added to their low-rank terms or updated, against the update of x W^T and of g
    for found, other in torch.tensor(errors).mean(0).tolist():
        assert found <= max(1.5 * other, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (0, 16), (130, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_zeros_give_the_bits_of_the_frozen_layer(bias, shape, dtype):
    layer, x = linear(bias, dtype), torch.randn(shape).to(dtype)
    with torch.no_grad():
        layer.v.zero_()
    y, dx, _ = gradients(layer, x)
    x.requires_grad_()
    out = layer.base(x).mul_(2).relu_()
    (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
    assert torch.equal(y, out) and torch.equal(dx, x.grad)


@pytest.mark.parametrize("shape", [(5, 16), (0, 16), (2, 1, 3, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_features", [24, 7])  # so narrow that y and a copy of g are updated instead
@pytest.mark.parametrize("bias", [True, False])
def test_the_node_in_python_gives_the_bits_of_the_one_in_cpp(shape, dtype, out_features, bias, monkeypatch):
    layer, x = linear(bias, dtype, out_features), torch.randn(shape).to(dtype)
    if node.twin is None:
        pytest.skip(node.why_no_twin)
    in_cpp = gradients(layer, x)
    assert "C++" in layer(x.requires_grad_()).grad_fn.name()
    monkeypatch.setattr(node, "twin", None)
    monkeypatch.setattr(plan, "twin", None)
    twin = copy.deepcopy(layer)
    for one, two in zip(in_cpp, gradients(twin, x), strict=True):
        assert torch.equal(one, two)
    assert "C++" not in twin(x).grad_fn.name()


@pytest.mark.skipif(node.twin is None, reason=f"no node in C++: {node.why_no_twin}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_features", [24, 8, 7, 3])
def test_a_right_factor_that_is_given_is_used_alike_in_both_nodes(dtype, out_features, monkeypatch):
    """The layer hands none over where the rules have no use for it; a caller of tiny_lora_linear may."""
    layer, x = linear(False, dtype, out_features), torch.randn(5, 16).to(dtype).requires_grad_()
    frozen = layer.base.weight, None, layer.basis, layer.v, layer.projection

    def results():
        y = tiny_lora_linear(x, *frozen, right=layer.right_factor().float())
        return y.grad_fn.name(), [y, *torch.autograd.grad(y, (x, layer.v), torch.ones_like(y))]

    name, in_cpp = results()
    monkeypatch.setattr(node, "twin", None)
    other, in_python = results()
    assert "C++" in name and "C++" not in other
    for one, two in zip(in_cpp, in_python, strict=True):
        assert torch.equal(one, two)


@pytest.mark.skipif(ops.choose("cpu", torch.float32, 2) != "cpu", reason="the reference knows no B^T")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("out_features, wide", [(8, False), (7, True)])  # of 16 inputs
def test_right_factor_is_kept_where_it_is_used(dtype, bias, training, out_features, wide):
    layer, x = linear(bias, dtype, out_features), torch.randn(3, 16, dtype=dtype, requires_grad=training)
    with torch.set_grad_enabled(training):
        layer(x)
    forward = dtype.itemsize >= 4 or bias
    assert (layer._right is not None) is (not wide and (forward or training))
    if layer._right is not None:
        torch.testing.assert_close(layer._right[-1], layer.right_factor().to(layer.basis.dtype))


@pytest.mark.parametrize("rows", [600, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["reference", "cpu"])  # the node in Python; in C++
def test_a_right_factor_that_the_device_looks_after_follows_its_weight(backend, bias, rows, monkeypatch):
    """By a GPU's rule, with its ops: B^T is made again, for calls of many rows, where W was written unseen."""
    if ops.BACKENDS[backend].why_not("cpu", torch.float32, 2) is not None:
        pytest.skip("no native library")
    looks, names = [], ("low_rank", "update_input_grad", "refresh_right")
    module = library if backend == "cpu" else reference
    found = {name: getattr(module, name) for name in names}

    def refresh_right(*arguments):
        looks.append(arguments[-1])
        found["refresh_right"](*arguments)

    watched = found | {"refresh_right": refresh_right}
    monkeypatch.setitem(ops.BACKENDS, backend, ops.BACKENDS[backend]._replace(**watched))
    monkeypatch.setattr(node, "product_order", lambda weight, bias: 7)
    layer, x = linear(bias, torch.float32, 48), torch.randn(rows, 16, requires_grad=True)
    layer.backend, g = backend, torch.randn(rows, 48)

    def results(by):
        y = by(x)
        return y, *torch.autograd.grad(y, (x, layer.v), g)

    def plain(x):
        y = x @ layer.base.weight.T
        y = y + y @ layer.basis.T @ contract(layer.v, layer.projection).T @ layer.basis
        return y if layer.base.bias is None else y + layer.base.bias

    for change in (lambda: None, lambda: layer.base.weight.data.mul_(-3), lambda: None):
        change()
        for one, two in zip(results(layer), results(plain), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    looked = rows == 600 and (backend == "reference" or node.twin is None)  # the node in C++ calls the op itself
    assert looks == [True] + 3 * [False] * looked


@pytest.fixture(params=["reference", "cpu"])  # the node in Python; in C++
def looked_after(request, monkeypatch):
    """A layer by a GPU's rule, with a GPU's ops on the CPU; x and g."""
    if ops.BACKENDS[request.param].why_not("cpu", torch.float32, 2) is not None:
        pytest.skip("no native library")
    module = library if request.param == "cpu" else reference
    found = {name: getattr(module, name) for name in ("low_rank", "update_input_grad", "refresh_right")}
    monkeypatch.setitem(ops.BACKENDS, request.param, ops.BACKENDS[request.param]._replace(**found))
    monkeypatch.setattr(node, "product_order", lambda weight, bias: 7)
    layer = linear(True, torch.float32, 48)
    layer.backend, layer.config = request.param, TinyLoRAConfig(trainable_dim=3)
    return layer, torch.randn(600, 16, requires_grad=True), torch.randn(600, 48)


def load_itself(layer):
    layer.load_state_dict(layer.state_dict())


def write_data(layer):
    layer.base.weight.data.mul_(-3)


def take_other_factors(layer):
    U, S, _ = torch.linalg.svd(layer.base.weight.detach().double(), full_matrices=False)
    layer.set_factors(U[:, 3:5].T.float().contiguous(), S[3:5].float())


def take_them_and_put_them_back(layer):
    put_back = layer.keep()
    take_other_factors(layer)
    put_back()


WRITTEN = [lambda layer: write_weight(layer.base.weight), load_itself, write_data, lambda layer: layer.to("cpu"),
           take_other_factors, take_them_and_put_them_back]  # fmt: skip


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", WRITTEN)
def test_what_a_captured_graph_reads_stays_where_it_is(looked_after, change, inference):
    """B^T and its samples, whatever is written: a graph that was captured reads and writes them at each replay."""
    layer, x, g = looked_after

    def step(run):
        y = run(x)
        return [y.detach(), *torch.autograd.grad(y, (x, layer.v), g)]

    def plain(x):
        y = x @ layer.base.weight.T
        return y + y @ layer.basis.T @ contract(layer.v, layer.projection).T @ layer.basis + layer.base.bias

    with torch.inference_mode(inference):
        layer(x)
    step(layer), step(layer)
    held, before = layer._right, (layer._right.right.data_ptr(), layer._right.samples.data_ptr())
    for _ in range(2):
        change(layer)
        if "take" in change.__name__:  # nothing on the device would tell that U is another
            torch.testing.assert_close(held.right, layer.right_factor(), rtol=1e-4, atol=1e-5)
        for _ in range(2):
            for one, two in zip(step(layer), step(plain), strict=True):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
        assert (layer._right.right.data_ptr(), layer._right.samples.data_ptr()) == before
        torch.testing.assert_close(held.right, layer.right_factor(), rtol=1e-4, atol=1e-5)


def test_another_weight_gets_another_right_factor(looked_after):
    """A backward pass of before the exchange wants that of the old one."""
    layer, x, g = looked_after
    expected = torch.autograd.grad(layer(x), (x, layer.v), g)
    y = layer(x)
    old, layer.base.weight = layer._right, nn.Parameter(-2 * layer.base.weight.detach(), requires_grad=False)
    assert error(layer(x), dense(layer, x)) < 1e-5 and layer._right.right.data_ptr() != old.right.data_ptr()
    for one, two in zip(torch.autograd.grad(y, (x, layer.v), g), expected, strict=True):
        assert torch.equal(one, two)
    assert copy.deepcopy(layer)._right is None
    layer.take_witness()
    layer.double()
    assert layer._right is None or layer._right.right.dtype is torch.float32
    assert error(layer(x.double()), dense(layer, x)) < 1e-6


@pytest.mark.parametrize("called", [False, True])
def test_one_node_notices_factors_rewritten_before_backward(looked_after, called):
    """By load_adapter or refresh_factors; with B^T, which is written with them."""
    layer, x, _ = looked_after
    out = layer(x)
    take_other_factors(layer)
    if called:
        layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation: its basis"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "cpu"])  # the node in Python; in C++
@pytest.mark.parametrize("out_features, rows, looks", [(48, 600, 1), (48, 5, 0), (24, 600, 0)])
def test_the_device_looks_where_a_pass_uses_the_right_factor_and_nowhere_else(
    backend, out_features, rows, looks, monkeypatch
):
    """Once a forward pass whose product comes last; not where it comes first, nor for few rows, nor backward."""
    if ops.BACKENDS[backend].why_not("cpu", torch.float32, 2) is not None:
        pytest.skip("no native library")
    module = library if backend == "cpu" else reference
    found = {name: getattr(module, name) for name in ("low_rank", "update_input_grad", "refresh_right")}
    calls = []
    if backend == "reference":  # no op of torch's, which the profiler would see
        found["refresh_right"] = lambda *arguments: calls.append(1) or reference.refresh_right(*arguments)
    monkeypatch.setitem(ops.BACKENDS, backend, ops.BACKENDS[backend]._replace(**found))
    monkeypatch.setattr(node, "product_order", lambda weight, bias: rules.product_order(weight.to("meta"), bias))
    layer, x = linear(False, torch.float32, out_features), torch.randn(rows, 16, requires_grad=True)
    layer.backend = backend
    layer(x)  # makes B^T, where it will be used
    calls.clear()
    for run in (lambda: layer(x), lambda: layer(x).sum().backward()):
        with torch.autograd.profiler.profile() as profile:
            run()
        calls += [event for event in profile.function_events if event.name == "tinylora::refresh_right"]
        assert len(calls) == looks
        calls.clear()


def test_a_gpus_orders_put_the_product_last_forward_or_nothing():
    for out_features in range(1, 100):
        order = rules.product_order(torch.empty(out_features, 16, device="meta"), None)
        assert order == 0 or order & rules.LAST_FORWARD


def write_weight(weight):
    with torch.no_grad():
        weight.mul_(-3)


def exchange_data(weight):
    weight.data = weight.detach() * -3  # an assignment that torch's version counter does not see


@pytest.mark.parametrize("write", [write_weight, exchange_data])
def test_a_weight_written_anew_is_the_one_that_counts(write):
    layer, x = linear(), torch.randn(5, 16)
    gradients(layer, x)
    write(layer.base.weight)
    assert error(layer(x), dense(layer, x)) < 1e-6
    for one, two in zip(gradients(layer, x), gradients(copy.deepcopy(layer), x), strict=True):
        assert torch.equal(one, two)


def test_one_node_takes_inputs_of_any_layout():
    layer, x = linear(), torch.randn(16, 3, 5)
    for view in (x.permute(2, 1, 0), x.permute(1, 2, 0), x[:, 0].T[::2], torch.randn(1, 16).expand(4, 16)):
        for one, two in zip(gradients(layer, view), gradients(general(layer), view), strict=True):
            torch.testing.assert_close(one, two)


def replace_v(layer):
    layer.v = nn.Parameter(torch.ones(3))


def replace_v_behind_the_layer(layer):
    layer._parameters["v"] = nn.Parameter(torch.ones(3))  # as torch.func.functional_call does


def replace_v_by_a_column(layer):
    layer.v.data = torch.ones(3, 4)[:, 1]


def replace_v_by_one_number(layer):
    layer.v.data = torch.ones(1).expand(3)


def replace_v_by_half_as_many_bits(layer):
    layer.v.data = torch.ones(3, dtype=torch.float16)


def replace_weight(layer):
    layer.base.weight = nn.Parameter(torch.ones(24, 16), requires_grad=False)


def change_dtype(layer):
    layer.base.to(torch.float64)


def add_hook(layer):
    layer.base.register_forward_hook(lambda module, args, out: 2 * out)


def wrap_forward(layer):
    run = layer.base.forward
    layer.base.forward = lambda x: 2 * run(x)


def switch_off(layer):
    layer.enabled = False


def replace_factors(layer):
    layer.basis = 2 * layer.basis


def write_weight_in_place(layer):
    layer.base.weight.mul_(-3)


def exchange_weight(layer):
    layer.base.weight.data = layer.base.weight.detach() * -3


def stretch_projection(layer):
    layer.projection = torch.stack([layer.projection * 2, layer.projection], -1)[..., 0]


CHANGES = [replace_v, replace_v_behind_the_layer, replace_v_by_a_column, replace_v_by_one_number,
           replace_v_by_half_as_many_bits, stretch_projection, replace_weight, change_dtype, add_hook, wrap_forward,
           switch_off, replace_factors, write_weight_in_place, exchange_weight]  # fmt: skip


@pytest.fixture(params=["plan as it is", "plan in Python"])
def plans(request, monkeypatch):
    if request.param == "plan in Python":
        monkeypatch.setattr(plan, "twin", None)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_was_called_before_follows_every_change(change, tied, plans):
    first = linear()
    layer = TinyLoRALayer(first.base, first.basis, first.sigma, first.projection, first) if tied else first
    x = torch.randn(3, 16)
    with torch.no_grad():
        before = layer(x)
        assert layer._plan is not None and torch.equal(layer(x), before)
        (change if change.__name__.startswith("replace_v") else lambda _: change(layer))(first)
        x = x.to(layer.base.weight.dtype)
        layer.__dict__["_plan"], plan = None, layer._plan
        fresh = layer(x)
        layer.__dict__["_plan"] = plan
        assert torch.equal(layer(x), fresh) and not torch.equal(fresh.float(), before)


@pytest.mark.parametrize("change", [
    replace_v_by_a_column, replace_v_by_one_number, replace_v_by_half_as_many_bits, stretch_projection,
])  # fmt: skip
def test_tensors_that_are_copied_for_each_call_are_copied_for_all(change, plans):
    layer, x = linear(), torch.randn(3, 16)
    change(layer)
    exact = general(layer)(x)
    for _ in range(3):
        torch.testing.assert_close(layer(x), exact)


class Counter(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.products += func in (node.twin, nn.functional.linear, torch.Tensor.addmm_)
        return func(*args, **(kwargs or {}))


def test_what_watches_a_call_sees_one_with_a_plan_as_well(plans):
    layer, x = linear(), torch.randn(3, 16)
    exact = layer(x)
    calls = []
    with nn.modules.module.register_module_forward_hook(lambda module, args, out: calls.append(module)):
        torch.testing.assert_close(layer(x), exact)
    assert layer.base in calls
    with Counter() as counter:
        assert torch.equal(layer(x), exact) and counter.products == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert torch.equal(layer(x), exact)


def test_a_wrong_input_raises_the_same_with_a_plan(plans):
    layer = linear()
    layer(torch.randn(3, 16))
    assert layer._plan is not None
    with pytest.raises(ValueError, match=r"x: expected last dimension 16 as in right \(2, 16\), found \(3, 15\)"):
        layer(torch.randn(3, 15))
    with pytest.raises((RuntimeError, TypeError)):
        layer(torch.randn(3, 16).double())
    with pytest.raises((AttributeError, TypeError)):
        layer([1.0] * 16)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_plan_keeps_nothing_alive(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(plan, "twin", None)
    layer, x = linear(), torch.randn(3, 16)
    layer(x)
    layer.base.register_forward_hook(lambda module, args, out, kept=layer: None)  # a cycle through the plan
    weight, gone = weakref.ref(layer.base.weight), weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None and weight() is None


def test_a_call_without_gradients_does_not_answer_one_with(plans):
    layer, x = linear(), torch.randn(3, 16)
    with torch.no_grad():
        assert not layer(x).requires_grad and not layer(x).requires_grad
    assert layer(x).requires_grad
    layer.base.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.base.weight.grad.any()


def test_one_node_notices_a_weight_rewritten_before_backward():
    layer, x = linear(), torch.randn(3, 16, requires_grad=True)
    out = layer(x)
    with torch.no_grad():
        layer.base.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_one_node_notices_a_vector_rewritten_before_backward():
    layer, x = linear(), torch.randn(3, 16, requires_grad=True)
    out = layer(x)
    with torch.no_grad():
        layer.v.mul_(2)  # a step of the optimizer
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("trained", [True, False])
def test_a_second_backward_needs_the_graph_retained(trained):
    layer, x = linear(), torch.randn(3, 16, requires_grad=True)
    layer.v.requires_grad_(trained)
    out = layer(x).sum()
    out.backward(retain_graph=True)
    first, x.grad = x.grad, None
    out.backward()
    assert torch.equal(x.grad, first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()


def test_a_layer_called_in_inference_mode_first_is_trained_all_the_same():
    layer, x = linear(), torch.randn(3, 16)
    twin = copy.deepcopy(layer)
    with torch.inference_mode():
        layer(x)
    for one, two in zip(gradients(layer, x), gradients(twin, x), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("watched", [False, True])
def test_second_derivatives(watched):
    layer, x = linear(), torch.randn(3, 16, requires_grad=True)
    out = (general(layer) if watched else layer)(x)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(dx.sum(), x)
    weight = layer.weight_matrix().double() + delta_weight(layer).double()
    torch.testing.assert_close(found, (2 * weight.T @ weight).sum(0).float().expand(3, 16), rtol=1e-4, atol=1e-4)


def test_a_base_in_training_gets_its_gradient():
    layer, x = linear(), torch.randn(3, 16)
    layer.base.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.base.weight.grad.any() and layer.base.bias.grad.any() and layer.v.grad.any()


def test_autocast_reaches_the_base():
    layer, x = linear(), torch.randn(3, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and x.grad.dtype == torch.float32 and layer.v.grad.any()


def test_a_hook_before_the_base_may_change_its_input():
    layer, x = linear(), torch.randn(3, 16)
    layer.base.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    assert error(layer(x).detach(), dense(layer, 2 * x)) < 1e-6


@pytest.mark.parametrize("hook", ["forward", "full_backward", "full_backward_pre"])
def test_a_hook_on_the_base_sees_the_bare_output(hook):
    layer, x, seen = linear(), torch.randn(3, 16, requires_grad=True), []
    if hook == "forward":
        layer.base.register_forward_hook(lambda module, args, out: seen.append(out))
    else:
        getattr(layer.base, f"register_{hook}_hook")(lambda *args: seen.append(args[-1][0]))
    out = layer(x)
    out.sum().backward()
    assert error(out.detach(), dense(layer, x.detach())) < 1e-6 and len(seen) == 1
    if hook == "forward":
        assert error(seen[0].detach(), layer.base(x).detach()) < 1e-7


def test_no_gradient_is_computed_that_nobody_needs():
    layer, x = linear(), torch.randn(3, 16)
    assert layer(x).requires_grad and not layer.eval()(x.detach()).is_leaf
    layer.v.requires_grad_(False)
    assert not layer(x).requires_grad
    out = layer(x.requires_grad_())
    out.sum().backward()
    assert layer.v.grad is None and x.grad is not None
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_the_tie(copy_of):
    first = linear()
    second = linear()
    second = TinyLoRALayer(second.base, second.basis, second.sigma, second.projection, first)
    model = nn.ModuleList([first, second])
    twin, x = copy_of(model), torch.randn(3, 16)
    assert twin[1].v is twin[0].v and twin[0].v is not first.v
    assert torch.equal(twin[1](x), second(x))
    assert [name for name, _ in twin.named_parameters()].count("0.v") == 1 and "1.v" not in twin.state_dict()


def test_the_state_dict_holds_v_and_the_base_but_not_the_factors():
    assert list(linear().state_dict()) == ["v", "base.weight", "base.bias"]


def test_the_base_is_readable_through_the_layer():
    layer = linear()
    assert layer.weight is layer.base.weight and layer.bias is layer.base.bias
    assert (layer.in_features, layer.out_features) == (16, 24)
    with pytest.raises(AttributeError, match="no attribute 'wieght'"):
        _ = layer.wieght


def test_fullgraph_compilation_of_a_layer_has_one_graph_over_lengths():
    layer = linear()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for length in (7, 9, 11):  # no size equal to another one's: a graph would tie the two together
        x = torch.randn(5, length, 16, requires_grad=True)
        outputs = [f(x) for f in (compiled, layer)]
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*[torch.autograd.grad(o.sum(), (x, layer.v)) for o in outputs])
    assert counter.frame_count == 1


def test_a_weight_that_was_cast_gives_the_gradient_of_the_cast_weight():
    layer, x = linear(), torch.randn(5, 16)
    gradients(layer, x)
    layer.bfloat16()
    x = x.bfloat16()
    for one, two in zip(gradients(layer, x), gradients(copy.deepcopy(layer), x), strict=True):
        assert torch.equal(one, two)


def test_a_weight_made_in_inference_mode():
    with torch.inference_mode():
        base = nn.Linear(16, 24)
    layer, x = adapted(base, base.weight.clone()), torch.randn(5, 16)
    with torch.inference_mode():
        assert error(layer(x), dense(layer, x)) < 1e-6
    with torch.no_grad():
        assert error(layer(x), dense(layer, x)) < 1e-6


def test_the_node_runs_as_any_other_does():
    """Inference mode, checkpoints, saved tensors moved by hooks, one gradient alone, a graph used twice."""
    layer, x = linear(), torch.randn(5, 16)
    y, dx, dv = (tensor.clone() for tensor in gradients(layer, x))

    def results(forward, keep=False) -> list[torch.Tensor]:
        x1, layer.v.grad = x.detach().requires_grad_(), None
        out = forward(x1).mul(2).relu()
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        if keep:
            torch.autograd.grad(loss, layer.v, retain_graph=True)
        loss.backward()
        return [out.detach(), x1.grad, layer.v.grad]

    def offloaded(x):
        with torch.autograd.graph.save_on_cpu():
            return layer(x)

    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, layer)
    runs = [results(layer), results(layer, keep=True), results(offloaded)]
    runs += [results(functools.partial(checkpoint, use_reentrant=reentrant)) for reentrant in (True, False)]
    for found in runs:
        assert all(torch.equal(one, two) for one, two in zip(found, (y, dx, dv), strict=True))
    with torch.inference_mode():
        assert torch.equal(layer(x).mul(2).relu(), y)
    layer.v.requires_grad_(False)
    assert torch.equal(results(layer)[1], dx) and layer.v.grad is None
    assert not layer(x).requires_grad
