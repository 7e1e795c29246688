"""Exported LoRA directories load in PEFT and give the adapted model's outputs."""
import copy
import json
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.models import TARGETS, tiny_decoder
from tests.paper import delta_weight
from tinylora_kernels import TinyLoRAConfig, adapted_layers, apply_tiny_lora
from tinylora_kernels.common import atomic
from tinylora_kernels.files.adapter import save_adapter
from tinylora_kernels.files.export import export_lora, lora_factors, main
from tinylora_kernels.method.config import LoRAXSConfig
from tinylora_kernels.model.attach import apply_lora_xs
from tinylora_kernels.model.merging import merge, unmerge
from tinylora_kernels.model.targets import shortest_targets

TOKENS = torch.arange(12).view(2, 6)


def adapt(model, targets=TARGETS, size=0.3, **options):
    options = {"trainable_dim": 3, "n_tie": 4, "target_modules": targets, "cache": False, **options}
    apply_tiny_lora(model, TinyLoRAConfig(**options), progress=False)
    return randomise(model, size)


def randomise(model, size):
    torch.manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=size)
    return model


def llama(seed=0):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2(seed=0):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def load_in_peft(model, directory):
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(model, directory)


@pytest.mark.parametrize(
    "make, targets",
    [
        (llama, TARGETS),
        (llama, ["model.layers.1.self_attn.q_proj", "up_proj"]),
        (llama, ["lm_head", "o_proj"]),
        (gpt2, ["c_attn", "c_fc"]),
    ],
    ids=["llama", "llama-some", "llama-head", "gpt2"],
)
def test_peft_gives_the_same_outputs(make, targets, tmp_path):
    model = adapt(make(), targets, size=1.0)
    with torch.no_grad():
        expected = model(TOKENS).logits
    export_lora(model, tmp_path / "lora")
    loaded = load_in_peft(make(), str(tmp_path / "lora"))
    with torch.no_grad():
        ours, base = loaded(TOKENS).logits, make()(TOKENS).logits
    assert (expected - base).abs().max() > 0.01
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    # every adapted module and no other got a LoRA layer
    peft_names = {name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
                  for name, _ in loaded.named_modules() if name.endswith(".lora_A.default")}  # fmt: skip
    assert peft_names == set(adapted_layers(model))


def test_peft_merges_to_our_merged_weights(tmp_path):
    model = adapt(llama())
    export_lora(model, tmp_path / "lora")
    theirs = load_in_peft(llama(), str(tmp_path / "lora")).merge_and_unload().state_dict()
    merge(model)
    for name, layer in adapted_layers(model).items():
        torch.testing.assert_close(theirs[name + ".weight"], layer.base.weight, rtol=1e-5, atol=1e-6)


def test_lora_xs_exports_too(tmp_path):
    model = apply_lora_xs(llama(), LoRAXSConfig(rank=3, target_modules=TARGETS, cache=False), progress=False)
    randomise(model, 0.1)
    export_lora(model, tmp_path / "lora")
    with torch.no_grad():
        torch.testing.assert_close(
            load_in_peft(llama(), str(tmp_path / "lora"))(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("rank", [2, 8, 16])
def test_format(tmp_path, rank):
    model = adapt(tiny_decoder())
    export_lora(model, tmp_path / "lora", rank=rank)
    assert sorted(os.listdir(tmp_path)) == ["lora"]
    assert sorted(os.listdir(tmp_path / "lora")) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == rank
    assert config["target_modules"] == sorted(TARGETS)
    assert not config["use_rslora"] and not config["use_dora"] and config["bias"] == "none"
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    layers = adapted_layers(model)
    assert set(tensors) == {f"base_model.model.{name}.lora_{x}.weight" for name in layers for x in "AB"}
    for name, layer in layers.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert a.shape == (rank, layer.in_features) and b.shape == (layer.out_features, rank)
        assert not a[2:].any() and not b[:, 2:].any() and a[:2].any()
        torch.testing.assert_close(b @ a, delta_weight(layer), rtol=1e-5, atol=1e-6)


def test_vllm_format_rules(tmp_path):
    """As vLLM states them in vllm/lora/peft_helper.py and vllm/lora/utils.py, and the ranks its kernels know."""
    model = adapt(llama())
    export_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= set(config)  # required
    assert config["r"] in (8, 16, 32, 64, 128, 256, 320, 512)
    assert not config["modules_to_save"] and not config["use_dora"] and config["bias"] == "none"
    assert config["lora_alpha"] / config["r"] == 1.0  # its scaling factor
    linear = {name.rpartition(".")[2] for name in adapted_layers(model)}
    for name in load_file(tmp_path / "lora" / "adapter_model.safetensors"):
        prefix, _, rest = name.partition("base_model.model.")
        parts = rest.split(".")
        assert prefix == "" and parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B")
        assert parts[-3] in linear and parts[-3] in config["target_modules"]


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_half_precision_keeps_its_relative_precision_at_tiny_updates(dtype, tolerance, tmp_path):
    # unbalanced, lora_B would be about 1e-7: below float16's smallest normal number, 6e-5
    model = adapt(tiny_decoder(), size=1e-6)
    export_lora(model, tmp_path / "lora", dtype=dtype)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, layer in adapted_layers(model).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert a.dtype == b.dtype == dtype
        delta = delta_weight(layer).double()
        assert float((b.double() @ a.double() - delta).norm() / delta.norm()) < tolerance


def test_zero_update_exports_zeros():
    layer = next(iter(adapted_layers(adapt(tiny_decoder(), size=0.0)).values()))
    a, b = lora_factors(layer, 4)
    assert not (b @ a).any() and bool(torch.isfinite(a).all())


class Int8Linear(nn.Module):
    """A weight-only quantised layer: integers, one scale for each row, a bias."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x):
        return x @ (self.weight * self.scale).T + self.bias


def test_quantised_bases_export_by_what_they_compute():
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(20, 12)), targets=["0"])
    layer, x = model[0], torch.randn(5, 20)
    layer.base = Int8Linear(layer.base)
    a, b = lora_factors(layer, 8)
    torch.testing.assert_close(layer.base(x) + x @ a.T @ b.T, layer(x), rtol=1e-5, atol=1e-5)
    assert (layer(x) - layer.base(x)).abs().max() > 0.01


def test_merged_models_export_the_same(tmp_path):
    model = adapt(tiny_decoder())
    export_lora(model, tmp_path / "plain")
    export_lora(merge(model), tmp_path / "merged")
    unmerge(model)
    for file in os.listdir(tmp_path / "plain"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()


def test_target_modules_are_full_names_where_a_suffix_would_select_more():
    assert shortest_targets(adapt(tiny_decoder())) == sorted(TARGETS)
    model = adapt(tiny_decoder(), targets=["layers.0.q_proj", "up_proj"])
    assert shortest_targets(model) == ["layers.0.q_proj", "layers.0.up_proj", "layers.1.up_proj"]


class Nested(nn.Module):
    """A module whose name is the end of another one's, which is a container or a linear layer."""

    def __init__(self, inner):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.ModuleDict({"fc": inner(nn.Linear(12, 12))})
        self.fc, self.out = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.out(torch.tanh(self.fc(torch.tanh(self.block["fc"](x)))))


def to_peft(model, directory):
    pytest.importorskip("peft")
    from tinylora_kernels.integrations.peft import to_peft

    to_peft(model, directory)


WRITERS = pytest.mark.parametrize("write", [export_lora, to_peft])


@WRITERS
@pytest.mark.parametrize("inner", [nn.Sequential, nn.Identity], ids=["a container", "a layer"])
def test_a_name_that_is_the_end_of_another_ones(write, inner, tmp_path):
    inner = {nn.Identity: lambda layer: layer}.get(inner, inner)
    model, x = adapt(Nested(inner), targets="fc|out", size=1.0), torch.randn(5, 12)
    assert list(adapted_layers(model)) == ["fc", "out"]
    write(model, tmp_path / "lora")
    with torch.no_grad():
        loaded = load_in_peft(Nested(inner), str(tmp_path / "lora"))
        assert (model(x) - Nested(inner)(x)).abs().max() > 0.1
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)


class Tripling(nn.Linear):
    """Its update is one of the weight, and three times what factors add beside it."""

    def forward(self, x):
        return super().forward(3 * x)


class Reshaping(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class PaddedAsNeeded(nn.Conv2d):
    """timm's Conv2dSame: padded in its forward, which PEFT's lora_A, of the same class, is too."""

    def forward(self, x):
        sizes = zip(x.shape[-2:], self.stride, self.kernel_size, strict=True)
        rows, columns = (max(((n - 1) // s) * s + k - n, 0) for n, s, k in sizes)
        return super().forward(nn.functional.pad(x, (0, columns, rows // 2, rows - rows // 2)))


class Gained(nn.Conv2d):
    def forward(self, x):
        return super().forward(3 * x)


class MadeOtherwise(nn.Conv1d):
    def __init__(self, width):
        super().__init__(width, width, 3, padding=1)

    def forward(self, x):
        return super().forward(x)


class ScaledRows(nn.Embedding):
    embed_scale = 7.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class ScaledInSecret(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 7.0


class Positions(nn.Embedding):
    """As BART's embed_positions: the rows follow from the input's shape."""

    def forward(self, ids):
        return super().forward(torch.arange(ids.shape[1]) + 2).expand(*ids.shape, -1)


class MaskedPositions(nn.Embedding):
    """As OPT's: of other inputs than ids."""

    def forward(self, mask, before):
        return super().forward((mask.cumsum(1) * mask).long() + before)


IMAGE, SIGNAL, IDS = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9), torch.arange(10).view(2, 5) % 9
# name -> (the frozen layer, its input, why PEFT's layer in its place is no update of it)
BESIDE = {
    "linear": (lambda: nn.Linear(4, 6), torch.randn(3, 4), None),
    "linear, a forward of its own": (lambda: Reshaping(4, 6), torch.randn(3, 2, 4), None),
    "linear, three times": (lambda: Tripling(4, 6), torch.randn(3, 4), "the forward of Tripling is not that of nn.Lin"),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), IMAGE, None),
    "convolution, padding": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same"), IMAGE, None),
    "convolution, padded in its forward": (lambda: PaddedAsNeeded(4, 6, 3, stride=2), IMAGE, None),
    "convolution, three times": (lambda: Gained(4, 6, 3), IMAGE, "the forward of Gained is not that of nn.Conv2d"),
    "convolution, made otherwise": (lambda: MadeOtherwise(4), SIGNAL, "the forward of MadeOtherwise is not that"),
    "convolution, circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), IMAGE, "without padding_mode='circular'"
    ),
    "convolution, reflect": (
        lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), SIGNAL, "without padding_mode='reflect'"
    ),
    "convolution, dilated": (lambda: nn.Conv1d(4, 6, 3, dilation=2), SIGNAL, r"without dilation=\(2,\)"),
    "convolution, both": (
        lambda: nn.Conv2d(4, 6, 3, dilation=(1, 2), padding="same", padding_mode="replicate"), IMAGE,
        r"without dilation=\(1, 2\) and padding_mode='replicate'",
    ),
    "embedding": (lambda: nn.Embedding(9, 6, padding_idx=1), IDS, None),
    "embedding, scaled": (lambda: ScaledRows(9, 6), IDS, None),
    "embedding, scaled in secret": (lambda: ScaledInSecret(9, 6), IDS, "the forward of ScaledInSecret is not that"),
    "embedding, positions": (lambda: Positions(9, 6), IDS, "the forward of Positions is not that of nn.Embedding"),
    "embedding, a mask": (lambda: MaskedPositions(9, 6), None, "MaskedPositions .* called with other inputs"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BESIDE)
def test_beside_a_layer_peft_computes_its_update_or_the_export_is_refused(kind, tmp_path):
    make, x, reason = BESIDE[kind]

    def bare():
        torch.manual_seed(0)
        return nn.Sequential(make())

    model = adapt(bare(), targets=["0"], size=1.0)
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    if reason is not None:
        with pytest.raises(ValueError, match=f"^0: .*{reason}.*; write merged weights with merged_weights") as error:
            export_lora(model, tmp_path / "lora")
        assert "\n" not in str(error.value) and not os.listdir(tmp_path)
    else:
        export_lora(model, tmp_path / "lora")
        with torch.no_grad():
            assert (model(x) - bare()(x)).abs().max() > 0.05
            loaded = load_in_peft(bare(), str(tmp_path / "lora"))
            torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
    if reason is not None:  # what was tried left no trace
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class Two(nn.Module):
    """One linear layer in two places: under two parents, twice under one, or in a block that is itself in two."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        a = nn.ModuleDict({"fc": nn.Linear(12, 12), "other": nn.Linear(12, 12)})
        if how == "one parent":
            a["other"] = a["fc"]
        b = a if how == "a block" else nn.ModuleDict({"fc": a["fc"] if how == "two parents" else nn.Linear(12, 12)})
        self.a, self.b = a, b

    def forward(self, x):
        for layer in (self.a["fc"], self.a["other"], self.b["fc"]):
            x = torch.tanh(layer(x))
        return x


@WRITERS
@pytest.mark.parametrize("how, places", [
    ("two parents", "a.fc and b.fc"), ("one parent", "a.fc and a.other"), ("a block", None), ("apart", None),
])  # fmt: skip
def test_one_layer_in_two_places(write, how, places, tmp_path):
    model, x = adapt(Two(how), targets=["fc"], size=1.0), torch.randn(5, 12)
    if places:
        with pytest.raises(ValueError, match=f"^{places} are one layer, of which PEFT would adapt a.fc alone; write"):
            write(model, tmp_path / "lora")
        assert not os.listdir(tmp_path)
        return
    write(model, tmp_path / "lora")
    with torch.no_grad():
        assert (model(x) - Two(how)(x)).abs().max() > 0.05
        loaded = load_in_peft(Two(how), str(tmp_path / "lora"))
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


def test_errors_write_nothing(tmp_path):
    target = tmp_path / "lora"
    with pytest.raises(ValueError, match="^model: it has no adapter to export"):
        export_lora(tiny_decoder(), target)
    model = adapt(tiny_decoder(), frozen_rank=4)
    with pytest.raises(ValueError, match="^rank: expected at least the adapter's rank 4, found 3$"):
        export_lora(model, target, rank=3)
    with pytest.raises(ValueError, match="^dtype: expected one of float32, bfloat16, float16"):
        export_lora(model, target, dtype=torch.int8)
    with torch.no_grad():
        model.layers[0].q_proj.v.fill_(float("nan"))
    with pytest.raises(ValueError, match="^layers.0.q_proj: its update is not finite"):
        export_lora(model, target)
    assert not os.listdir(tmp_path)


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "optimizer.pt").write_text("precious")
    model = adapt(tiny_decoder())
    with pytest.raises(ValueError, match=r"holds other files \(optimizer.pt\); choose a new one"):
        export_lora(model, tmp_path / "checkpoint")
    assert os.listdir(tmp_path / "checkpoint") == ["optimizer.pt"]
    with pytest.raises(ValueError, match="is a file"):
        export_lora(model, tmp_path / "checkpoint" / "optimizer.pt")


def test_an_earlier_export_is_replaced_whole_or_kept(tmp_path, monkeypatch):
    model = adapt(tiny_decoder())
    export_lora(model, tmp_path / "lora")
    first = (tmp_path / "lora" / "adapter_model.safetensors").read_bytes()
    model = randomise(model, 0.7)

    def fails_into_place(fresh, target):
        raise OSError("disk full")

    monkeypatch.setattr(atomic, "_exchanged", fails_into_place)
    with pytest.raises(OSError, match="disk full"):
        export_lora(model, tmp_path / "lora")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["lora"]
    assert (tmp_path / "lora" / "adapter_model.safetensors").read_bytes() == first
    export_lora(model, tmp_path / "lora", rank=16)
    assert os.listdir(tmp_path) == ["lora"]
    assert (tmp_path / "lora" / "adapter_model.safetensors").read_bytes() != first


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    llama().save_pretrained(tmp_path / "base")
    model = adapt(llama())
    save_adapter(model, tmp_path / "adapter.safetensors")
    arguments = [str(tmp_path / "adapter.safetensors"), str(tmp_path / "lora"), "--model", str(tmp_path / "base")]
    assert main([*arguments, "--rank", "1"]) == 1
    assert capsys.readouterr().err.endswith("rank: expected at least the adapter's rank 2, found 1\n")
    assert main(arguments) == 0
    assert "rank 8, 14 modules, float32" in capsys.readouterr().out
    with torch.no_grad():
        torch.testing.assert_close(
            load_in_peft(llama(), str(tmp_path / "lora"))(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("rank", [8.0, "8", True, None, 0, -1])
def test_a_rank_that_is_no_count_is_refused(rank, tmp_path):
    with pytest.raises(ValueError, match="^rank: expected an integer >= 1, found "):
        export_lora(adapt(tiny_decoder()), tmp_path / "lora", rank=rank)


def test_the_command_line_refuses_in_one_line_and_loads_no_base_for_it(tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    adapter, base, lora = tmp_path / "adapter.safetensors", tmp_path / "base", tmp_path / "lora"
    llama().save_pretrained(base)
    save_adapter(adapt(llama()), adapter)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")

    def refused(*arguments):
        assert main([*map(str, arguments)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and not lora.exists()
        return err.splitlines()[-1]  # above it the bars of transformers

    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:1000])
    assert f"{base}: transformers cannot load this base: " in refused(adapter, lora, "--model", base)
    assert "no such base: transformers cannot load" in refused(adapter, lora, "--model", tmp_path / "no such base")

    loads = []
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: loads.append(1))
    assert "No such file" in refused(tmp_path / "missing", lora, "--model", base)
    assert "not a safetensors file" in refused(tmp_path / "full" / "precious", lora, "--model", base)
    assert "holds other files (precious)" in refused(adapter, tmp_path / "full", "--model", base)
    assert "rank 2, found 1" in refused(adapter, lora, "--model", base, "--rank", 1)
    assert not loads


def encoder_decoder(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                  encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64, d_model=16)  # fmt: skip
    if kind == "bart":
        return transformers.BartForConditionalGeneration(transformers.BartConfig(**layers))
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**layers, **tokens, num_mel_bins=8))


@pytest.mark.parametrize("make, targets, task", [
    (llama, ["q_proj"], "CAUSAL_LM"), (gpt2, ["c_attn"], "CAUSAL_LM"), (tiny_decoder, ["q_proj"], None),
    (lambda: llama().model, ["q_proj"], None), (lambda: encoder_decoder("t5"), ["q"], "SEQ_2_SEQ_LM"),
    (lambda: encoder_decoder("bart"), ["q_proj"], "SEQ_2_SEQ_LM"),
    (lambda: encoder_decoder("whisper"), ["q_proj"], None),
], ids=["llama", "gpt2", "ours", "no head", "t5", "bart", "whisper"])  # fmt: skip
def test_the_task_is_the_models(make, targets, task, tmp_path):
    model = adapt(make(), targets)
    export_lora(model, tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["task_type"] == task
    loaded = load_in_peft(make(), str(tmp_path / "lora"))
    named = {None: "PeftModel", "CAUSAL_LM": "PeftModelForCausalLM", "SEQ_2_SEQ_LM": "PeftModelForSeq2SeqLM"}
    assert type(loaded).__name__ == named[task]


def test_projections_beside_a_stack_of_experts_are_exported_with_a_warning(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=16, shared_expert_intermediate_size=24,
                 num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_experts=2,
                 num_experts_per_tok=1,
                 vocab_size=50)  # fmt: skip
    for wanted, silent in ((["q_proj"], True), (["q_proj", "up_proj"], False)):
        model = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**sizes))
        apply_tiny_lora(model, TinyLoRAConfig(target_modules=wanted, cache=False))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            export_lora(model, tmp_path / str(silent))
        messages = [str(w.message) for w in caught if "stacks of experts" in str(w.message)]
        assert (not messages) == silent
        assert silent or "PEFT takes up_proj of a Qwen2MoeForCausalLM" in messages[0]
