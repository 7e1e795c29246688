"""A PEFT run on these kernels, by one line: the same parameters, names, files and optimizer, less time.

    python examples/accelerate_peft.py                      # a new TinyLoRA adapter of PEFT's
    python examples/accelerate_peft.py --adapter directory  # one that PEFT has saved

Takes turns between PEFT's own layers and ours, training all the while, and prints what a step takes with either.
"""
from __future__ import annotations

import argparse
import statistics
import time

import torch
from peft import PeftModel, TinyLoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tinylora_kernels.integrations.peft import accelerate_peft, acceleration_report, deaccelerate_peft


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a directory, or a hub's name")
    parser.add_argument("--adapter", help="a directory of PEFT's save_pretrained; else a new adapter")
    parser.add_argument("--out", default="peft-adapter", help="where PEFT saves the trained adapter")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs=2, default=(4, 128), metavar=("SEQUENCES", "LENGTH"))
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    if args.adapter:
        model = PeftModel.from_pretrained(base, args.adapter, is_trainable=True)
    else:
        model = get_peft_model(base, TinyLoraConfig(r=2, u=4, target_modules="all-linear"))
    tokens = torch.randint(model.config.vocab_size, args.tokens, device=model.device)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)

    def step() -> float:
        """Seconds of one step of training."""
        begun = time.perf_counter()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        return time.perf_counter() - begun

    ways = {"PEFT": deaccelerate_peft, "accelerated": accelerate_peft}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, change in ways.items():
            change(model)  # this is the line
            step()  # warm
            seconds[name].append(step())
    for name, taken in seconds.items():
        print(f"{name}: {1000 * statistics.median(taken):.0f} ms a step")
    refused = {layer: why for layer, why in acceleration_report(model).items() if why}
    print(f"{len(refused)} layers stay PEFT's{': ' if refused else ''}{refused or ''}")
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
