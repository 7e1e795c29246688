"""A whole model adapted: the published usage, tie counts, freezing, and bad input that must not touch the model."""
import copy
import functools

import pytest
import torch
from torch import nn

from tests.cases import error
from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import (
    AdapterBank,
    SFTTrainer,
    TinyLoRAConfig,
    adapted_layers,
    apply_tiny_lora,
    count_trainable_params,
    merge,
    remove_adapter,
    trainable_vectors,
    unmerge,
)
from tinylora_kernels.distributed import replicate_adapter
from tinylora_kernels.ops.reference import contract


def config(**changes) -> TinyLoRAConfig:
    return TinyLoRAConfig(**{"target_modules": TARGETS, "cache": False, **changes})


def test_the_published_usage_runs_unchanged():
    model = tiny_decoder()
    config = TinyLoRAConfig(frozen_rank=2, trainable_dim=1, n_tie=15, target_modules=["q_proj","k_proj","v_proj","o_proj","up_proj","down_proj","gate_proj"]); model = apply_tiny_lora(model, config); stats = count_trainable_params(model)  # fmt: skip # noqa: E501, E702
    assert (stats["trainable"], stats["trainable_bytes_bf16"]) == (1, 2)


@pytest.mark.parametrize("n_tie, expected", [(1, 196), (7, 28), (14, 14), (15, 14), (16, 13), (196, 1), (500, 1)])
def test_numbers_trained_over_196_modules(n_tie, expected):
    model = apply_tiny_lora(tiny_decoder(blocks=28, width=4, inner=5), config(n_tie=n_tie))
    stats = count_trainable_params(model)
    assert stats["modules"] == 196 and stats["trainable"] == stats["groups"] == expected
    assert stats["trainable_bytes_fp32"] == 4 * expected and len(trainable_vectors(model)) == expected
    assert [p.shape for p in model.parameters() if p.requires_grad] == [(1,)] * expected


def dense_twin(model: nn.Module) -> nn.Module:
    """The bare model with every update written into its weights, in float64."""
    twin, deltas = copy.deepcopy(model), {}
    for name, layer in adapted_layers(twin).items():
        U, W = layer.basis.T.double(), layer.weight_matrix().double()
        deltas[name] = U @ contract(layer.v.detach().double(), layer.projection.double()) @ U.T @ W
    remove_adapter(twin).double()
    with torch.no_grad():
        for name, delta in deltas.items():
            twin.get_submodule(name).weight.add_(delta)
    return twin


@pytest.mark.parametrize("scaling", ["left", "sqrt"])
@pytest.mark.parametrize("tying", ["tiled", "structured"])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_equal_the_dense_update(tying, scaling, bias):
    model = apply_tiny_lora(
        tiny_decoder(bias=bias), config(trainable_dim=3, n_tie=4, tying=tying, scaling=scaling, alpha=0.5)
    )
    torch.manual_seed(0)
    for v in trainable_vectors(model):
        v.data.normal_(std=0.1)
    tokens = torch.randint(0, 17, (3, 5))
    logits = model(tokens)
    assert error(logits.detach(), dense_twin(model)(tokens).detach()) < 1e-6
    # the derivative along the first number, against central differences, all in float64
    exact = copy.deepcopy(model).double()
    (gradient, *_) = torch.autograd.grad(exact(tokens).square().sum(), trainable_vectors(exact))
    step, losses = 1e-4, []
    for sign in (1, -1):
        moved = copy.deepcopy(model).double()
        trainable_vectors(moved)[0].data[0] += sign * step
        losses.append(dense_twin(moved)(tokens).square().sum())
    numeric = float(losses[0] - losses[1]) / (2 * step)
    assert float(gradient[0]) == pytest.approx(numeric, rel=1e-3)


def test_a_fresh_adapter_is_the_base_model_bit_for_bit():
    model, tokens = tiny_decoder(bias=True), torch.randint(0, 17, (3, 5))
    before = model(tokens)
    assert torch.equal(apply_tiny_lora(model, config())(tokens), before)
    assert torch.equal(remove_adapter(model)(tokens), before) and not adapted_layers(model)


def test_default_targets_are_all_linear_layers_but_the_head():
    names = list(adapted_layers(apply_tiny_lora(tiny_decoder(), config(target_modules=None))))
    assert len(names) == 14 and not any("lm_head" in name for name in names)


def test_a_target_matches_by_name_last_component_or_suffix():
    for target, count in (("layers.1.q_proj", 1), ("q_proj", 2), ("1.q_proj", 1), ("lm_head", 1)):
        assert len(adapted_layers(apply_tiny_lora(tiny_decoder(), config(target_modules=[target])))) == count
    with pytest.raises(ValueError, match="no module matches proj;.*q_proj"):
        apply_tiny_lora(tiny_decoder(), config(target_modules=["proj"]))


def test_a_module_used_under_two_names_is_adapted_once_and_everywhere():
    model = tiny_decoder()
    model.layers[1].q_proj = model.layers[0].q_proj
    apply_tiny_lora(model, config(target_modules=["q_proj"]))
    assert model.layers[1].q_proj is model.layers[0].q_proj and len(adapted_layers(model)) == 1


def test_custom_tying_by_name():
    names = [f"layers.{i}.q_proj" for i in range(2)]
    tying = {names[0]: "early", names[1]: "late"}
    model = apply_tiny_lora(tiny_decoder(), config(target_modules=["q_proj"], tying=tying))
    assert len(trainable_vectors(model)) == 2
    with pytest.raises(ValueError, match=names[1]):
        apply_tiny_lora(tiny_decoder(), config(target_modules=["q_proj"], tying={names[0]: 0}))


def test_uniform_init_is_small_nonzero_and_fixed_by_the_seed():
    vectors = [trainable_vectors(apply_tiny_lora(tiny_decoder(), config(init="uniform", seed=s))) for s in (1, 1, 2)]
    flat = [torch.cat([v.detach() for v in vs]) for vs in vectors]
    assert torch.equal(flat[0], flat[1]) and not torch.equal(flat[0], flat[2])
    assert 0 < flat[0].abs().max() <= 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_v_is_float32_whatever_the_base(dtype):
    model = apply_tiny_lora(tiny_decoder().to(dtype), config(trainable_dim=2))
    assert {v.dtype for v in trainable_vectors(model)} == {torch.float32}
    model(torch.randint(0, 17, (2, 3))).float().sum().backward()
    assert all(v.grad is not None and v.grad.dtype == torch.float32 for v in trainable_vectors(model))


def break_nan(model):
    model.layers[1].k_proj.weight.data[3, 2] = float("nan")


def break_rank(model):
    model.layers[1].k_proj.weight.data[:] = torch.outer(torch.ones(24), torch.arange(24.0))


def break_meta(model):
    model.layers[1].k_proj.to("meta")


BAD_INPUT = {
    "NaN in a weight": (break_nan, {}, "layers.1.k_proj"),
    "weight of rank below r": (break_rank, {}, "layers.1.k_proj"),
    "weights on two devices, one of them meta": (break_meta, {}, "layers.1.k_proj.*meta"),
    "no target matched": (None, {"target_modules": ["query"]}, "query"),
    "rank above min(out, in)": (None, {"frozen_rank": 25}, "q_proj.*25"),
}


@pytest.mark.parametrize("damage, changes, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_the_model_alone(damage, changes, message):
    model = tiny_decoder()
    if damage:
        damage(model)
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message) as info:
        apply_tiny_lora(model, config(**changes))
    assert "\n" not in str(info.value)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("field, value", [
    ("n_tie", 0), ("n_tie", 1.5), ("frozen_rank", 0), ("trainable_dim", -1), ("alpha", float("nan")),
    ("scaling", "right"), ("tying", "random"), ("init", "ones"), ("seed", -1), ("v_dtype", torch.int8),
])  # fmt: skip
def test_a_bad_configuration_names_the_field_and_the_value(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected .*, found ") as info:
        TinyLoRAConfig(**{field: value})
    assert repr(value) in str(info.value) or str(value) in str(info.value)


def test_adapting_twice_is_refused():
    model = apply_tiny_lora(tiny_decoder(), config())
    with pytest.raises(ValueError, match="adapted already"):
        apply_tiny_lora(model, config())


def test_training_reaches_a_model_that_the_update_can_express():
    """Adam on one vector recovers the v that made the targets."""
    teacher = apply_tiny_lora(tiny_decoder(), config(trainable_dim=2, n_tie=100))
    trainable_vectors(teacher)[0].data.copy_(torch.tensor([0.3, -0.2]))
    student = apply_tiny_lora(tiny_decoder(), config(trainable_dim=2, n_tie=100))
    optimizer = torch.optim.Adam(trainable_vectors(student), lr=0.03)
    tokens = torch.randint(0, 17, (16, 8), generator=torch.Generator().manual_seed(0))
    target = teacher(tokens).detach()
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.mse_loss(student(tokens), target).backward()
        optimizer.step()
    torch.testing.assert_close(trainable_vectors(student)[0], trainable_vectors(teacher)[0], atol=0.01, rtol=0)


HELD = {
    "list": lambda p: [p],
    "tuple": lambda p: ("a", (p,)),
    "dict": lambda p: {"p": [p]},
    "attribute": lambda p: p,
    "method": lambda p: p.forward,
    "partial": lambda p: functools.partial(lambda layer, x: layer(x), p),
    "partial of a method": lambda p: functools.partial(p.forward),
    "keyword": lambda p: functools.partial(lambda x, layer: layer(x), layer=p),
}  # fmt: skip


class Holder(nn.Module):
    """Calls its layer by something else than its registered name, as MaskFormer's heads do."""

    def __init__(self, how):
        super().__init__()
        self.p = nn.Linear(8, 8)
        self.__dict__["held"] = HELD[how](self.p)

    def forward(self, x):
        held = self.held
        while not callable(held):
            held = held["p"] if isinstance(held, dict) else held[-1]
        return held(x)


@pytest.mark.parametrize("how", HELD)
@torch.no_grad()
def test_what_else_refers_to_a_module_is_swapped_with_it_and_back(how):
    torch.manual_seed(0)
    model, x = Holder(how), torch.randn(3, 8)
    bare = model(x)
    apply_tiny_lora(model, TinyLoRAConfig(trainable_dim=2, cache=False), progress=False)
    nn.init.ones_(model.p.v)
    adapted = model(x)
    torch.testing.assert_close(adapted, model.p(x))
    assert (adapted - bare).abs().max() > 0.01
    torch.testing.assert_close(merge(model)(x), adapted, rtol=1e-5, atol=1e-5)
    remove_adapter(unmerge(model))
    assert torch.equal(model(x), bare) and type(model.p) is nn.Linear


def test_a_list_that_holds_itself_is_no_trap():
    model = nn.Sequential(nn.Linear(8, 8))
    model.held = [model[0]]
    model.held.append(model.held)
    apply_tiny_lora(model, TinyLoRAConfig(cache=False), progress=False)
    assert model.held[0] is model[0]


TAKES = {
    "count_trainable_params": count_trainable_params,
    "AdapterBank": lambda model: AdapterBank(model, 1),
    "model": lambda model: SFTTrainer(model),
    "replicate_adapter": replicate_adapter,
}


@pytest.mark.parametrize("who", TAKES)
@pytest.mark.parametrize("taken", ["the tail", "a block", "a copy of a block"])
def test_a_vector_that_left_the_model_with_its_layer_is_missed(who, taken):
    """It was in no parameters() and in no state dict: what was learned was lost without a word."""
    model = apply_tiny_lora(tiny_decoder(), config(n_tie=14))
    TAKES["count_trainable_params"](model)
    model.layers = model.layers[1:]
    part = {"the tail": model, "a block": model.layers[0], "a copy of a block": copy.deepcopy(model.layers[0])}[taken]
    with pytest.raises(ValueError, match=rf"^{who}: the vector v of .* the layer that was layers.0.q_proj, which is n"):
        TAKES[who](part)


class WithAChild(nn.Linear):
    """Adapted, and around another one that is."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.before = nn.Linear(self.in_features, self.in_features)

    def forward(self, x):
        return super().forward(self.before(x))


@torch.no_grad()
def test_a_layer_inside_an_adapted_one_is_adapted_too():
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"outer": WithAChild(8, 8)}), torch.randn(3, 8)
    bare = model["outer"](x)
    apply_tiny_lora(model, TinyLoRAConfig(cache=False, n_tie=1), progress=False)
    inner = model["outer"].base.before
    inner.v.fill_(1.0)
    assert (model["outer"](x) - bare).abs().max() > 0.01
    remove_adapter(model)
    assert torch.equal(model["outer"](x), bare)
