"""What an engine holds at once, and what it refuses at its start. Each engine here is alone in the process."""
from __future__ import annotations

import pytest
import torch

import tinylora_kernels as tk
from tinylora_kernels.files.format import AdapterError, read
from tinylora_kernels.integrations.vllm import adapters as core_side
from tinylora_kernels.integrations.vllm import set_vectors
from tinylora_kernels.integrations.vllm.requests import adapter_request

from . import models
from .engines import core_of, engine, generate, manager_of


def test_many_more_adapters_than_the_table_holds(base, adapters, texts, prompts, monkeypatch):
    """300 under 12 names through 8 slots: each runs its own numbers, and what nobody refers to is forgotten."""
    monkeypatch.setattr(core_side, "FORGOTTEN_FROM", 16)
    own = read(adapters / "tied-0.safetensors").v, read(adapters / "tied-1.safetensors").v
    with engine(base, {"adapters": str(adapters / "tied-0.safetensors"), "capacity": 8}, max_num_seqs=8) as llm:
        generator = torch.Generator().manual_seed(0)
        requests, expected = [], []
        for i in range(300):
            known = i % 10
            v = own[known] if known < 2 else torch.randn(1, 13, generator=generator) * models.SIZE
            requests.append(adapter_request(f"n{i % 12}", v))
            expected.append(texts[f"tied-{known}"][0] if known < 2 else None)
        found = generate(llm, [prompts[0]] * 300, requests)
        assert all(want is None or text == want for text, want in zip(found, expected, strict=True))
        assert len({tuple(text) for text in found}) > 200
        for i in range(50):
            set_vectors(llm, "policy", own[0] + 0.01 * i)
        assert generate(llm, prompts, set_vectors(llm, "policy", own[1])) == texts["tied-1"]
        held = manager_of(llm)
        assert len(held._host) < 60 and len(core_of(llm).tinylora._contents) < 60
        assert held.table.shape[1] == 8


@pytest.mark.parametrize("start, message", [
    ("head", r"cannot on lm_head \(a ParallelLMHead here\); leave these out of target_modules"),
    ("embedding", r"cannot on model.embed_tokens \(a VocabParallelEmbedding here\)"),
    ("base", "model.layers.1.mlp.up_proj: the adapters were trained on another base weight than the one served"),
])  # fmt: skip
def test_what_an_engine_cannot_carry_is_named_at_its_start(start, message, wrong, base, tmp_path):
    path = wrong[0] / f"{start}.safetensors"
    if start == "embedding":
        config = tk.TinyLoRAConfig(target_modules=["q_proj", "embed_tokens"], cache=False)
        path = tmp_path / "embedding.safetensors"
        tk.save_adapter(tk.apply_tiny_lora(models.load(base), config, progress=False), path)
    with pytest.raises(AdapterError, match=message):
        with engine(base, path):
            pass


@pytest.mark.parametrize("setting, changes, message", [
    ({"adapters": "x", "seeds": 3}, {}, r"additional_config\['tinylora'\]: expected a path or a map"),
    ({"adapters": "x", "capacity": 0}, {}, "capacity: expected int, found 0"),
    (None, {"additional_config": {"tinylora": "x"}}, "expected --enable-lora"),
])  # fmt: skip
def test_a_setting_that_is_wrong_is_refused(setting, changes, message, base):
    with pytest.raises(ValueError, match=message):
        with engine(base, setting, **changes):
            pass


def test_a_table_smaller_than_a_step_is_refused(base, adapters):
    with pytest.raises(ValueError, match=r"capacity is 8, and a step may run 64 adapters \(max_num_seqs\)"):
        with engine(base, {"adapters": str(adapters), "capacity": 8}):
            pass
