"""The engine's environment, before anything imports it; the base and the adapters, made once."""
from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import tinylora_kernels as tk

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip

pytest.importorskip("vllm", reason="make test-vllm has an environment for it")

from . import models  # noqa: E402


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return models.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapters(base, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    models.make_adapters(base, directory)
    return directory


@pytest.fixture(scope="session")
def texts(adapters) -> dict[str, list[list[int]]]:
    import json

    return json.loads((adapters / "texts.json").read_text())


@pytest.fixture(scope="session")
def prompts(base) -> list[list[int]]:
    return models.tokens(base)


@pytest.fixture(scope="session")
def wrong(base, adapters, tmp_path_factory):
    """Files that do not fit, by what is wrong, and what the message must say."""
    directory = tmp_path_factory.mktemp("wrong")
    other = models.load(base)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 0.5
    models.adapt(other, "tied")
    tk.save_adapter(other, directory / "base.safetensors")
    for name, options in {
        "rank": dict(frozen_rank=1),
        "head": dict(target_modules=[*models.LINEAR, "lm_head"]),
        "fused": dict(fused={"q_proj": 2}),
    }.items():
        config = tk.TinyLoRAConfig(**{"target_modules": models.LINEAR, "cache": False, **options})
        model = tk.apply_tiny_lora(models.load(base), config, progress=False)
        tk.save_adapter(model, directory / f"{name}.safetensors")
    good = (adapters / "tied-0.safetensors").read_bytes()
    (directory / "truncated.safetensors").write_bytes(good[:-9])
    (directory / "flipped.safetensors").write_bytes(good[:200] + bytes([good[200] ^ 1]) + good[201:])
    tk.export_lora(models.adapt(models.load(base), "tied"), directory / "lora", rank=8)
    (directory / "other.safetensors").write_bytes((directory / "lora" / "adapter_model.safetensors").read_bytes())
    (directory / "folder.safetensors").mkdir()
    return directory, {
        "base": "it was trained on other base weights: 1 of 14 differ, model.layers.1.mlp.up_proj",
        "rank": "its rank is 1, this engine serves rank 2",
        "head": "it adapts lm_head, which this engine was started without",
        "fused": "fused is {'q_proj': 2} there, this engine serves None",
        "truncated": "truncated",
        "flipped": "",
        "other": "not an adapter",
        "folder": "the adapter file cannot be read",
    }


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not inside an engine: what it reads of memory it never wrote is masked by its own rules, not by ours."""
    yield
