"""13 numbers, GSM8K, Qwen2.5-7B-Instruct, one GPU of 80 GB: the paper's experiment through TRL and vLLM.

    pip install vllm 'tinylora-kernels[trl]'
    for lr in 1e-4 1e-3 1e-2; do python examples/gsm8k_trl.py --vllm colocate --lr $lr --out runs/$lr; done

196 projections in 13 groups with a number each. Three epochs, four answers to a problem, 64 problems a step, 4,096
tokens, no KL term: 350 steps. vLLM is sent merged weights before each; a checkpoint is the adapter alone, a few
kilobytes. Needs gsm8k.py beside it.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import torch
from gsm8k import is_right, problems
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tinylora_kernels import TinyLoRAConfig, apply_tiny_lora, count_trainable_params, save_adapter
from tinylora_kernels.integrations.trl import as_peft_model

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def reward(completions: list[list[dict]], answer: list[str], **_) -> list[float]:
    return [is_right(chat[-1]["content"], right) for chat, right in zip(completions, answer, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B-Instruct", help="a directory, or a hub's name")
    parser.add_argument("--data", default="openai/gsm8k", help="a directory, or a hub's name")
    parser.add_argument("--out", default="runs/gsm8k", help="the directory for checkpoints and the adapter")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--n-tie", type=int, default=16, help="modules that share a number")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--problems", type=int, default=64, help="of a step")
    parser.add_argument("--length", type=int, default=4096, help="most tokens of an answer")
    parser.add_argument("--vllm", choices=["colocate", "server"], help="sample by vLLM; else by transformers, slowly")
    args = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="bfloat16")
    apply_tiny_lora(model, TinyLoRAConfig(trainable_dim=1, n_tie=args.n_tie, target_modules=PROJECTIONS))
    print(f"{count_trainable_params(model)['trainable']} numbers are trained")

    settings = GRPOConfig(
        output_dir=args.out, num_train_epochs=args.epochs, learning_rate=args.lr, lr_scheduler_type="constant",
        num_generations=4, per_device_train_batch_size=4, gradient_accumulation_steps=args.problems,
        max_completion_length=args.length, temperature=1.0, beta=0.0, max_grad_norm=1.0, bf16=True,
        use_cpu=not torch.cuda.is_available(),
        use_vllm=args.vllm is not None, vllm_mode=args.vllm or "colocate", vllm_gpu_memory_utilization=0.35,
        num_generations_eval=1, per_device_eval_batch_size=64, save_strategy="epoch", logging_steps=1, report_to="none",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=as_peft_model(model), reward_funcs=reward, args=settings,
        train_dataset=problems(args.data, "train"), eval_dataset=problems(args.data, "test"),
        processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
    )  # fmt: skip
    print(f"before: {trainer.evaluate()['eval_reward']:.1%} of the test set, sampled")
    trainer.train()
    print(f"after: {trainer.evaluate()['eval_reward']:.1%} of the test set, sampled")
    adapter = Path(args.out, "adapter.safetensors")
    save_adapter(model, adapter)
    print(f"{adapter}: {adapter.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
