"""Tensor-parallel engines give the texts of one process: shards by rows and by columns, repeated heads, biases."""
from __future__ import annotations

import pytest
import torch

import tinylora_kernels as tk
from tinylora_kernels.integrations.vllm import set_vectors

from . import models
from .engines import engine, equal, generate, mixed_batch


def test_three_ranks(base, adapters, texts, prompts):
    """A head of k and v on each; the texts under changes too."""
    with engine(base, adapters, tensor_parallel_size=3, distributed_executor_backend="mp") as llm:
        batch, requests, expected = mixed_batch(texts, prompts, adapters)
        assert equal(generate(llm, batch, requests), expected) == len(expected)
        model = models.adapt(models.load(base), "untied")
        models.randomise(model, 30)
        v = torch.stack([v.detach() for v in tk.trainable_vectors(model)])
        assert generate(llm, prompts, set_vectors(llm, "policy", v)) == models.greedy(model, prompts)


@pytest.mark.parametrize("own_seeds", [True, False])
def test_two_ranks_that_share_one_head_of_k_and_v(own_seeds, tmp_path_factory, tmp_path):
    """Also biases, which a rank of a row shard adds alone, and an engine core in a process of its own."""
    base = models.make_base(tmp_path_factory.mktemp("mqa"), bias=True, num_key_value_heads=1)
    prompts = models.tokens(base)
    model = models.adapt(models.load(base), "tied")
    models.randomise(model, 0)
    tk.save_adapter(model, tmp_path / "tied-0.safetensors")
    texts = {"base": models.greedy(models.load(base), prompts), "tied-0": models.greedy(model, prompts)}
    setting = {"adapters": str(tmp_path), "own_seeds": own_seeds}
    with engine(base, setting, processes=True, tensor_parallel_size=2) as llm:
        batch, requests, expected = mixed_batch(texts, prompts, tmp_path)
        assert equal(generate(llm, batch, requests), expected) == len(expected)
