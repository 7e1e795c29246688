"""GRPO in TRL on SmolLM2, its rollouts by a vLLM engine under the live adapter, and by transformers' generate.

The same seed, prompts and rates; 840 numbers learn "What is a + b?". Each row is a step: what was rewarded, and where
its time went. The second way starts when the first is done.

    python bench/rollouts.py            bench/results/rollouts.csv and a table; in the environment of `make test-vllm`
    python bench/rollouts.py --steps 2 --ways native
"""
from __future__ import annotations

import argparse
import csv
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false",
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541",
}  # fmt: skip
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402

import tinylora_kernels as tk  # noqa: E402
from bench.grid import environment  # noqa: E402
from demo.models import smollm2_directory  # noqa: E402
from tinylora_kernels.integrations.trl import as_peft_model  # noqa: E402

FILE = "rollouts.csv"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS, SAMPLES, NEW = 4, 8, 12


def questions(count: int) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(1, 21, (count, 2), generator=generator).tolist()
    ask = "What is {} + {}? Answer with only the number."
    return datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": ask.format(a, b)}], "answer": str(a + b)} for a, b in pairs]
    )


def correct(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    found = [re.findall(r"-?\d+", said[0]["content"]) for said in completions]
    return [float(bool(numbers) and numbers[-1] == right) for numbers, right in zip(found, answer, strict=True)]


def run(way: str, steps: int, rate: float, record: Callable[[dict[str, Any]], None]) -> None:
    """Train; record is given each step when it is done."""
    base = str(smollm2_directory())
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.name_or_path = model.config._name_or_path = base
    config = tk.TinyLoRAConfig(trainable_dim=4, n_tie=1, target_modules=LINEAR)
    policy = as_peft_model(tk.apply_tiny_lora(model, config, progress=False))
    with tempfile.TemporaryDirectory() as directory:
        native = dict(
            use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.3, vllm_max_model_length=256
        ) if way == "native" else {}  # fmt: skip
        arguments = trl.GRPOConfig(
            output_dir=directory, per_device_train_batch_size=PROMPTS * SAMPLES, num_generations=SAMPLES,
            max_completion_length=NEW, max_steps=steps, learning_rate=rate, lr_scheduler_type="constant", beta=0.0,
            temperature=0.7, logging_steps=1, use_cpu=True, bf16=False, report_to=[], save_strategy="no", seed=1,
            gradient_checkpointing=False, **native,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            model=policy, reward_funcs=correct, args=arguments, train_dataset=questions(PROMPTS * steps),
            processing_class=transformers.AutoTokenizer.from_pretrained(base),
        )  # fmt: skip
        spent: dict[str, list[float]] = {"generating": [], "syncing": [], "step": []}

        def timed(owner: Any, name: str, what: str) -> None:
            inner = getattr(owner, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                began = time.perf_counter()
                result = inner(*args, **kwargs)
                spent[what].append(time.perf_counter() - began)
                return result

            setattr(owner, name, call)

        timed(trainer, "_generate_single_turn", "generating")
        timed(trainer, "training_step", "step")
        if way == "native":
            timed(trainer.vllm_generation, "sync_weights", "syncing")

        class Recorder(transformers.TrainerCallback):
            def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
                if "reward" not in logs:
                    return
                syncing = spent["syncing"][-1] if way == "native" else 0.0
                record({
                    "way": way, "step": len(spent["step"]), "reward": f"{logs['reward']:.4f}",
                    "seconds": f"{spent['step'][-1]:.2f}", "generating": f"{spent['generating'][-1] - syncing:.2f}",
                    "syncing": f"{syncing:.5f}", "bytes": 4 * 840 if way == "native" else 0,
                    "difference_mean": f"{logs.get('sampling/sampling_logp_difference/mean', 0):.2g}",
                    "difference_max": f"{logs.get('sampling/sampling_logp_difference/max', 0):.2g}",
                })  # fmt: skip

        trainer.add_callback(Recorder())
        trainer.train()
        if way == "native":
            trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--ways", default="native,generate")
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / FILE))
    arguments = parser.parse_args()
    import vllm

    facts = {**environment.describe(), "trl": trl.__version__, "vllm": vllm.__version__}
    rows: list[dict[str, Any]] = []
    for way in arguments.ways.split(","):
        found: list[dict[str, Any]] = []

        def record(row: dict[str, Any], found: list[dict[str, Any]] = found) -> None:
            found.append(row)
            rows.append(row | facts)
            with open(arguments.out, "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)

        run(way, arguments.steps, arguments.rate, record)
        third = max(1, len(found) // 3)
        mean = lambda rows, name: sum(float(row[name]) for row in rows) / len(rows)  # noqa: E731
        print(
            f"{way:10} reward {mean(found[:third], 'reward'):.3f} -> {mean(found[-third:], 'reward'):.3f}   "
            f"a step {mean(found, 'seconds'):.1f} s, of it generating {mean(found, 'generating'):.1f} s, "
            f"syncing {1e3 * mean(found, 'syncing'):.2f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
