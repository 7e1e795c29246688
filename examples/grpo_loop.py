"""GRPO in a loop of your own: 840 numbers, four for each projection, teach a frozen model of 135M parameters to add.

    python examples/grpo_loop.py

A step asks 8 questions, samples 8 answers to each, and moves the numbers towards what was right more often than the
other answers to its question. The sampling is transformers' own; any other engine does as well.
"""
from __future__ import annotations

import argparse
import random
import re

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tinylora_kernels import TinyLoRAConfig, apply_tiny_lora, count_trainable_params, save_adapter
from tinylora_kernels.rl import GRPOTrainer, token_log_probs

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(directory: str):
    """Tokenizer and frozen model, from a directory or a hub."""
    on_gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    # few CPUs multiply bfloat16 as fast as float32
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto" if on_gpu else torch.float32)
    return tokenizer, model.to("cuda" if on_gpu else "cpu")


def additions(largest: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Questions with their answers: three quarters to train on, the others to be judged by."""
    sums = [(a, b) for a in range(1, largest + 1) for b in range(1, largest + 1)]
    random.Random(0).shuffle(sums)
    problems = [(f"What is {a} + {b}? Answer with only the number.", str(a + b)) for a, b in sums]
    return problems[len(problems) // 4 :], problems[: len(problems) // 4]


def reward(reply: str, answer: str) -> float:
    return float(re.findall(r"-?\d+", reply)[-1:] == [answer])


def sample(model, tokenizer, questions: list[str], length: int, temperature: float = 0.0, **options):
    """One reply to each question: tokens and attention mask [B, S + T], the replies' mask [B, T], and their texts.

    What is sampled from is the model's own softmax, which is what token_log_probs trains. generate() fills in what it
    is not told from the model's generation_config, where many have a repetition penalty or more: nothing of that but
    the end tokens is kept.
    """
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    theirs = model.generation_config
    ends = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    ends = sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})  # chat models have several
    drawn = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else {}
    model.generation_config = GenerationConfig(
        max_new_tokens=length, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, **drawn
    )
    try:
        tokens = model.generate(**prompts, **options)
    finally:
        model.generation_config = theirs
    replies = tokens[:, prompts.input_ids.shape[1] :]
    ends = torch.isin(replies, torch.tensor(ends, device=replies.device)).int()
    mask = ends.cumsum(1) - ends == 0  # up to the end token and with it
    texts = [tokenizer.decode(reply[kept], skip_special_tokens=True) for reply, kept in zip(replies, mask, strict=True)]
    return tokens, torch.cat([prompts.attention_mask, mask.long()], 1), mask, texts


def accuracy(model, tokenizer, problems: list[tuple[str, str]], length: int = 12) -> float:
    """The share of right greedy answers."""
    texts = sample(model, tokenizer, [question for question, _ in problems], length)[-1]
    return sum(reward(text, answer) for text, (_, answer) in zip(texts, problems, strict=True)) / len(problems)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a directory, or a hub's name")
    parser.add_argument("--out", default="adder.safetensors", help="the adapter's file")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--largest", type=int, default=20, help="of the numbers to add")
    args = parser.parse_args(argv)
    questions, samples, temperature = 8, 8, 0.7

    tokenizer, model = load(args.model)
    training, held_out = additions(args.largest)
    apply_tiny_lora(model, TinyLoRAConfig(trainable_dim=4, target_modules=PROJECTIONS))
    trainer = GRPOTrainer(model, group_size=samples, lr=args.lr, betas=(0.9, 0.95), max_grad_norm=1.0)
    print(f"greedy accuracy on {len(held_out)} sums held out: {accuracy(model, tokenizer, held_out):.0%}")

    rng = random.Random(0)
    torch.manual_seed(0)
    for step in range(1, args.steps + 1):
        asked = [problem for problem in rng.choices(training, k=questions) for _ in range(samples)]
        tokens, seen, mask, texts = sample(model, tokenizer, [question for question, _ in asked], 12, temperature)
        rewards = [reward(text, answer) for text, (_, answer) in zip(texts, asked, strict=True)]
        length = mask.shape[1]
        logits = model(tokens, attention_mask=seen, logits_to_keep=length + 1).logits[:, :-1]  # [B, T, vocabulary]
        log_probs = token_log_probs(logits, tokens[:, -length:], temperature)  # [B, T]
        trainer.training_step(log_probs, None, rewards, mask=mask)
        print(f"step {step}: {sum(rewards) / len(rewards):.0%} of {len(rewards)} answers right", flush=True)

    print(f"greedy accuracy on {len(held_out)} sums held out: {accuracy(model, tokenizer, held_out):.0%}")
    save_adapter(model, args.out)
    print(f"{args.out}: {count_trainable_params(model)['trainable']} numbers")


if __name__ == "__main__":
    main()
