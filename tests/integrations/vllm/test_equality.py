"""What an engine generates is what our own model generates, token for token, whatever else is in the batch."""
from __future__ import annotations

import pytest
import torch

import tinylora_kernels as tk

from . import models
from .engines import engine, equal, file_request, generate, manager_of, mixed_batch, sampling


@pytest.fixture(scope="module")
def llm(base, adapters):
    with engine(base, adapters, enable_prefix_caching=True) as one:
        yield one


def test_the_setting_makes_room_for_an_adapter_a_sequence(llm):
    assert llm.llm_engine.vllm_config.lora_config.max_loras == 64
    assert manager_of(llm).table.shape[1] == 4096


def test_a_mixed_batch_of_seeds_tie_groups_sizes_and_methods(llm, adapters, texts, prompts):
    """Untied and tied, another seed, alpha and scaling, a few modules, LoRA-XS, and the bare base, side by side."""
    batch, requests, expected = mixed_batch(texts, prompts, adapters)
    assert len({tuple(text) for text in expected}) == len(expected), "the texts must differ for this to say anything"
    for _ in range(2):  # the second time from the prefix cache
        assert equal(generate(llm, batch, requests), expected) == len(expected) == 44


def test_sampling_with_a_seed_does_not_depend_on_the_batch(llm, adapters, texts, prompts):
    batch, requests, _ = mixed_batch(texts, prompts, adapters)
    drawn = [sampling(temperature=0.9, seed=number) for number in range(len(batch))]
    together = generate(llm, batch, requests, drawn)
    assert len({tuple(text) for text in together}) > 40
    for i in (0, 5, 13, 30, 43):
        assert generate(llm, [batch[i]], requests[i], drawn[i]) == [together[i]]


def test_log_probabilities_are_those_of_the_model(llm, base, adapters, prompts):
    model = models.adapt(models.load(base), "tied")
    models.randomise(model, 1)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    request = file_request("tied-1", 900, adapters)
    outputs = llm.generate(inputs, sampling(logprobs=1), lora_request=request, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        text = list(output.outputs[0].token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + text[:-1]])).logits[0, len(prompt) - 1 :]
        ours = logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None])[:, 0]
        steps = zip(output.outputs[0].logprobs, text, strict=True)
        theirs = torch.tensor([step[token].logprob for step, token in steps])
        assert (ours - theirs).abs().max() < 2e-5


def test_bfloat16_is_as_exact_as_our_own_model_in_it(base, prompts, tmp_path_factory, tmp_path):
    """Log-probabilities against float32 arithmetic on the same bfloat16 weights: twice our own error at the most."""
    half = tmp_path_factory.mktemp("bfloat16")
    models.load(base, torch.bfloat16).save_pretrained(half)
    own = models.adapt(models.load(half, torch.bfloat16), "tied")
    models.randomise(own, 0)
    tk.save_adapter(own, tmp_path / "tied-0.safetensors")
    exact = tk.load_adapter(models.load(half), tmp_path / "tied-0.safetensors", cache=False, progress=False)

    def log_probs(model, prompt):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]

    found = []
    with engine(half, tmp_path, dtype="bfloat16", skip_tokenizer_init=True) as llm:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        parameters = sampling(1, prompt_logprobs=0, detokenize=False)
        request = file_request("tied-0", 1, tmp_path)
        for output in llm.generate(inputs, parameters, lora_request=request, use_tqdm=False):
            steps = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
            found.append(torch.tensor([step[token].logprob for step, token in steps]))
    truth = torch.cat([log_probs(exact, prompt) for prompt in prompts])
    ours = (torch.cat([log_probs(own, prompt) for prompt in prompts]) - truth).square().mean().sqrt()
    theirs = (torch.cat(found) - truth).square().mean().sqrt()
    assert 0 < theirs <= 2 * ours, f"the engine's error {theirs:.3g}, our own model's {ours:.3g}"


def test_one_seed_for_all_keeps_the_numbers_alone(base, adapters, texts, prompts):
    setting = {"adapters": str(adapters / "tied-0.safetensors"), "own_seeds": False}
    with engine(base, setting) as llm:
        names = ("tied-0", "tied-1")
        for number, name in enumerate(names, start=1):
            assert generate(llm, prompts, file_request(name, number, adapters)) == texts[name]
        assert manager_of(llm).table.shape == (1, 4096, 13)
        assert generate(llm, prompts, None) == texts["base"]


@pytest.mark.parametrize("rank, own_seeds", [(1, True), (3, True), (3, False)])
def test_biases_and_other_ranks(rank, own_seeds, tmp_path_factory, tmp_path):
    """Qwen2's q, k and v have a bias; rank 3 is padded to one that kernels exist for."""
    base = models.make_base(tmp_path_factory.mktemp("qwen"), bias=True)
    prompts = models.tokens(base)
    config = tk.TinyLoRAConfig(frozen_rank=rank, trainable_dim=3, n_tie=2, target_modules=models.LINEAR, cache=False)
    model = tk.apply_tiny_lora(models.load(base), config, progress=False)
    models.randomise(model, 0)
    tk.save_adapter(model, tmp_path / "a.safetensors")
    layers = [layer for name, layer in tk.adapted_layers(model).items() if "q_proj" in name]
    assert len(layers) == 2 and all(layer.base.bias.abs().max() > 0.1 for layer in layers)
    expected = models.greedy(model, prompts)
    with engine(base, {"adapters": str(tmp_path), "own_seeds": own_seeds}) as llm:
        assert generate(llm, prompts, file_request("a", 1, tmp_path)) == expected
        assert generate(llm, prompts, None) == models.greedy(models.load(base), prompts)


@pytest.mark.parametrize("fused", [None, {"qkv_proj": (128, 64, 64), "gate_up_proj": 2}], ids=["one SVD", "by parts"])
def test_projections_that_the_model_itself_fuses(fused, tmp_path_factory, tmp_path):
    transformers = pytest.importorskip("transformers")
    base = models.make_base(tmp_path_factory.mktemp("phi3"))  # for its tokenizer
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=98, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        original_max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(base)
    adapter = tk.TinyLoRAConfig(
        trainable_dim=3, n_tie=2, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], fused=fused,
        cache=False,
    )  # fmt: skip
    tk.apply_tiny_lora(model.eval(), adapter, progress=False)
    models.randomise(model, 0)
    tk.save_adapter(model, tmp_path / "a.safetensors")
    prompts = models.tokens(base)
    with engine(base, tmp_path) as llm:
        assert generate(llm, prompts, file_request("a", 1, tmp_path)) == models.greedy(model, prompts)


def test_under_torch_compile(base, adapters, texts, prompts, monkeypatch):
    """vLLM compiles no model with LoRA on a CPU; on a GPU it does, so its own switch is passed by here."""
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    plain = CpuPlatform.check_and_update_config.__func__

    def with_compilation(cls, config):
        lora_config = config.lora_config
        object.__setattr__(config, "lora_config", None)
        try:
            plain(cls, config)
        finally:
            object.__setattr__(config, "lora_config", lora_config)

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(with_compilation))
    with engine(base, adapters, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
        batch, requests, expected = mixed_batch(texts, prompts, adapters)
        assert equal(generate(llm, batch, requests), expected) == len(expected)


def test_an_exported_directory_is_served_by_vllms_own_lora(base, prompts, tmp_path):
    """The plugin is there and not asked for: vLLM is as it was. One slot to spare: see docs/vllm.md."""
    from vllm.lora.request import LoRARequest

    model = models.adapt(models.load(base), "tied")
    expected, requests, all_prompts = [], [], []
    for draw in range(2):
        models.randomise(model, draw)
        tk.export_lora(model, tmp_path / f"lora{draw}", rank=8)
        expected += models.greedy(model, prompts)
        requests += [LoRARequest(f"l{draw}", draw + 1, str(tmp_path / f"lora{draw}"))] * len(prompts)
        all_prompts += prompts
    expected += models.greedy(models.load(base), prompts)
    requests += [None] * len(prompts)
    with engine(base, None, enable_lora=True, max_loras=3, max_lora_rank=8) as llm:
        assert equal(generate(llm, all_prompts + prompts, requests), expected) == len(expected)
