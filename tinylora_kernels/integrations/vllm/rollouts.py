"""TRL's trainers: rollouts under the live adapter. A sync is its numbers; no weight is merged, sent or rounded.

    GRPOTrainer(model=as_peft_model(model), args=GRPOConfig(use_vllm=True, vllm_mode="colocate", ...), ...)

is all: as_peft_model asks for this, and a VLLMGeneration over such a model then starts its engine (colocate), or
expects its server, with the setting. In server mode the server is started on a file of the same config:

    save_adapter(model, "policy.safetensors")
    VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora \\
        --additional-config '{"tinylora": "policy.safetensors"}' --logprobs-mode processed_logprobs

The policy is what every request runs that names no adapter. Requests are bound to the numbers they begin with, and the
prefix cache is keyed by them, so nothing is reset.
"""
from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...common.words import dtype_name
from ...files.adapter import describe_model, save_adapter
from ...method.config import LoRAXSConfig, TinyLoRAConfig
from ...model.adapted import adapted_layers, trainable_vectors
from .family import token_of
from .requests import post_default, set_default

FAMILY = "policy.safetensors"


def use_native_rollouts() -> None:
    """Let TRL's VLLMGeneration serve our models natively, from now on, where vLLM and TRL are installed."""
    if any(importlib.util.find_spec(name) is None for name in ("vllm", "trl")):
        return
    from trl.generation.vllm_generation import VLLMGeneration

    if hasattr(VLLMGeneration, "tinylora"):
        return
    VLLMGeneration.tinylora = True
    for name, hook in {"_init_vllm": _init_vllm, "sync_weights": _sync_weights}.items():
        setattr(VLLMGeneration, name, functools.partialmethod(hook, getattr(VLLMGeneration, name)))


def policy_of(model: Any) -> nn.Module | None:
    """The adapted model behind a trainer's, if its adapter has a file of ours; None leaves TRL its own way."""
    base = getattr(model, "get_base_model", lambda: None)()
    layers = adapted_layers(base) if isinstance(base, nn.Module) else {}
    ours = layers and all(isinstance(layer.config, (TinyLoRAConfig, LoRAXSConfig)) for layer in layers.values())
    return base if ours else None


def vectors_of(model: nn.Module) -> Tensor:
    """v [groups, u] of an adapted model, on the CPU."""
    return torch.stack([v.detach().to("cpu", torch.float32) for v in trainable_vectors(model)])


def _init_vllm(generation: Any, original: Any) -> None:
    policy = policy_of(generation.model)
    if policy is None:
        original(generation)
        return
    module: Any = sys.modules[type(generation).__module__]
    generation.tinylora_token = token_of(describe_model(policy))
    plain = module.LLM, module.VLLMClient
    generation.tinylora_directory = tempfile.TemporaryDirectory()  # there for as long as the engine
    path = Path(generation.tinylora_directory.name, FAMILY)
    save_adapter(policy, path)
    setting = {"adapters": str(path), "own_seeds": False}
    # Left to itself vLLM runs a float32 model in 16 bits, which is another policy than the one that trains.
    weights = (parameter for parameter in policy.parameters() if not parameter.requires_grad)
    dtype = next((dtype_name(weight.dtype) for weight in weights if weight.is_floating_point()), "auto")
    module.LLM = functools.partial(
        plain[0], enable_lora=True, max_lora_rank=8, dtype=dtype, additional_config={"tinylora": setting}
    )
    # No group for weights: there is none to send, and NCCL need not be there.
    module.VLLMClient = type("VLLMClient", (plain[1],), {"init_communicator": lambda self, *_, **__: None})
    try:
        original(generation)
    finally:
        module.LLM, module.VLLMClient = plain
    if generation.mode == "colocate":
        sleep = generation.llm.sleep
        # Level 2 would drop the base, which only a weight sync could bring back.
        generation.llm.sleep = lambda level=1, *args, **kwargs: sleep(1, *args, **kwargs)


def _sync_weights(generation: Any, original: Any) -> None:
    """The numbers of the policy to the engine, in place of its weights."""
    token, policy = getattr(generation, "tinylora_token", None), policy_of(generation.model)
    if token is None or policy is None:
        original(generation)
        return
    v = vectors_of(policy)
    if generation.mode == "colocate":
        if generation.enable_sleep_mode:
            generation.llm.wake_up(tags=["weights"])
            generation._llm_weights_sleeping = False
        set_default(generation.llm, v, token)
    elif generation.accelerator.is_main_process:
        post_default(generation.vllm_client.base_url, v, token)
