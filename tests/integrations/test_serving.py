"""Exports that servers load: vLLM's rules for adapter directories, and what a streamed merge must not do."""
import json
import os
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cases import error
from tests.integrations.tiny import gpt2, llama, tokens
from tinylora_kernels import TinyLoRAConfig, adapted_layers, apply_tiny_lora, trainable_vectors
from tinylora_kernels.files.export import export_lora
from tinylora_kernels.integrations.vllm import vllm_problems
from tinylora_kernels.model.merging import merged_weights

pytest.importorskip("transformers", reason="the models under test come from transformers")

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapted(model, targets="all-linear"):
    apply_tiny_lora(model, TinyLoRAConfig(target_modules=targets, trainable_dim=3, n_tie=4, cache=False))
    for v in trainable_vectors(model):
        v.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def directory(tmp_path):
    export_lora(adapted(llama()), tmp_path / "lora")
    return tmp_path / "lora"


def test_an_export_breaks_none_of_the_rules(directory):
    assert vllm_problems(directory, served_modules=LINEAR) == []
    assert vllm_problems(directory, max_lora_rank=8) == []


@pytest.mark.parametrize("make, targets", [(gpt2, ["c_attn", "c_fc"]), (llama, ["model.layers.1.self_attn.q_proj"])])
def test_other_models_export_by_the_rules(tmp_path, make, targets):
    export_lora(adapted(make(), targets), tmp_path / "lora")
    assert vllm_problems(tmp_path / "lora") == []


def test_pefts_own_lora_adapters_pass_and_its_other_kinds_do_not(tmp_path):
    peft = pytest.importorskip("peft", reason="adapters are written by peft here")
    lora = peft.LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(llama(), lora).save_pretrained(tmp_path / "lora")
    assert vllm_problems(tmp_path / "lora", served_modules=LINEAR) == []
    tiny = peft.TinyLoraConfig(r=2, u=3, target_modules=["q_proj"])
    peft.get_peft_model(llama(), tiny).save_pretrained(tmp_path / "tiny")
    problems = vllm_problems(tmp_path / "tiny")
    assert any("no lora_alpha" in p for p in problems) and any("tinylora_v" in p for p in problems)


CONFIG_DAMAGE = {
    "r": (32, "r is 32, the engine's max_lora_rank 16"),
    "bias": ("all", "bias must be 'none', found 'all'"),
    "use_dora": (True, "use_dora must be false"),
    "modules_to_save": (["lm_head"], "modules_to_save must be null"),
    "lora_alpha": (None, "no lora_alpha"),
}


@pytest.mark.parametrize("field", CONFIG_DAMAGE)
def test_each_rule_about_the_config_is_checked(directory, field):
    value, message = CONFIG_DAMAGE[field]
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert any(message in problem for problem in vllm_problems(directory))


def rename(old, new):
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


TENSOR_DAMAGE = {
    "another suffix": (rename(".lora_A.weight", ".lora_A.default.weight"),
                       "expected a name that ends in .lora_A.weight"),
    "a factor alone": (lambda tensors: {k: t for k, t in tensors.items() if "0.self_attn.q_proj.lora_B" not in k},
                       "layers.0.self_attn.q_proj: no lora_B.weight"),
    "another rank": (lambda tensors: {k: t[:4] if ".lora_A" in k else t for k, t in tensors.items()},
                     "its factors have rank [4, 8], the config says 8"),
    "an unknown module": (rename("q_proj", "query"), "the served model has no linear layer of that name"),
    "nothing at all": (lambda tensors: {}, "no LoRA tensors"),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", TENSOR_DAMAGE.values(), ids=TENSOR_DAMAGE)
def test_each_rule_about_the_tensors_is_checked(directory, damage, message):
    path = directory / "adapter_model.safetensors"
    save_file({key: t.contiguous() for key, t in damage(load_file(path)).items()}, path)
    assert any(message in problem for problem in vllm_problems(directory, served_modules=LINEAR))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickled_weights_are_read_as_vllm_does(name, directory):
    """Nothing of theirs is run, and they are read where there is no safetensors file alone."""
    tensors = load_file(directory / "adapter_model.safetensors")
    (directory / name).write_bytes(b"torn")
    assert vllm_problems(directory, served_modules=LINEAR) == []
    (directory / "adapter_model.safetensors").unlink()
    assert "cannot be read" in vllm_problems(directory)[0]
    torch.save(tensors, directory / name)
    assert vllm_problems(directory, served_modules=LINEAR) == []
    assert "no linear layer of that name" in vllm_problems(directory, served_modules=["query"])[0]
    for contents in ({}, [1], {"a": 1}, {"a": os.system}):
        torch.save(contents, directory / name)
        problems = vllm_problems(directory)
        assert len(problems) == 1 and "\n" not in problems[0] and name in problems[0] or "cannot be read" in problems[0]


def test_files_and_ranks_are_checked(directory, tmp_path):
    assert vllm_problems(tmp_path / "nowhere")[0].endswith("no adapter_config.json")
    with pytest.raises(ValueError, match="max_lora_rank: expected one of 1, 8, .*found 12"):
        vllm_problems(directory, max_lora_rank=12)
    (directory / "adapter_model.safetensors").write_bytes(b"torn")
    assert "cannot be read" in vllm_problems(directory)[0]
    export_lora(adapted(llama()), tmp_path / "small", rank=2)
    assert any("export with rank=8" in problem for problem in vllm_problems(tmp_path / "small"))


def test_an_engine_that_adds_the_factors_to_the_frozen_base_is_the_adapted_model(directory):
    """W + (lora_alpha / r) lora_B lora_A as an engine has it: nothing is merged, no importance weight is needed."""
    engine, tensors = llama(), load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    with torch.no_grad():
        for key, lora_a in tensors.items():
            if key.endswith(".lora_A.weight"):
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                lora_b = tensors[key.replace("lora_A", "lora_B")]
                engine.get_submodule(name).weight.add_(scale * lora_b @ lora_a)
        assert error(engine(tokens()).logits, adapted(llama())(tokens()).logits) < 1e-5


def test_streaming_to_an_engine_never_holds_two_merged_weights():
    model = adapted(llama())
    names = {f"{name}.weight" for name in adapted_layers(model)}
    merged, peak = [], 0
    for name, tensor in merged_weights(model):
        if name in names:
            merged.append(weakref.ref(tensor))
            peak = max(peak, sum(reference() is not None for reference in merged))
    assert len(merged) == len(names) == 14 and peak <= 2
