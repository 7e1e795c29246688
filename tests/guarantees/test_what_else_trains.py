"""What trains beside the vectors is in no adapter: every writer of one names it; whole models have it."""
import copy
import warnings

import pytest
import torch
from torch import nn

from tests.integrations.tiny import VOCABULARY, tokens
from tinylora_kernels import (
    AdapterBank,
    GRPOTrainer,
    TinyLoRAConfig,
    apply_tiny_lora,
    export_lora,
    load_adapter,
    merge,
    merged_weights,
    refresh_factors,
    save_adapter,
    trainable_vectors,
)  # fmt: skip

peft = pytest.importorskip("peft", minversion="0.21", reason="some of the writers write PEFT's formats")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="the models under test come from it")

from tinylora_kernels.files.format import AdapterError  # noqa: E402
from tinylora_kernels.integrations.peft import from_peft, to_peft  # noqa: E402
from tinylora_kernels.integrations.transformers import from_pretrained, save_pretrained  # noqa: E402
from tinylora_kernels.integrations.trl import as_peft_model  # noqa: E402


def bare():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        attention_bias=True, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.statistics = nn.Sequential(nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)).eval()
    return model


def adapted():
    config = TinyLoRAConfig(target_modules=["q_proj", "up_proj"], trainable_dim=2, cache=False)
    model = apply_tiny_lora(bare(), config, progress=False)
    for v in trainable_vectors(model):
        v.data.fill_(0.2)
    return model


def train(*names: str):
    def set_training(model: nn.Module) -> None:
        for name in names:
            model.get_parameter(name).requires_grad_()

    return set_training


# What is trained: by which of its names the warning must call it.
BESIDE = {
    "a head": (train("score.weight"), "score.weight"),
    "an adapted layer's bias": (
        train("model.layers.1.self_attn.q_proj.base.bias"), "model.layers.1.self_attn.q_proj.bias"
    ),
    "a frozen layer's bias": (train("model.layers.0.self_attn.k_proj.bias"), "model.layers.0.self_attn.k_proj.bias"),
    "an adapted layer's weight": (train("model.layers.0.mlp.up_proj.base.weight"), "model.layers.0.mlp.up_proj.weight"),
    "embeddings": (train("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    "a norm": (train("model.norm.weight"), "model.norm.weight"),
    "several": (train("model.norm.weight", "score.weight"), "model.norm.weight, score.weight"),
    "running statistics": (lambda model: model.statistics[0].train(), "statistics.0.running_mean"),
    "statistics of instances": (lambda model: model.statistics[1].train(), "statistics.1.running_mean"),
}  # fmt: skip


def _bank(model, path):
    bank = AdapterBank(model, 2)
    bank.add("one", torch.stack([v.detach() for v in trainable_vectors(model)]))
    try:
        bank.save("one", path / "a")
    finally:
        bank.close()


def _from_peft(model, path):
    """A PeftModel of a model of from_peft writes PEFT's own format."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        to_peft(model, path / "first")
    again = from_peft(path / "first", bare())
    for name, parameter in again.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    for name, module in again.named_modules():
        module.training = model.get_submodule(name).training
    as_peft_model(again).save_pretrained(path / "second")


def _trainer(model, path):
    """A checkpoint of transformers' Trainer."""
    arguments = transformers.TrainingArguments(output_dir=str(path), use_cpu=True, report_to=[], disable_tqdm=True)
    transformers.Trainer(model=as_peft_model(model), args=arguments).save_model(str(path / "checkpoint"))


WRITERS = {
    "save_adapter": lambda model, path: save_adapter(model, path / "a"),
    "save_adapter of a compiled model": lambda model, path: save_adapter(torch.compile(model), path / "a"),
    "bank.save": _bank,
    "export_lora": lambda model, path: export_lora(model, path / "lora"),
    "to_peft": lambda model, path: to_peft(model, path / "peft"),
    "as_peft_model": lambda model, path: as_peft_model(model).save_pretrained(path / "peft"),
    "as_peft_model of from_peft": _from_peft,
    "Trainer": _trainer,
}


def said(write, model, path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write(model, path)
    return [str(w.message) for w in caught if "beside" in str(w.message)]


@pytest.mark.parametrize("write", WRITERS.values(), ids=list(WRITERS))
@pytest.mark.parametrize("beside, names", BESIDE.values(), ids=list(BESIDE))
def test_a_writer_of_adapters_names_what_it_leaves_out(write, beside, names, tmp_path):
    model = adapted()
    beside(model)
    (message,) = said(write, model, tmp_path)
    assert f"it holds the vectors v alone, and {names} train beside them; save those too" in message
    assert message.startswith(str(tmp_path)) and "\n" not in message


@pytest.mark.parametrize("write", WRITERS.values(), ids=list(WRITERS))
def test_nothing_is_said_where_the_vectors_alone_train(write, tmp_path):
    assert said(write, adapted(), tmp_path) == []


@pytest.mark.parametrize("beside, names", BESIDE.values(), ids=list(BESIDE))
@pytest.mark.parametrize("merged", [False, True])
def test_a_whole_model_has_it_and_says_nothing(beside, names, merged, tmp_path):
    model = adapted()
    beside(model)
    model = _trained(model)
    load = transformers.LlamaForSequenceClassification
    if not merged and "up_proj.weight" in names:
        with pytest.raises(AdapterError, match="^model.layers.0.mlp.up_proj: its weight has changed since "):
            save_pretrained(model, tmp_path)
        return
    assert said(lambda model, path: save_pretrained(model, path, merged=merged), model, tmp_path) == []
    loaded = load.from_pretrained(tmp_path) if merged else from_pretrained(tmp_path, load, cache=False)
    expected, found = dict(merged_weights(model)), dict(loaded.state_dict() if merged else merged_weights(loaded))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if name in found)
    assert set(expected) - set(found) <= {name for name in expected if name.startswith("statistics.")}


def _trained(model: nn.Module) -> nn.Module:
    """A few steps of everything that trains."""
    trainer = GRPOTrainer(model, lr=0.01)
    loss = model(input_ids=tokens(), labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    trainer.optimizer.step()
    return model


CHANGES = {
    "trained": lambda layer: None,
    "trained, and frozen again": lambda layer: layer.base.weight.requires_grad_(False),
    "trained, and merged": None,
    "written": None,
    "replaced": lambda layer: setattr(layer.base, "weight", nn.Parameter(layer.base.weight.detach() * 1.5, False)),
}


@pytest.mark.parametrize("writer", ["save_adapter", "save_adapter of a compiled model", "bank.save"])
@pytest.mark.parametrize("how", CHANGES)
def test_no_adapter_is_saved_that_could_not_be_loaded(writer, how, tmp_path):
    model = adapted()
    layer = model.model.layers[0].mlp.up_proj
    if how == "written":
        with torch.no_grad():
            layer.base.weight.mul_(1.5)
    elif how != "replaced":
        layer.base.weight.requires_grad_()
        _trained(model)
    if CHANGES[how]:
        CHANGES[how](layer)
    if how == "trained, and merged":
        if writer == "bank.save":
            return  # no bank of a merged model
        merge(model)
    (tmp_path / "a").write_bytes(b"as it was")
    with pytest.raises(AdapterError, match=r"^model.layers.0.mlp.up_proj: its weight has changed since .*; save the "):
        WRITERS[writer](model, tmp_path)
    assert (tmp_path / "a").read_bytes() == b"as it was"
    weights = dict(merged_weights(model))  # the way out that it names
    assert weights["model.layers.0.mlp.up_proj.weight"].isfinite().all()
    if how != "trained, and merged":
        layer.base.weight.requires_grad_(False)
        save_adapter(refresh_factors(model, progress=False), tmp_path / "a")


def test_a_weight_that_trains_and_has_not_changed_yet_is_saved(tmp_path):
    model = adapted()
    model.model.layers[0].mlp.up_proj.base.weight.requires_grad_()
    assert said(WRITERS["save_adapter"], model, tmp_path)
    load_adapter(bare(), tmp_path / "a", cache=False, progress=False)


def test_what_is_left_out_is_what_is_lost(tmp_path):
    """The warning is about a difference: the head of a loaded adapter is the base's."""
    model = adapted()
    model.score.weight.requires_grad_()
    _trained(model)
    assert said(WRITERS["save_adapter"], model, tmp_path)
    loaded = load_adapter(bare(), tmp_path / "a", cache=False, progress=False)
    with torch.no_grad():
        assert not torch.allclose(loaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
        loaded.score.load_state_dict(copy.deepcopy(model.score.state_dict()))
        assert torch.equal(loaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
