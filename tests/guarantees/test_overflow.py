"""Overflow stays local: what is finite in the frozen layer's output stays finite, and no other row feels it."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from tests.guarantees.dense import BASES, example, relative
from tinylora_kernels import AdapterBank, TinyLoRAConfig, TinyLoRALayer, apply_tiny_lora
from tinylora_kernels.functional import tiny_lora_update
from tinylora_kernels.ops import dispatch, reference

BACKENDS = [name for name, why_not in dispatch.table("cpu") if why_not is None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BAD = [float("inf"), -float("inf"), float("nan")]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_looks_at_what_is_finite(backend, dtype, bad, rank):
    """t = y0 U - c over the finite elements of a row; those get the update, the others stay as they are."""
    generator = torch.Generator().manual_seed(rank)
    y0 = torch.randn(40, 67, generator=generator).to(dtype)
    at = torch.rand(40, 67, generator=generator) < 0.02
    at[3] = True  # a whole row
    at[5:9] = False
    y0[at] = bad
    basis = torch.randn(rank, 67, generator=generator, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    v, projection = (torch.randn(shape, generator=generator, dtype=wide) / rank for shape in ([5], [5, rank, rank]))
    bias, offset = torch.randn(67, generator=generator, dtype=dtype), torch.randn(rank, generator=generator, dtype=wide)
    for extra in ({}, {"bias": bias}, {"offset": offset}):
        y = tiny_lora_update(y0.clone(), basis, v, projection, backend=backend, **extra)
        t = y0.double().where(~at, 0) @ basis.double().T - (offset.double() if "offset" in extra else 0)
        truth = y0.double() + t @ reference.contract(v, projection).double().T @ basis.double()
        truth = truth + (bias.double() if "bias" in extra else 0)
        assert torch.equal(y.isfinite(), ~at)
        assert relative(y[~at], truth[~at]) < TOLERANCE[dtype]
        assert torch.equal(y[at].isnan(), y0[at].isnan())


def assert_same(found: Tensor, frozen: Tensor) -> None:
    """At v = 0: but for the rounding of a product that is added to what is there."""
    finite = frozen.isfinite()
    assert torch.equal(found.isfinite(), finite)
    assert torch.allclose(found[finite], frozen[finite], rtol=2e-3, atol=2e-3 * float(frozen[finite].abs().median()))


def overflowing(base: str) -> tuple[TinyLoRALayer, Tensor]:
    """A layer in float16 one of whose outputs is beyond that for some rows of the input."""
    torch.manual_seed(0)
    bare = BASES[base]().half()
    matrix = bare.weight.data.T if base == "conv1d" else bare.weight.data
    matrix[2] = 60
    config = TinyLoRAConfig(frozen_rank=2, trainable_dim=3, target_modules=["layer"], cache=False)
    layer = apply_tiny_lora(nn.ModuleDict({"layer": bare}), config, progress=False)["layer"]
    return layer, 300 * example(layer, rows=9)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("base", [b for b in BASES if b != "embedding"])
def test_a_layer_whose_output_overflows(base, grad):
    """As T5's wo in float16: the model clamps what is not finite, and the rest of the row is used."""
    layer, x = overflowing(base)
    frozen = layer.base(x)
    assert 0 < (~frozen.isfinite()).sum() < frozen.numel() // 4
    for _ in range(2):  # the second time by a plan
        with torch.set_grad_enabled(grad):
            with torch.no_grad():
                layer.v.zero_()
            assert_same(layer(x), frozen)
            with torch.no_grad():
                layer.v.fill_(1e-3)
            y = layer(x.clone().requires_grad_())
            assert y[frozen.isfinite()].isfinite().all()
    if grad:
        limit = torch.finfo(torch.float16).max
        x = x.clone().requires_grad_()
        layer(x).clamp(-limit, limit).float().tanh().sum().backward()
        assert layer.v.grad.isfinite().all() and x.grad.isfinite().all()


def test_rows_of_other_prompts_do_not_feel_it():
    layer, x = overflowing("linear with a bias")
    with torch.no_grad():
        layer.v.fill_(1e-3)
        x = x[0]
        bad = ~layer.base(x).isfinite().all(1)
        assert 0 < bad.sum() < len(x)
        assert torch.equal(layer(x)[~bad], layer(x[~bad]))


def t5(dtype: torch.dtype = torch.float16) -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=31, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    T5ForConditionalGeneration._keep_in_fp32_modules, kept = None, T5ForConditionalGeneration._keep_in_fp32_modules
    model = model.to(dtype)
    T5ForConditionalGeneration._keep_in_fp32_modules = kept
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.weight.data[3] = 60.0  # one of its outputs is beyond float16
        block.layer[1].DenseReluDense.wi_1.weight.data *= 1000.0
    return model


@pytest.mark.parametrize("bank", [False, True], ids=["one adapter", "a bank"])
def test_t5_in_float16(bank):
    """The model clamps an overflow of wo and goes on: at v = 0 to the same numbers, in training to finite ones."""
    model, tokens = t5(), torch.arange(14).view(2, 7) % 31
    labels = tokens.flip(1)
    hidden = []
    hook = model.encoder.block[0].layer[1].DenseReluDense.wo.register_forward_hook(lambda m, i, y: hidden.append(y))
    frozen = model(input_ids=tokens, labels=labels)
    hook.remove()
    assert not hidden[0].isfinite().all() and frozen.logits.isfinite().all()
    targets = ["wi_0", "wi_1", "wo", "q", "v"]
    apply_tiny_lora(model, TinyLoRAConfig(target_modules=targets, n_tie=100, cache=False), progress=False)
    (v,) = [p for p in model.parameters() if p.requires_grad]
    assert relative(model(input_ids=tokens, labels=labels).logits, frozen.logits) < 5e-3
    if bank:
        adapters = AdapterBank(model, 2)
        adapters.add("zero", torch.zeros(1, len(v)))
        with torch.no_grad(), adapters.use(["zero", None]):
            assert relative(model(input_ids=tokens, labels=labels).logits, frozen.logits) < 5e-3
        return
    model(input_ids=tokens, labels=labels).loss.backward()
    assert v.grad.isfinite().all() and v.grad.abs().max() > 0
