"""Every layout of a model over processes, beside the same model in one: how far outputs, gradients and v are apart.

    python -m tests.distributed.layouts      writes bench/results/layouts.csv: two and four processes, three dtypes
"""
from __future__ import annotations

import csv
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed.processes import run
from tests.models import TARGETS, TinyDecoder, tiny_decoder
from tinylora_kernels import TinyLoRAConfig, adapted_layers, apply_tiny_lora, trainable_vectors
from tinylora_kernels.distributed import factorize_shared, replicate_adapter

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "layouts.csv"
BATCH, LENGTH, VOCABULARY = 8, 8, 17
STEPS = 100
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")


@dataclass
class Placed:
    """A model in a layout: call `forward` on the rows of a batch that belong to this rank, `rows`."""

    bare: nn.Module  # the model, adapted; where v and the layers are found
    forward: nn.Module  # the same, perhaps in a wrapper
    rows: slice


def one_process(bare: nn.Module, config: TinyLoRAConfig) -> Placed:
    return Placed(apply_tiny_lora(bare, config, progress=False), bare, slice(None))


def data_rows(mesh: DeviceMesh) -> slice:
    share = BATCH // mesh.size()
    return slice(mesh.get_local_rank() * share, (mesh.get_local_rank() + 1) * share)


def ddp(bare: nn.Module, mesh: DeviceMesh, config: TinyLoRAConfig) -> Placed:
    apply_tiny_lora(bare, config, progress=False)
    wrapped = DistributedDataParallel(bare, process_group=mesh.get_group(), forward_sync_buffers=False)
    return Placed(bare, wrapped, data_rows(mesh))


def replicated(bare: nn.Module, mesh: DeviceMesh, config: TinyLoRAConfig) -> Placed:
    apply_tiny_lora(bare, config, progress=False)
    replicate_adapter(bare, mesh.get_group())
    return Placed(bare, bare, data_rows(mesh))


def fsdp_after(bare: nn.Module, mesh: DeviceMesh, config: TinyLoRAConfig) -> Placed:
    """Adapted, then sharded: v stays out of the shards."""
    vectors = replicate_adapter(apply_tiny_lora(bare, config, progress=False), mesh.get_group())
    for block in bare.layers:
        fully_shard(block, mesh=mesh, ignored_params=vectors)
    fully_shard(bare, mesh=mesh, ignored_params=vectors)
    return Placed(bare, bare, data_rows(mesh))


def fsdp_before(bare: nn.Module, mesh: DeviceMesh, config: TinyLoRAConfig) -> Placed:
    """Sharded, then adapted: the weights are gathered one by one to be factorised, each on one rank."""
    for block in bare.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(bare, mesh=mesh)
    apply_tiny_lora(bare, config, progress=False, factors=factorize_shared(bare, config, mesh.get_group()))
    replicate_adapter(bare, mesh.get_group())
    return Placed(bare, bare, data_rows(mesh))


def fsdp_each_linear(bare: nn.Module, mesh: DeviceMesh, config: TinyLoRAConfig) -> Placed:
    """Every frozen linear is a unit of its own."""
    vectors = replicate_adapter(apply_tiny_lora(bare, config, progress=False), mesh.get_group())
    for layer in adapted_layers(bare).values():
        fully_shard(layer.base, mesh=mesh)
    fully_shard(bare, mesh=mesh, ignored_params=vectors)
    return Placed(bare, bare, data_rows(mesh))


def parallel_plan(bare: TinyDecoder, suffix: str, rows: ColwiseParallel | RowwiseParallel) -> dict:
    """Columns into rows, twice a block; suffix ".base" where the layers are adapted already."""
    plan = {f"layers.{i}.{name}{suffix}": ColwiseParallel() for i in range(len(bare.layers)) for name in COLUMNS}
    return plan | {f"layers.{i}.{name}{suffix}": rows for i in range(len(bare.layers)) for name in ROWS}


def tensor_after(bare: TinyDecoder, mesh: DeviceMesh, config: TinyLoRAConfig) -> Placed:
    """Adapted, then made tensor parallel."""
    apply_tiny_lora(bare, config, progress=False)
    parallelize_module(bare, mesh, parallel_plan(bare, ".base", RowwiseParallel()))
    return Placed(bare, bare, slice(None))


def tensor_before(bare: TinyDecoder, mesh: DeviceMesh, config: TinyLoRAConfig) -> Placed:
    """Tensor parallel already when it is adapted: the plan names no part of ours."""
    parallelize_module(bare, mesh, parallel_plan(bare, "", RowwiseParallel()))
    apply_tiny_lora(bare, config, progress=False, factors=factorize_shared(bare, config, mesh.get_group()))
    return Placed(bare, bare, slice(None))


def sequence_parallel(bare: TinyDecoder, mesh: DeviceMesh, config: TinyLoRAConfig) -> Placed:
    """Between the blocks' linears each rank holds its part of the sequence: row shards end in a reduce-scatter."""
    tokens = Shard(1)
    plan = {
        name: ColwiseParallel(input_layouts=tokens) if isinstance(style, ColwiseParallel) else style
        for name, style in parallel_plan(bare, "", RowwiseParallel(output_layouts=tokens)).items()
    }
    plan["layers.0"] = PrepareModuleInput(
        input_layouts=(Replicate(),), desired_input_layouts=(tokens,), use_local_output=True
    )
    plan["lm_head"] = ColwiseParallel(input_layouts=tokens, output_layouts=Replicate())
    parallelize_module(bare, mesh, plan)
    apply_tiny_lora(bare, config, progress=False, factors=factorize_shared(bare, config, mesh.get_group()))
    return Placed(bare, bare, slice(None))


def fsdp_and_tensor(bare: TinyDecoder, mesh: DeviceMesh, config: TinyLoRAConfig) -> Placed:
    """Two ways at once on a 2-D mesh: pairs of ranks split every matrix, and pairs of pairs split the batch."""
    both = init_device_mesh("cpu", (mesh.size() // 2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(bare, both["tensor"], parallel_plan(bare, "", RowwiseParallel()))
    apply_tiny_lora(bare, config, progress=False, factors=factorize_shared(bare, config))
    vectors = replicate_adapter(bare, both["data"].get_group())
    for block in bare.layers:
        fully_shard(block, mesh=both["data"], ignored_params=vectors)
    fully_shard(bare, mesh=both["data"], ignored_params=vectors)
    return Placed(bare, bare, data_rows(both["data"]))


LAYOUTS: dict[str, Callable[[nn.Module, DeviceMesh, TinyLoRAConfig], Placed]] = {
    "DDP": ddp,
    "replicate_adapter alone": replicated,
    "FSDP2, adapted before": fsdp_after,
    "FSDP2, adapted after": fsdp_before,
    "FSDP2, each linear a unit": fsdp_each_linear,
    "tensor parallel, adapted before": tensor_after,
    "tensor parallel, adapted after": tensor_before,
    "tensor and sequence parallel": sequence_parallel,
    "FSDP2 x tensor parallel": fsdp_and_tensor,
}
FOUR_ONLY = ("FSDP2 x tensor parallel",)


@dataclass
class Deviation:
    """One layout in one dtype beside one process.

    Attributes:
        output, gradient: largest deviation over ranks relative to the largest entry, of the logits and of v's gradient.
        own: the deviation of one process in this dtype from float64, for the two: what rounding alone does.
        vector_bytes: of all v.
        collectives: how many of each kind, and the bytes given to them, in a forward and backward.
    """

    layout: str
    processes: int
    dtype: str
    output: float
    own_output: float
    gradient: float
    own_gradient: float
    vector_bytes: int
    collectives: str


@dataclass
class Training:
    """v after STEPS steps of Adam: whether all ranks hold the same bits, and how far they are from one process."""

    layout: str
    processes: int
    steps: int
    identical: bool
    deviation: float


class Traffic(TorchDispatchMode):
    """Counts collectives and the bytes of their inputs, by kind."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function._schema.name.partition("::")[2].strip("_")
            if name not in ("wait_tensor", "wrap_tensor_autograd"):
                self.calls[name] += 1
                self.bytes[name] += sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        return function(*args, **(kwargs or {}))


def config_of(dtype: torch.dtype) -> TinyLoRAConfig:
    """v in float64 where all else is, so that nothing hides behind its rounding."""
    v_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    return TinyLoRAConfig(trainable_dim=3, n_tie=4, target_modules=TARGETS, cache=False, v_dtype=v_dtype)


def model_of(dtype: torch.dtype, blocks: int) -> TinyDecoder:
    return tiny_decoder(blocks=blocks, bias=True).to(dtype)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    return tokens, torch.randn(BATCH, LENGTH, VOCABULARY, generator=generator)


def forward_backward(placed: Placed) -> tuple[Tensor, Tensor]:
    """Logits [rows, T, vocabulary] and the gradient of all v [groups * u] of the batch's mean loss."""
    tokens, target = batch()
    for v in trainable_vectors(placed.bare):
        v.grad = None
    logits = placed.forward(tokens[placed.rows])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    (wide * target[placed.rows]).sum(dim=(1, 2)).mean().backward()
    return logits.detach(), torch.cat([v.grad for v in trainable_vectors(placed.bare)])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def set_vectors(bare: nn.Module) -> None:
    """Far enough from zero that the update shows in every output."""
    with torch.no_grad():
        for group, v in enumerate(trainable_vectors(bare)):
            v.copy_(0.1 * torch.sin(torch.arange(v.numel()) + group + 1.0))


@functools.cache
def alone(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and v's gradient of one process on the whole batch."""
    placed = one_process(model_of(dtype, 2), config_of(dtype))
    set_vectors(placed.bare)
    return forward_backward(placed)


def measure(name: str, world: int, dtype: torch.dtype) -> Deviation:
    mesh = init_device_mesh("cpu", (world,))
    placed = LAYOUTS[name](model_of(dtype, 2), mesh, config_of(dtype))
    set_vectors(placed.bare)
    true_logits, true_gradient = alone(torch.float64)
    own_logits, own_gradient = alone(dtype)
    with Traffic() as traffic:
        logits, gradient = forward_backward(placed)
    deviations = torch.tensor([relative(logits, own_logits[placed.rows]), relative(gradient, own_gradient)])
    dist.all_reduce(deviations, op=dist.ReduceOp.MAX)
    counts = "; ".join(f"{count} {kind}, {traffic.bytes[kind]} B" for kind, count in sorted(traffic.calls.items()))
    return Deviation(
        name, world, str(dtype).removeprefix("torch."), deviations[0].item(), relative(own_logits, true_logits),
        deviations[1].item(), relative(own_gradient, true_gradient), own_gradient.nbytes, counts,
    )  # fmt: skip


def train(placed: Placed, steps: int) -> Tensor:
    """Adam on all v, [groups * u]."""
    vectors = trainable_vectors(placed.bare)
    optimizer = torch.optim.Adam(vectors, lr=0.01)
    for _ in range(steps):
        forward_backward(placed)
        optimizer.step()
    return torch.cat([v.detach() for v in vectors])


@functools.cache
def trained_alone(steps: int) -> Tensor:
    return train(one_process(model_of(torch.float32, 1), config_of(torch.float32)), steps)


def measure_training(name: str, world: int, steps: int = STEPS) -> Training:
    mesh = init_device_mesh("cpu", (world,))
    found = train(LAYOUTS[name](model_of(torch.float32, 1), mesh, config_of(torch.float32)), steps)
    everyone = [torch.empty_like(found) for _ in range(world)]
    dist.all_gather(everyone, found)
    identical = all(torch.equal(other, found) for other in everyone)
    return Training(name, world, steps, identical, relative(found, trained_alone(steps)))


def layouts_of(world: int) -> list[str]:
    return [name for name in LAYOUTS if world == 4 or name not in FOUR_ONLY]


def measure_all(rank: int, world: int, dtypes: list[torch.dtype], trained: list[str]) -> tuple[list, list]:
    deviations = [measure(name, world, dtype) for name in layouts_of(world) for dtype in dtypes]
    return deviations, [measure_training(name, world) for name in trained]


def main() -> None:
    rows = []
    for world in (2, 4):
        dtypes = [torch.float64, torch.float32, torch.bfloat16]
        deviations, trainings = run(world, measure_all, dtypes, layouts_of(world))[0]
        trained = {training.layout: training for training in trainings}
        for deviation in deviations:
            row = {key: f"{v:.2g}" if isinstance(v, float) else v for key, v in asdict(deviation).items()}
            training = trained[deviation.layout]
            if deviation.dtype == "float32":
                row |= {"steps": training.steps, "identical": training.identical}
                row["v_after_steps"] = f"{training.deviation:.2g}"
            rows.append(row)
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    print(f"{RESULTS}: {len(rows)} rows")


if __name__ == "__main__":
    main()
