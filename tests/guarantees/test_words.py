"""What people do to an adapted model in passing: it works, or the message says what to do."""
import copy
import io

import pytest
import torch
from torch import nn

from tests.guarantees.dense import adapted, dense_output, example, relative
from tests.models import tiny_decoder
from tinylora_kernels import (
    AdapterBank,
    TinyLoRAConfig,
    adapted_layers,
    apply_tiny_lora,
    remove_adapter,
    trainable_vectors,
)  # fmt: skip
from tinylora_kernels.rl.population import PopulationAdam

WITH_A_BIAS = ["linear with a bias", "wide linear", "large linear", "conv1d", "conv2d"]


# What is set on an adapted layer is set on the layer it stands for


@pytest.mark.parametrize("base", WITH_A_BIAS)
def test_a_bias_set_on_the_layer_is_the_base_s(base):
    layer = adapted(base)
    x = example(layer)
    for bias in (nn.Parameter(torch.linspace(-2, 5, len(layer.bias)), requires_grad=False), None):
        if bias is None and base == "conv1d":
            continue  # transformers' Conv1D needs one
        layer(x)  # makes its plan
        layer.bias = bias
        assert layer.base.bias is bias and "bias" not in layer._parameters
        assert relative(layer(x), dense_output(layer, x)) < 1e-5


@pytest.mark.parametrize("base", ["linear", *WITH_A_BIAS, "embedding"])
def test_a_weight_set_on_the_layer_is_the_base_s(base):
    layer = adapted(base)
    x = example(layer)
    layer(x)
    layer.weight = nn.Parameter(layer.base.weight.detach() * 1.5, requires_grad=False)
    assert "weight" not in layer._parameters and relative(layer(x), dense_output(layer, x)) < 1e-5


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]])
def test_weights_tied_after_adapting(targets):
    pytest.importorskip("transformers", minversion="5.0", reason="tie_weights is its")
    from tests.integrations.tiny import llama, tokens

    model = llama(tie_word_embeddings=True)
    apply_tiny_lora(model, TinyLoRAConfig(target_modules=targets, cache=False), progress=False)
    for v in trainable_vectors(model):
        v.data.fill_(0.3)
    with torch.no_grad():
        before = model(tokens()).logits
        model.tie_weights()
        assert torch.equal(model(tokens()).logits, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# Inputs made in inference mode


@pytest.mark.parametrize("base", ["linear", *WITH_A_BIAS, "embedding"])
def test_inputs_made_in_inference_mode_train(base):
    layer = adapted(base)
    x = example(layer)
    layer(x).square().sum().backward()
    expected, layer.v.grad = layer.v.grad, None
    with torch.inference_mode():
        made = x.clone()
    for _ in range(2):
        layer.v.grad = None
        layer(made).square().sum().backward()
        assert relative(layer.v.grad, expected) < 1e-6


# Schedulers on a population


SCHEDULERS = {
    "LambdaLR": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n),
    "ExponentialLR": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    "StepLR": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
}


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=list(SCHEDULERS))
@pytest.mark.parametrize("rates", [0.1, {"a": 0.1, "b": 0.3}])
def test_a_scheduler_moves_the_rates_of_a_population(schedule, rates):
    config = TinyLoRAConfig(target_modules=["q_proj"], trainable_dim=2, cache=False)
    model = apply_tiny_lora(tiny_decoder(), config, progress=False)
    bank = AdapterBank(model, 2, trainable=True, names=["a", "b"])
    optimizer = PopulationAdam(bank, rates)
    scheduler, sizes = schedule(optimizer), []
    for _ in range(3):
        before = {name: bank.vectors(name) for name in ("a", "b")}
        for table in bank.parameters():
            table.grad = torch.ones_like(table)
        optimizer.step(["a", "b"])
        scheduler.step()
        sizes.append([float((bank.vectors(name) - before[name]).abs().max()) for name in ("a", "b")])
    own = [rates[name] for name in ("a", "b")] if isinstance(rates, dict) else [rates, rates]
    for step, size in enumerate(sizes):  # Adam moves by its rate while gradients stay the same
        assert size == pytest.approx([rate * 0.5**step for rate in own], rel=1e-3)


def test_a_population_s_state_saved_without_a_rate_goes_on_with_its_own():
    model = apply_tiny_lora(tiny_decoder(), TinyLoRAConfig(target_modules=["q_proj"], cache=False), progress=False)
    bank = AdapterBank(model, 1, trainable=True, names=["a"])
    state = PopulationAdam(bank, 0.2).state_dict()
    del state["param_groups"][0]["lr"]
    optimizer = PopulationAdam(bank, 0.1)
    optimizer.load_state_dict(state)
    for table in bank.parameters():
        table.grad = torch.ones_like(table)
    optimizer.step(["a"])
    assert float(bank.vectors("a").abs().max()) == pytest.approx(0.1, rel=1e-4)


# Weights that are not there


@pytest.mark.parametrize("targets", [None, ["q_proj"], r".*q_proj"])
@pytest.mark.parametrize("shape", [(0,), (0, 24), (24, 0)])
def test_weights_that_an_engine_keeps_elsewhere(targets, shape):
    model = tiny_decoder()
    for block in model.layers:
        block.q_proj.weight.data = torch.empty(shape)
    with pytest.raises(ValueError, match=r"layers.0.q_proj: its weight is empty on this rank, .*ZeRO-3.*adapt the"):
        apply_tiny_lora(model, TinyLoRAConfig(target_modules=targets, cache=False), progress=False)
    assert not adapted_layers(model)


# Vocabularies that grow


def language_model(tied):
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="the method under test is its")
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("how", ["as it is", "copied", "pickled", "of as_peft_model"])
def test_an_adapted_embedding_or_head_is_not_resized(how, target, tied):
    model = apply_tiny_lora(language_model(tied), TinyLoRAConfig(target_modules=[target], cache=False), progress=False)
    if how == "of as_peft_model":
        pytest.importorskip("peft", minversion="0.21", reason="it stands in for a PeftModel")
        from tinylora_kernels.integrations.trl import as_peft_model

        if target == "lm_head":
            with pytest.raises(ValueError, match="lm_head is adapted"):
                as_peft_model(model)
            return
        resize = as_peft_model(model).resize_token_embeddings
    else:
        model = {"as it is": lambda m: m, "copied": copy.deepcopy, "pickled": pickled}[how](model)
        resize = model.resize_token_embeddings
    tokens = torch.tensor([[3, 1, 5]])
    before = model(tokens).logits
    message = f"resize_token_embeddings: .*{target} is adapted with 24 rows, and U and sigma of {{}} would be others"
    with pytest.raises(ValueError, match=message.format(30)):
        resize(30)
    with pytest.raises(ValueError, match=message.format(32)):
        resize(pad_to_multiple_of=16)
    assert model.config.vocab_size == 24 and torch.equal(model(tokens).logits, before)
    resize(24), resize(), resize(20, 8)  # which change nothing
    assert torch.equal(model(tokens).logits, before)
    if how != "of as_peft_model":
        remove_adapter(model).resize_token_embeddings(30)
        assert model(tokens).logits.shape[-1] == model.config.vocab_size == 30


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_adapted_elsewhere_is_resized(tied):
    config = TinyLoRAConfig(target_modules=["q_proj"], cache=False)
    model = apply_tiny_lora(language_model(tied), config, progress=False)
    model.resize_token_embeddings(30)
    assert model(torch.tensor([[3, 29]])).logits.shape[-1] == 30


# Vectors of a bank


@pytest.mark.parametrize("method", ["add", "set"])
def test_vectors_of_a_bank_in_any_form_or_one_line(method):
    config = TinyLoRAConfig(target_modules=["q_proj", "k_proj"], trainable_dim=2, cache=False)
    model = apply_tiny_lora(tiny_decoder(blocks=1), config, progress=False)
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    taken = [
        rows, tuple(rows), [nn.Parameter(row) for row in rows], torch.stack(rows), [row.tolist() for row in rows],
        torch.stack(rows).numpy(), [rows[0], rows[1].double()],
    ]  # fmt: skip
    refused = [
        [rows[0], rows[1][:1]], [rows[0], [3.0, 4.0]], [rows[0], None], [[1.0, 2.0], [3.0]], "ab", object(),
        [None, None], {"q": rows}, rows[:1], [[rows[0]]],
    ]  # fmt: skip
    bank = AdapterBank(model, 2)
    bank.add("a", torch.zeros(2, 2))

    def put(vectors):
        return bank.set("a", vectors) if method == "set" else bank.add("b", vectors)

    for vectors in taken:
        put(vectors)
        name = "a" if method == "set" else "b"
        assert torch.equal(bank.vectors(name), torch.stack(rows)), vectors
        if name == "b":
            bank.remove("b")
    for vectors in refused:
        with pytest.raises(ValueError, match=r"^adapter '[ab]': expected vectors \[groups, u\] = \(2, 2\), found .*$"):
            put(vectors)
