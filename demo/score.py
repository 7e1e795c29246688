"""Score a saved adapter on a task's held-out problems: python -m demo.score --adapter FILE

Prints one line of JSON: greedy and sampled accuracy and the greedy replies. The demo runs it in a fresh process to show
that the file alone carries what was trained.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from tinylora_kernels.files.adapter import load_adapter

from .evaluation import evaluate
from .models import load_model
from .tasks import task


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--temperature", type=float, required=True)
    args = parser.parse_args(argv)
    model, problems = load_model(args.model), task(args.task)
    load_adapter(model.module, args.adapter, progress=False)
    found = evaluate(model, problems.held_out, args.temperature, problems.max_new_tokens)
    print(json.dumps({
        "greedy": found.greedy.accuracy, "sampled": found.sampled.accuracy, "replies": found.replies
    }))  # fmt: skip


if __name__ == "__main__":
    main()
