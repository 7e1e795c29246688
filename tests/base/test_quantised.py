"""Quantised bases: the update on their output, beside the same adapter on the dequantised weights."""
import warnings

import pytest
import torch
from peft import PeftModel
from torch import nn

from tests.base.formats import FORMATS, ROUNDS_ACTIVATIONS, decoder, dequantised, is_projection
from tests.cases import error
from tests.models import TARGETS
from tinylora_kernels import (
    TinyLoRAConfig,
    adapted_layers,
    apply_tiny_lora,
    export_lora,
    load_adapter,
    merge,
    merge_fidelity,
    merged_weights,
    save_adapter,
    trainable_vectors,
)
from tinylora_kernels.base.kinds import matrix_shape, weight_matrix
from tinylora_kernels.base.quantised import dequantised_weight
from tinylora_kernels.factors import modules as fused
from tinylora_kernels.layers import layer as layer_module

TOKENS = torch.arange(40).view(4, 10) % 17


def config(**changes) -> TinyLoRAConfig:
    return TinyLoRAConfig(**{"trainable_dim": 3, "n_tie": 4, "target_modules": TARGETS, "cache": False, **changes})


def adapt(model: nn.Module) -> nn.Module:
    apply_tiny_lora(model, config(), progress=False)
    with torch.no_grad():
        for group, v in enumerate(trainable_vectors(model)):
            v.copy_(0.5 * torch.sin(torch.arange(3.0) + group + 1))
    return model


def run(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, the gradient of the embeddings (through every layer's dx), the gradient of all v."""
    for v in trainable_vectors(model):
        v.grad = None
    model.embedding.weight.requires_grad_().grad = None
    logits = model(TOKENS)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), model.embedding.weight.grad, torch.cat([v.grad for v in trainable_vectors(model)])


@pytest.fixture(params=FORMATS)
def quantised(request):
    return request.param, FORMATS[request.param](decoder())


def test_outputs_and_gradients_are_those_of_the_dequantised_model(quantised):
    name, model = quantised
    expected = run(adapt(dequantised(model)))
    bare = dequantised(model)(TOKENS).detach()
    for found, reference in zip(run(adapt(model)), expected, strict=True):
        assert error(found, reference) < (0.03 if name in ROUNDS_ACTIVATIONS else 1e-5)
    assert error(bare, expected[0]) > 0.1  # the update is far above what is tolerated


@pytest.mark.parametrize("name", ["torchao int8", "torchao int4", "bitsandbytes nf4"])
def test_bfloat16_activations(name):
    model = FORMATS[name](decoder(torch.bfloat16))
    expected = run(adapt(dequantised(model).float()))
    for found, reference in zip(run(adapt(model)), expected, strict=True):
        assert error(found.float(), reference) < 0.03


def test_the_weight_read_back_is_what_the_layer_computes(quantised):
    name, model = quantised
    for module in (model.layers[0].down_proj, model.layers[0].o_proj):
        weight = dequantised_weight(module)
        assert matrix_shape(module) == weight.shape == (64, module.in_features) and weight.is_floating_point()
        x = torch.randn(32, module.in_features, generator=torch.Generator().manual_seed(0))
        expected = nn.functional.linear(x, weight, module.bias)
        assert error(module(x).detach(), expected.detach()) < (0.03 if name in ROUNDS_ACTIVATIONS else 1e-5)


def test_one_weight_is_dequantised_at_a_time(quantised, monkeypatch):
    """While one matrix is factorised no other one is alive."""
    import weakref

    _, model = quantised
    alive, most = weakref.WeakSet(), []

    def watched(module):
        matrix = weight_matrix(module)
        alive.add(matrix)
        most.append(len(alive))
        return matrix

    monkeypatch.setattr(fused, "weight_matrix", watched)
    adapt(model)
    assert len(most) == 14 and max(most) <= 2  # the last one goes as the next is made


def test_merging_is_refused_and_names_the_way_out(quantised):
    _, model = quantised
    adapt(model)
    before = model(TOKENS).detach()
    for call in (merge, merge_fidelity, merged_weights):
        with pytest.raises(ValueError, match=r"layers.0.q_proj: expected a dense.*quantised.*export_lora"):
            call(model)
    assert torch.equal(model(TOKENS), before)


def test_the_exported_lora_does_the_same_beside_the_dequantised_base(quantised, tmp_path):
    _, model = quantised
    plain = dequantised(model)
    expected = adapt(dequantised(model))(TOKENS).detach()
    export_lora(adapt(model), tmp_path / "lora")
    loaded = PeftModel.from_pretrained(plain, tmp_path / "lora")
    assert error(loaded(tokens=TOKENS).detach(), expected) < 1e-5


def test_an_adapter_file_knows_its_quantised_base(quantised, tmp_path):
    name, model = quantised
    path = tmp_path / "adapter.safetensors"
    expected = adapt(model)(TOKENS).detach()
    save_adapter(model, path)
    again = load_adapter(FORMATS[name](decoder()), path, cache=False, progress=False)
    assert torch.equal(again(TOKENS), expected)
    with pytest.raises(ValueError, match="other base weights: 14 of 14"):
        load_adapter(decoder(), path, cache=False, progress=False)


def test_every_projection_is_adapted_and_stays_quantised(quantised):
    _, model = quantised
    kinds = {name: type(module.weight) for name, module in model.named_modules() if is_projection(module, name)}
    for name, layer in adapted_layers(adapt(model)).items():
        assert type(layer.base.weight) is kinds.pop(name)
    assert not kinds


def test_a_weight_nobody_can_read_is_named():
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="expected a floating weight or one of.*found Parameter of torch.uint8"):
        dequantised_weight(module)


def test_torchaos_packed_int4_is_read_through_its_outputs():
    """Packed for the CPU's matrix product, it has no way back to numbers; nor has that product a gradient."""
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = decoder()
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False), filter_fn=is_projection)
    expected = adapt(dequantised(model))(TOKENS).detach()
    with torch.no_grad():
        assert error(adapt(model)(TOKENS), expected) < 1e-5


@pytest.mark.parametrize("name", ["torchao int8", "torchao int4", "bitsandbytes nf4"])
def test_a_large_bias_in_bfloat16_is_not_in_the_gradient(name):
    """As in Qwen2.5's k_proj under QLoRA: the output's rounding is the bias's, the product's numbers are lost in it."""
    model = FORMATS[name](decoder(torch.bfloat16))
    module = model.layers[0].k_proj
    torch.manual_seed(0)
    module.bias.data.normal_().mul_(900 / module.bias.data.norm())
    truth = dequantised(model).layers[0].k_proj.double()
    layer = adapt(model).layers[0].k_proj
    x, g = torch.randn(40, 64).bfloat16(), torch.randn(40, 64).bfloat16()
    # dv_i = <P'_i, a^T t>,  a = g U,  t = x W^T U
    basis = layer.basis.double()
    t, a = x.double() @ truth.weight.detach().T @ basis.T, g.double() @ basis.T
    dv = torch.einsum("uij,ij->u", layer.projection.double(), a.T @ t)
    layer.v.grad = None
    layer(x.clone().requires_grad_()).backward(g)
    assert error(layer.v.grad, dv) < 0.01


class Detached(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x.detach(), self.weight, self.bias)


def dynamic_int8(bias: bool) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    layer = nn.Sequential(nn.Linear(64, 64, bias=bias))
    torchao.quantize_(layer, torchao.Int8DynamicActivationInt8WeightConfig())
    return layer[0]


@pytest.mark.parametrize("last", [
    lambda: dynamic_int8(True), lambda: dynamic_int8(False), lambda: Detached(64, 64).requires_grad_(False),
], ids=["int8, bias", "int8", "detached"])  # fmt: skip
def test_a_base_without_a_gradient_is_named_once_where_something_before_it_trains(last, monkeypatch):
    monkeypatch.setattr(layer_module, "_without_gradient", set())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), last())
    apply_tiny_lora(model, TinyLoRAConfig(cache=False), progress=False)
    x = torch.randn(4, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[1](x)  # nothing before it
        with torch.no_grad():
            model(x)
    with pytest.warns(UserWarning, match=r"^1: its base \(.* of .*\) gives its input no gradient: vectors"):
        model(x).sum().backward()
    assert model[1].v.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
