"""Many adapters, one engine: requests on standard input, each with its adapter, replies of vLLM on standard output.

    python examples/serve_vllm.py alice=alice.safetensors bob=bob.safetensors < requests.jsonl

A request is a line {"adapter": "alice", "prompt": "What is 3 + 4?"}; without an adapter the bare model answers. Nothing
is exported, merged or rounded: the engine holds the numbers of each adapter (docs/vllm.md, for a server as well).
"""
from __future__ import annotations

import argparse
import json
import sys

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a directory, or a hub's name")
    parser.add_argument("--dtype", default="auto", help="of the weights, as the adapters were trained on")
    parser.add_argument("--context", type=int, help="most tokens of prompt and reply; else the model's own limit")
    parser.add_argument("--length", type=int, default=64, help="most tokens of a reply")
    args = parser.parse_args(argv)
    files = dict(adapter.split("=", 1) for adapter in args.adapters)

    llm = LLM(
        args.model, dtype=args.dtype, max_model_len=args.context, enable_lora=True, max_lora_rank=8,
        additional_config={"tinylora": next(iter(files.values()))},  # one file says which modules and which rank
    )  # fmt: skip
    adapters = {name: LoRARequest(name, number, file) for number, (name, file) in enumerate(files.items(), start=1)}
    requests = [json.loads(line) for line in sys.stdin]
    chats = [[{"role": "user", "content": request["prompt"]}] for request in requests]
    chosen = [adapters[request["adapter"]] if "adapter" in request else None for request in requests]
    settings = SamplingParams(temperature=0, max_tokens=args.length)
    for request, found in zip(requests, llm.chat(chats, settings, lora_request=chosen, use_tqdm=False), strict=True):
        print(json.dumps({**request, "reply": found.outputs[0].text}))


if __name__ == "__main__":
    main()
