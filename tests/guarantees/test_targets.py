"""Targets: every name, expression and layer number that is asked for matches, the default skips what it must aloud."""
import re
import warnings

import pytest
import torch
from torch import nn

from tests.integrations.tiny import gpt2, llama
from tests.models import tiny_decoder
from tinylora_kernels import (
    LoRAXSConfig,
    TinyLoRAConfig,
    adapted_layers,
    apply_lora_xs,
    apply_tiny_lora,
    inspect_adapter,
    load_adapter,
    remove_adapter,
    save_adapter,
    trainable_vectors,
)  # fmt: skip

peft = pytest.importorskip("peft", minversion="0.21", reason="what is selected is compared with PEFT's choice")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="the models under test come from it")

SIZES = dict(vocab_size=31, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


def config(**options) -> TinyLoRAConfig:
    return TinyLoRAConfig(**{"trainable_dim": 2, "cache": False} | options)


def selected(model: nn.Module, **options) -> list[str]:
    apply_tiny_lora(model, config(**options), progress=False)
    names = list(adapted_layers(model))
    remove_adapter(model)
    return names


def refused(model: nn.Module, message: str, **options) -> None:
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message) as info:
        apply_tiny_lora(model, config(**options), progress=False)
    assert "\n" not in str(info.value) and dict(model.named_modules()) == before


def t5():
    torch.manual_seed(0)
    sizes = dict(vocab_size=31, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def qwen_moe():
    torch.manual_seed(0)
    sizes = SIZES | dict(
        intermediate_size=48, moe_intermediate_size=24, shared_expert_intermediate_size=48, num_experts=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**sizes))


def reward():
    torch.manual_seed(0)
    sizes = SIZES | dict(intermediate_size=48, num_labels=1, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes))


# As PEFT selects

SELECTIONS = {
    "names": dict(target_modules=["q_proj", "down_proj"]),
    "a suffix": dict(target_modules=["self_attn.q_proj", "mlp.up_proj"]),
    "a full name": dict(target_modules=["model.layers.1.mlp.up_proj", "v_proj"]),
    "an expression": dict(target_modules=r".*\.(q|v)_proj"),
    "an expression of layers": dict(target_modules=r"model\.layers\.[12]\..*_proj"),
    "an expression with $": dict(target_modules=r".*layers.*(gate|up)_proj$"),
    "names but some": dict(target_modules=["q_proj", "v_proj", "down_proj"], exclude_modules=["v_proj"]),
    "names but full names": dict(target_modules=["q_proj"], exclude_modules=["model.layers.0.self_attn.q_proj"]),
    "names but an expression": dict(target_modules=["q_proj", "k_proj"], exclude_modules=r".*layers\.[0-2]\..*"),
    "an expression but names": dict(target_modules=r".*_proj", exclude_modules=["mlp.up_proj", "o_proj"]),
    "all linear but names": dict(target_modules="all-linear", exclude_modules=["k_proj", "gate_proj"]),
    "all linear but an expression": dict(target_modules="all-linear", exclude_modules=r".*\.mlp\..*"),
    "one layer": dict(target_modules=["q_proj", "up_proj"], layers_to_transform=2),
    "layers": dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 3]),
    "layers of a list": dict(target_modules=["o_proj"], layers_to_transform=[1, 2], layers_pattern="layers"),
    "a full name beside layers": dict(
        target_modules=["model.layers.3.self_attn.q_proj", "k_proj"], layers_to_transform=[0]
    ),
    "layers of lists": dict(target_modules=["o_proj"], layers_to_transform=[1], layers_pattern=["h", "layers"]),
}


@pytest.mark.parametrize("options", SELECTIONS.values(), ids=list(SELECTIONS))
def test_the_same_modules_as_in_peft(options, tmp_path):
    theirs = peft.get_peft_model(llama(num_hidden_layers=4), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    layer = peft.tuners.lora.LoraLayer
    expected = [name for name, module in theirs.base_model.model.named_modules() if isinstance(module, layer)]
    model = llama(num_hidden_layers=4)
    assert selected(model, **options) == expected
    apply_lora_xs(model, LoRAXSConfig(rank=2, cache=False, **options), progress=False)
    assert list(adapted_layers(model)) == expected
    # A file names what was selected, and is loaded without a selection.
    save_adapter(model, tmp_path / "a.safetensors")
    found = inspect_adapter(tmp_path / "a.safetensors")
    assert [module.name for module in found.modules] == expected
    loaded = load_adapter(llama(num_hidden_layers=4), tmp_path / "a.safetensors", cache=False, progress=False)
    assert list(adapted_layers(loaded)) == expected
    save_adapter(loaded, tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_the_same_layers_as_in_peft_where_names_have_several_numbers():
    """T5's blocks hold lists of layers: block.1.layer.0."""
    for options in (
        dict(target_modules=["q", "wo"], layers_to_transform=[1]),
        dict(target_modules=["q", "wi"], layers_to_transform=[0, 1], layers_pattern="layer"),
        dict(target_modules=["k"], layers_to_transform=2, layers_pattern=["block"]),
        dict(target_modules=["q", "wo"], layers_to_transform=[1], layers_pattern=["layer", "block"]),
        dict(target_modules=["q", "wo"], layers_to_transform=[2], layers_pattern=["block", "layer"]),
    ):
        theirs = peft.get_peft_model(t5(), peft.LoraConfig(r=2, **options))
        layer = peft.tuners.lora.LoraLayer
        expected = [name for name, module in theirs.base_model.model.named_modules() if isinstance(module, layer)]
        assert expected and selected(t5(), **options) == expected
    assert selected(gpt2(), target_modules=["c_attn"], layers_to_transform=1) == ["transformer.h.1.attn.c_attn"]


@pytest.mark.parametrize("layers, expected", [
    (1, [1]), ([1], [1]), (range(2), [0, 1]), (range(1, 3), [1, 2]), ((2, 0), [0, 2]), ({2}, [2]),
    (range(0, 3, 2), [0, 2]),
])  # fmt: skip
@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj"], "q_proj", r"layers\..*_proj"])
def test_ranges_of_layers_with_every_form_of_targets(targets, layers, expected):
    names = selected(tiny_decoder(blocks=3), target_modules=targets, layers_to_transform=layers)
    assert sorted({int(name.split(".")[1]) for name in names}) == expected
    assert len(names) == len(expected) * (1 if targets in (["q_proj"], "q_proj") else 7)


def test_a_string_without_special_characters_is_a_name_and_a_set_is_a_list():
    for targets, count in (("q_proj", 2), ("1.q_proj", 1), ({"q_proj", "o_proj"}, 4), (("up_proj",), 2)):
        assert len(selected(tiny_decoder(), target_modules=targets)) == count


def test_a_shared_module_goes_by_each_of_its_names():
    model = nn.ModuleDict({"first": nn.Linear(8, 6), "other": nn.Linear(8, 6)})
    model["second"] = model["first"]
    assert selected(model, target_modules=["second"]) == selected(model, target_modules=["first"]) == ["first"]
    assert selected(model, target_modules=["other", "first"], exclude_modules=["second"]) == ["other"]


# What matches nothing

TYPOS = {
    "one of several": (dict(target_modules=["q_proj", "v_porj"]), "^target_modules: .* v_porj; did you mean v_proj"),
    "two of several": (dict(target_modules=["q_prj", "k_proj", "Up_proj"]), "q_prj, Up_proj; did you mean q_proj"),
    "a suffix": (dict(target_modules=["q_proj", "attn.v_proj"]), "no module matches attn.v_proj; did you mean v_proj"),
    "a layer too far": (dict(target_modules=["q_proj", "layers.7.v_proj"]), "no module matches layers.7.v_proj"),
    "another model's": (dict(target_modules=["q_proj", "c_attn"]), "no module matches c_attn; the model has"),
    "a block": (dict(target_modules=["q_proj", "layers.0"]), "matches layers.0; it is above the modules down_proj, "),
    "no matrix": (dict(target_modules=["q_proj", "layers"]), "matches layers; it is above the modules"),
    "half a name": (dict(target_modules=["proj"]), "no module matches proj; .*the model has .*q_proj"),
    "case": (dict(target_modules=["Q_PROJ", "k_proj"]), "no module matches Q_PROJ"),
    "a space": (dict(target_modules=["q_proj "]), "no module matches q_proj"),
    "an expression": (dict(target_modules=r".*\.w_proj"), "an expression has to match a whole name; the model has"),
    "an expression of a part": (dict(target_modules=r"(q|v)_proj"), "an expression has to match a whole name"),
    "an expression in a list": (dict(target_modules=["q_proj", r".*v_proj"]), "given as a string, not in a list"),
    "excluded": (dict(exclude_modules=["lm_haed"]), "^exclude_modules: .* lm_haed; did you mean lm_head"),
    "one excluded of several": (dict(exclude_modules=["lm_head", "q_porj"]), "no module matches q_porj"),
    "an excluded expression": (dict(exclude_modules=r"vision.*"), "exclude_modules: no module matches vision"),
    "a block excluded": (dict(exclude_modules=["layers.1"]), "no module matches layers.1; it is above"),
    "all excluded": (dict(target_modules=["q_proj"], exclude_modules=["q_proj"]), "q_proj that exclude_modules leave"),
    "all linear excluded": (dict(exclude_modules=r".*"), "matches every linear layer that exclude_modules leave"),
    "a layer": (dict(layers_to_transform=[0, 2]), "layers_to_transform: expected layers .* found 2; there are 0 to 1"),
    "several layers": (dict(layers_to_transform=range(1, 5)), "found 2, 3, 4; there are 0 to 1"),
    "a list of layers": (dict(layers_to_transform=0, layers_pattern="h"), "no name has a number after h"),
}  # fmt: skip


@pytest.mark.parametrize("options, message", TYPOS.values(), ids=list(TYPOS))
@pytest.mark.parametrize("adapt", [apply_tiny_lora, apply_lora_xs])
def test_what_matches_nothing_is_an_error(options, message, adapt):
    if adapt is apply_tiny_lora:
        refused(tiny_decoder(), message, **options)
    else:
        with pytest.raises(ValueError, match=message):
            apply_lora_xs(tiny_decoder(), LoRAXSConfig(rank=2, cache=False, **options), progress=False)


def test_a_module_without_a_matrix_is_named_with_its_class():
    refused(llama(), "matches norm; model.norm is a LlamaRMSNorm, which has no matrix", target_modules=["norm"])


@pytest.mark.parametrize("field, value", [
    *(("target_modules", value) for value in ([], "", [""], [None], ["q_proj", 3], 7, b"q_proj", [["q_proj"]])),
    *(("target_modules", value) for value in (r"q_(", "*_proj", "[a", "q_proj|(?P<x")),
    *(("exclude_modules", value) for value in ([], "", [1], 1.5, "+")),
    *(("layers_to_transform", value) for value in ([], -1, [0, -1], 1.0, [True], True, "0", ["0"], [None])),
    *(("layers_pattern", value) for value in ([], "", 3, "(", ["layers", "["])),
    ("layers_pattern", "layers"),
])  # fmt: skip
@pytest.mark.parametrize("kind", [TinyLoRAConfig, LoRAXSConfig])
def test_what_is_no_selection_is_refused_where_it_is_written(kind, field, value):
    layers = {"layers_to_transform": [0]} if field == "layers_pattern" and value != "layers" else {}
    with pytest.raises(ValueError, match=f"^{field}: ") as info:
        kind(**{field: value}, **layers)
    assert "\n" not in str(info.value)


# What the default skips


class Around(nn.Module):
    """What people write around a model: a reward head, two models side by side."""

    def __init__(self, *models: nn.Module):
        super().__init__()
        self.models, self.score = nn.ModuleList(models), nn.Linear(32, 2)


class Encoder(nn.Module):
    """One that inherits the method, and has no head."""

    def __init__(self, error: type[Exception]):
        super().__init__()
        self.proj, self.error = nn.Linear(32, 32), error

    def get_output_embeddings(self):
        raise self.error("none")


@pytest.mark.parametrize("wanted", [None, "all-linear"])
@pytest.mark.parametrize("make", [llama, t5, qwen_moe, lambda: tiny_decoder(width=32)])
def test_the_output_head_is_left_out_wherever_its_model_sits(make, wanted):
    alone = selected(make(), target_modules=wanted)
    for encoder in (Encoder(NotImplementedError), Encoder(AttributeError), nn.Identity()):
        inside = selected(Around(make(), encoder, make()), target_modules=wanted)
        names = [f"models.{n}.{name}" for n in (0, 2) for name in alone]
        extra = ["models.1.proj"] if isinstance(encoder, Encoder) else []
        assert sorted(inside) == sorted([*names, *extra, "score"])
    assert selected(Around(make()), target_modules=["lm_head"]) == ["models.0.lm_head"]  # where it is asked for


class Gates(nn.Module):
    """A layer of each sort that cannot carry a rank of 2 for its shape or its numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.one_out, self.one_in = nn.Linear(12, 10), nn.Linear(12, 1), nn.Linear(1, 12)
        self.zero, self.flat, self.rich = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(12, 3)
        nn.init.zeros_(self.zero.weight)
        nn.init.ones_(self.flat.weight)


def by_default(model: nn.Module, **options) -> tuple[list[str], list[str]]:
    """Names adapted; what the warnings say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        apply_tiny_lora(model, config(**options), progress=False)
    return list(adapted_layers(model)), [str(w.message) for w in caught if "carry" in str(w.message)]


@pytest.mark.parametrize("rank, skipped", [
    (1, ["zero"]), (2, ["one_out", "one_in", "zero", "flat"]), (3, ["one_out", "one_in", "zero", "flat"]),
    (4, ["one_out", "one_in", "rich", "zero", "flat"]),
])  # fmt: skip
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_the_default_skips_what_cannot_carry_the_rank_and_says_so(rank, skipped, targets, tmp_path):
    model = Gates()
    names, said = by_default(model, frozen_rank=rank, target_modules=targets)
    assert names == [name for name in dict(Gates().named_children()) if name not in skipped]
    assert said == [
        f"target_modules: {', '.join(skipped)} cannot carry rank {rank} and stay as they are; name them in "
        "exclude_modules to hear no more of it"
    ]
    assert by_default(Gates(), frozen_rank=rank, exclude_modules=skipped) == (names, [])
    save_adapter(model, tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_adapter(Gates(), tmp_path / "a.safetensors", cache=False, progress=False)
    assert list(adapted_layers(loaded)) == names


@pytest.mark.parametrize("make, skipped", [(qwen_moe, "shared_expert_gate"), (reward, "score")])
def test_gates_and_heads_with_one_output(make, skipped):
    names, (said,) = by_default(make())
    assert names and not any(skipped in name for name in names) and skipped in said
    with pytest.raises(ValueError, match=f"{skipped}: rank must be from 1 to .* = 1, got 2; leave it out otherwise"):
        apply_tiny_lora(make(), config(target_modules=["q_proj", skipped]), progress=False)


def test_a_model_of_nothing_else_is_refused():
    for model in (nn.Sequential(nn.Linear(4, 1)), nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))):
        refused(model, "no module matches every linear layer that the rank 2 leave")
    empty = nn.Sequential(nn.Linear(4, 5))
    nn.init.zeros_(empty[0].weight)
    refused(empty, "target_modules: none of 0 can carry rank 2; use a lower one")


def test_named_modules_that_cannot_carry_the_rank_are_errors_still():
    for name, message in {"one_out": "one_out: rank must", "zero": "usable rank is 0", "flat": "rank is 1"}.items():
        refused(Gates(), message, target_modules=["body", name])


def test_groups_follow_from_what_is_left():
    model = Gates()
    by_default(model, n_tie=2)
    assert [layer.group for layer in adapted_layers(model).values()] == [0, 0] and len(trainable_vectors(model)) == 1


def test_factors_that_lack_a_module_are_an_error_where_it_was_named():
    model = apply_tiny_lora(Gates(), config(target_modules=["body"]), progress=False)
    body = adapted_layers(model)["body"]
    factors = {"body": type("F", (), dict(basis=body.basis, sigma=body.sigma, degenerate=False))()}
    with pytest.raises(ValueError, match="factors: expected those of every module to adapt, found none of rich"):
        apply_tiny_lora(Gates(), config(target_modules=["body", "rich"]), factors=factors)


# Bases that another adapter sits in


class OwnLoRA(nn.Module):
    """As people write one: beside the layer, and trained."""

    def __init__(self, base: nn.Linear, down: str, up: str):
        super().__init__()
        self.linear = base
        self.add_module(down, nn.Linear(base.in_features, 4, bias=False))
        self.add_module(up, nn.Linear(4, base.out_features, bias=False))


class OfParameters(nn.Linear):
    """loralib's and litgpt's way: a linear layer with two more parameters."""

    def __init__(self, size: int):
        super().__init__(size, size)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(2, size)), nn.Parameter(torch.zeros(size, 2))


def with_own(down: str, up: str):
    model = tiny_decoder()
    model.layers[0].q_proj = OwnLoRA(model.layers[0].q_proj, down, up)
    return model


def with_parameters():
    model = tiny_decoder()
    model.layers[0].q_proj = OfParameters(24)
    return model


def with_peft(kind, injected=False, **options):
    def make():
        settings = kind(target_modules=["q_proj"], **options)
        if injected:
            return peft.inject_adapter_in_model(settings, llama())
        return peft.get_peft_model(llama(), settings)

    return make


ADAPTERS = {
    "LoRA": with_peft(peft.LoraConfig, r=4),
    "LoRA of rank 1": with_peft(peft.LoraConfig, r=1),
    "LoRA injected": with_peft(peft.LoraConfig, injected=True, r=4),
    "DoRA": with_peft(peft.LoraConfig, r=4, use_dora=True),
    "OFT": with_peft(peft.OFTConfig, r=0, oft_block_size=4),
    "IA3": with_peft(peft.IA3Config, feedforward_modules=[]),
    "VeRA": with_peft(peft.VeraConfig, r=4),
    "TinyLoRA": with_peft(peft.TinyLoraConfig, u=2),
    "modules_to_save": with_peft(peft.LoraConfig, r=4, modules_to_save=["lm_head"]),
    "loralib": with_parameters,
    "torchtune": lambda: with_own("lora_a", "lora_b"),
    "diffusers": lambda: with_own("lora_down", "lora_up"),
    "somebody's": lambda: with_own("loraA", "loraB"),
}


@pytest.mark.parametrize("make", ADAPTERS.values(), ids=list(ADAPTERS))
@pytest.mark.parametrize("targets", [None, ["q_proj"], r".*q_proj.*"])
def test_another_adapter_in_the_base_is_refused_by_name(make, targets):
    message = r"q_proj.* holds an adapter already \(.*\).*merge it into the base first"
    if targets is None:
        message = r"(q_proj|lm_head).* holds an adapter already \(.*\); merge it into the base first"
    refused(make(), message, target_modules=targets)


@pytest.mark.parametrize("make", ADAPTERS.values(), ids=list(ADAPTERS))
def test_modules_beside_another_adapter_are_adapted(make):
    assert all(re.search(r"k_proj$", name) for name in selected(make(), target_modules=["k_proj"]))


def test_a_merged_adapter_is_no_adapter():
    merged = with_peft(peft.LoraConfig, r=4)().merge_and_unload()
    assert selected(merged) == selected(llama())


@pytest.mark.parametrize("sizes", [(12, 0), (0, 12)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
def test_a_layer_of_no_size_is_left_out_by_default(sizes):
    model = nn.ModuleDict({"body": nn.Linear(12, 10), "none": nn.Linear(*sizes)})
    names, (said,) = by_default(model)
    assert names == ["body"] and said.startswith("target_modules: none cannot carry rank 2")
    refused(nn.ModuleDict({"none": nn.Linear(*sizes)}), "none: .*", target_modules=["none"])
