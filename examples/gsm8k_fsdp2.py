"""13 numbers, GSM8K, several GPUs: the frozen weights are sharded by FSDP2, each rank samples and learns its problems.

    torchrun --nproc-per-node 8 examples/gsm8k_fsdp2.py --lr 1e-3

What the ranks tell one another about the adapter is 52 bytes a backward pass; the rest of the traffic is the frozen
weights of FSDP2. Needs gsm8k.py and grpo_loop.py beside it.
"""
from __future__ import annotations

import argparse
import os
import random

import torch
import torch.distributed as dist
from grpo_loop import PROJECTIONS, load, sample
from gsm8k import is_right, problems
from torch.distributed.fsdp import fully_shard

from tinylora_kernels import TinyLoRAConfig, apply_tiny_lora
from tinylora_kernels.distributed import factorize_shared, replicate_adapter, save_adapter_once
from tinylora_kernels.rl import GRPOTrainer, token_log_probs


def sharded(model, config: TinyLoRAConfig):
    """Adapted, the factorisation shared out over the ranks, then sharded; v stays whole on each."""
    apply_tiny_lora(model, config, factors=factorize_shared(model, config))
    vectors = replicate_adapter(model)
    for block in model.model.layers:
        fully_shard(block, ignored_params=vectors)
    return fully_shard(model, ignored_params=vectors)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B-Instruct", help="a directory, or a hub's name")
    parser.add_argument("--data", default="openai/gsm8k", help="a directory, or a hub's name")
    parser.add_argument("--out", default="gsm8k.safetensors", help="the adapter's file")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--n-tie", type=int, default=16, help="modules that share a number")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--problems", type=int, default=64, help="of a step, over all ranks")
    parser.add_argument("--length", type=int, default=4096, help="most tokens of an answer")
    args = parser.parse_args(argv)
    samples, temperature = 4, 1.0

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)

    tokenizer, model = load(args.model)
    model = sharded(model, TinyLoRAConfig(trainable_dim=1, n_tie=args.n_tie, target_modules=PROJECTIONS))
    model.gradient_checkpointing_enable()  # in train(), where generate() would have no cache
    mine = args.problems // ranks
    trainer = GRPOTrainer(
        model, group_size=samples, lr=args.lr, betas=(0.9, 0.95), max_grad_norm=1.0, accumulation_steps=mine
    )

    def answers(rows: list[dict], temperature: float):
        """As sample() of grpo_loop.py, and who is right [B]; all ranks together, since the weights are gathered."""
        model.eval()
        found = sample(
            model, tokenizer, [row["prompt"][0]["content"] for row in rows], args.length, temperature, synced_gpus=True
        )
        return *found[:-1], [is_right(text, row["answer"]) for text, row in zip(found[-1], rows, strict=True)]

    def mean(values: list[float]) -> float:
        total = torch.tensor([sum(values), len(values)], device=model.device)
        dist.all_reduce(total)
        return float(total[0] / total[1])

    training, test = ([*problems(args.data, split)] for split in ("train", "test"))
    rng = random.Random(0)  # the same order on every rank
    for epoch in range(args.epochs):
        rng.shuffle(training)
        for first in range(0, len(training) - args.problems + 1, args.problems):
            own = training[first + rank * mine : first + (rank + 1) * mine]
            tokens, seen, mask, right = answers([row for row in own for _ in range(samples)], temperature)
            model.train()
            for group in range(0, len(right), samples):  # a problem at a time: its answers fit beside the model
                rows = slice(group, group + samples)
                kept = mask[rows][:, : mask[rows].any(0).sum()]  # [G, T] of the longest one here
                end = tokens.shape[1] - mask.shape[1] + kept.shape[1]
                row_tokens, length = tokens[rows, :end], kept.shape[1]
                logits = model(row_tokens, attention_mask=seen[rows, :end], logits_to_keep=length + 1).logits[:, :-1]
                log_probs = token_log_probs(logits, row_tokens[:, -length:], temperature)  # [G, T]
                trainer.training_step(log_probs, None, right[rows], mask=kept)
            rewarded = mean(right)
            if rank == 0:
                print(f"epoch {epoch + 1}, step {trainer.steps}: {rewarded:.1%} of the answers right", flush=True)

    share = test[rank : len(test) - len(test) % ranks : ranks]  # as many on every rank
    batches = [share[first : first + 64] for first in range(0, len(share), 64)]
    greedy = mean([right for batch in batches for right in answers(batch, 0.0)[-1]])
    if rank == 0:
        print(f"greedy accuracy on the test set: {greedy:.1%}")
    save_adapter_once(model, args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
