"""A sweep of learning rates and seeds in one run: every row of a batch trains its own adapter, as if it were alone.

    python examples/sweep.py --lr 0.001 0.003 0.01 --seeds 2

Needs grpo_loop.py beside it. With few numbers the random P of a seed decides much, and one rate too high ruins a run
(docs/study.md): so never train one adapter where six cost about half of six runs.
"""
from __future__ import annotations

import argparse
import random

import torch
from grpo_loop import MODEL, PROJECTIONS, accuracy, additions, load, reward, sample

from tinylora_kernels import AdapterBank, TinyLoRAConfig, apply_tiny_lora
from tinylora_kernels.rl import PopulationGRPO, token_log_probs


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a directory, or a hub's name")
    parser.add_argument("--out", default="best.safetensors", help="the best adapter's file")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.001, 0.003, 0.01])
    parser.add_argument("--seeds", type=int, default=2, help="random P for each rate")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--questions", type=int, default=4, help="of a step and run")
    parser.add_argument("--largest", type=int, default=20, help="of the numbers to add")
    args = parser.parse_args(argv)
    samples, temperature = 8, 0.7

    tokenizer, model = load(args.model)
    training, held_out = additions(args.largest)
    training, chosen_by = training[len(held_out) :], training[: len(held_out)]  # held-out sums choose nothing
    apply_tiny_lora(model, TinyLoRAConfig(trainable_dim=4, target_modules=PROJECTIONS))
    runs = [(rate, seed) for rate in args.lr for seed in range(args.seeds)]  # a run is its own name in the bank
    bank = AdapterBank(model, len(runs), trainable=True, own_seeds=True)
    for run in runs:
        bank.add(run, seed=run[1])
    trainer = PopulationGRPO(
        bank, lr={run: run[0] for run in runs}, group_size=samples, betas=(0.9, 0.95), max_grad_norm=1.0
    )

    with torch.no_grad(), bank.use([runs[0], None]):
        # shows the bank which dimension is the rows': a first batch of as many rows as tokens would not
        model(torch.zeros(2, 3, dtype=torch.int64, device=model.device))
    rng = random.Random(0)
    torch.manual_seed(0)
    for step in range(1, args.steps + 1):
        problems = rng.choices(training, k=args.questions)  # the same for every run
        asked = [problem for _ in runs for problem in problems for _ in range(samples)]
        adapters = [run for run in runs for _ in range(args.questions * samples)]  # one a row
        with bank.use(adapters):  # all sample in one batch
            tokens, seen, mask, texts = sample(model, tokenizer, [question for question, _ in asked], 12, temperature)
        rewards = torch.tensor([reward(text, answer) for text, (_, answer) in zip(texts, asked, strict=True)])
        length, right = mask.shape[1], []
        for rows in torch.arange(len(asked)).split(args.questions * samples):  # and learn in turns, for less memory
            own = [adapters[row] for row in rows]
            with bank.use(own):
                logits = model(tokens[rows], attention_mask=seen[rows], logits_to_keep=length + 1).logits[:, :-1]
                log_probs = token_log_probs(logits, tokens[rows, -length:], temperature)  # [B, T]
                (metrics,) = trainer.training_step(own, log_probs, None, rewards[rows], mask=mask[rows]).values()
            right.append(f"{metrics['reward_mean']:.0%}")
        print(f"step {step}: {' '.join(right)}", flush=True)

    def score(run, problems) -> float:
        with bank.use([run] * len(problems)):
            return accuracy(model, tokenizer, problems)

    scores = {run: score(run, chosen_by) for run in runs}
    for (rate, seed), right in scores.items():
        print(f"lr {rate:g}, seed {seed}: greedy accuracy {right:.0%}")
    best = max(runs, key=scores.__getitem__)
    bank.save(best, args.out)
    print(f"{args.out}: lr {best[0]:g}, seed {best[1]}; on {len(held_out)} sums held out {score(best, held_out):.0%}")


if __name__ == "__main__":
    main()
