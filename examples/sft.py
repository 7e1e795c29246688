"""Fine-tuning on what the model itself gets right: sample answers, keep the right ones, make them likelier.

    python examples/sft.py                        # answers to sums that the model got right
    python examples/sft.py --data pairs.jsonl     # lines of {"prompt": ..., "reply": ...}

At this size replies in the model's own words are the ones to use: a foreign style costs accuracy as it is learned
(docs/study.md). Needs grpo_loop.py beside it.
"""
from __future__ import annotations

import argparse
import json
import random

import torch
from grpo_loop import MODEL, PROJECTIONS, accuracy, additions, load, reward, sample

from tinylora_kernels import TinyLoRAConfig, apply_tiny_lora, save_adapter
from tinylora_kernels.rl import SFTTrainer


def own_answers(model, tokenizer, problems: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Prompts and the model's right replies to them, one try each."""
    replies = sample(model, tokenizer, [question for question, _ in problems], 12, temperature=0.7)[-1]
    tried = zip(problems, replies, strict=True)
    return [(question, reply) for (question, answer), reply in tried if reward(reply, answer)]


def read_pairs(path: str) -> list[tuple[str, str]]:
    with open(path) as lines:
        return [(row["prompt"], row["reply"]) for row in map(json.loads, lines)]


def encode(tokenizer, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [B, T]; only replies and the end token behind them are learned."""
    rows, labels = [], []
    for prompt, reply in pairs:
        chat = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        said = [*tokenizer(reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append(torch.tensor(asked + said))
        labels.append(torch.tensor([-100] * len(asked) + said))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id), pad(labels, True, -100)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a directory, or a hub's name")
    parser.add_argument("--data", help="pairs to learn; else the model's own right answers")
    parser.add_argument("--out", default="adder-sft.safetensors", help="the adapter's file")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--largest", type=int, default=20, help="of the numbers to add")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    tokenizer, model = load(args.model)
    training, held_out = additions(args.largest)
    pairs = read_pairs(args.data) if args.data else own_answers(model, tokenizer, training)
    if not pairs:
        raise SystemExit(
            f"pairs: expected at least one to learn from, found none in {args.data}" if args.data else
            f"pairs: expected at least one right answer to learn from, found none in {len(training)} tries; give "
            "smaller numbers (--largest) or pairs of your own (--data)"
        )
    print(f"{len(pairs)} pairs; greedy accuracy on {len(held_out)} sums: {accuracy(model, tokenizer, held_out):.0%}")

    apply_tiny_lora(model, TinyLoRAConfig(trainable_dim=4, target_modules=PROJECTIONS))
    trainer = SFTTrainer(model, lr=args.lr, betas=(0.9, 0.95), max_grad_norm=1.0)
    rng = random.Random(0)
    for step in range(1, args.steps + 1):
        tokens, labels = encode(tokenizer, rng.choices(pairs, k=args.batch))
        # padding on the right: no token of a causal model sees it
        logits = model(tokens.to(model.device)).logits  # [B, T, vocabulary]
        metrics = trainer.training_step(logits=logits, labels=labels)
        print(f"step {step}: perplexity {metrics['perplexity']:.3f} on {metrics['tokens']} tokens")

    print(f"greedy accuracy on {len(held_out)} sums: {accuracy(model, tokenizer, held_out):.0%}")
    save_adapter(model, args.out)
    print(f"{args.out} written")


if __name__ == "__main__":
    main()
