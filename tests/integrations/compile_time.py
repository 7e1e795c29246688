"""What PEFT, acceleration and torch.compile do to the cost of the update: forward and backward of a small decoder.

    OMP_NUM_THREADS=1 python -m tests.integrations.compile_time

Variants are interleaved; medians, and ratios to the frozen model run eagerly. "frozen" differentiates with respect to
its input embeddings, as every other variant does.
"""
import argparse
import statistics
import time
from collections.abc import Callable

import peft
import torch
from torch import nn

from tests.integrations.tiny import llama
from tinylora_kernels import TinyLoRAConfig, apply_tiny_lora
from tinylora_kernels.integrations.peft import accelerate_peft


def decoder(dtype: torch.dtype):
    sizes = dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3,
        attention_bias=False, vocab_size=256, max_position_embeddings=512,
    )  # fmt: skip
    return llama(**sizes).to(dtype).requires_grad_(False)


def peft_model(dtype: torch.dtype, autocast: bool = True) -> nn.Module:
    config = peft.TinyLoraConfig(r=2, u=1, target_modules="all-linear", init_weights="uniform")
    return peft.get_peft_model(decoder(dtype), config, autocast_adapter_dtype=autocast)


def step_of(model: Callable, inputs: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        inputs.grad = None
        model(inputs_embeds=inputs, use_cache=False).logits.square().mean().backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)

    frozen = decoder(dtype)
    adapted = apply_tiny_lora(
        decoder(dtype), TinyLoRAConfig(target_modules="all-linear", init="uniform", cache=False), progress=False
    )
    inputs = torch.randn(2, arguments.tokens // 2, 576).to(dtype).requires_grad_()
    variants = {
        "frozen, eager": frozen,
        "adapted, eager": adapted,
        "PEFT, eager": peft_model(dtype),
        "PEFT without autocast": peft_model(dtype, autocast=False),
        "PEFT accelerated": accelerate_peft(peft_model(dtype)),
        "frozen, compiled": torch.compile(frozen, fullgraph=True),
        "adapted, compiled": torch.compile(adapted, fullgraph=True),
    }
    steps = {name: step_of(model, inputs) for name, model in variants.items()}
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} thread(s), {arguments.dtype}, {arguments.tokens} tokens, 14 modules")
    for name, median in medians.items():
        print(f"{name:22s} {1e3 * median:8.2f} ms  {median / medians['frozen, eager']:.3f}")


if __name__ == "__main__":
    main()
