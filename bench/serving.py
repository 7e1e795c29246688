"""What native adapters cost a vLLM engine: a decode step, the host, registering and changing, and a thousand at once.

Everything that is compared runs in one process on one thread, engines side by side, step by step in turn; ratios are
also given of processor time, which other processes on the machine do not lengthen. vLLM's own LoRA path serves the
exports of the same adapters.

    python bench/serving.py            bench/results/serving.csv and a table; in the environment of `make test-vllm`
    python bench/serving.py --tiny     the random model of the tests: a check that it runs, not a measurement
"""
from __future__ import annotations

import argparse
import csv
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip

import torch  # noqa: E402

import tinylora_kernels as tk  # noqa: E402
from bench.grid import environment  # noqa: E402

FILE = "serving.csv"
SEQUENCES, STEPS = 16, 120
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENGINE_LINEAR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def make_adapters(base: str, directory: pathlib.Path, count: int) -> None:
    """`count` adapters of 13 tied numbers, each as our file and as a LoRA directory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = tk.TinyLoRAConfig(trainable_dim=13, n_tie=10_000, target_modules=LINEAR)
    tk.apply_tiny_lora(model, config, progress=False)
    for i in range(count):
        for v in tk.trainable_vectors(model):
            v.data.normal_(std=0.03, generator=torch.Generator().manual_seed(i))
        tk.save_adapter(model, directory / f"{i}.safetensors")
        tk.export_lora(model, directory / f"lora{i}", rank=8)


def engine(base: str, directory: pathlib.Path, kind: str, dtype: str, capacity: int = 4096) -> Any:
    from vllm import LLM

    common: dict[str, Any] = dict(
        model=base, dtype=dtype, enforce_eager=True, max_model_len=512, max_num_seqs=SEQUENCES,
        enable_prefix_caching=False, seed=0,
    )  # fmt: skip
    if kind == "lora":
        common |= dict(enable_lora=True, max_loras=SEQUENCES + 1, max_lora_rank=8, lora_target_modules=ENGINE_LINEAR)
    elif kind.startswith("native"):
        setting = {"adapters": str(directory), "capacity": capacity, "own_seeds": kind != "native, one seed"}
        common |= dict(enable_lora=True, max_lora_rank=8, additional_config={"tinylora": setting})
    return LLM(**common).llm_engine


def request(kind: str, i: int, directory: pathlib.Path) -> Any:
    from vllm.lora.request import LoRARequest

    if kind == "bare":
        return None
    return LoRARequest(f"a{i}", i + 1, str(directory / (f"lora{i}" if kind == "lora" else f"{i}.safetensors")))


def start_decoding(one: Any, kind: str, directory: pathlib.Path, tag: str) -> None:
    from vllm import SamplingParams

    endless = SamplingParams(temperature=0, max_tokens=450, ignore_eos=True)
    for i in range(SEQUENCES):
        one.add_request(
            f"{tag}{i}", {"prompt_token_ids": list(range(20, 52))}, endless, lora_request=request(kind, i, directory)
        )
    for _ in range(4):
        one.step()


def decode_steps(
    base: str, directory: pathlib.Path, dtype: str, kinds: list[str], steps: int
) -> dict[str, list[tuple[float, float]]]:
    """(seconds, processor seconds) of each decode step of each engine; "bare, again" is the first one's next step."""
    engines = {kind: engine(base, directory, kind, dtype) for kind in kinds}
    for kind, one in engines.items():
        start_decoding(one, kind, directory, kind)
    again = "bare, again"
    kinds, engines[again] = [*kinds, again], engines["bare"]
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for n in range(steps):
        for kind in kinds if n % 2 == 0 else kinds[::-1]:
            began = time.perf_counter(), time.process_time()
            engines[kind].step()
            times[kind].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    for one in engines.values():
        one.engine_core.shutdown()
    return times


def timed(function: Callable[[int], Any], count: int) -> float:
    """Median seconds of a call."""
    took = []
    for i in range(count):
        began = time.perf_counter()
        function(i)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def memory() -> float:
    """Resident MB."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def host(base: str, directory: pathlib.Path, registered: list[int], record: Callable[..., None]) -> None:
    """What the manager takes of a step, and what adapters take of memory, by how many are registered."""
    from vllm.lora.request import LoRARequest

    from tinylora_kernels.integrations.vllm import numbers_path

    one = engine(base, directory, "native, one seed", "float32", capacity=registered[-1] + 64)
    manager = one.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.lora_manager
    spent: list[float] = []
    inner = manager.set_active_adapters

    def set_active_adapters(*arguments: Any) -> None:
        began = time.perf_counter()
        manager._last = None  # as where the batch changes at every step
        inner(*arguments)
        spent.append(time.perf_counter() - began)

    manager.set_active_adapters = set_active_adapters
    generator, known = torch.Generator().manual_seed(0), 0
    for count in registered:
        before, began = memory(), time.perf_counter()
        for i in range(known, count):
            v = torch.randn(1, 13, generator=generator) * 0.03
            one.add_lora(LoRARequest(f"n{i}", 1000 + i, numbers_path(v)))
        if count > known:
            record("registering one", 1e6 * (time.perf_counter() - began) / (count - known), "us", f"up to {count:,}")
            record("memory of one", 2**20 * (memory() - before) / (count - known), "bytes", f"up to {count:,}")
        known = count
        start_decoding(one, "native", directory, f"at{count}-")
        spent.clear()
        for _ in range(40):
            one.step()
        record("manager, of a step", 1e6 * statistics.median(spent), "us", f"{count:,} registered")
        one.abort_request([f"at{count}-{i}" for i in range(SEQUENCES)])
        one.step()
    record("table", manager.table.nbytes, "bytes", f"{manager.capacity:,} adapters of 13 numbers")


def files(base: str, directory: pathlib.Path, count: int, record: Callable[..., None], where: str) -> None:
    """Adding from a file and changing, through the engine's public calls."""
    from vllm.lora.request import LoRARequest

    from tinylora_kernels.files.format import read
    from tinylora_kernels.integrations.vllm import set_vectors

    one = engine(base, directory, "native", "float32")
    numbers = [read(directory / f"{i}.safetensors").v + 0.001 * i for i in range(count)]
    paths = [str(directory / f"{i}.safetensors") for i in range(count)]
    add = timed(lambda i: one.add_lora(LoRARequest(f"f{i}", 100 + i, paths[i % count])), 4 * count)
    record("adding, from a file", 1e3 * add, "ms", where)
    change = timed(lambda i: set_vectors(one, "policy", numbers[i % count] + 1e-4 * i), 100)
    record("changing, set_vectors", 1e3 * change, "ms", where)


def thousand(base: str, directory: pathlib.Path, count: int, record: Callable[..., None]) -> None:
    """As many requests, each under an adapter of its own, over as many of the bare base, by halves of ten."""
    from vllm import SamplingParams

    from tinylora_kernels.integrations.vllm.requests import adapter_request

    one = engine(base, directory, "native", "float32")
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    generator = torch.Generator().manual_seed(1)

    def run(tag: str, requests: list[Any]) -> tuple[float, float]:
        began = time.perf_counter(), time.process_time()
        for i, lora in enumerate(requests):
            one.add_request(f"{tag}-{i}", {"prompt_token_ids": list(range(20, 52))}, sampling, lora_request=lora)
        while one.has_unfinished_requests():
            one.step()
        return time.perf_counter() - began[0], time.process_time() - began[1]

    share, shares = max(1, count // 10), []
    run("warm", [None] * SEQUENCES)
    for n in range(10):
        vectors = [torch.randn(1, 13, generator=generator) * 0.03 for _ in range(share)]
        own = [adapter_request(f"u{n}-{i}", v) for i, v in enumerate(vectors)]
        first = run(f"own{n}", own) if n % 2 else None
        bare = run(f"bare{n}", [None] * share)
        shares.append((first or run(f"own{n}", own), bare))
    what = f"{count:,} requests under {count:,} adapters"
    for clock, unit in enumerate(("of the base", "of the base, processor")):
        record(what, statistics.median(own[clock] / bare[clock] for own, bare in shares), unit, "shares of a tenth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the random model of the tests")
    parser.add_argument("--steps", type=int, default=STEPS, help="decode steps of each engine")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of the decode steps")
    parser.add_argument("--only", help="one section: steps, host, files, across or thousand")
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--adapters", help=argparse.SUPPRESS)
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / FILE))
    arguments = parser.parse_args()
    import vllm

    facts = {**environment.describe(), "vllm": vllm.__version__}
    rows: list[dict[str, Any]] = []

    def record(what: str, value: float, unit: str, where: str) -> None:
        rows.append({"what": what, "where": where, "value": f"{value:.4g}", "unit": unit, **facts})
        print(f"{what:42} {where:34} {value:10.4g} {unit}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(arguments.adapters or scratch)
        if arguments.base is None:
            if arguments.tiny:
                from tests.integrations.vllm.models import make_base

                arguments.base = str(make_base(directory / "base"))
            else:
                from demo.models import smollm2_directory

                arguments.base = str(smollm2_directory())
            make_adapters(arguments.base, directory, SEQUENCES)
        wanted = lambda section: arguments.only in (None, section)  # noqa: E731
        if wanted("steps"):
            kinds = ["bare", "native", "native, one seed", "lora"]
            for dtype in arguments.dtypes:
                times = decode_steps(arguments.base, directory, dtype, kinds, 4 if arguments.tiny else arguments.steps)
                where = f"{SEQUENCES} sequences, {dtype}"
                for clock, unit in enumerate(("ms", "ms of processor")):
                    bare = statistics.median(step[clock] for step in times["bare"])
                    record("decode step, bare", 1e3 * bare, unit, where)
                for kind in (*kinds[1:], "bare, again"):
                    for clock, unit in enumerate(("of bare", "of bare, processor")):
                        pairs = zip(times[kind], times["bare"], strict=True)
                        ratio = statistics.median(ours[clock] / bare[clock] for ours, bare in pairs)
                        record(f"decode step, {kind}", ratio, unit, where)
        if wanted("host"):
            host(arguments.base, directory, [0, 100] if arguments.tiny else [0, 1_000, 100_000], record)
        if wanted("files"):
            files(arguments.base, directory, SEQUENCES, record, "in one process")
        if wanted("thousand"):
            thousand(arguments.base, directory, 40 if arguments.tiny else 1000, record)
        if arguments.only == "across":
            files(arguments.base, directory, SEQUENCES, record, "engine core in its own process")
        elif wanted("across"):
            across(arguments.base, directory, rows, facts)
    with open(arguments.out, "w", newline="") as file:
        writer = csv.DictWriter(file, ["what", "where", "value", "unit", *facts])
        writer.writeheader()
        writer.writerows(rows)


def across(base: str, directory: pathlib.Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """`files` with the engine core in a process of its own, as a server has it."""
    out = directory / "across.csv"
    given = ["--base", base, "--adapters", str(directory), "--out", str(out)]
    command = [sys.executable, __file__, "--only", "across", *given]
    subprocess.run(command, check=True, env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    with open(out, newline="") as file:
        rows.extend(csv.DictReader(file))


if __name__ == "__main__":
    main()
