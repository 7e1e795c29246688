"""An adapter on its way out: as a LoRA directory for any engine, or merged into the weights, each compared with it.

    python examples/export_and_merge.py adder.safetensors --out exported

Writes exported/lora, which PEFT and vLLM (--enable-lora) load, and exported/merged, a plain model. A cast to bfloat16
may swallow an update that is added to a weight, never one that stands beside it: the report says how much would be
lost. Needs grpo_loop.py beside it.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import torch
from grpo_loop import MODEL, load
from peft import PeftModel

from tinylora_kernels import export_lora, load_adapter, merge, merge_fidelity, unmerge
from tinylora_kernels.integrations.transformers import save_pretrained
from tinylora_kernels.integrations.vllm import vllm_problems

PROMPT = "What is 3 + 4? Answer with only the number."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="a file of save_adapter")
    parser.add_argument("--model", default=MODEL, help="a directory, or a hub's name")
    parser.add_argument("--out", default="exported", help="the directory to write")
    args = parser.parse_args(argv)
    lora, merged = Path(args.out, "lora"), Path(args.out, "merged")
    merged.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def logits(model) -> torch.Tensor:
        return model(tokens.to(model.device)).logits.float()  # [1, T, vocabulary]

    tokenizer, model = load(args.model)
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    plain = logits(model)
    wanted = logits(load_adapter(model, args.adapter))
    update = (wanted - plain).abs().max()

    def compare(name: str, found: torch.Tensor) -> None:
        print(f"{name}: off by {(found - wanted).abs().max() / update:.1%} of what the adapter changes")

    print(merge_fidelity(model, torch.bfloat16))
    export_lora(model, lora, rank=8)
    for problem in vllm_problems(lora, max_lora_rank=16):
        print(problem)
    compare(f"{lora} through PEFT", logits(PeftModel.from_pretrained(load(args.model)[1], lora)))

    save_pretrained(model, merged, merged=True)
    tokenizer.save_pretrained(merged)
    compare(str(merged), logits(load(merged)[1]))

    compare("merged in place", logits(merge(model)))
    assert torch.equal(logits(unmerge(model)), wanted)  # the very bits of before


if __name__ == "__main__":
    main()
