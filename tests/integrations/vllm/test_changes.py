"""Adapters added, replaced and removed while requests run; refused ones; what stays in memory."""
from __future__ import annotations

import shutil

import pytest
import torch

import tinylora_kernels as tk
from tinylora_kernels.files.format import AdapterError
from tinylora_kernels.integrations.vllm import numbers_path, set_default, set_vectors

from . import models
from .engines import core_of, engine, file_request, generate, sampling


@pytest.fixture(scope="module")
def llm(base, adapters):
    with engine(base, adapters, enable_prefix_caching=True, block_size=32) as one:
        yield one


@pytest.fixture
def policies(base, prompts) -> list[tuple[torch.Tensor, list[list[int]]]]:
    """(v, texts) of three points in the numbers of the engine's first file."""
    model = models.adapt(models.load(base), "untied")
    found = []
    for draw in (20, 21, 22):
        models.randomise(model, draw)
        v = torch.stack([v.detach().clone() for v in tk.trainable_vectors(model)])
        found.append((v, models.greedy(model, prompts)))
    return found


def submit(llm, name: str, prompt: list[int], request) -> None:
    llm.llm_engine.add_request(f"{name}-x", {"prompt_token_ids": prompt}, sampling(), lora_request=request)


def finish(llm, names: list[str]) -> dict[str, list[int]]:
    done = {}
    for _ in range(500):
        for output in llm.llm_engine.step():
            if output.finished:
                done[output.request_id.split("-x")[0]] = list(output.outputs[0].token_ids)
        if set(done) >= set(names):
            return done
    raise AssertionError(f"{set(names) - set(done)} did not finish")


def test_requests_keep_the_numbers_they_began_with(llm, prompts, policies):
    """One name, three contents, changed in the middle of generation: nobody gets another's text."""
    expected = {}
    for n, (v, texts) in enumerate(policies):
        policy = set_vectors(llm, "policy", v)
        for i, prompt in enumerate(prompts):
            submit(llm, f"p{n}.{i}", prompt, policy)
            expected[f"p{n}.{i}"] = texts[i]
        for _ in range(4):  # every one of them is somewhere in its text when the numbers change
            llm.llm_engine.step()
    submit(llm, "base", prompts[0], None)
    found = finish(llm, [*expected, "base"])
    assert {name: found[name] for name in expected} == expected


def test_the_prefix_cache_never_serves_another_contents_blocks(llm, base, policies):
    """A prompt of several blocks under one name, the numbers changed and changed back: no reset, and the cache hits."""
    prompt = models.tokens(base)[3] * 8
    model = models.adapt(models.load(base), "untied")

    def cached(v):
        request = set_vectors(llm, "cached", v)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling(), lora_request=request, use_tqdm=False)
        return list(output.outputs[0].token_ids), output.num_cached_tokens

    texts = []
    for v, _ in policies[:2]:
        for own, numbers in zip(tk.trainable_vectors(model), v, strict=True):
            own.data.copy_(numbers)
        texts.append(models.greedy(model, [prompt])[0])
    assert texts[0] != texts[1]
    assert cached(policies[0][0]) == (texts[0], 0)
    assert cached(policies[1][0]) == (texts[1], 0)
    text, hits = cached(policies[0][0])
    assert text == texts[0] and hits >= 128


def test_a_file_replaced_on_disk_counts_when_it_is_loaded_again(llm, adapters, texts, prompts, tmp_path):
    from vllm.lora.request import LoRARequest

    path = tmp_path / "live.safetensors"
    shutil.copy(adapters / "tied-0.safetensors", path)
    live = LoRARequest("live", 500, str(path))
    assert generate(llm, prompts, live) == texts["tied-0"]
    shutil.copy(adapters / "tied-1.safetensors", path)
    assert generate(llm, prompts, live) == texts["tied-0"]  # nobody said so
    submit(llm, "before", prompts[0], live)
    llm.llm_engine.step()
    llm.llm_engine.add_lora(LoRARequest("live", 500, str(path), load_inplace=True))
    submit(llm, "after", prompts[0], live)
    assert finish(llm, ["before", "after"]) == {"before": texts["tied-0"][0], "after": texts["tied-1"][0]}


def test_removed_while_its_requests_run(llm, adapters, texts, prompts):
    request = file_request("tied-0", 600, adapters)
    llm.llm_engine.add_lora(request)
    assert 600 in llm.llm_engine.list_loras()
    submit(llm, "running", prompts[1], request)
    llm.llm_engine.step()
    assert llm.llm_engine.remove_lora(600) and not llm.llm_engine.remove_lora(600)
    assert 600 not in llm.llm_engine.list_loras()
    assert finish(llm, ["running"])["running"] == texts["tied-0"][1]


def test_a_default_for_requests_that_name_no_adapter(llm, prompts, policies, texts):
    try:
        for v, expected in policies[:2]:
            set_default(llm, v)
            assert generate(llm, prompts, None) == expected
    finally:
        set_default(llm, None)
    assert generate(llm, prompts, None) == texts["base"]


@pytest.mark.parametrize("name", ["base", "rank", "head", "fused", "truncated", "flipped", "other", "folder"])
def test_a_file_that_does_not_fit_is_refused_by_name_and_the_engine_goes_on(name, wrong, llm, adapters, texts, prompts):
    directory, messages = wrong
    before = llm.llm_engine.list_loras()
    for call in (llm.llm_engine.add_lora, lambda request: generate(llm, prompts[:1], request)):
        with pytest.raises(AdapterError) as info:
            call(file_request(name, 700, directory))
        message = str(info.value)
        assert message.startswith(f"adapter {name!r}: ") and messages[name] in message
        assert str(directory) not in message and "\n" not in message
    assert llm.llm_engine.list_loras() == before
    assert generate(llm, prompts, file_request("tied-0", 701, adapters)) == texts["tied-0"]


def test_a_missing_file_is_vllms_own_not_found(llm, tmp_path):
    from vllm.exceptions import LoRAAdapterNotFoundError

    with pytest.raises(LoRAAdapterNotFoundError):
        llm.llm_engine.add_lora(file_request("nothing", 702, tmp_path))


@pytest.mark.parametrize("path, message", [
    (numbers_path(torch.zeros(3)), "expected 14 x 4 float32 numbers, 224 bytes, found 12 bytes"),
    ("tinylora:%%%", "expected numbers in base64"),
    (numbers_path(torch.full((14, 4), torch.nan)), "expected finite numbers"),
])  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(llm, path, message):
    from vllm.lora.request import LoRARequest

    with pytest.raises(AdapterError, match=message):
        llm.llm_engine.add_lora(LoRARequest("numbers", 800, path))


def test_a_new_base_under_the_adapters_is_refused(llm):
    runner = core_of(llm).model_executor.driver_worker.worker.model_runner
    with pytest.raises(RuntimeError, match="the weights of the base model were replaced"):
        runner.reset_lora_state()
