"""Many adapters, one model, one batch: requests on standard input, each with its adapter, replies on standard output.

    python examples/serve_bank.py alice=alice.safetensors bob=bob.safetensors < requests.jsonl

A request is a line {"adapter": "alice", "prompt": "What is 3 + 4?"}; without an adapter the bare model answers. All
adapters of a call were trained with the same settings, the seed excepted. Needs grpo_loop.py beside it.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from grpo_loop import MODEL, load, sample

from tinylora_kernels import AdapterBank, load_adapter


def batches(lines: Iterable[str], size: int) -> Iterator[list[dict]]:
    lines = iter(lines)
    while batch := [json.loads(line) for line in islice(lines, size)]:
        yield batch


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--model", default=MODEL, help="a directory, or a hub's name")
    parser.add_argument("--batch", type=int, default=32, help="requests answered together")
    parser.add_argument("--length", type=int, default=64, help="most tokens of a reply")
    args = parser.parse_args(argv)
    files = dict(adapter.split("=", 1) for adapter in args.adapters)

    tokenizer, model = load(args.model)
    load_adapter(model, next(iter(files.values())))  # the first one's settings are everyone's
    bank = AdapterBank(model, capacity=len(files), own_seeds=True)
    for name, file in files.items():
        bank.load(name, file)  # refused where it was trained on another base
    with torch.no_grad(), bank.use([next(iter(files)), None]):
        # shows the bank which dimension is the requests': a first batch of 16 of 16 tokens would not
        model(torch.zeros(2, 3, dtype=torch.int64, device=model.device))
    for batch in batches(sys.stdin, args.batch):
        with bank.use([request.get("adapter") for request in batch]):
            replies = sample(model, tokenizer, [request["prompt"] for request in batch], args.length)[-1]
        for request, reply in zip(batch, replies, strict=True):
            print(json.dumps({**request, "reply": reply}), flush=True)


if __name__ == "__main__":
    main()
