"""What an adapter costs at 7B, 70B and 1T parameters on 1, 8 and 1,024 GPUs: counted, not measured.

    python bench/scale.py               the tables of docs/scale.md, from the formulae below
    python bench/scale.py --measure     first time a few matrices on this CPU: bench/results/factorisation.csv

Bytes and operations are counted by the formulae, which tests/bench/test_scale.py checks against counted buffers,
collectives and measured factorisations of small models. A time is a count over a datasheet's bandwidth: a floor,
labelled so. No GPU was timed.
"""
from __future__ import annotations

import argparse
import csv
import pathlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.grid import environment  # noqa: E402
from tinylora_kernels.distributed import deal  # noqa: E402
from tinylora_kernels.factors import subspace  # noqa: E402
from tinylora_kernels.factors.svd import truncated_svd  # noqa: E402

MEASURED = ROOT / "bench" / "results" / "factorisation.csv"
REPEATS = 5
RANK, NUMBERS, GROUPS = 2, 1, 13  # r, u, tie groups: the 13 numbers
DEVICES = (1, 8, 1024)
NODE = 8  # GPUs that split every matrix between them; more than a node are replicas of it

# NVIDIA H100 SXM datasheet: dense bf16, HBM3, NVLink in one direction; one 400 Gbit/s network port a GPU.
BF16_FLOPS, MEMORY, NVLINK, NETWORK = 989e12, 3.35e12, 450e9, 50e9


@dataclass(frozen=True)
class Matrix:
    """One kind of adapted weight.

    Attributes:
        count: how many of it.
        used: how many of them a token passes through; fewer where experts are chosen.
        column: split over its output features in tensor parallelism, else over its inputs.
        expert: on one device whole, never split.
    """

    out: int
    inputs: int
    count: int
    used: int
    column: bool = True
    expert: bool = False

    @property
    def entries(self) -> int:
        return self.out * self.inputs


@dataclass(frozen=True)
class Decoder:
    """A decoder's sizes; experts = 0: a dense feed-forward of `ffn`, else `experts` of that width, `chosen` a token."""

    name: str
    layers: int
    hidden: int
    kv: int
    ffn: int
    experts: int = 0
    chosen: int = 0

    def matrices(self) -> list[Matrix]:
        n, h = self.layers, self.hidden
        attention = [Matrix(h, h, n, n), Matrix(self.kv, h, 2 * n, 2 * n), Matrix(h, h, n, n, column=False)]
        count, used = n * max(self.experts, 1), n * max(self.chosen, 1)
        expert = self.experts > 0
        return attention + [
            Matrix(self.ffn, h, 2 * count, 2 * used, expert=expert),
            Matrix(h, self.ffn, count, used, column=False, expert=expert),
        ]


MODELS = (
    Decoder("7B", 28, 3584, 512, 18944),  # Qwen2.5-7B
    Decoder("70B", 80, 8192, 1024, 28672),  # Llama 3 70B
    Decoder("1T, 384 experts, 8 chosen", 61, 7168, 1024, 2048, experts=384, chosen=8),  # Kimi K2, plain attention
)


def layer_factor_bytes(out: int, rank: int, numbers: int) -> int:
    """Buffers of one adapted layer in fp32: U^T [r, out], S [r] and P' [u, r, r]."""
    return 4 * (rank * out + rank + numbers * rank * rank)


def factor_bytes(model: Decoder, devices: int) -> int:
    """Of all layers on one device: U whole, also where the matrix is split; experts spread over the node."""
    total = 0
    for m in model.matrices():
        here = -(-m.count // min(devices, NODE)) if m.expert else m.count
        total += here * layer_factor_bytes(m.out, RANK, NUMBERS)
    return total


def all_reduce_bytes(size: int, ranks: int) -> float:
    """What one rank sends in a ring all-reduce of `size` bytes."""
    return 2 * size * (ranks - 1) / ranks


def gradient_bytes(devices: int) -> float:
    """Sent by one device a step for v's mean over the replicas."""
    return all_reduce_bytes(4 * NUMBERS * GROUPS, max(devices // NODE, 1))


def tensor_parallel_bytes(
    matrices: list[Matrix], tokens: int, rank: int = RANK, numbers: int = NUMBERS
) -> dict[str, int]:
    """Bytes given to all-reduces in a node, forward and backward of `tokens`: the adapter's and the frozen model's.

    Column shards reduce t and a, 4 r bytes a token each; row shards v's gradient. The frozen model reduces its bf16
    activations where a pair of shards ends, forward, and where it begins, backward.
    """
    columns = sum(m.used for m in matrices if m.column and not m.expert)
    rows = [m for m in matrices if not m.column and not m.expert]
    return {
        "adapter": 2 * columns * tokens * 4 * rank + sum(m.used for m in rows) * 4 * numbers,
        "frozen": sum(2 * m.used * tokens * 2 * m.out for m in rows),
    }


@dataclass(frozen=True)
class Step:
    """Seconds of a step on one device, counts over the datasheet: frozen products, and the updates beside them."""

    frozen: float
    update: float

    @property
    def share(self) -> float:
        return self.update / (self.frozen + self.update)


def training_step(model: Decoder, tokens: int, split: int) -> Step:
    """Forward and backward with dx of `tokens` on one of `split` devices; attention, norms and the head are left out of
    the frozen part.

        frozen   2 out in operations a token forward, as many backward, over the devices
        update   y read and written forward, g read and written backward, in bf16: 8 bytes an output; t, 8 r bytes
        columns  of a split matrix: project, then add, each a pass, y widened to fp32 in between: 28 bytes an output
        rows     of a split matrix: every device updates its own summand of all outputs
    """
    frozen = update = 0.0
    for m in model.matrices():
        outputs, each = m.out / split, 8
        if split > 1 and not m.expert:
            outputs, each = (m.out / split, 2 * (2 + 4 + 4 + 2 + 2)) if m.column else (m.out, 8)
        frozen += m.used * tokens * 4 * m.entries / split / BF16_FLOPS
        update += m.used * tokens * (each * outputs + 8 * RANK) / MEMORY
    return Step(frozen, update)


def decode_step(model: Decoder, sequences: int) -> Step:
    """One token for each sequence: every weight that is used is read once (all experts, once the batch is large)."""
    frozen = update = 0.0
    for m in model.matrices():
        touched = min(m.count, m.used * sequences) if m.expert else m.count
        frozen += max(touched * 2 * m.entries / MEMORY, m.used * sequences * 2 * m.entries / BF16_FLOPS)
        update += (touched * 4 * RANK * m.out + m.used * sequences * 2 * 2 * m.out) / MEMORY
    return Step(frozen, update)


@dataclass
class Work:
    """Products of factorisations of one shape, by dtype; one with a sample of W's rows counts as that share of one.

    Attributes:
        rows: vectors multiplied by W and W^T.
        passes: over W.
        seconds: of CPU.
    """

    rows: dict[torch.dtype, float]
    passes: dict[torch.dtype, float]
    seconds: dict[torch.dtype, float]
    total: float = 0.0  # seconds of CPU, the small problems and the check of the entries included


def operations(shape: tuple[int, int], rows: float) -> float:
    """W x and W^T (W x) for `rows` vectors."""
    return 4 * shape[0] * shape[1] * rows


@contextmanager
def counted(out: int) -> Iterator[Work]:
    """Count and time the products of the factorisations of weights [out, ...] inside, on one thread."""
    work = Work({}, {}, {})
    multiply, threads = subspace.multiply, torch.get_num_threads()

    def timed(space, rows, dtype, left, image):
        begin = time.process_time()
        multiply(space, rows, dtype, left, image)
        work.seconds[dtype] = work.seconds.get(dtype, 0.0) + time.process_time() - begin
        share = len(space.weight) / out
        work.rows[dtype] = work.rows.get(dtype, 0.0) + share * len(rows)
        work.passes[dtype] = work.passes.get(dtype, 0.0) + share

    subspace.multiply = timed
    torch.set_num_threads(1)
    begin = time.process_time()
    try:
        yield work
    finally:
        work.total = time.process_time() - begin
        subspace.multiply = multiply
        torch.set_num_threads(threads)


def synthetic(out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """A bf16 weight whose leading singular values fall as i^-0.2 over noise, as bench/startup.py makes them."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.arange(1, 129) ** -0.2
    left = torch.randn(out, 128, generator=generator) / out**0.5 * strength
    weight = left @ torch.randn(128, inputs, generator=generator) / inputs**0.5
    noise = torch.randn(out, inputs, generator=generator)
    return (weight + noise * (129**-0.2 / (out**0.5 + inputs**0.5))).bfloat16()


def measure(shapes: list[tuple[int, int]]) -> list[dict]:
    """Factorise one matrix of each shape, nothing cached; a row of counts and CPU seconds, the least of a few, each."""
    rows = []
    for shape in shapes:
        weight, works = synthetic(*shape), []
        for _ in range(REPEATS):  # the first finds everything cold: code, pages, the thread pool
            with counted(shape[0]) as work:
                truncated_svd(weight, RANK, cache=False)
            works.append(work)
        work = min(works, key=lambda work: work.total)
        row = {"out": shape[0], "in": shape[1], "cpu_s": f"{work.total:.3f}"}
        for dtype, label in ((torch.float32, "fp32"), (torch.float64, "fp64")):
            done = operations(shape, work.rows[dtype])
            row |= {f"passes_{label}": f"{work.passes[dtype]:g}", f"rows_{label}": f"{work.rows[dtype]:g}"}
            row[f"gflops_{label}"] = f"{done / work.seconds[dtype] / 1e9:.2f}"
        rows.append(row | environment.describe())
    return rows


@dataclass(frozen=True)
class Solver:
    """The largest measured matrix: passes over W, vectors in them, operations a CPU second, by precision."""

    passes: tuple[float, float]  # fp32, fp64
    rows: tuple[float, float]
    rate: tuple[float, float]
    overhead: float  # CPU seconds beside the products for each row and column: orthogonalisation, small eigenproblems

    @staticmethod
    def of(row: dict) -> Solver:
        passes, rows, gflops = (
            tuple(float(row[f"{key}_{precision}"]) for precision in ("fp32", "fp64"))
            for key in ("passes", "rows", "gflops")
        )
        shape = int(row["out"]), int(row["in"])
        products = sum(operations(shape, vectors) / (1e9 * rate) for vectors, rate in zip(rows, gflops, strict=True))
        overhead = (float(row["cpu_s"]) - products) / sum(shape)
        return Solver(passes, rows, tuple(1e9 * rate for rate in gflops), overhead)

    def cpu_seconds(self, shape: tuple[int, int]) -> float:
        products = sum(operations(shape, rows) / rate for rows, rate in zip(self.rows, self.rate, strict=True))
        return products + self.overhead * sum(shape)

    def gpu_bytes(self, entries: int) -> float:
        """Traffic of all passes: a chunk is read in bf16, widened (a write), and read by two products."""
        return entries * (self.passes[0] * (2 + 3 * 4) + self.passes[1] * (2 + 3 * 8))


def solver() -> Solver:
    with open(MEASURED, newline="") as file:
        return Solver.of(list(csv.DictReader(file))[-1])


def largest_share(model: Decoder, devices: int) -> int:
    """Entries on the device that gets the most, dealt out as factorize_shared does."""
    sizes = {f"{i}.{j}": m.entries for i, m in enumerate(model.matrices()) for j in range(m.count)}
    return max(sum(sizes[name] for name in share) for share in deal(sizes, devices))


def tables() -> str:
    """Markdown: what docs/scale.md shows."""
    measured = solver()
    factorising = [
        "| model | adapted | matrices | GPUs | largest share, entries | CPU, one thread | GPU, bytes / HBM | "
        "gathering sharded weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    running = [
        "| model | GPUs | factors on a GPU | v's all-reduce a step | tensor parallel, adapter / frozen model | "
        "training, 4,096 tokens | decoding, 1 sequence | decoding, 64 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        entries = sum(m.entries * m.count for m in model.matrices())
        count = sum(m.count for m in model.matrices())
        cpu = sum(measured.cpu_seconds((m.out, m.inputs)) * m.count for m in model.matrices())
        one, many = decode_step(model, 1), decode_step(model, 64)
        for devices in DEVICES:
            share = largest_share(model, devices)
            link = NVLINK if devices <= NODE else NETWORK
            gather = "-" if devices == 1 else f"{2 * entries * (devices - 1) / devices / link:.2g} s"
            on_gpu = measured.gpu_bytes(share) / MEMORY
            factorising.append(
                f"| {model.name} | {entries:.3g} | {count:,} | {devices:,} | {share:.3g} | "
                f"{cpu * share / entries:.3g} s | {on_gpu:.2g} s | {gather} |"
            )
            training = training_step(model, 4096, min(devices, NODE))
            traffic = tensor_parallel_bytes(model.matrices(), 4096)
            decoding = f"{one.share:.2%} | {many.share:.2%}" if devices == 1 else "- | -"
            parallel = "-" if devices == 1 else f"{traffic['adapter'] / traffic['frozen']:.2%}"
            running.append(
                f"| {model.name} | {devices:,} | {factor_bytes(model, devices) / 1e6:.3g} MB | "
                f"{gradient_bytes(devices):.0f} B | {parallel} | {training.share:.1%} | {decoding} |"
            )
    return "\n".join([*factorising, "", *running])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="time factorisations on this CPU first")
    if parser.parse_args().measure:
        rows = measure([(512, 768), (1024, 1024), (2048, 1024), (2048, 2048), (3584, 3584)])
        with open(MEASURED, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print(tables())


if __name__ == "__main__":
    main()
