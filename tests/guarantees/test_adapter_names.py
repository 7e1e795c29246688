"""adapter_names of an accelerated PEFT model: each row runs what its adapter alone gives it, or the call is refused."""
import threading

import pytest
import torch
from torch import nn

from tests.cases import error
from tests.integrations.tiny import VOCABULARY, gpt2, llama, tokens

peft = pytest.importorskip("peft", minversion="0.21", reason="it is PEFT's argument")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="the models under test come from it")

from tinylora_kernels.integrations.peft import accelerate_peft, deaccelerate_peft  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*gradient_checkpointing.*:FutureWarning")
NAMES = ["default", "other", "__base__"]
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


def classifier():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_labels=3, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config)


def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3))


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def tiny_lora(targets, **options):
    return peft.TinyLoraConfig(
        r=2, u=3, target_modules=targets, init_weights="uniform", init_v_bound=0.5, **options
    )  # fmt: skip


def psoft(targets, **options):
    return peft.PsoftConfig(
        r=4, psoft_alpha=8, target_modules=targets, ab_svd_init="pissa_init", psoft_svd="full", psoft_orth=False,
        psoft_mag_a=False, psoft_mag_b=False, init_weights=False, **options,
    )  # fmt: skip


# model, config, targets, modules_to_save of "default" and of "other"
MODELS = {
    "llama": (llama, tiny_lora, ["q_proj", "down_proj"], None, None),
    "llama, PSOFT": (llama, psoft, ["q_proj", "down_proj"], None, None),
    "gpt2": (gpt2, lambda t, **o: tiny_lora(t, fan_in_fan_out=True, **o), ["c_attn"], None, None),
    "an embedding": (llama, tiny_lora, ["embed_tokens", "v_proj"], None, None),
    "a head to save": (classifier, tiny_lora, ["q_proj", "down_proj"], ["score"], ["score"]),
    "a head to save, PSOFT": (classifier, psoft, ["q_proj", "down_proj"], ["score"], ["score"]),
    "a head of the first alone": (classifier, tiny_lora, ["q_proj", "down_proj"], ["score"], None),
    "a head of the other alone": (classifier, tiny_lora, ["q_proj", "down_proj"], None, ["score"]),
    "an output layer to save": (llama, tiny_lora, ["q_proj"], ["lm_head"], ["lm_head"]),
    "embeddings to save": (llama, tiny_lora, ["q_proj"], ["embed_tokens"], ["embed_tokens"]),
    "two to save": (llama, tiny_lora, ["q_proj"], ["embed_tokens", "lm_head"], ["lm_head"]),
    "a pooler adapted": (bert, tiny_lora, ["query", "pooler.dense"], ["classifier"], ["classifier"]),
}


def two_adapters(make, config, targets, first, second, accelerate=True):
    torch.manual_seed(1)
    model = peft.get_peft_model(make(), config(targets, modules_to_save=first))
    model.add_adapter("other", config(targets, modules_to_save=second))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "psoft_R" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return accelerate_peft(model).eval() if accelerate else model.eval()


def alone(model, name: str, **inputs) -> torch.Tensor:
    """The logits of PEFT itself with one adapter for all rows."""
    deaccelerate_peft(model)
    try:
        if name == "__base__":
            with model.disable_adapter(), torch.no_grad():
                return model(**inputs).logits
        model.set_adapter(name)
        with torch.no_grad():
            return model(**inputs).logits
    finally:
        model.set_adapter("default")
        accelerate_peft(model)


@pytest.mark.parametrize("case", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("names", [
    ["default", "other", "__base__"], ["other", "other", "default", "__base__", "other"], ["__base__", "other"],
    ["other"], ["__base__"] * 3, ["other"] * 4,
])  # fmt: skip
@pytest.mark.parametrize("active", ["default", "other"])
def test_each_row_is_what_its_adapter_alone_gives(case, names, active):
    model, x = two_adapters(*case), tokens(rows=len(names), length=6)
    expected = {name: alone(model, name, input_ids=x) for name in NAMES}
    model.set_adapter(active)
    with torch.no_grad():
        found = model(input_ids=x, adapter_names=names).logits
    for row, name in enumerate(names):
        assert error(found[row], expected[name][row]) < 1e-5
    assert all(error(expected[a], expected[b]) > 1e-3 for a, b in (("default", "other"), ("other", "__base__")))
    model.set_adapter("default")  # the names hold for one call only
    with torch.no_grad():
        assert error(model(input_ids=x).logits, expected["default"]) < 1e-5


def test_gradients_go_to_the_modules_of_each_rows_adapter():
    model, x = two_adapters(*MODELS["a head to save"]), tokens(rows=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("modules_to_save" in name or "tinylora_v" in name)
    names = ["other", "default", "other"]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(model(input_ids=x, adapter_names=names).logits.square().sum(), list(trained.values()))
    expected = {name: torch.zeros_like(p) for name, p in trained.items()}
    for row, name in enumerate(names):
        model.set_adapter(name)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        loss = model(input_ids=x[row : row + 1]).logits.square().sum()
        own = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        for key, gradient in zip(trained, own, strict=True):
            expected[key] += 0 if gradient is None else gradient
    for (key, wanted), gradient in zip(expected.items(), found, strict=True):
        assert error(gradient, wanted) < 1e-5, key


@pytest.mark.parametrize("settings", [
    {}, dict(num_beams=3), dict(num_beams=4, num_return_sequences=2),
    dict(generation_config=transformers.GenerationConfig(num_beams=2, pad_token_id=0)),
])  # fmt: skip
@pytest.mark.parametrize("case", ["llama", "an output layer to save", "t5"])
@pytest.mark.parametrize("same_prompt", [False, True])
def test_generation(case, settings, same_prompt):
    make = (t5, tiny_lora, ["q", "wo"], None, None) if case == "t5" else MODELS[case]
    model, x = two_adapters(*make), tokens(rows=3, length=5)
    x = x[:1].expand(3, -1).contiguous() if same_prompt else x
    settings = settings | dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    names = ["other", "default", "other"]
    mixed = model.generate(input_ids=x, attention_mask=torch.ones_like(x), adapter_names=names, **settings)
    each = len(mixed) // 3
    for row, name in enumerate(names):
        model.set_adapter(name)
        one = x[row : row + 1]
        expected = model.generate(input_ids=one, attention_mask=torch.ones_like(one), **settings)
        assert torch.equal(mixed[row * each : (row + 1) * each], expected)


# Refused


REFUSED = {
    "none": ([], "expected a list of names, one for each row of the input, found"),
    "a string": ("default", "expected a list of names, one for each row of the input, found 'default'"),
    "no strings": (["default", None, 3], "expected a list of names"),
    "too few": (["default", "other"], r"expected one for each row of input_ids \[9, 7\], found 2"),
    "a third": (["default", "other", "default"], r"expected one for each row of input_ids \[9, 7\], found 3"),
    "a third, all the same": (["other"] * 3, r"expected one for each row of input_ids \[9, 7\], found 3"),
    "one for all": (["other"], r"expected one for each row of input_ids \[9, 7\], found 1"),
    "too many": (["default"] * 10, "found 10"),
    "twice as many": (["default", "other"] * 9, "found 18"),
    "one a token": (["default", "other", "other"] * 21, "found 63"),
    "unknown": (["typo"] * 9, "no adapter named 'typo'; known are __base__, default, other"),
}


@pytest.mark.parametrize("names, message", REFUSED.values(), ids=list(REFUSED))
@pytest.mark.parametrize("call", ["forward", "generate", "embeddings"])
@pytest.mark.parametrize("case", ["llama", "an output layer to save"])
def test_names_that_are_not_one_a_row_are_refused(names, message, call, case):
    model, x = two_adapters(*MODELS[case]), tokens(rows=9)
    calls = {
        "forward": lambda: model(input_ids=x, adapter_names=names),
        "generate": lambda: model.generate(input_ids=x, adapter_names=names, max_new_tokens=2, pad_token_id=0),
        "embeddings": lambda: model(inputs_embeds=torch.randn(9, 7, 32), adapter_names=names),
    }
    if call == "embeddings":
        message = message.replace("input_ids", "inputs_embeds").replace("7\\]", "7, 32\\]")
    with pytest.raises(ValueError, match=message) as info:
        calls[call]()
    assert str(info.value).startswith("adapter_names: ") and "\n" not in str(info.value)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=x).logits).all()  # nothing is left behind


def test_a_merged_model_has_one_adapter_for_all_rows():
    for case in ("llama", "llama, PSOFT", "a head to save"):
        model, x = two_adapters(*MODELS[case]), tokens(rows=2)
        model.merge_adapter(["other"])
        with pytest.raises(ValueError, match="adapter_names: .*q_proj is merged, .*; call unmerge_adapter"):
            model(input_ids=x, adapter_names=["default", "other"])
        model.unmerge_adapter()
        expected = alone(model, "other", input_ids=x)
        with torch.no_grad():
            assert error(model(input_ids=x, adapter_names=["default", "other"]).logits[1], expected[1]) < 1e-4


def test_modules_to_save_that_cannot_be_mixed_are_refused():
    model = two_adapters(llama, tiny_lora, ["q_proj"], ["norm"], ["norm"])
    with pytest.raises(ValueError, match="adapter_names: .*norm is a .*ModulesToSave.* of a LlamaRMSNorm"):
        model(input_ids=tokens(rows=2), adapter_names=["default", "other"])
    late = two_adapters(*MODELS["a head of the other alone"], accelerate=False)
    accelerate_peft(late)
    late.add_adapter("late", tiny_lora(["q_proj"], modules_to_save=["embed_tokens"]))
    with pytest.raises(ValueError, match="embed_tokens is a ModulesToSaveWrapper .*call accelerate_peft again"):
        late(input_ids=tokens(rows=2), adapter_names=["late", "other"])


class Experts(nn.Module):
    """Rows are gathered for each expert: nothing in a layer's input says whose they are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.config = None

    def forward(self, x):  # [b, T, E]
        rows = x.flatten(0, 1)
        out = torch.zeros_like(rows)
        for expert, layer in enumerate(self.experts):
            chosen = (rows.sum(-1) > 0) == bool(expert)
            out[chosen] = layer(rows[chosen])
        return out.view_as(x)


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x):  # [b, T, E]
        return self.inner[0](x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("make, targets", [(Experts, ["0", "1"]), (TimeFirst, ["0"])])
def test_rows_that_are_not_the_samples_are_refused(make, targets):
    model = peft.get_peft_model(make(), tiny_lora(targets))
    model.add_adapter("other", tiny_lora(targets))
    accelerate_peft(model)
    for seed in range(12):  # of some, the rows divide by the names
        x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(seed))
        with pytest.raises(ValueError, match="its rows may be any .*; call the model with one adapter at a time"):
            model(x, adapter_names=["default", "other", "default"])
        for name in ("default", "other"):
            model.set_adapter(name)
            assert error(model(x, adapter_names=[name] * 3), model(x)) < 1e-6


def test_names_hold_for_the_thread_that_gave_them():
    model, x = two_adapters(*MODELS["a head to save"]), tokens(rows=2)
    expected = alone(model, "default", input_ids=x)
    inside, found = threading.Event(), []

    def other_thread():
        with torch.no_grad():
            found.append(model(input_ids=x).logits)

    def hold(module, args, output):
        if not inside.is_set():
            inside.set()
            thread = threading.Thread(target=other_thread)
            thread.start()
            thread.join()

    handle = model.get_base_model().model.layers[0].register_forward_hook(hold)
    with torch.no_grad():
        mixed = model(input_ids=x, adapter_names=["other", "__base__"]).logits
    handle.remove()
    assert error(found[0], expected) < 1e-5 and error(mixed, expected) > 1e-3
