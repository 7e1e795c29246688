"""Precision of what trains: v moves by any step, in whatever it is stored, and a bias's rounding is not in dv."""
from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from tests.guarantees.dense import BASES, adapted, dense_output, example, relative
from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import (
    AdapterBank,
    LoRAXSConfig,
    TinyLoRAConfig,
    apply_tiny_lora,
    load_adapter,
    save_adapter,
    trainable_vectors,
)  # fmt: skip

STORED = [torch.float32, torch.bfloat16, torch.float16]
MOVES = {
    "as it is": lambda model: model,
    "bfloat16()": lambda model: model.bfloat16(),
    "half()": lambda model: model.half(),
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "to('cpu', bfloat16)": lambda model: model.to("cpu", torch.bfloat16),
    "deepcopy": lambda model: copy.deepcopy(model),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}
CONFIGS = {
    "TinyLoRA": lambda v_dtype: TinyLoRAConfig(target_modules=TARGETS, trainable_dim=3, v_dtype=v_dtype, cache=False),
    "LoRA-XS": lambda v_dtype: LoRAXSConfig(target_modules=TARGETS, rank=2, v_dtype=v_dtype, cache=False),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("v_dtype", STORED, ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_small_steps_add_up(config, v_dtype, move, tmp_path):
    """2,000 steps of 0.0001 are 0.2; a v in bfloat16 stands still at 0.03, one in float16 at 0.25."""
    model = MOVES[move](apply_tiny_lora(tiny_decoder().bfloat16(), CONFIGS[config](v_dtype), progress=False))
    vectors = trainable_vectors(model)
    first = [v.detach().clone() for v in vectors]
    optimizer = torch.optim.SGD(vectors, lr=1.0)
    for v in vectors:
        v.grad = torch.full_like(v, -1e-4)
    for _ in range(2000):
        optimizer.step()
    for v, start in zip(vectors, first, strict=True):
        assert v.dtype == torch.float32 and torch.allclose(v, start + 0.2, atol=1e-4)
    # and is stored in what was asked for, rounded once
    save_adapter(model, tmp_path / "adapter.safetensors")
    fresh = apply_tiny_lora(tiny_decoder().bfloat16(), CONFIGS[config](v_dtype), progress=False)
    load_adapter(fresh, tmp_path / "adapter.safetensors")
    for v, stored in zip(vectors, trainable_vectors(fresh), strict=True):
        assert torch.equal(v.detach().to(v_dtype).float(), stored)


@pytest.mark.parametrize("v_dtype", STORED, ids=str)
def test_the_vectors_of_a_trainable_bank_do_too(v_dtype):
    model = apply_tiny_lora(tiny_decoder().bfloat16(), CONFIGS["TinyLoRA"](v_dtype), progress=False)
    bank = AdapterBank(model, 2, trainable=True)
    bank.add("a")
    tables = list(bank.parameters())
    before = [table.detach().clone() for table in tables]
    for table in tables:
        table.grad = torch.full_like(table, -1e-4)
    optimizer = torch.optim.SGD(tables, lr=1.0)
    for _ in range(2000):
        optimizer.step()
    for table, start in zip(tables, before, strict=True):
        assert table.dtype == torch.float32 and torch.allclose(table, start + 0.2, atol=1e-4)


@pytest.mark.parametrize("kind", ["TinyLoRA", "PSOFT"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("cast", [True, False])
def test_peft_adapters_that_train_in_16_bits_are_named(cast, dtype, kind):
    """PEFT's own float32 stands still nowhere; with autocast_adapter_dtype=False its vectors have the base's dtype."""
    peft = pytest.importorskip("peft", minversion="0.21", reason="the layers under test are PEFT's")
    from tinylora_kernels.integrations.peft import accelerate_peft

    config = (
        peft.TinyLoraConfig(r=2, u=3, target_modules=["q_proj"]) if kind == "TinyLoRA"
        else peft.PsoftConfig(r=2, target_modules=["q_proj"], psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False)
    )  # fmt: skip
    model = peft.get_peft_model(tiny_decoder(), config, autocast_adapter_dtype=cast)
    if not cast:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accelerate_peft(model)
    said = [str(w.message) for w in caught if "train in" in str(w.message)]
    assert len(said) == (not cast and dtype is not torch.float32)
    if not said:
        return
    first = next(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert said[0].startswith(f"accelerate_peft: {first}") and f" train in {str(dtype)[6:]}, where small " in said[0]
    for parameter in model.parameters():  # what it advises
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.SGD(trained, lr=1e-4)
    for _ in range(500):
        for parameter in trained:
            parameter.grad = -torch.ones_like(parameter)
        optimizer.step()
    moved = [float((now - then).detach().mean()) for now, then in zip(trained, before, strict=True)]
    assert moved == pytest.approx([0.05] * len(moved), rel=1e-3)
    assert model(torch.tensor([[1, 2]])).isfinite().all()


@pytest.mark.parametrize("size", [1, 30, 600, 900, 3e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", [name for name in BASES if getattr(BASES[name](), "bias", None) is not None])
def test_a_bias_however_large_costs_the_gradient_nothing(base, dtype, size):
    """As in Qwen2.5-7B's k_proj, where t of an output with the bias in it was 2% off and dv 4%."""
    layer = adapted(base, dtype)
    with torch.no_grad():
        bias = layer.base.bias
        bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(2)))
        bias.mul_(size / bias.norm())
    x = example(layer, rows=40)
    v = layer.v.detach().double().requires_grad_()
    truth = dense_output(layer, x, v)
    g = torch.randn(truth.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    (dv,) = torch.autograd.grad(truth, v, g.double())
    for _ in range(2):  # the second time by a plan
        layer.v.grad = None
        y = layer(x.clone().requires_grad_())
        y.backward(g)
        assert relative(layer.v.grad, dv) < {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}[dtype]
        # and the output is that of one rounding
        assert relative(y, truth) < {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]


def test_a_float64_model_trains_in_float32_or_as_asked():
    for v_dtype in (torch.float32, torch.float64):
        model = nn.Sequential(nn.Linear(8, 8)).double()
        apply_tiny_lora(model, TinyLoRAConfig(target_modules=["0"], v_dtype=v_dtype, cache=False), progress=False)
        assert trainable_vectors(model)[0].dtype == v_dtype
