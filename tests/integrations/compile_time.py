"""What torch.compile does to the cost of the update: forward and backward of a small decoder, interleaved, medians.

    OMP_NUM_THREADS=1 python -m tests.integrations.compile_time

Times are ratios to the frozen model run eagerly; "frozen" differentiates with respect to its input embeddings, as a
frozen model below a trained layer must.
"""
import argparse
import statistics
import time
from collections.abc import Callable

import torch

from tests.integrations.tiny import llama
from tinylora_kernels import TinyLoRAConfig, apply_tiny_lora


def decoder(dtype: torch.dtype):
    sizes = dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3,
        attention_bias=False, vocab_size=256, max_position_embeddings=512,
    )  # fmt: skip
    return llama(**sizes).to(dtype).requires_grad_(False)


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
        print(f"{name:20s} {1e3 * median:8.2f} ms  {median / medians['frozen, eager']:.3f}")


if __name__ == "__main__":
    main()
