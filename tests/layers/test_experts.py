"""Experts of transformers' mixture models: an adapter for each matrix of a 3-D stack, against the dense weights in
float64; routing, ties, files, merging, banks, and layouts other than Mixtral's."""
import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

from tests.cases import error
from tests.paper import paper_weight
from tinylora_kernels import (
    AdapterBank,
    LoRAXSConfig,
    TinyLoRAConfig,
    adapted_layers,
    apply_lora_xs,
    apply_tiny_lora,
    count_trainable_params,
    export_lora,
    load_adapter,
    merge,
    merged_weights,
    remove_adapter,
    save_adapter,
    trainable_vectors,
    unmerge,
)
from tinylora_kernels.base.experts import ExpertSlice
from tinylora_kernels.model.adapted import wrappers

transformers = pytest.importorskip("transformers", minversion="5.23")

TOKENS = torch.arange(24).view(3, 8) * 7 % 40
SHARED = dict(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, num_experts_per_tok=2,
)  # fmt: skip


@functools.cache
def _made(kind: str):
    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SHARED, intermediate_size=24, num_local_experts=4)
    elif kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **SHARED, intermediate_size=48, moe_intermediate_size=20, num_experts=6, head_dim=8, norm_topk_prob=True
        )
    else:  # stored as [in, out], with biases, gate and up rows interleaved
        config = transformers.GptOssConfig(**SHARED, intermediate_size=24, num_local_experts=4, head_dim=8)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name or name.endswith("gate.weight"):
                nn.init.normal_(parameter, std=0.3)
    return model


def bare(kind: str):
    return copy.deepcopy(_made(kind))


KINDS = pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])


def adapt(model: nn.Module, targets=("experts",), size=0.5, **options) -> nn.Module:
    options = {"trainable_dim": 2, "n_tie": 5, "alpha": 0.7, "cache": False, **options}
    apply_tiny_lora(model, TinyLoRAConfig(target_modules=list(targets), **options), progress=False)
    torch.manual_seed(1)
    for v in trainable_vectors(model):
        nn.init.normal_(v, std=size)
    return model


def dense_parameters(model: nn.Module, vectors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The paper's weights in float64 under their names in the bare model, differentiable in the vectors [u]."""
    of_group = {layer.group: v for v, layer in zip(vectors, _owners(model), strict=True)}
    changed: dict[str, torch.Tensor] = {}
    for name, layer in adapted_layers(model).items():
        weight = paper_weight(layer, of_group[layer.group])
        if isinstance(layer.base, ExpertSlice):
            stack = name.rpartition(".")[0]
            stored = layer.base.experts._parameters[layer.base.stack].detach().double()
            changed[stack] = changed.get(stack, stored).index_copy(
                0, torch.tensor([layer.base.expert]), weight.unsqueeze(0)
            )
        else:
            changed[f"{name}.weight"] = weight
    return changed


def _owners(model):
    return [layer for layer in adapted_layers(model).values() if layer.owner is layer]


def truth(model: nn.Module, bare_model: nn.Module, embeds: torch.Tensor, g: torch.Tensor):
    """Logits, gradient of the embedded input, and of every vector, by transformers' plain loop in float64."""
    twin = copy.deepcopy(bare_model).double()
    twin.set_experts_implementation("eager")
    vectors = [layer.v.detach().double().requires_grad_() for layer in _owners(model)]
    x = embeds.detach().double().requires_grad_()
    y = functional_call(twin, dense_parameters(model, vectors), (), {"inputs_embeds": x}).logits
    y.backward(g.double())
    return y.detach(), x.grad, [v.grad for v in vectors]


@KINDS
@pytest.mark.parametrize("targets", [["experts"], ["experts.down_proj", "q_proj"], ["gate_up_proj"]], ids=str)
def test_logits_and_gradients_equal_the_dense_formula(kind, targets):
    base = bare(kind)
    model = adapt(bare(kind), targets)
    embeds = base.get_input_embeddings()(TOKENS).detach().requires_grad_()
    y = model(inputs_embeds=embeds).logits
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(g)
    expected, dx, dvs = truth(model, base, embeds, g)
    assert error(y.detach(), base(inputs_embeds=embeds).logits.detach().double()) > 0.05
    assert error(y.detach(), expected) < 5e-6 and error(embeds.grad, dx) < 5e-6
    for layer, dv in zip(_owners(model), dvs, strict=True):
        assert error(layer.v.grad, dv) < 1e-5


def test_every_matrix_is_a_module_with_its_own_p_and_place_in_a_tie_group():
    model = adapt(bare("mixtral"), ["experts", "o_proj"], n_tie=3)
    layers = adapted_layers(model)
    assert list(layers)[:10] == [
        "model.layers.0.self_attn.o_proj",
        *(f"model.layers.0.mlp.experts.gate_up_proj.{e}" for e in range(4)),
        *(f"model.layers.0.mlp.experts.down_proj.{e}" for e in range(4)),
        "model.layers.1.self_attn.o_proj",
    ]
    assert [layer.index for layer in layers.values()] == list(range(18))
    assert [layer.group for layer in layers.values()] == [i // 3 for i in range(18)]
    stats = count_trainable_params(model)
    assert (stats["modules"], stats["groups"], stats["trainable"]) == (18, 6, 12)
    projections = [layer.projection for layer in layers.values()]
    assert not torch.equal(projections[1], projections[2])
    assert [name for name in wrappers(model) if "experts" in name] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]


def test_a_single_expert_can_be_adapted_and_linear_layers_alone_are_by_default():
    name = "model.layers.1.mlp.experts.down_proj.2"
    model = adapt(bare("mixtral"), [name])
    assert list(adapted_layers(model)) == [name]
    assert error(model(TOKENS).logits.detach(), bare("mixtral")(TOKENS).logits.detach().double()) > 1e-3
    config = TinyLoRAConfig(cache=False)
    assert not any("expert" in n for n in adapted_layers(apply_tiny_lora(bare("mixtral"), config, progress=False)))
    with pytest.raises(ValueError, match="exports; did you mean experts. the model has .*experts experts"):
        adapt(bare("mixtral"), ["exports"])


def test_experts_that_no_token_reaches_get_no_gradient():
    model = adapt(bare("mixtral"), ["layers.0.mlp.experts.gate_up_proj"], n_tie=1)
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():  # every token to experts 1 and 3: the hidden states have a positive sum of squares
        gate.forward = lambda x: (None, torch.full((len(x), 2), 0.5), torch.tensor([[3, 1]]).expand(len(x), 2))
    model(TOKENS).logits.square().sum().backward()
    reached = [v.grad is not None and bool(v.grad.any()) for v in trainable_vectors(model)]
    assert reached == [False, True, False, True]


def test_without_tokens_and_without_gradients():
    model = adapt(bare("mixtral"))
    experts = model.model.layers[0].mlp.experts
    empty = experts(torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert empty.shape == (0, 32)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    y = model(TOKENS).logits
    for v in trainable_vectors(model):
        v.requires_grad_(False)
    assert not model(TOKENS).logits.requires_grad
    torch.testing.assert_close(model(TOKENS).logits, y)


@KINDS
def test_merging_is_exact_keeps_the_names_and_comes_back_bit_for_bit(kind):
    model, base = adapt(bare(kind), ["experts", "q_proj"]), bare(kind)
    y = model(TOKENS).logits.detach()
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    streamed = dict(merged_weights(model))
    assert list(streamed) == list(base.state_dict())
    assert {name for name, _ in merged_weights(model, only_adapted=True)} == {
        name for name in streamed if "q_proj.weight" in name or name.endswith(("experts.gate_up_proj", "down_proj"))
    }
    for name, expected in dense_parameters(model, [layer.v.detach().double() for layer in _owners(model)]).items():
        assert error(streamed[name], expected) < 1e-6
    base.load_state_dict(streamed)
    assert error(base(TOKENS).logits.detach(), y.double()) < 2e-5
    merge(model)
    assert torch.equal(model(TOKENS).logits, base(TOKENS).logits)
    assert all(torch.equal(tensor, streamed[name]) for name, tensor in merged_weights(model))
    model.set_experts_implementation("eager")  # a merged model runs what its config asks for, float64 included
    assert error(copy.deepcopy(model).double()(TOKENS).logits.detach(), y.double()) < 2e-5
    model.set_experts_implementation("grouped_mm")
    unmerge(model)
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(TOKENS).logits, y)


@pytest.mark.parametrize("include_basis", [False, True])
def test_files(include_basis, tmp_path):
    model = adapt(bare("qwen3_moe"), fused={"experts.gate_up_proj": 2})
    path = tmp_path / "adapter.safetensors"
    save_adapter(model, path, include_basis=include_basis)
    other = adapt(bare("qwen3_moe"), size=0.0, fused={"experts.gate_up_proj": 2})
    for loaded in (load_adapter(bare("qwen3_moe"), path, cache=False, progress=False), load_adapter(other, path)):
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    with pytest.raises(ValueError, match="it is for another model|it does not fit this model"):
        load_adapter(bare("mixtral"), path)


def test_gate_and_up_of_an_expert_taken_apart():
    base, model = bare("mixtral"), adapt(bare("mixtral"), fused={"gate_up_proj": 2})
    embeds = base.get_input_embeddings()(TOKENS).detach()
    y = model(inputs_embeds=embeds).logits
    expected, _, _ = truth(model, base, embeds, torch.zeros(()).expand(y.shape))
    assert error(y.detach(), expected) < 2e-5
    with pytest.raises(ValueError, match="interleaves its gate and up rows"):
        adapt(bare("gpt_oss"), fused={"gate_up_proj": 2})


def test_a_bank_gives_every_prompt_its_own_adapter():
    model = adapt(bare("mixtral"), ["experts", "v_proj"])
    own, base = model(TOKENS).logits.detach(), bare("mixtral")(TOKENS).logits.detach()
    bank = AdapterBank(model, 2, trainable=True)
    bank.add("own", torch.stack([v.detach() for v in trainable_vectors(model)]))
    bank.add("zero")
    with bank.use(["own", None, "zero"]):
        mixed = model(TOKENS).logits
        mixed.square().sum().backward()
    for row, expected in enumerate((own, base, base)):
        torch.testing.assert_close(mixed[row].detach(), expected[row], rtol=1e-4, atol=1e-5)
    assert all(table.grad[0].any() and table.grad[1].any() for table in bank.parameters())
    with bank.use(["own", None] * 2), pytest.raises(ValueError, match="expected a row for each of the 4 entries"):
        model(TOKENS)


def test_lora_xs_on_experts():
    model = bare("mixtral")
    apply_lora_xs(model, LoRAXSConfig(rank=2, target_modules=["experts"], cache=False), progress=False)
    torch.manual_seed(1)
    for v in trainable_vectors(model):
        nn.init.normal_(v, std=0.3)
    y = model(TOKENS).logits.detach()
    assert error(merge(model)(TOKENS).logits.detach(), y.double()) < 2e-5


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("copy_of", COPIES.values(), ids=COPIES)
def test_copies_stand_on_their_own_stack(copy_of):
    model = adapt(bare("mixtral"))
    twin, y = copy_of(model), model(TOKENS).logits.detach()
    assert torch.equal(twin(TOKENS).logits, y)
    merge(twin)
    assert torch.equal(model(TOKENS).logits, y)
    layer = next(iter(adapted_layers(twin).values()))
    stack = twin.model.layers[0].mlp.experts.base.gate_up_proj
    assert layer.base.weight.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()


def test_the_model_moves_to_bfloat16_and_keeps_its_vectors():
    model = adapt(bare("mixtral"))
    bits = [v.detach().clone() for v in trainable_vectors(model)]
    experts = model.model.layers[0].mlp.experts  # alone: rounding may send a token to another expert
    x, index, weights = torch.randn(6, 32), torch.tensor([[0, 2], [2, 1], [1, 3]]).repeat(2, 1), torch.full((6, 2), 0.5)
    y = experts(x, index, weights).detach()
    model.bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(bits, trainable_vectors(model), strict=True))
    assert error(experts(x.bfloat16(), index, weights.bfloat16()).detach(), y.double()) < 0.02


def test_removing_the_adapter_gives_the_bare_model_back():
    model = remove_adapter(adapt(bare("mixtral")))
    assert list(model.state_dict()) == list(bare("mixtral").state_dict()) and not adapted_layers(model)
    assert torch.equal(model(TOKENS).logits, bare("mixtral")(TOKENS).logits)


def test_whole_models_on_disk(tmp_path):
    from tinylora_kernels.integrations.transformers import from_pretrained, save_pretrained

    model = adapt(bare("mixtral"), ["experts", "embed_tokens"])
    y = model(TOKENS).logits.detach()
    save_pretrained(model, tmp_path / "both")
    torch.testing.assert_close(from_pretrained(tmp_path / "both", cache=False)(TOKENS).logits.detach(), y)
    save_pretrained(model, tmp_path / "merged", merged=True)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert error(merged(TOKENS).logits.detach(), y.double()) < 2e-5


def test_generation_and_recomputed_activations():
    model = adapt(bare("mixtral"))
    prompt = TOKENS[:2, :4]
    merged = bare("mixtral")
    merged.load_state_dict(dict(merged_weights(model)))
    ours, theirs = (m.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (model, merged))
    assert torch.equal(ours, theirs)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.train()
        loss = model(inputs_embeds=model.get_input_embeddings()(TOKENS).requires_grad_()).logits.square().sum()
        gradients.append(torch.autograd.grad(loss, trainable_vectors(model)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_lora_directory_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"gate_up_proj.0: LoRA directories have no .*merged_weights\(model\)"):
        export_lora(adapt(bare("mixtral")), tmp_path / "lora")
    assert not list(tmp_path.iterdir())


class Ungated(nn.Module):
    """Experts without a gate, with a norm after them, as the interface of transformers allows."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = 3
        self.up_proj = nn.Parameter(0.3 * torch.randn(3, 12, 8))
        self.down_proj = nn.Parameter(0.3 * torch.randn(3, 8, 12))
        self.act_fn = nn.ReLU()
        self.post_expert_norm = nn.LayerNorm(8)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for token, (experts, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            for expert, weight in zip(experts, weights, strict=True):
                y = self.down_proj[expert] @ self.act_fn(self.up_proj[expert] @ hidden_states[token])
                out[token] += weight * self.post_expert_norm(y)
        return out


class UngatedModel(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = transformers.PretrainedConfig()
        config._experts_implementation = "eager"
        make = transformers.integrations.moe.use_experts_implementation(has_gate=False, has_post_expert_norm=True)
        self.experts = make(type("UngatedExperts", (Ungated,), {}))(config)

    def forward(self, x):
        index = torch.tensor([[0, 2], [2, 1], [1, 0], [2, 0]])
        return self.experts(x, index, torch.full((4, 2), 0.5))


def test_experts_without_a_gate_and_with_a_norm_after_them():
    import transformers.integrations.moe  # noqa: F401

    x, base = torch.randn(4, 8), UngatedModel()
    model = adapt(UngatedModel(), n_tie=1)
    assert [name.partition(".")[2] for name in adapted_layers(model)][:4] == [*(f"up_proj.{e}" for e in range(3)),
                                                                             "down_proj.0"]  # fmt: skip
    y, before = model(x).detach(), base(x).detach()
    base.load_state_dict(dict(merged_weights(model)))
    assert error(y, base(x).detach().double()) < 1e-5 and error(y, before.double()) > 0.01


def test_experts_spread_over_ranks_or_quantised_are_refused():
    model = UngatedModel()
    model.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="^experts.up_proj.0: it cannot be adapted: its experts are spread over ranks"):
        adapt(model)
    model = UngatedModel()
    model.experts.up_proj = nn.Parameter(torch.zeros(3, 12, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="expected up_proj as a floating-point parameter .*found torch.int8"):
        adapt(model)


def test_a_trained_bias_of_a_stack_is_refused():
    """c = b U is a constant of the update: the bias's gradient would miss a term."""
    model = adapt(bare("gpt_oss"))
    model.model.layers[1].mlp.experts.base.down_proj_bias.requires_grad_()
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj.0: expected a frozen down_proj_bias, found"):
        model(TOKENS)
    with torch.no_grad():
        model(TOKENS)


def test_a_version_of_transformers_that_passes_the_updates_by_is_an_error(monkeypatch):
    model = adapt(bare("mixtral"))
    monkeypatch.setattr(model.model.layers[0].mlp.experts, "_forward", lambda seen, x, index, weights: x)
    with pytest.raises(RuntimeError, match="experts interface of version 5.23, found .*not supported"):
        model(TOKENS)


def functional(model: nn.Module):
    """(the mean square of the logits as a function of all vectors, the vectors)."""
    vectors = {name: v.detach() for name, v in model.named_parameters() if v.requires_grad}

    def loss(vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(model, vectors, (TOKENS,)).logits.square().mean()

    return loss, vectors


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev"])
@KINDS
def test_gradients_by_torch_func_are_those_of_autograd(kind, transform):
    model = adapt(bare(kind))
    loss, vectors = functional(model)
    expected = torch.autograd.grad(model(TOKENS).logits.square().mean(), trainable_vectors(model))
    if transform == "vjp":
        (found,) = torch.func.vjp(loss, vectors)[1](torch.tensor(1.0))
    else:
        found = getattr(torch.func, transform)(loss)(vectors)
    for ours, truth in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5 * truth.abs().max().item())


@KINDS
def test_the_vectors_of_one_stack_under_vmap(kind):
    experts = adapt(bare(kind)).model.layers[0].mlp.experts
    vectors = {name: v.detach() for name, v in experts.named_parameters() if v.requires_grad}
    tokens = torch.randn(6, 32)
    routing = torch.tensor([[0, 1], [1, 2], [2, 3], [0, 3], [1, 3], [0, 2]]), torch.rand(6, 2)

    def output(scale: torch.Tensor) -> torch.Tensor:
        return functional_call(experts, {n: scale * v for n, v in vectors.items()}, (tokens, *routing))

    scales = torch.tensor([0.5, -1.0, 0.0])
    expected = torch.stack([output(scale) for scale in scales])
    torch.testing.assert_close(torch.func.vmap(output)(scales), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "dual numbers"])
@KINDS
def test_forward_mode_is_refused_and_not_zero(kind, transform):
    loss, vectors = functional(adapt(bare(kind)))
    ones = {name: torch.ones_like(v) for name, v in vectors.items()}

    def dual() -> None:
        with forward_ad.dual_level():
            loss({name: forward_ad.make_dual(v, ones[name]) for name, v in vectors.items()})

    call = {
        "jvp": lambda: torch.func.jvp(loss, (vectors,), (ones,)), "jacfwd": lambda: torch.func.jacfwd(loss)(vectors),
        "dual numbers": dual,
    }[transform]  # fmt: skip
    with pytest.raises(RuntimeError, match=r"^experts: torch carries no tangent of forward mode [^\n]*$"):
        call()


def test_a_tangent_that_meets_no_other_product_is_carried():
    model = adapt(bare("mixtral"), targets=["down_proj"], layers_to_transform=[1])
    loss, vectors = functional(model)
    assert vectors
    gradient = torch.func.grad(loss)(vectors)
    along = torch.func.jvp(loss, (vectors,), ({name: torch.ones_like(v) for name, v in vectors.items()},))[1]
    torch.testing.assert_close(along, sum(g.sum() for g in gradient.values()), rtol=1e-3, atol=1e-4)


def test_a_routing_that_vmap_makes_different_for_each_sample_is_refused():
    loss, vectors = functional(adapt(bare("mixtral")))
    stacked = {name: torch.stack([v, 2 * v]) for name, v in vectors.items()}
    with pytest.raises(RuntimeError, match="experts: expected one routing of the tokens, .* torch.func.vmap"):
        torch.func.vmap(loss)(stacked)
