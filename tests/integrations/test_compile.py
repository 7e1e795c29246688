"""torch.compile: one graph for the layer and for whole models, over every length, and no copy of y for the update."""
import re

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch._inductor.utils import run_and_get_code

from tests.cases import error
from tests.integrations.tiny import gpt2, llama, tokens
from tests.layers.test_layer import adapted
from tinylora_kernels import TinyLoRAConfig, apply_tiny_lora, trainable_vectors
from tinylora_kernels.model.merging import merge, unmerge

pytest.importorskip("transformers", reason="the models under test come from transformers")

TARGETS = {"llama": "all-linear", "gpt2": ["c_attn", "c_fc", "c_proj"]}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapt(model: nn.Module) -> nn.Module:
    config = TinyLoRAConfig(target_modules=TARGETS[model.config.model_type], trainable_dim=2, n_tie=3, cache=False)
    apply_tiny_lora(model, config, progress=False)
    for v in trainable_vectors(model):
        v.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return model


def outputs_and_gradients(call, model, x) -> list[torch.Tensor]:
    logits = call(input_ids=x, use_cache=False).logits
    return [logits.detach(), *torch.autograd.grad(logits.square().mean(), trainable_vectors(model))]


MODELS = {"llama": lambda: llama(num_hidden_layers=1), "gpt2": lambda: gpt2(n_layer=1)}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_model_and_its_backward_are_one_graph_over_all_lengths(make):
    model = adapt(make())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)  # fullgraph: a break is an error
    counts = []
    for rows, length in ((3, 7), (3, 11), (5, 19), (5, 23)):
        x = tokens(rows, length)
        results = outputs_and_gradients(compiled, model, x), outputs_and_gradients(model, model, x)
        for found, expected in zip(*results, strict=True):
            assert error(found, expected) < 1e-5
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1  # whatever the first call took, no later length takes more


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_default_mode_recompiles_as_often_as_the_bare_model(make):
    counts = []
    for model in (make(), adapt(make())):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        with torch.no_grad():
            for length in (7, 11, 19):
                compiled(input_ids=tokens(3, length), use_cache=False)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] <= 2


def test_new_values_of_v_need_no_new_graph_and_merging_is_seen():
    model, x = adapt(llama(num_hidden_layers=1)), tokens()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for value in (0.1, -0.2, 0.3):
            for v in trainable_vectors(model):
                v.fill_(value)
            assert error(compiled(x).logits, model(x).logits) < 1e-5
        assert counter.frame_count == 1
        expected = model(x).logits
        assert error(compiled(x).logits, expected) < 1e-5
        merge(model)
        assert error(compiled(x).logits, expected) < 1e-5
        unmerge(model)
        assert error(compiled(x).logits, expected) < 1e-5


def test_the_chosen_backend_is_a_constant_of_the_graph():
    model = adapt(llama(num_hidden_layers=1))
    explained = torch._dynamo.explain(model)(input_ids=tokens(), use_cache=False)
    assert explained.graph_break_count == 0 and explained.graph_count == 1


# The generated code


def updates_in(code: str) -> list[str]:
    """The buffers that tinylora.update writes into."""
    return re.findall(r"tinylora\.update\.default\((?:reinterpret_tensor\()?(\w+)", code)


def products_in(code: str) -> set[str]:
    """The buffers that matrix products are written to."""
    return set(re.findall(r"extern_kernels\.(?:addmm|mm)\(.*out=(?:reinterpret_tensor\()?(\w+)", code))


def conv1d():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="Conv1D is transformers'")
    torch.manual_seed(1)
    base = pytorch_utils.Conv1D(96, 64)
    return adapted(base, base.weight.T)


def linear(bias: bool, dtype=torch.float32):
    torch.manual_seed(1)
    base = nn.Linear(64, 96, bias=bias)
    return adapted(base, base.weight).to(dtype)


LAYERS = {
    "bias": lambda: linear(True),
    "no bias": lambda: linear(False),
    "bfloat16": lambda: linear(True, torch.bfloat16),
    "Conv1D": conv1d,
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_the_compiled_layer_updates_the_product_itself(make):
    """The clone made while tracing is gone: the update writes into the product's buffer, the only one of its size."""
    layer = make()
    dtype = layer.base.weight.dtype
    x = torch.randn(5, 7, 64).to(dtype)
    found, (code,) = run_and_get_code(torch.compile(layer, fullgraph=True), x)
    assert error(found.detach(), layer(x).detach()) < 4 * torch.finfo(dtype).eps
    assert len(updates_in(code)) == 1 and set(updates_in(code)) <= products_in(code)
    assert len(re.findall(r"empty_strided_cpu\(\((?:35, 96|5, 7, 96)\)", code)) == 1
    assert "cpp_fused" not in code  # no kernel but the product and the update


def test_the_compiled_model_copies_nothing_for_the_update_in_training():
    model = adapt(llama(num_hidden_layers=1))
    compiled = torch.compile(model, fullgraph=True)
    x, results = tokens(), []
    _, codes = run_and_get_code(lambda: results.extend(outputs_and_gradients(compiled, model, x)))
    forward, backward = codes
    assert len(updates_in(forward)) == 7 and set(updates_in(forward)) <= products_in(forward)
    assert backward.count("tinylora.update_backward.default(") == 7
    for found, expected in zip(results, outputs_and_gradients(model, model, x), strict=True):
        assert error(found, expected) < 1e-4
