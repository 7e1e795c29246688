"""Engines as the tests start them, and what comes out of them."""
from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .models import NEW


@contextlib.contextmanager
def engine(base: Path, adapters: Path | str | dict | None, *, processes: bool = False, **changes: Any) -> Iterator[Any]:
    """An LLM over the base; adapters: the setting, None for a bare engine; processes: the engine core in its own."""
    from vllm import LLM

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(processes))
    setting = str(adapters) if isinstance(adapters, Path) else adapters
    options = dict(model=str(base), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=64, seed=0)
    if setting is not None:
        options |= dict(enable_lora=True, max_lora_rank=8, additional_config={"tinylora": setting})
    llm = LLM(**options | changes)
    try:
        yield llm
    finally:
        core = llm.llm_engine.engine_core
        core.shutdown()
        del llm
        gc.collect()


def manager_of(llm: Any) -> Any:
    """Of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.lora_manager


def core_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def file_request(name: str, number: int, adapters: Path, **changes: Any) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(adapters / f"{name}.safetensors"), **changes)


def sampling(new: int = NEW, **changes: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, "max_tokens": new, "ignore_eos": True, **changes})


def generate(llm: Any, prompts: list[list[int]], requests: Any, parameters: Any | None = None) -> list[list[int]]:
    """The tokens of each prompt."""
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, parameters or sampling(), lora_request=requests, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def mixed_batch(texts: dict[str, list[list[int]]], prompts: list[list[int]], adapters: Path) -> tuple[list, list, list]:
    """(prompts, requests, expected texts) of every adapter and the bare base with every prompt."""
    all_prompts, requests, expected = [], [], []
    for number, (name, own) in enumerate(texts.items()):
        for prompt, text in zip(prompts, own, strict=True):
            all_prompts.append(prompt)
            requests.append(None if name == "base" else file_request(name, number, adapters))
            expected.append(text)
    return all_prompts, requests, expected


def equal(found: list[list[int]], expected: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(found, expected, strict=True))
