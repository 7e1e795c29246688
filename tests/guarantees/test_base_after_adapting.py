"""The base after adapting: biases that are trained, weights that are loaded, written, cast or emptied."""
from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tests.guarantees.dense import BASES, PRODUCTS, adapted, dense_output, example, relative
from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import (
    LoRAXSConfig,
    TinyLoRAConfig,
    TinyLoRALayer,
    adapted_layers,
    apply_tiny_lora,
    export_lora,
    inspect_adapter,
    load_adapter,
    merge,
    merge_fidelity,
    merged_weights,
    refresh_factors,
    save_adapter,
    trainable_vectors,
    unmerge,
)  # fmt: skip
from tinylora_kernels.ops import reference

WITH_A_BIAS = ["linear with a bias", "wide linear", "conv1d", "conv2d"]


def call(layer: TinyLoRALayer, x: Tensor, training: bool = True) -> Tensor:
    """As in training, or as in generation: both ways make their plans."""
    if not training:
        with torch.no_grad():
            return layer(x)
    return layer(x.clone().requires_grad_() if x.is_floating_point() else x)


def merged_output(layer: TinyLoRALayer, x: Tensor) -> Tensor:
    model = nn.ModuleDict({"layer": layer})
    merge(model)
    y = layer(x)
    unmerge(model)
    return y


def _write_bias(layer: TinyLoRALayer) -> None:
    with torch.no_grad():
        layer.base.bias.mul_(-3).add_(1)


def _write_bias_unseen(layer: TinyLoRALayer) -> None:
    layer.base.bias.data.mul_(-3).add_(1)


def _new_bias(layer: TinyLoRALayer) -> None:
    layer.base.bias = nn.Parameter(torch.linspace(-2, 5, len(layer.base.bias)), requires_grad=False)


def _loaded_bias(layer: TinyLoRALayer) -> None:
    layer.load_state_dict({"base.bias": torch.linspace(-2, 5, len(layer.base.bias))}, strict=False)


def _no_bias(layer: TinyLoRALayer) -> None:
    layer.base.bias = None


BIAS_CHANGES = {f.__name__.strip("_"): f for f in (_write_bias, _write_bias_unseen, _new_bias, _loaded_bias, _no_bias)}


@pytest.mark.parametrize("training", [True, False], ids=["training", "generating"])
@pytest.mark.parametrize("change", BIAS_CHANGES)
@pytest.mark.parametrize("base", WITH_A_BIAS)
def test_the_bias_is_the_one_that_the_layer_has_now(base, change, training):
    """c = b U was taken once: forward and merged differed by more than the update."""
    if change == "no_bias" and base == "conv1d":
        base = "linear with a bias"  # transformers' Conv1D has no forward without one
    layer = adapted(base)
    x = example(layer)
    for _ in range(2):
        call(layer, x, training)
    BIAS_CHANGES[change](layer)
    for _ in range(2):
        assert relative(call(layer, x, training), dense_output(layer, x)) < 1e-6
    merged = merged_output(layer, x)
    assert relative(merged, dense_output(layer, x)) < 1e-6


@pytest.mark.parametrize("base", WITH_A_BIAS)
def test_a_bias_that_is_trained_beside_v(base):
    layer = adapted(base)
    x = example(layer)
    call(layer, x)
    layer.base.bias.requires_grad_()
    optimizer = torch.optim.SGD([layer.v, layer.base.bias], lr=0.01)
    for _ in range(3):
        exact_v, exact_bias = (p.detach().double().requires_grad_() for p in (layer.v, layer.base.bias))
        truth = dense_output(layer, x, exact_v, exact_bias)
        truth.square().mean().backward()
        optimizer.zero_grad()
        found = layer(x)
        found.double().square().mean().backward()
        assert relative(found, truth) < 1e-6
        assert relative(layer.v.grad, exact_v.grad) < 1e-5
        assert relative(layer.base.bias.grad, exact_bias.grad) < 1e-5
        optimizer.step()


def _copy_unseen(weight: Tensor, new: Tensor) -> None:
    weight.data.copy_(new)


def _copy(weight: Tensor, new: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(new)


def _swap_data(weight: Tensor, new: Tensor) -> None:
    weight.data = new


def _add_a_little(weight: Tensor, new: Tensor) -> None:
    weight.data.add_(new, alpha=1e-3)


def _scale_by_numpy(weight: Tensor, new: Tensor) -> None:
    weight.detach().numpy()[:] *= 1.5


def _one_row_of_blocks(weight: Tensor, new: Tensor) -> None:
    """An eighth of the rows, e.g. the keys of a fused projection."""
    eighth = max(len(weight) // 8, 1)
    weight.data[-eighth:].copy_(new[-eighth:])


WRITES = {f.__name__.strip("_"): f for f in (
    _copy, _copy_unseen, _swap_data, _add_a_little, _scale_by_numpy, _one_row_of_blocks,
)}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["training", "generating"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("base", BASES)
def test_a_weight_that_is_written_is_the_one_that_is_multiplied(base, write, training):
    """Whoever writes it, and however: B^T = U^T W follows. fp32 layers stayed on the old one, 0.22 off."""
    layer = adapted(base)
    x = example(layer)
    for _ in range(2):
        call(layer, x, training)
    weight = layer.base.weight
    WRITES[write](weight, torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    for _ in range(2):
        assert relative(call(layer, x, training), dense_output(layer, x)) < 2e-6
    merged = merged_output(layer, x)
    assert relative(merged, dense_output(layer, x)) < 2e-6


def adapt(model: nn.Module) -> nn.Module:
    config = TinyLoRAConfig(trainable_dim=3, n_tie=4, target_modules=TARGETS, init="uniform", cache=False)
    return apply_tiny_lora(model, config, progress=False)


TOKENS = torch.arange(12).view(2, 6)


def prefixed(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that a state dict of the bare model has in the adapted one."""
    layers = adapted_layers(model)
    return {
        f"{module}.base.{leaf}" if (module := name.rpartition(".")[0]) in layers else name: tensor
        for name, tensor in state.items() for leaf in [name.rpartition(".")[2]]
    }  # fmt: skip


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_weights_that_are_loaded_are_an_error_that_says_what_to_do(assign, dtype):
    """Into a model adapted at random: "all keys matched", and the logits were 1.4 off."""
    model = adapt(tiny_decoder(seed=0).to(dtype))
    real = tiny_decoder(seed=1).to(dtype)
    model(TOKENS)
    with pytest.raises(RuntimeError, match="U and sigma are not of it.*refresh_factors") as raised:
        model.load_state_dict(prefixed(model, real.state_dict()), strict=False, assign=assign)
    assert all(f"{name}.weight" in str(raised.value) for name in adapted_layers(model)), "a layer is not named"
    with pytest.raises(RuntimeError, match=r"layers\.0\..*refresh_factors"):
        model(TOKENS)
    refresh_factors(model)
    right = adapt(copy.deepcopy(real))
    assert torch.equal(model(TOKENS), right(TOKENS))


@pytest.mark.parametrize("assign", [False, True])
def test_the_same_weights_may_be_loaded_again(assign):
    model = adapt(tiny_decoder())
    expected, state = model(TOKENS), copy.deepcopy(model.state_dict())
    model.load_state_dict(state, assign=assign)
    assert torch.equal(model(TOKENS), expected)


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda model: model.bfloat16(),
    "half and back": lambda model: model.half().float(),
    "double": lambda model: model.double(),
    "to cpu": lambda model: model.to("cpu", torch.bfloat16),
    "share_memory": lambda model: model.share_memory(),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("base", BASES)
def test_a_base_that_is_cast_or_moved(base, cast):
    layer = adapted(base)
    call(layer, example(layer))
    basis, v = layer.basis.clone(), layer.v.detach().clone()
    layer = CASTS[cast](layer)
    assert torch.equal(layer.basis, basis) and torch.equal(layer.v, v) and layer.v.dtype is torch.float32
    x = example(layer)
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-6}[layer.base.weight.dtype]
    assert relative(call(layer, x), dense_output(layer, x)) < tolerance


def test_an_emptied_base_computes_nothing_until_its_weights_are_there():
    """It gave NaN or garbage; and v and the factors were emptied with it."""
    model = adapt(tiny_decoder())
    expected, state = model(TOKENS), copy.deepcopy(model.state_dict())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)  # what memory happens to hold
    model.embedding.weight.data.copy_(state["embedding.weight"])
    with pytest.raises(RuntimeError, match=r"layers\.0\.q_proj: it is not the one that the layer was adapted to"):
        model(TOKENS)
    model.load_state_dict(state)
    assert torch.equal(model(TOKENS), expected)


def test_adapted_on_the_meta_device_or_left_there():
    model = adapt(tiny_decoder()).to("meta")
    with pytest.raises(RuntimeError, match="left on the meta device; load the weights and adapt the model after"):
        model.to_empty(device="cpu")


def test_weights_that_come_by_other_doors_after_emptying():
    """Engines fill parameters one by one, without a state dict."""
    model = adapt(tiny_decoder())
    expected, state = model(TOKENS), copy.deepcopy(dict(model.named_parameters()))
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if not name.endswith(".v"):
            parameter.data.copy_(state[name].data)
    assert torch.equal(model(TOKENS), expected)


def _llama(seed: int) -> nn.Module:
    return _of_transformers("Llama", seed)


def _mixtral(seed: int) -> nn.Module:
    return _of_transformers("Mixtral", seed, num_local_experts=4)


def _gpt_oss(seed: int) -> nn.Module:
    return _of_transformers("GptOss", seed, num_local_experts=4, head_dim=8)  # experts stored as [in, out]


def _of_transformers(name: str, seed: int, **options) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5.23")
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=20, max_position_embeddings=64, **options,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


MODELS = {"layers": (_llama, TARGETS), "experts": (_mixtral, ["experts"]), "experts [in, out]": (_gpt_oss, ["experts"])}


def adapted_model(kind: str, seed: int = 0) -> nn.Module:
    make, targets = MODELS[kind]
    config = TinyLoRAConfig(trainable_dim=3, n_tie=4, target_modules=targets, init="uniform", cache=False)
    return apply_tiny_lora(make(seed), config, progress=False)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def frozen(model: nn.Module) -> dict[str, Tensor]:
    vectors, layers = {id(v) for v in trainable_vectors(model)}, tuple(adapted_layers(model))
    tensors = {name: p.data for name, p in model.named_parameters() if id(p) not in vectors}
    return tensors | {name: buffer for name, buffer in model.named_buffers() if not name.startswith(layers)}


def _load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    with pytest.raises(RuntimeError, match="refresh_factors"):
        model.load_state_dict(weights, strict=False)


def _assign(model: nn.Module, weights: dict[str, Tensor]) -> None:
    with pytest.raises(RuntimeError, match="refresh_factors"):
        model.load_state_dict(weights, strict=False, assign=True)


def _fill_one_by_one(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.to_empty(device="cpu")
    for name, parameter in frozen(model).items():
        parameter.copy_(weights[name])


def _leave_empty(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.to_empty(device="cpu")
    for parameter in frozen(model).values():
        parameter.fill_(0.5)


def _to_peft(model: nn.Module, directory) -> None:
    pytest.importorskip("peft", minversion="0.21")
    from tinylora_kernels.integrations.peft import to_peft

    to_peft(model, directory)


def _save_merged(model: nn.Module, directory) -> None:
    from tinylora_kernels.integrations.transformers import save_pretrained

    save_pretrained(model, directory, merged=True)


DOORS = {f.__name__.strip("_"): f for f in (_load, _assign, _fill_one_by_one, _leave_empty)}
READERS: dict[str, Callable] = {
    "forward": lambda model, path: logits(model),
    "merge": lambda model, path: merge(model),
    "merged_weights": lambda model, path: merged_weights(model),
    "merge_fidelity": lambda model, path: merge_fidelity(model),
    "export_lora": export_lora,
    "save_adapter": save_adapter,
    "save_pretrained, merged": _save_merged,
    "to_peft": _to_peft,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("kind", "reader"),
    [(kind, each) for kind in MODELS for each in READERS if kind == "layers" or each not in ("export_lora", "to_peft")],
)  # these two refuse experts
def test_nobody_puts_the_factors_of_one_weight_on_another(kind, door, reader, tmp_path):
    """Experts ran the old U on the new weights, and of all others the forward pass alone refused."""
    model, before = adapted_model(kind), copy.deepcopy(adapted_model(kind))
    DOORS[door](model, {name: p.clone() for name, p in frozen(adapted_model(kind, seed=1)).items()})
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match="refresh_factors") as raised:
            READERS[reader](model, tmp_path / "out")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()
    for name, parameter in frozen(model).items():
        parameter.copy_(frozen(before)[name])  # the model's own weights again: no doubt is left
    READERS[reader](model, tmp_path / "out")
    if reader != "merge":
        assert torch.equal(logits(model), logits(before))


@pytest.mark.parametrize("kind", MODELS)
def test_a_merged_model_holds_what_was_merged_into_it(kind):
    """An unmerged state dict made it the bare base without a word; its own was refused, and without a way out."""
    model = adapted_model(kind)
    unmerged, expected = copy.deepcopy(model.state_dict()), logits(model)
    merge(model)
    merged, shown = copy.deepcopy(model.state_dict()), logits(model)
    assert relative(shown, expected) < 1e-4
    model.load_state_dict(merged)
    assert torch.equal(logits(model), shown)
    model.load_state_dict({name: v for name, v in unmerged.items() if name.endswith(".v")}, strict=False)
    assert torch.equal(logits(model.double().float()), shown)
    weights = {name: w for name, w in merged.items() if ".base." in name and not name.endswith("bias")}
    for other in (unmerged, {name: weight + 1 for name, weight in weights.items()}):
        with pytest.raises(RuntimeError, match=r"call unmerge\(model\)"):
            model.load_state_dict(other, strict=False)
        with pytest.raises(RuntimeError, match=r"call unmerge\(model\)"):
            logits(model)
        assert torch.equal(logits(unmerge(model)), expected)
        model.load_state_dict(unmerged)
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(merge(model)), shown)


def test_a_weight_that_changed_before_it_was_merged_is_no_other_one_after(tmp_path):
    """The save of a merged model asked nothing."""
    model = adapted_model("layers")
    adapted_layers(model)["model.layers.0.self_attn.q_proj"].base.weight.data.normal_()
    for change in (lambda: None, lambda: merge(model), lambda: unmerge(model)):
        change()
        with pytest.raises(ValueError, match="q_proj: its weight has changed since it was adapted"):
            save_adapter(model, tmp_path / "adapter")


def test_a_weight_in_doubt_is_no_business_of_the_compiler():
    model = adapt(tiny_decoder())
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    torch.compile(model, fullgraph=True, backend="eager")(TOKENS)


class RoundedLinear(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, (self.weight * 4).round() / 4, self.bias)


class RoundedConv2d(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, (self.weight * 4).round() / 4, self.bias)


def _rounded(base: nn.Module) -> nn.Module:
    """As quantisers in training put it there: another class, with the same parameters."""
    if isinstance(base, nn.Linear):
        other = RoundedLinear(base.in_features, base.out_features, base.bias is not None)
    else:
        other = RoundedConv2d(base.in_channels, base.out_channels, base.kernel_size, padding=base.padding)
    other._parameters.update(base._parameters)
    return other


def _set_submodule(layer: TinyLoRALayer) -> None:
    nn.ModuleDict({"layer": layer}).set_submodule("layer.base", _rounded(layer.base))


def _torchao(layer: TinyLoRALayer) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    qat = pytest.importorskip("torchao.quantization.qat")
    as_asked = qat.IntxFakeQuantizeConfig(torch.int4, group_size=8)
    quantization.quantize_(nn.ModuleDict({"layer": layer}), qat.QATConfig(weight_config=as_asked, step="prepare"))


EXCHANGES: dict[str, Callable[[TinyLoRALayer], None]] = {
    "attribute": lambda layer: setattr(layer, "base", _rounded(layer.base)),
    "register_module": lambda layer: layer.register_module("base", _rounded(layer.base)),
    "set_submodule": _set_submodule,
    "class": lambda layer: setattr(layer.base, "__class__", type(_rounded(layer.base))),
    "torchao": _torchao,
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "generating"])
@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize(
    ("base", "exchange"),
    [
        (base, each) for base in ("linear", "linear with a bias", "wide linear", "conv2d") for each in EXCHANGES
        if each != "torchao" or base in ("linear", "wide linear")  # it takes linear layers without a bias
    ],
)  # fmt: skip
def test_the_base_that_is_there_now_is_what_runs(base, exchange, calls, training):
    """Of a quantised layer put there for training the unquantised weight was multiplied."""
    layer = adapted(base)
    x = example(layer)
    for _ in range(calls):
        call(layer, x, training)
    before = type(layer.base)
    EXCHANGES[exchange](layer)
    if exchange == "class":
        layer.base = layer.base  # a plan does not ask for the class
    assert type(layer.base) is not before
    y, bias = layer.base(x).double(), getattr(layer.base, "bias", None)
    axis = 1 if base == "conv2d" else -1
    y = y.movedim(axis, -1) - (0 if bias is None else bias.double())
    basis, mixing = layer.basis.double(), reference.contract(layer.v.detach().double(), layer.projection.double())
    truth = y + y @ basis.T @ mixing.T @ basis + (0 if bias is None else bias.double())
    for _ in range(2):
        assert relative(call(layer, x, training), truth.movedim(-1, axis)) < 1e-6


def _int8(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), lambda m, name: isinstance(m, nn.Linear))
    return model


ROUNDED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "bfloat16 and back": lambda model: model.bfloat16().float(),
    "int8": _int8,
    "bfloat16, int8": lambda model: _int8(model.bfloat16()),
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("method", [TinyLoRAConfig, LoRAXSConfig])
@pytest.mark.parametrize("rounding", ROUNDED)
def test_what_is_saved_of_a_model_that_was_cast_is_loaded(rounding, method, tmp_path):
    """U is of the weight before the cast, and no reader had that one: refused, and the trained model was gone."""
    rank = {"frozen_rank": 2, "trainable_dim": 3} if method is TinyLoRAConfig else {"rank": 2}
    config = method(**rank, n_tie=4, target_modules=TARGETS, cache=False)
    cast, make = ROUNDED[rounding], functools.partial(tiny_decoder, width=32, inner=64)
    model = apply_tiny_lora(make(), config, progress=False)
    for v in trainable_vectors(model):
        nn.init.normal_(v, std=0.3)
    model = cast(model)
    expected = model(TOKENS)
    save_adapter(model, tmp_path / "adapter")
    carried = {module.basis is not None for module in inspect_adapter(tmp_path / "adapter").modules}
    assert carried == {rounding != "double"}  # which rounds nothing
    bare = cast(make())
    loaded = load_adapter(bare, tmp_path / "adapter", cache=False, progress=False)
    tolerance = 1e-6 if rounding == "double" else 0.0  # U in float64
    assert relative(loaded(TOKENS), expected) <= tolerance
    other = apply_tiny_lora(cast(make()), config, progress=False)  # with U of the rounded weights
    load_adapter(other, tmp_path / "adapter")
    for again in (model, loaded, other):
        save_adapter(again, tmp_path / "again")
        found = load_adapter(cast(make()), tmp_path / "again", cache=False, progress=False)
        assert relative(found(TOKENS), expected) <= tolerance


@pytest.mark.parametrize("base", BASES)
def test_every_kind_of_layer_is_saved_after_a_cast(base, tmp_path):
    layer = adapted(base).bfloat16()
    model, bare = nn.ModuleDict({"layer": layer}), nn.ModuleDict({"layer": copy.deepcopy(layer.base)})
    expected = layer(example(layer))
    for change in (lambda: None, lambda: merge(model), lambda: unmerge(model)):
        change()
        save_adapter(model, tmp_path / "adapter")
        loaded = load_adapter(copy.deepcopy(bare), tmp_path / "adapter", cache=False, progress=False)["layer"]
        assert torch.equal(loaded(example(layer)), expected)


def test_a_model_of_transformers_is_saved_after_a_cast(tmp_path):
    from tinylora_kernels.integrations.transformers import from_pretrained, save_pretrained

    model = adapted_model("layers").bfloat16()
    save_pretrained(model, tmp_path)
    assert relative(logits(from_pretrained(tmp_path, cache=False)), logits(model)) < 0.02  # its rotations are not cast


def test_a_weight_that_was_trained_is_no_other_one_after_a_cast(tmp_path):
    """A cast of a weight that trains made it the one that U is of."""
    model = adapt(tiny_decoder())
    weight = model.layers[0].q_proj.base.weight.requires_grad_()
    weight.data.mul_(1.5)
    model.bfloat16()
    model.layers[0].q_proj.base.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="q_proj: its weight has changed since it was adapted"):
        save_adapter(model, tmp_path / "adapter")


def _old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm, by hooks": _old_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


@pytest.mark.filterwarnings("ignore:.*leading singular values coincide:UserWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_the_base_computes(kind, tmp_path):
    """Merging raised the KeyError of an address; a cast, "not the one adapted to"."""

    def make(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return nn.ModuleDict({"layer": COMPUTED[kind](nn.Linear(24, 16))}).eval()

    config = TinyLoRAConfig(trainable_dim=3, target_modules=["layer"], init="uniform", cache=False)
    model = apply_tiny_lora(make(), config, progress=False)
    layer, state = model["layer"], copy.deepcopy(model.state_dict())
    x = example(layer)
    layer(x)
    for refused in (merge, merged_weights, merge_fidelity):
        with pytest.raises(ValueError, match=r"^layer: expected a weight that is a tensor .*export_lora") as raised:
            refused(model)
        assert "\n" not in str(raised.value)
    export_lora(model, tmp_path / "lora")
    model.load_state_dict(state)
    assert relative(layer(x), dense_output(layer, x)) < 1e-6
    other = {name.replace("layer.", "layer.base.", 1): 2 * tensor for name, tensor in make(1).state_dict().items()}
    if kind != "weight_norm, by hooks" and kind != "pruned":  # computed at the next call alone
        with pytest.raises(RuntimeError, match="U and sigma are not of it"):
            model.load_state_dict(other, strict=False)
        model.load_state_dict(state)
    if kind == "orthogonal":
        return  # torch computes none in 16 bits
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        model.to(dtype)
        assert relative(layer(x.to(dtype)), dense_output(layer, x.to(dtype))) < 0.03
    save_adapter(model, tmp_path / "adapter")
    bare = make().bfloat16().float().half()
    bare["layer"](x.half())  # where hooks compute the weight
    loaded = load_adapter(bare, tmp_path / "adapter", cache=False, progress=False)
    assert relative(loaded["layer"](x.half()), layer(x.half())) < 1e-3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_tie", [1, 4])
def test_what_is_offloaded_is_brought_for_the_forward_pass_alone(n_tie, bias, tmp_path):
    """Biases and the vectors of other layers were read where they are not."""
    accelerate = pytest.importorskip("accelerate")
    config = TinyLoRAConfig(trainable_dim=3, n_tie=n_tie, target_modules=TARGETS, init="uniform", cache=False)
    model = apply_tiny_lora(tiny_decoder(bias=bias), config, progress=False)
    expected = model(TOKENS)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for _ in range(2):
        assert relative(model(TOKENS), expected) < 1e-6
    writers = [READERS[name] for name in ("merge", "merged_weights", "merge_fidelity", "export_lora", "save_adapter")]
    for write in (*writers, lambda model, path: refresh_factors(model, progress=False)):
        with pytest.raises((ValueError, RuntimeError), match=r"^layers\.0\.q_proj: .*meta device") as raised:
            write(model, tmp_path / "out")
        assert "\n" not in str(raised.value) and type(raised.value) is not NotImplementedError
    accelerate.hooks.remove_hook_from_submodules(model)
    assert relative(model(TOKENS), expected) < 1e-6
    save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("twin", [True, False])
def test_a_vector_that_is_computed_is_refused_by_name(twin, calls, monkeypatch):
    if not twin:
        monkeypatch.setattr("tinylora_kernels.linear.plan.twin", None)
    model = adapt(tiny_decoder())
    for _ in range(calls):
        model(TOKENS)
    nn.utils.parametrize.register_parametrization(model.layers[0].q_proj, "v", nn.Tanh())
    with pytest.raises(RuntimeError, match=r"^layers\.0\.q_proj\.v: expected a parameter, .*remove_parametrizations"):
        model(TOKENS)


@pytest.mark.parametrize("twin", [True, False])
def test_a_weight_that_is_computed_from_now_on(twin, monkeypatch):
    """The plan in Python looked for it among the parameters."""
    if not twin:
        monkeypatch.setattr("tinylora_kernels.linear.plan.twin", None)
    for change in (parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)):
        layer = adapted("linear with a bias")
        x = example(layer)
        for _ in range(2):
            call(layer, x, training=False)
        change(layer.base)
        for _ in range(2):
            assert relative(call(layer, x, training=False), dense_output(layer, x)) < 1e-6


@pytest.mark.parametrize("base", PRODUCTS)
def test_merged_weights_are_those_of_the_base_as_it_is_now(base):
    layer = adapted(base)
    model = nn.ModuleDict({"layer": layer})
    x = example(layer)
    call(layer, x)
    layer.base.weight.data.mul_(0.5)
    if getattr(layer.base, "bias", None) is not None:
        layer.base.bias.data.add_(2)
    truth = dense_output(layer, x)
    (weight,) = (weight for name, weight in merged_weights(model) if name.endswith("weight"))
    bare = copy.deepcopy(layer.base)
    with torch.no_grad():
        bare.weight.copy_(weight)
    assert relative(bare(x), truth) < 1e-6
