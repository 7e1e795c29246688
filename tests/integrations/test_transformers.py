"""Adapted transformers models: on disk and back, generation, tied heads, Conv1D, experts, placement, copies."""
import copy
import os
import pickle
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.cases import error
from tests.integrations.tiny import VOCABULARY, gpt2, llama, tokens
from tinylora_kernels import TinyLoRAConfig, adapted_layers, apply_tiny_lora, remove_adapter, trainable_vectors
from tinylora_kernels.files.adapter import AdapterError, load_adapter, save_adapter
from tinylora_kernels.model.merging import merge, unmerge

transformers = pytest.importorskip("transformers", minversion="5.0", reason="written for transformers 5")

from tests.paper import delta_weight  # noqa: E402
from tinylora_kernels.integrations.transformers import ADAPTER_FILE, from_pretrained, save_pretrained  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc", "c_proj"]}


def adapt(model: nn.Module, targets=None, std: float = 0.3, **changes) -> nn.Module:
    targets = TARGETS[model.config.model_type] if targets is None else targets
    settings = dict(target_modules=targets, trainable_dim=3, n_tie=4, cache=False)
    apply_tiny_lora(model, TinyLoRAConfig(**{**settings, **changes}), progress=False)
    generator = torch.Generator().manual_seed(0)
    for v in trainable_vectors(model):
        v.data.normal_(std=std, generator=generator)
    return model


def dense_twin(model: nn.Module) -> nn.Module:
    """The bare model with the updates added to its weights."""
    twin = copy.deepcopy(model)
    deltas = {layer.base.weight: delta_weight(layer) for layer in adapted_layers(twin).values()}
    remove_adapter(twin)
    with torch.no_grad():
        for weight, delta in deltas.items():
            weight.add_(delta if delta.shape == weight.shape and not is_conv1d(twin, weight) else delta.T)
    return twin


def is_conv1d(model: nn.Module, weight: torch.Tensor) -> bool:
    return any(type(m).__name__ == "Conv1D" and m.weight is weight for m in model.modules())


def logits(model: nn.Module, x=None) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens() if x is None else x).logits


# Forward and gradients


@pytest.mark.parametrize("make", [llama, gpt2])
def test_logits_and_gradients_are_those_of_the_dense_update(make):
    model = adapt(make())
    assert error(logits(model), logits(dense_twin(model))) < 1e-5
    model(tokens()).logits.square().mean().backward()
    # dv_i = sum over the layers of v's group of <dW, d(W')/dv_i>, dW from the dense twin in float64
    twin = dense_twin(copy.deepcopy(model).double()).requires_grad_(True)
    twin(tokens()).logits.square().mean().backward()
    v = trainable_vectors(model)[0]
    found, expected = v.grad.clone(), torch.zeros(len(v), dtype=torch.float64)
    for name, layer in adapted_layers(model).items():
        dense = twin.get_submodule(name)
        gradient = dense.weight.grad.T if type(dense).__name__ == "Conv1D" else dense.weight.grad  # [out, in]
        for i in range(len(v) if layer.v is v else 0):
            v.data.copy_(torch.eye(len(v))[i])
            expected[i] += (gradient * delta_weight(layer)).sum()
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = adapt(llama()).train()
    expected = torch.autograd.grad(model(tokens()).logits.square().mean(), trainable_vectors(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:  # torch's reentrant form needs an input that requires a gradient
        model.enable_input_require_grads()
    model(tokens()).logits.square().mean().backward()
    for v, gradient in zip(trainable_vectors(model), expected, strict=True):
        torch.testing.assert_close(v.grad, gradient)


# Generation


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_is_generation_without(make, cache):
    model, x = adapt(make(), std=3.0), tokens(rows=2, length=5)
    settings = dict(attention_mask=torch.ones_like(x), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    static = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    with_cache = model.generate(x, **settings, use_cache=True, **static)
    assert torch.equal(with_cache, model.generate(x, **settings, use_cache=False))
    assert torch.equal(with_cache, dense_twin(model).generate(x, **settings))
    assert not torch.equal(with_cache, remove_adapter(copy.deepcopy(model)).generate(x, **settings))


def test_generation_of_a_merged_model():
    model, x = adapt(llama()), tokens(rows=2, length=5)
    settings = dict(attention_mask=torch.ones_like(x), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    expected = model.generate(x, **settings)
    assert torch.equal(merge(model).generate(x, **settings), expected)
    assert torch.equal(unmerge(model).generate(x, **settings), expected)


# On disk


@pytest.mark.parametrize("make", [llama, gpt2, lambda: llama(tie_word_embeddings=True)], ids=["llama", "gpt2", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, make, dtype):
    make().to(dtype).save_pretrained(tmp_path / "base")
    load = transformers.AutoModelForCausalLM.from_pretrained
    base = load(tmp_path / "base", dtype="auto")  # through the disk: .to(dtype) alone would round the rotary table too
    expected_of_base, model = logits(base), adapt(base)
    expected = logits(model)
    save_pretrained(model, tmp_path / "adapted")
    assert torch.equal(logits(from_pretrained(tmp_path / "adapted", cache=False)), expected)
    assert torch.equal(logits(model), expected)
    # The directory is a plain base model to everybody else.
    bare, report = load(tmp_path / "adapted", dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(bare), expected_of_base)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_model_saved_merged_needs_nothing_of_ours(tmp_path, make):
    model = adapt(make())
    save_pretrained(model, tmp_path, merged=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert error(logits(loaded), logits(model)) < 1e-5 and not (tmp_path / "tinylora_adapter.safetensors").exists()


@pytest.fixture
def uploads(monkeypatch):
    """What each upload would have sent: the files that have changed since its save began."""
    from transformers import modeling_utils

    sent, cls = [], modeling_utils.PreTrainedModel
    monkeypatch.setattr(modeling_utils, "hf_api", mock.MagicMock)
    monkeypatch.setattr(modeling_utils, "create_and_tag_model_card", mock.MagicMock())

    def upload(self, directory, repo_id, before, **_):
        now = cls._get_files_timestamps(self, directory)
        sent.append({name for name, moment in now.items() if moment > before.get(name, 0)})

    monkeypatch.setattr(cls, "_upload_modified_files", upload)
    return sent


@pytest.mark.parametrize("merged", [False, True])
def test_an_upload_holds_what_was_saved(merged, uploads, tmp_path):
    model = adapt(llama())
    for turn in range(2):  # into an empty directory, and over an earlier save
        save_pretrained(model, tmp_path, merged=merged, push_to_hub=True, repo_id="me/mine")
        assert {"config.json", "model.safetensors"} <= uploads[turn]
        assert (ADAPTER_FILE in uploads[turn]) == (ADAPTER_FILE in os.listdir(tmp_path)) == (not merged)
        for file in tmp_path.iterdir():
            os.utime(file, (0, 0))
    assert "_upload_modified_files" not in vars(model)
    if not merged:
        assert torch.equal(logits(from_pretrained(tmp_path, cache=False)), logits(model))


def test_an_upload_that_fails_leaves_what_was_saved(uploads, tmp_path, monkeypatch):
    model = adapt(llama())
    offline = mock.Mock(side_effect=OSError("offline"))
    monkeypatch.setattr(transformers.PreTrainedModel, "_upload_modified_files", offline)
    with pytest.raises(OSError, match="offline"):
        save_pretrained(model, tmp_path, push_to_hub=True, repo_id="me/mine")
    assert "_upload_modified_files" not in vars(model)
    assert torch.equal(logits(from_pretrained(tmp_path, cache=False)), logits(model))


def test_merged_over_an_earlier_save_leaves_no_adapter_of_other_weights(tmp_path):
    model = adapt(llama())
    save_pretrained(model, tmp_path)
    with pytest.raises(ValueError), mock.patch.object(type(model), "save_pretrained", side_effect=ValueError):
        save_pretrained(model, tmp_path, merged=True)
    assert torch.equal(logits(from_pretrained(tmp_path, cache=False)), logits(model))  # nothing was lost
    save_pretrained(model, tmp_path, merged=True)
    assert ADAPTER_FILE not in os.listdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="tinylora_adapter.safetensors: no such file"):
        from_pretrained(tmp_path)
    save_pretrained(model, tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path, cache=False)), logits(model))


def test_an_adapted_tied_head_is_saved_beside_the_tied_weight(tmp_path):
    model = adapt(llama(tie_word_embeddings=True), targets=["q_proj", "lm_head"])
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path, cache=False)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_what_the_models_own_save_pretrained_does_is_not_silent(tmp_path):
    """The weights of adapted layers get other names there: transformers reports them missing."""
    adapt(llama()).save_pretrained(tmp_path)
    _, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert "model.layers.0.self_attn.q_proj.weight" in report["missing_keys"]


def test_saving_and_loading_what_does_not_fit_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="it has no adapter; use its own save_pretrained"):
        save_pretrained(llama(), tmp_path)
    with pytest.raises(ValueError, match="^model: .* merged; call unmerge"):
        save_pretrained(merge(adapt(llama())), tmp_path)
    llama().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="tinylora_adapter.safetensors: no such file"):
        from_pretrained(tmp_path)
    save_pretrained(adapt(llama()), tmp_path)
    with pytest.raises(AdapterError, match="trained on other base weights"):
        from_pretrained(tmp_path, dtype=torch.bfloat16, cache=False)


def test_the_adapter_alone_moves_between_processes_of_transformers(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = adapt(base)
    save_adapter(model, tmp_path / "adapter.safetensors")
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(load_adapter(fresh, tmp_path / "adapter.safetensors", cache=False)), logits(model))


# Kinds of layer


def test_an_adapted_head_tied_to_the_embedding_leaves_the_embedding_alone():
    model = llama(tie_word_embeddings=True)
    bare, x = logits(model), tokens()
    hidden = model.model(x).last_hidden_state.detach()
    adapt(model, targets=["lm_head"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model(x).last_hidden_state, hidden)
    delta = delta_weight(adapted_layers(model)["lm_head"])
    assert error(logits(model), bare + hidden @ delta.T) < 1e-5
    with pytest.raises(ValueError, match="lm_head.weight shares its memory with model.embed_tokens.weight"):
        merge(model)


def test_default_targets_leave_out_the_head_of_a_transformers_model():
    names = list(adapted_layers(adapt(llama(), targets="all-linear")))
    assert len(names) == 14 and "lm_head" not in names


def test_experts_that_are_modules_are_adapted_whatever_the_router_sends_them():
    config = transformers.SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, expert_capacity=64, dropout_rate=0.0,
        router_jitter_noise=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    x = tokens()
    before = model(input_ids=x, decoder_input_ids=x).logits.detach()
    apply_tiny_lora(model, TinyLoRAConfig(target_modules=["wi", "wo"], cache=False), progress=False)
    experts = [name for name in adapted_layers(model) if ".experts." in name]
    assert len(experts) >= 8
    for v in trainable_vectors(model):
        v.data.fill_(0.3)
    after = model(input_ids=x, decoder_input_ids=x).logits
    assert error(after.detach(), before) > 1e-4
    assert error(dense_twin(model)(input_ids=x, decoder_input_ids=x).logits.detach(), after.detach()) < 1e-5
    after.square().mean().backward()
    # An expert that no token reached has no gradient or a zero one; the ones that were reached have one.
    grads = [adapted_layers(model)[name].v.grad for name in experts]
    assert any(g is not None and g.any() for g in grads)


# Placement


def test_a_model_with_accelerates_hooks_before_and_after():
    accelerate = pytest.importorskip("accelerate", reason="device maps come from accelerate")
    expected = logits(adapt(llama()))
    device_map = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
                  "lm_head": "cpu"}  # fmt: skip
    hooked = accelerate.dispatch_model(llama(), device_map=device_map, main_device="cpu", force_hooks=True)
    # A layer with hooks has its output updated, another's product is added to the low-rank term: two roundings.
    torch.testing.assert_close(logits(adapt(hooked)), expected)
    after = accelerate.dispatch_model(adapt(llama()), device_map=device_map, main_device="cpu", force_hooks=True)
    torch.testing.assert_close(logits(after), expected)


def test_a_device_map_on_loading(tmp_path):
    model = adapt(llama())
    save_pretrained(model, tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path, cache=False, device_map={"": "cpu"})), logits(model))


def test_weights_offloaded_from_memory_are_refused_with_a_reason(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="offloading comes from accelerate")
    model = accelerate.disk_offload(llama(), str(tmp_path), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="expected a weight on a real device, found meta"):
        adapt(model)


def test_moving_a_model_moves_the_factors_and_keeps_their_precision():
    model = adapt(llama()).to(torch.bfloat16)
    for layer in adapted_layers(model).values():
        assert layer.base.weight.dtype == torch.bfloat16
        assert {t.dtype for t in (layer.v, layer.basis, layer.projection)} == {torch.float32}
    meta = adapt(llama()).to("meta")
    for layer in adapted_layers(meta).values():
        assert layer.v.is_meta and all(tensor.is_meta for tensor in layer.buffers())


# Copies and state


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("copy_of", COPIES.values(), ids=COPIES)
def test_copies_are_equal_tied_and_independent(copy_of):
    model = adapt(llama())
    expected, twin = logits(model), copy_of(model)
    assert torch.equal(logits(twin), expected)
    groups = {layer.group: layer.v for layer in adapted_layers(twin).values()}
    assert all(layer.v is groups[layer.group] for layer in adapted_layers(twin).values())
    trainable_vectors(twin)[0].data.add_(1.0)
    assert torch.equal(logits(model), expected) and not torch.equal(logits(twin), expected)


def test_the_state_dict_holds_base_and_vectors_and_nothing_frozen_of_ours():
    bare, model = llama(), adapt(llama())
    owners = [name for name, layer in adapted_layers(model).items() if layer.owner is layer]
    ours = {key.replace(".base.", ".") for key in model.state_dict()} - {f"{name}.v" for name in owners}
    assert ours == set(bare.state_dict())
    other = adapt(llama(), std=0.0)
    other.load_state_dict(model.state_dict())
    assert [v.tolist() for v in trainable_vectors(other)] == [v.tolist() for v in trainable_vectors(model)]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"], ["q_proj"]])
def test_checkpoints_of_transformers_own_hold_a_tied_weight_once_and_resume(targets, tmp_path):
    """Its Trainer died at the first one where the head was adapted."""
    x = torch.arange(12)
    data = [{"input_ids": x, "labels": x}] * 8

    def train(resume):
        torch.manual_seed(0)
        model = llama(tie_word_embeddings=True)
        apply_tiny_lora(model, TinyLoRAConfig(target_modules=targets, cache=False), progress=False)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True,
            learning_rate=1e-2, save_only_model=False,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return torch.cat([v.detach() for v in trainable_vectors(model)])

    whole = train(resume=False)
    stored = safetensors.torch.load_file(tmp_path / "checkpoint-2/model.safetensors")
    assert len({name for name in stored if "lm_head" in name or "embed_tokens" in name if name.endswith("weight")}) == 1
    assert whole.abs().max() > 0 and torch.equal(train(resume=True), whole)
