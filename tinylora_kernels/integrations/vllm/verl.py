"""verl: its rollout servers take the policy's numbers in place of its weights. Written against its source, not run.

At verl-project/verl 0210b18 a trainer hands a generator of (name, tensor) to ServerAdapter.update_weights
(verl/workers/rollout/vllm_rollout/vllm_rollout.py), which sends all of it to the workers of an engine that runs vLLM's
own server (vllm_async_server.py). An adapted model streams its vectors there under the names of their layers, so they
are all that is needed:

    from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter
    ServerAdapter.update_weights = update_policy
    # actor_rollout_ref.rollout.engine_kwargs.vllm:
    #   {enable_lora: true, additional_config: {tinylora: policy.safetensors}}
    # VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, actor_rollout_ref.rollout.load_format=auto: the engine reads the base itself
"""
from __future__ import annotations

from collections.abc import AsyncIterable, Iterable
from typing import Any

import torch
from torch import Tensor

from ...files.format import AdapterError
from .requests import post_default

VECTOR = ".v"  # what the name of a vector ends with: that of the first layer of its tie group, and this


async def vectors_in(weights: Iterable[tuple[str, Tensor]] | AsyncIterable[tuple[str, Tensor]]) -> Tensor:
    """v [groups, u] out of a stream of an adapted model's tensors, in the order of its layers.

    Raises:
        AdapterError: there are none: the model is merged, or not adapted.
    """
    found = []
    if isinstance(weights, AsyncIterable):
        async for name, tensor in weights:
            if name.endswith(VECTOR):
                found.append(tensor.detach().to("cpu", torch.float32))
    else:
        for name, tensor in weights:
            if name.endswith(VECTOR):
                found.append(tensor.detach().to("cpu", torch.float32))
    if not found:
        raise AdapterError("update_weights: the stream holds no trained vector of an adapted model")
    return torch.stack(found)


async def update_policy(
    self: Any, weights: Iterable[tuple[str, Tensor]], global_steps: int | None = None, **kwargs: Any
) -> None:
    """ServerAdapter.update_weights for an adapted model: every rank takes part in the stream, the first one posts."""
    v = await vectors_in(weights)
    if not self._ensure_server_handle():
        return
    address, port = await self.server_handle.get_server_address.remote()
    post_default(f"http://{address}:{port}", v)
    if global_steps is not None:
        await self.server_handle.set_global_steps.remote(global_steps)
