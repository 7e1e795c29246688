"""For loops of one's own: an adapter as a request, from numbers, with no file between.

    from tinylora_kernels.integrations.vllm import set_vectors
    policy = set_vectors(llm, "policy", v)                       # v [groups, u]: 52 bytes
    llm.generate(prompts, sampling, lora_request=policy)

A request holds its numbers, or their digest, for as long as it runs: requests before and after a change never mix, and
the prefix cache, keyed by the path, never serves one adapter's blocks to another.
"""
from __future__ import annotations

import base64
import inspect
import json
import urllib.error
import urllib.request
import zlib
from typing import Any

import torch
from torch import Tensor

from ...files.format import AdapterError

INLINE = "tinylora:"  # of a lora_path that carries numbers
DEFAULT = "tinylora:default"  # the lora_name whose adapter every request without one runs


def numbers_path(v: Tensor, token: str | None = None) -> str:
    """v [groups, u] as a lora_path, also for /v1/load_lora_adapter: in base64, float32, of the engine's own config.

    Args:
        token: family.token_of the adapter they belong to; with it the engine refuses the numbers of another config or
            base, without it any of the right shape.
    """
    numbers = base64.b64encode(v.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()).decode()
    return f"{INLINE}{token}:{numbers}" if token else INLINE + numbers


def adapter_request(name: str, v: Tensor) -> Any:
    """A LoRARequest that runs these numbers; the engine need not be told before."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, 1 + zlib.crc32(name.encode()) % (2**31 - 2), numbers_path(v))


def set_vectors(engine: Any, name: str, v: Tensor) -> Any:
    """Give an adapter these numbers from the next request on; requests that run keep theirs.

    Args:
        engine: a vllm LLM, LLMEngine or AsyncLLM that was started with the setting.
        name: of the adapter; it is added if it is new.
        v: [groups, u], in the config of the file that the engine was started with.

    Returns:
        The LoRARequest to pass to generate(); of an AsyncLLM an awaitable of it.

    Raises:
        ValueError: from the engine, if the numbers do not fit its family or are not finite.
    """
    return _add(engine, adapter_request(name, v))


def set_default(engine: Any, v: Tensor | None, token: str | None = None) -> Any:
    """Run these numbers in every later request that names no adapter; None: the bare base again."""
    from vllm.lora.request import LoRARequest

    path = INLINE if v is None else numbers_path(v, token)
    return _add(engine, LoRARequest(DEFAULT, 2**31 - 1, path, load_inplace=True))


def post_default(url: str, v: Tensor, token: str | None = None) -> None:
    """set_default over HTTP, for a server that lets adapters be loaded while it runs.

    Raises:
        AdapterError: the server refuses the numbers; its answer says why.
        OSError: there is no server.
    """
    body = {"lora_name": DEFAULT, "lora_path": numbers_path(v, token), "load_inplace": True}
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    try:
        urllib.request.urlopen(urllib.request.Request(f"{url}/v1/load_lora_adapter", data, kind), timeout=60).close()
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:300]
        raise AdapterError(
            f"the server at {url} did not take the policy's numbers ({error.code}, {said}); start it as docs/vllm.md "
            "says"
        ) from None


def _add(engine: Any, request: Any) -> Any:
    engine = getattr(engine, "llm_engine", engine)
    done = engine.add_lora(request)
    if inspect.isawaitable(done):
        async def add() -> Any:
            await done
            return request

        return add()
    return request
