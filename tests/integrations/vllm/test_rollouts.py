"""TRL's GRPOTrainer with use_vllm on an adapted model: as_peft_model and nothing else makes its rollouts native."""
from __future__ import annotations

import json
import os

import pytest
import torch

import tinylora_kernels as tk
from tinylora_kernels.files.format import AdapterError
from tinylora_kernels.integrations.trl import as_peft_model
from tinylora_kernels.integrations.vllm.rollouts import vectors_of

from . import models
from .engines import manager_of
from .test_server import Server

trl = pytest.importorskip("trl")
STEPS = 4


@pytest.fixture
def one_process(monkeypatch, tmp_path):
    """What TRL expects of its launcher."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "29533", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return tmp_path


def policy(base, kind: str = "tied"):
    model = models.load(base)
    model.name_or_path = model.config._name_or_path = str(base)
    return as_peft_model(models.adapt(model, kind))


def trainer(base, model, directory, **changes):
    import datasets
    import transformers

    prompts = datasets.Dataset.from_list([{"prompt": prompt} for prompt in models.PROMPTS * 4])

    def vowels(completions, **_):
        return [sum(letter in "aeiou" for letter in text) / 8 for text in completions]

    arguments = trl.GRPOConfig(
        output_dir=str(directory), use_vllm=True, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=8, max_steps=STEPS, learning_rate=3e-2, logging_steps=1, use_cpu=True, bf16=False,
        report_to=[], save_strategy="no", temperature=1.0, seed=1, **changes,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    return trl.GRPOTrainer(
        model=model, reward_funcs=vowels, args=arguments, train_dataset=prompts, processing_class=tokenizer
    )


def check_log(log: list[dict]) -> None:
    """Rollouts are of the policy that trains: its log-probabilities are the engine's, at every step."""
    differences = [entry["sampling/sampling_logp_difference/max"] for entry in log if "reward" in entry]
    assert len(differences) == STEPS and max(differences) < 1e-3, differences
    assert any(entry.get("reward_std", 0) > 0 for entry in log)


def test_colocated(base, one_process):
    model = policy(base)
    run = trainer(
        base, model, one_process, vllm_mode="colocate", vllm_gpu_memory_utilization=0.2, vllm_max_model_length=128
    )
    before = vectors_of(model.get_base_model())
    llm = run.vllm_generation.llm
    try:
        run.train()
        check_log(run.state.log_history)
        after = vectors_of(model.get_base_model())
        assert (after - before).abs().max() > 0.01, "nothing was trained"
        run.vllm_generation.sync_weights()
        assert llm.llm_engine.list_loras() == set()  # the policy is a default, not an adapter beside others
        held = manager_of(llm)
        assert held.table.shape == (1, 4096, 13) and len(held._host) <= STEPS + 2
        # What the engine says now is what the trained model says.
        prompts = models.tokens(base)
        from .engines import generate

        assert generate(llm, prompts, None) == models.greedy(model.get_base_model().eval(), prompts)
    finally:
        llm.llm_engine.engine_core.shutdown()


def test_a_server(base, adapters, one_process):
    """The same over HTTP: a server that was started on the policy's file takes its numbers at every step."""
    model = policy(base)
    path = one_process / "policy.safetensors"
    tk.save_adapter(model.get_base_model(), path)
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    options = "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"
    server = Server(base, path, one_process / "log.txt", *options)
    try:
        server.wait()
        url = {"vllm_mode": "server", "vllm_server_base_url": f"http://127.0.0.1:{server.port}"}
        run = trainer(base, model, one_process, **url)
        run.train()
        check_log(run.state.log_history)
        run.vllm_generation.sync_weights()
        expected = models.greedy(model.get_base_model().eval(), models.tokens(base))
        for prompt, text in zip(models.tokens(base), expected, strict=True):
            code, answer = server.call(
                "/v1/completions",
                {"model": "base", "prompt": prompt, "max_tokens": len(text), "temperature": 0, "ignore_eos": True,
                 "return_token_ids": True},
            )  # fmt: skip
            assert code == 200 and json.loads(answer)["choices"][0]["token_ids"] == text
        # A policy of another seed has numbers of the same shape, and they would mean something else.
        other = as_peft_model(
            tk.apply_tiny_lora(
                models.load(base),
                tk.TinyLoRAConfig(trainable_dim=13, n_tie=100, seed=5, target_modules=models.LINEAR, cache=False),
                progress=False,
            )
        )
        other.get_base_model().name_or_path = str(base)
        stranger = trainer(base, other, one_process, **url)
        with pytest.raises(AdapterError, match="of another config or base than the adapter this engine was started"):
            stranger.vllm_generation.sync_weights()
    finally:
        os.environ.pop("VLLM_SERVER_DEV_MODE")
        server.stop()


def test_a_population_in_one_batch(base, adapters):
    """A bank's adapters, all in training, generate side by side in one engine."""
    from tinylora_kernels.integrations.vllm.requests import adapter_request

    from .engines import engine, generate

    prompts = models.tokens(base)
    model = models.adapt(models.load(base), "untied")
    bank = tk.AdapterBank(model, 6)
    generator = torch.Generator().manual_seed(3)
    for n in range(6):
        bank.add(f"run{n}", torch.randn(14, 4, generator=generator) * models.SIZE)
    with engine(base, str(adapters / "0untied-0.safetensors")) as llm:
        requests = [adapter_request(name, bank.vectors(name)) for name in bank.names() for _ in prompts]
        found = generate(llm, prompts * 6, requests)
    expected = []
    for name in bank.names():
        with torch.no_grad(), bank.use([name]):
            expected += models.greedy(model, prompts)
    assert found == expected
