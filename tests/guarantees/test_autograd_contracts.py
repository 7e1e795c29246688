"""Autograd's contracts: gradients of any order and mode, recomputed activations, and torch.func's transforms."""
from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from tests.guarantees.dense import BASES, PRODUCTS, adapted, dense_output, example, relative
from tests.layers import test_experts
from tinylora_kernels import AdapterBank, TinyLoRALayer, trainable_vectors
from tinylora_kernels.functional import tiny_lora_linear, tiny_lora_update, tiny_lora_update_parts
from tinylora_kernels.linear import node, plan
from tinylora_kernels.ops import reference

DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def functions(layer: TinyLoRALayer, x: Tensor) -> tuple[Callable, Callable, tuple[Tensor, ...]]:
    """(ours, the truth, arguments): a curved number of (v, x), or of v alone where x holds indices."""

    def curved(y: Tensor) -> Tensor:
        return (y.double() * torch.sin(0.3 * y.double())).sum()

    def ours(v: Tensor, x: Tensor = x) -> Tensor:
        return curved(torch.func.functional_call(layer, {"v": v}, (x,)))

    def truth(v: Tensor, x: Tensor = x) -> Tensor:
        return curved(dense_output(layer, x, v))

    arguments = (layer.v.detach(), x) if x.is_floating_point() else (layer.v.detach(),)
    return ours, truth, arguments


def assert_equal(found, expected, dtype: torch.dtype) -> None:
    found, expected = (torch.utils._pytree.tree_leaves(tree) for tree in (found, expected))
    assert len(found) == len(expected) > 0
    for ours, truth in zip(found, expected, strict=True):
        assert relative(ours, truth) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_the_gradient_and_the_gradient_of_the_gradient(base, dtype):
    layer = adapted(base, dtype)
    ours, truth, arguments = functions(layer, example(layer))
    layer(example(layer))  # from here on by a plan, where there is one

    def derivatives(function: Callable) -> list[Tensor]:
        inputs = [a.clone().requires_grad_() for a in arguments]
        first = torch.autograd.grad(function(*inputs), inputs, create_graph=True)
        squares = sum(g.double().square().sum() for g in first)
        second = torch.autograd.grad(squares, inputs, create_graph=True)
        third = torch.autograd.grad(sum(g.double().square().sum() for g in second), inputs)
        return [*first, *second, *third]

    assert_equal(derivatives(ours), derivatives(truth), dtype)


@pytest.mark.parametrize("call", ["backward", "grad", "hessian", "hvp"])
@pytest.mark.parametrize("base", ["linear with a bias", "conv2d"])
def test_the_hessian_of_a_sum_of_squares_by_every_door(base, call):
    """It was silently zero through torch.autograd.grad."""
    layer = adapted(base)
    x, v = example(layer), layer.v

    def loss(output: Tensor) -> Tensor:
        return output.double().square().sum()

    def through(function: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        v = v.detach().clone().requires_grad_()
        if call == "hessian":
            return torch.autograd.functional.hessian(function, v)
        if call == "hvp":
            return torch.autograd.functional.hvp(function, v, torch.ones_like(v))[1]
        (first,) = torch.autograd.grad(function(v), v, create_graph=True)
        if call == "grad":
            return torch.stack([torch.autograd.grad(g, v, retain_graph=True)[0] for g in first])
        first.square().sum().backward()
        return v.grad

    ours = through(lambda v: loss(torch.func.functional_call(layer, {"v": v}, (x,))), v)
    truth = through(lambda v: loss(dense_output(layer, x, v)), v.double())
    assert truth.abs().min() > 0
    assert relative(ours, truth) < 1e-5


TRANSFORMS: dict[str, Callable] = {
    "grad": lambda f, n: torch.func.grad(f, argnums=tuple(range(n))),
    "grad_and_value": lambda f, n: torch.func.grad_and_value(f, argnums=tuple(range(n))),
    "jvp": lambda f, n: lambda *a: torch.func.jvp(f, a, tuple(torch.cos(t) for t in a)),
    "vjp": lambda f, n: lambda *a: torch.func.vjp(f, *a)[1](torch.tensor(2.0, dtype=torch.float64)),
    "jacrev": lambda f, n: torch.func.jacrev(f, argnums=tuple(range(n))),
    "jacfwd": lambda f, n: torch.func.jacfwd(f, argnums=tuple(range(n))),
    "hessian": lambda f, n: torch.func.hessian(f),
    "reverse over reverse": lambda f, n: torch.func.jacrev(torch.func.grad(f)),
    "linearize": lambda f, n: lambda *a: torch.func.linearize(f, *a)[1](*(torch.cos(t) for t in a)),
    "vmap over v": lambda f, n: lambda v, *rest: torch.func.vmap(lambda v: f(v, *rest))(torch.stack([v, 2 * v, -v])),
    "vmap of grad": lambda f, n: lambda v, *rest: torch.func.vmap(lambda v: torch.func.grad(f)(v, *rest))(
        torch.stack([v, 2 * v, -v])
    ),
}  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("base", BASES)
def test_the_transforms_of_torch_func(base, transform):
    layer = adapted(base)
    layer(example(layer))
    ours, truth, arguments = functions(layer, example(layer))
    apply = TRANSFORMS[transform]
    assert_equal(apply(ours, len(arguments))(*arguments), apply(truth, len(arguments))(*arguments), torch.float32)


@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if name != "linearize"])  # which torch cannot trace
@pytest.mark.parametrize("base", ["linear with a bias", "conv2d", "embedding"])
def test_the_transforms_of_torch_func_inside_torch_compile(base, transform):
    """A tangent that came to an op was dropped there: jvp and jacfwd were zero."""
    layer = adapted(base)
    layer(example(layer))
    ours, truth, arguments = functions(layer, example(layer))
    apply = TRANSFORMS[transform]
    torch.compiler.reset()
    compiled = torch.compile(apply(ours, len(arguments)), backend="aot_eager")
    assert_equal(compiled(*arguments), apply(truth, len(arguments))(*arguments), torch.float32)


def test_gradients_of_each_example_inside_torch_compile():
    layer = adapted("linear with a bias")
    xs, v = torch.stack([example(layer, seed=seed) for seed in range(4)]), layer.v.detach()
    ours, truth, _ = functions(layer, xs[0])
    torch.compiler.reset()
    compiled = torch.compile(torch.func.vmap(torch.func.grad(ours), (None, 0)), backend="aot_eager")
    assert_equal(compiled(v, xs), torch.func.vmap(torch.func.grad(truth), (None, 0))(v, xs), torch.float32)


@pytest.mark.parametrize("compiled_before", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_dual_numbers_go_through_a_compiled_layer(base, compiled_before):
    layer = adapted(base)
    ours, truth, (v, *_) = functions(layer, example(layer))
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    if compiled_before:
        compiled(v)
    with forward_ad.dual_level():
        found, expected = (forward_ad.unpack_dual(f(forward_ad.make_dual(v, v.cos()))) for f in (compiled, truth))
        assert_equal(found.tangent, expected.tangent, torch.float32)


@pytest.mark.parametrize("op", ["update", "update_backward", "low_rank", "update_input_grad"])
@pytest.mark.skipif(node.extension is None, reason="it is the node in C++ that looks")
def test_an_op_by_itself_refuses_what_it_would_drop(op):
    call, arguments = _ops()[op]
    for name, tensor in arguments.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"forward AD with tinylora::{op} "):
                call(**arguments | {name: forward_ad.make_dual(tensor, torch.ones_like(tensor))})


def _load(layer: TinyLoRALayer) -> None:
    layer(example(layer))
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))


def _write(layer: TinyLoRALayer) -> None:
    layer(example(layer))
    with torch.no_grad():
        layer.base.weight.copy_(layer.base.weight.clone())


def _doubt(layer: TinyLoRALayer) -> None:
    _load(layer)
    layer.__dict__["_in_doubt"] = True  # as where the weights come after the layer's own


STATES = {"new": lambda layer: None, "loaded": _load, "written": _write, "in doubt": _doubt}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("base", ["linear with a bias", "large linear", "conv2d", "embedding"])
def test_a_transform_may_be_the_first_to_call_a_layer(base, transform, state):
    """What is kept of a weight was made inside, of wrapped tensors, and had no numbers to look at."""
    layer = adapted(base)
    ours, truth, arguments = functions(layer, example(layer))
    apply, expected = TRANSFORMS[transform], truth(*arguments)
    STATES[state](layer)
    assert_equal(apply(ours, len(arguments))(*arguments), apply(truth, len(arguments))(*arguments), torch.float32)
    for _ in range(2):
        assert relative(ours(*arguments), expected) < 1e-5


@pytest.mark.parametrize("skeleton", ["one of them", "on the meta device"])
@pytest.mark.parametrize("base", BASES)
def test_an_ensemble_of_stacked_states(base, skeleton):
    layers = [adapted(base, seed=seed) for seed in range(3)]
    x, stacked = example(layers[0]), torch.func.stack_module_state(layers)
    one = copy.deepcopy(layers[0]).to("meta" if skeleton == "on the meta device" else "cpu")
    found = torch.func.vmap(lambda *state: torch.func.functional_call(one, state, (x,)))(*stacked)
    assert relative(found, torch.stack([dense_output(layer, x) for layer in layers])) < 1e-5
    if one.basis.is_meta:
        with pytest.raises(RuntimeError, match="meta"):  # it computes nothing by itself
            one(x)


@pytest.mark.parametrize("base", PRODUCTS)
def test_vmap_over_the_input_and_gradients_of_each_example(base):
    layer = adapted(base)
    xs = torch.stack([example(layer, seed=seed) for seed in range(4)])
    ours, truth, _ = functions(layer, xs[0])
    v = layer.v.detach()
    for f, g in ((ours, truth), (torch.func.grad(ours), torch.func.grad(truth))):
        assert_equal(torch.func.vmap(f, (None, 0))(v, xs), torch.func.vmap(g, (None, 0))(v, xs), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_forward_mode_carries_every_tangent(base, dtype):
    """One through the node of a layer was dropped without a word."""
    layer = adapted(base, dtype)
    ours, truth, arguments = functions(layer, example(layer))
    layer(example(layer))

    def tangent(function: Callable, moved: int) -> Tensor:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(a, torch.cos(a)) if i == moved else a for i, a in enumerate(arguments)]
            return forward_ad.unpack_dual(function(*duals)).tangent

    for moved in range(len(arguments)):
        assert_equal(tangent(ours, moved), tangent(truth, moved), dtype)


def test_torch_checks_the_function_itself():
    """gradcheck and gradgradcheck, both modes, on the functions that everything stands on."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 7), torch.randn(6, 7), torch.randn(6)
    basis = torch.linalg.qr(torch.randn(6, 2))[0].T.contiguous()
    right, v, projection = basis @ weight, torch.randn(3), torch.randn(3, 2, 2)
    x, weight, bias, basis, right, v, projection = (
        t.double() for t in (x, weight, bias, basis, right, v, projection)
    )
    ids = torch.tensor([0, 1, -1, 1, 0])
    table = torch.randn(2, 3, dtype=torch.float64)

    def update(y, v, bias, ids=None):
        return tiny_lora_update(y, basis, v, projection, None, ids, bias=bias)

    def linear(x, v, ids=None, right=None):
        return tiny_lora_linear(x, weight, bias, basis, v, projection, None, ids, right=right)

    wanting = functools.partial(map, lambda t: t.clone().requires_grad_())
    y = x @ weight.T
    for function, inputs in (
        (update, (y, v, bias)), (functools.partial(update, ids=ids), (y, table, bias)),
        (linear, (x, v)), (functools.partial(linear, right=right), (x, v)),
        (functools.partial(linear, ids=ids), (x, table)),
        (functools.partial(linear, ids=ids, right=right), (x, table)),
    ):  # fmt: skip
        inputs = tuple(wanting(inputs))
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True)


class Stack(nn.Module):
    """Three adapted layers, as a block recomputes them."""

    def __init__(self, base: str, dtype: torch.dtype):
        super().__init__()
        layers = [adapted(base, dtype, seed) for seed in range(3)]
        self.layers = nn.ModuleList(layers)
        self.back = nn.ParameterList(
            nn.Parameter(torch.randn(layer.weight_matrix().shape, dtype=dtype).T, requires_grad=False)
            for layer in layers
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer, back in zip(self.layers, self.back, strict=True):
            x = torch.tanh(layer(x) @ back.T / 9)
        return x


def _save_products(context, op, *args, **kwargs):
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default}
    policy = checkpointing.CheckpointPolicy
    return policy.MUST_SAVE if op in products else policy.PREFER_RECOMPUTE


def _save_everything(context, op, *args, **kwargs):
    return checkpointing.CheckpointPolicy.PREFER_SAVE


RECOMPUTATIONS = {
    "reentrant": functools.partial(checkpointing.checkpoint, use_reentrant=True),
    "not reentrant": functools.partial(checkpointing.checkpoint, use_reentrant=False),
    "selective, products cached": functools.partial(
        checkpointing.checkpoint, use_reentrant=False,
        context_fn=lambda: checkpointing.create_selective_checkpoint_contexts(_save_products),
    ),
    "selective, all that can be cached": functools.partial(
        checkpointing.checkpoint, use_reentrant=False,
        context_fn=lambda: checkpointing.create_selective_checkpoint_contexts(_save_everything),
    ),
    "selective, the update cached": functools.partial(
        checkpointing.checkpoint, use_reentrant=False,
        context_fn=lambda: checkpointing.create_selective_checkpoint_contexts(
            [op.default for op in (torch.ops.tinylora.update, torch.ops.tinylora.updated, torch.ops.tinylora.low_rank)]
        ),
    ),
    "selective, a list of ops": functools.partial(
        checkpointing.checkpoint, use_reentrant=False,
        context_fn=lambda: checkpointing.create_selective_checkpoint_contexts(
            [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recomputation", RECOMPUTATIONS)
@pytest.mark.parametrize("base", PRODUCTS)
def test_recomputed_activations_change_no_gradient(base, recomputation, dtype):
    """With matrix products cached, dv was off by 24 to 102%: the update wrote into what the cache held."""
    stack = Stack(base, dtype)
    x = example(stack.layers[0]).requires_grad_()
    inputs = [x, *(layer.v for layer in stack.layers)]

    def gradients(forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        for tensor in inputs:
            tensor.grad = None
        forward(x).float().square().sum().backward()
        return tuple(tensor.grad for tensor in inputs)

    stack(x)  # plans
    plain = gradients(stack)
    recomputed = gradients(functools.partial(RECOMPUTATIONS[recomputation], stack))
    for found, expected in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype] * expected.abs().max().item())


# transformers writes its permutation in place, which no cache of everything survives, adapted or not.
@pytest.mark.parametrize("recomputation", [n for n in RECOMPUTATIONS if "all" not in n])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_recomputed_activations_of_stacked_experts(kind, recomputation):
    model = test_experts.adapt(test_experts.bare(kind))
    vectors = trainable_vectors(model)

    def gradients(wrapped: bool) -> list[Tensor]:
        for v in vectors:
            v.grad = None
        for layer in model.model.layers:
            whole = functools.partial(RECOMPUTATIONS[recomputation], layer.mlp.__class__.forward.__get__(layer.mlp))
            layer.mlp.forward = whole if wrapped else whole.args[0]
        embeds = model.get_input_embeddings()(test_experts.TOKENS).detach().requires_grad_()
        model(inputs_embeds=embeds).logits.square().sum().backward()
        return [embeds.grad, *(v.grad for v in vectors)]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_an_update_in_place_counts_as_a_write():
    """So that autograd notices where something has saved the output."""
    layer = adapted("linear")
    y = layer.base(example(layer))
    with torch.no_grad():
        before = y._version
        tiny_lora_update(y, layer.basis, layer.v, layer.projection, inplace=True)
    assert y._version > before
    z = torch.randn(6, 16, requires_grad=True).exp()  # saves its output
    tiny_lora_update(z, layer.basis, layer.v, layer.projection, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("base", ["linear", "linear with a bias"])
def test_gradients_of_a_bank(base):
    layer = adapted(base)
    model = nn.ModuleDict({"layer": layer})
    bank = AdapterBank(model, 3, trainable=True)
    ids = torch.tensor([bank.add(name) for name in "abc"])[[2, 0]]
    table = bank.tables[0]
    with torch.no_grad():
        table.copy_(torch.randn(table.shape))
    x = example(layer)

    def ours(table_: Tensor) -> Tensor:
        with bank.use(ids):
            return layer(x).double().square().sum()

    def truth(table_: Tensor) -> Tensor:
        return sum(dense_output(layer, x[row], table_[i]).square().sum() for row, i in enumerate(ids))

    for _ in range(3):  # the last two by a plan
        (first,) = torch.autograd.grad(ours(table), table, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), table)
        exact = table.detach().double().requires_grad_()
        (first_true,) = torch.autograd.grad(truth(exact), exact, create_graph=True)
        (second_true,) = torch.autograd.grad(first_true.square().sum(), exact)
        assert relative(first, first_true) < 1e-5 and relative(second, second_true) < 1e-5


@pytest.fixture(params=["node as it is", "node in Python"])
def nodes(request, monkeypatch):
    if request.param == "node in Python":
        monkeypatch.setattr(node, "twin", None)
        monkeypatch.setattr(plan, "twin", None)


def assert_batched_gradients_are_those_one_by_one(outputs: Tensor, inputs: list[Tensor], **options) -> None:
    """The vector-Jacobian products of many g in one backward pass."""
    many = torch.randn((3, *outputs.shape), generator=torch.Generator().manual_seed(0)).to(outputs.dtype)
    found = torch.autograd.grad(outputs, inputs, many, is_grads_batched=True, retain_graph=True, **options)
    each = [torch.autograd.grad(outputs, inputs, g, retain_graph=True) for g in many]
    assert_equal(found, [torch.stack(of_one) for of_one in zip(*each, strict=True)], torch.float32)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_a_batch_of_gradients_in_one_pass(base, create_graph, nodes):
    """The kernels have no batching rule, and what torch does one by one in their place raised."""
    layer = adapted(base)
    x = example(layer)
    inputs = [x.requires_grad_(), layer.v] if x.is_floating_point() else [layer.v]
    for _ in range(2):  # the second by a plan
        assert_batched_gradients_are_those_one_by_one(layer(x), inputs, create_graph=create_graph)


@pytest.mark.parametrize("rows_of_one", [False, True])
@pytest.mark.parametrize("base", ["linear", "linear with a bias", "conv1d"])
def test_a_batch_of_gradients_of_a_bank(base, rows_of_one, nodes):
    layer = adapted(base)
    bank = AdapterBank(nn.ModuleDict({"layer": layer}), 3, trainable=True)
    for name in "abc":
        bank.add(name)
    with torch.no_grad():
        bank.tables[0].normal_()
    x = example(layer).requires_grad_()
    with bank.use(["b", "b"] if rows_of_one else ["c", None]):
        for _ in range(3):
            assert_batched_gradients_are_those_one_by_one(layer(x), [x, bank.tables[0]])


def test_a_batch_of_gradients_of_parts(nodes):
    y, v, bias = (torch.randn(shape, requires_grad=True) for shape in ((5, 12), (2, 3), (12,)))
    basis, projection = torch.randn(2, 12), torch.randn(3, 3, 2, 2)
    outputs = tiny_lora_update_parts(y, basis, v, projection, [4, 6, 12], [0, 1, 0], bias=bias)
    assert_batched_gradients_are_those_one_by_one(outputs, [y, v, bias])


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_batch_of_gradients_of_stacked_experts(kind):
    model = test_experts.adapt(test_experts.bare(kind))
    assert_batched_gradients_are_those_one_by_one(model(test_experts.TOKENS).logits, trainable_vectors(model))


@pytest.mark.parametrize("call", ["jacobian", "hessian"])
@pytest.mark.parametrize("base", BASES)
def test_vectorized_jacobians_and_hessians(base, call, nodes):
    layer = adapted(base)
    ours, truth, (v, *_) = functions(layer, example(layer))
    layer(example(layer))
    derive = getattr(torch.autograd.functional, call)
    assert_equal(derive(ours, v, vectorize=True), derive(truth, v), torch.float32)


@pytest.mark.parametrize("base", BASES)
def test_a_tangent_of_an_incoming_gradient_is_carried(base, nodes):
    """Forward over reverse, of a graph that was made before: linear in g, so the tangent goes the way of g."""
    layer = adapted(base)
    x = example(layer)
    inputs = [x.requires_grad_(), layer.v] if x.is_floating_point() else [layer.v]
    y = layer(x)
    expected = torch.autograd.grad(y, inputs, y.detach().cos(), retain_graph=True)
    with forward_ad.dual_level():
        g = forward_ad.make_dual(torch.ones_like(y), y.detach().cos())
        found = [forward_ad.unpack_dual(d).tangent for d in torch.autograd.grad(y, inputs, g)]
    assert_equal(found, expected, torch.float32)


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_fullgraph_compilation_of_the_functions(right, trained):
    layer = adapted("linear with a bias")
    weight, bias, x = layer.base.weight.detach(), layer.base.bias.detach(), example(layer)
    v = layer.v.detach().clone().requires_grad_(trained)
    b_transposed = layer.right_factor() if right else None

    def linear(x: Tensor, v: Tensor) -> Tensor:
        return tiny_lora_linear(x, weight, bias, layer.basis, v, layer.projection, right=b_transposed)

    def update(x: Tensor, v: Tensor) -> Tensor:
        return tiny_lora_update(x @ weight.T, layer.basis, v, layer.projection, bias=bias, inplace=True)

    truth = dense_output(layer, x, v.detach())
    for function in (linear, update):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        found = compiled(x, v)
        assert relative(found, truth) < 1e-6
        if trained:
            (ours,) = torch.autograd.grad(found.square().sum(), v)
            exact = v.detach().double().requires_grad_()
            (expected,) = torch.autograd.grad(dense_output(layer, x, exact).square().sum(), exact)
            assert relative(ours, expected) < 1e-5


@pytest.mark.parametrize("name", ["y", "basis", "v", "projection", "offset", "bias", "adapter_ids"])
def test_any_strides_of_any_argument(name):
    """The native kernels want rows side by side; who calls the function need not know."""
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float32)
    arguments = {
        "y": normal(6, 16), "basis": torch.linalg.qr(normal(16, 2))[0].T.contiguous(), "v": normal(4, 3),
        "projection": normal(3, 2, 2), "offset": normal(2), "bias": None,
        "adapter_ids": torch.tensor([0, 3, 1, 2, -1, 1]),
    }  # fmt: skip
    if name == "bias":
        arguments |= {"offset": None, "bias": normal(16)}
    expected = tiny_lora_update(**arguments)
    tensor = arguments[name]
    wide = torch.zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]), dtype=tensor.dtype)
    wide[..., ::2] = tensor
    assert not wide[..., ::2].is_contiguous()
    assert torch.equal(tiny_lora_update(**arguments | {name: wide[..., ::2]}), expected)


def _ops() -> dict[str, tuple[Callable, dict[str, Tensor | bool | None]]]:
    """Each op, and arguments that it takes: N=6, D=16, E=8, r=2, u=3, K=4."""
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    basis, ids = torch.linalg.qr(normal(16, 2))[0].T.contiguous(), torch.tensor([0, 3, 1, 2, -1, 1])
    small = {"basis": basis, "v": normal(4, 3), "projection": normal(3, 2, 2)}
    bias, t, right = normal(16), normal(6, 2), normal(2, 8)
    of, ops = {"adapter_ids": ids}, torch.ops.tinylora
    return {
        "update": (ops.update, {"y": normal(6, 16), **small, "offset": normal(2), "bias": bias, **of}),
        "update_backward": (ops.update_backward, {"g": normal(6, 16), **small, "t": t, **of, "need_input_grad": True}),
        "low_rank": (ops.low_rank, {"x": normal(6, 8), "right": right, **small, "bias": bias, **of}),
        "update_input_grad": (
            ops.update_input_grad,
            {"dx": normal(6, 8), "right": right, "g": normal(6, 16), **small, "t": t, **of, "add": True},
        ),
    }  # fmt: skip


NAMED = [
    (op, name) for op, (_, arguments) in _ops().items() for name, value in arguments.items()
    if isinstance(value, Tensor) and name not in ("y", "x", "g", "dx")
]  # fmt: skip


@pytest.mark.parametrize("op, name", NAMED)
def test_native_kernels_reference_and_fakes_say_the_same_of_strides(op, name):
    """The ops are strict, each in the same way; the functions above them are not."""
    call, arguments = _ops()[op]
    stretched = torch.stack([arguments[name], arguments[name]], -1)[..., 0]
    assert torch.equal(stretched, arguments[name]) and not stretched.is_contiguous()

    def on(backend: str, given: dict) -> None:
        if backend == "native":
            call(**given)
        elif backend == "reference":
            getattr(reference, op)(*given.values())
        else:
            with FakeTensorMode() as mode:
                call(**{key: mode.from_tensor(one) if isinstance(one, Tensor) else one for key, one in given.items()})

    for backend in ("native", "reference", "fake"):
        on(backend, _ops()[op][1])
        with pytest.raises(ValueError, match=f"^{name}: expected (a )?contiguous "):
            on(backend, _ops()[op][1] | {name: stretched})


@pytest.mark.parametrize("name", ["x", "weight", "bias", "basis", "v", "projection", "right"])
def test_any_strides_of_any_argument_of_a_layer(name):
    layer = adapted("linear with a bias")
    base = layer.base
    arguments = {
        "x": example(layer), "weight": base.weight.detach(), "bias": base.bias.detach(), "basis": layer.basis,
        "v": layer.v.detach(), "projection": layer.projection, "right": layer.right_factor(),
    }  # fmt: skip
    stretched = torch.stack([arguments[name], arguments[name]], -1)[..., 0]
    assert not stretched.is_contiguous()
    found = tiny_lora_linear(**arguments | {name: stretched})
    assert relative(found, tiny_lora_linear(**arguments)) < 1e-6
