"""What the ranks check beside the layouts: shared factorisation, checkpoints between layouts, refusals."""
from __future__ import annotations

import contextlib
import os
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from demo import workers
from demo.generation import generate
from demo.models import PROJECTIONS, tiny_model
from demo.recipes import adapter_config
from demo.tasks import task
from demo.training import Run, Settings
from tests.distributed import layouts
from tests.distributed.layouts import LAYOUTS, batch, config_of, model_of, parallel_plan, set_vectors
from tinylora_kernels import AdapterBank, TinyLoRAConfig, apply_tiny_lora, load_adapter, trainable_vectors
from tinylora_kernels import distributed as module_under_test
from tinylora_kernels.distributed import factorize_shared, replicate_adapter, save_adapter_once
from tinylora_kernels.factors.modules import factorize_matrix
from tinylora_kernels.layers import sharded
from tinylora_kernels.model.targets import target_names

CONFIG = config_of(torch.float32)


def sharing(rank: int, world: int) -> dict:
    """The matrices this rank factorised, from whole weights and from sharded ones, and the factors it ended with."""
    seen: list[str] = []

    def counted(name, matrix, *args, **kwargs):
        seen.append(name)
        assert type(matrix) is torch.Tensor
        return factorize_matrix(name, matrix, *args, **kwargs)

    module_under_test.factorize_matrix = counted
    try:
        whole = factorize_shared(model_of(torch.float32, 2), CONFIG)
        from_whole = list(seen)
        seen.clear()
        sharded = model_of(torch.float32, 2)
        parallelize_module(sharded, init_device_mesh("cpu", (world,)), parallel_plan(sharded, "", RowwiseParallel()))
        gathered = factorize_shared(sharded, CONFIG)
    finally:
        module_under_test.factorize_matrix = factorize_matrix
    same = all(torch.equal(whole[name].basis, gathered[name].basis) for name in whole)
    return {"whole": from_whole, "sharded": seen, "same": same, "bases": {n: f.basis.numpy() for n, f in whole.items()}}


def failing(rank: int, world: int) -> str:
    """Every rank hears of the one weight that cannot be factorised."""
    model = model_of(torch.float32, 2)
    model.layers[1].k_proj.weight.data[3, 2] = float("nan")
    try:
        factorize_shared(model, CONFIG)
    except ValueError as error:
        return str(error)
    return "no error"


def after_a_failure(rank: int, world: int) -> float:
    """How far the ranks' gradients are apart after a backward pass that a hook ended on all of them."""
    model = apply_tiny_lora(model_of(torch.float32, 2), CONFIG, progress=False)
    vectors = trainable_vectors(model)
    replicate_adapter(model)
    tokens = batch()[0][rank : rank + 1]

    def fail(*_):
        raise MemoryError("no memory left")

    hook = model.layers[0].q_proj.register_full_backward_hook(fail)
    with contextlib.suppress(MemoryError):
        model(tokens).square().mean().backward()
    hook.remove()
    model.zero_grad()
    model(tokens).square().mean().backward()
    own = torch.cat([v.grad for v in vectors])
    every = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(every, own)
    return max(float((other - own).abs().max()) for other in every)


def unused(rank: int, world: int) -> list[float]:
    """How far AdamW moves a vector that no rank used, and one that was frozen; and how far the gradient of one that the
    first rank alone used is from the mean.
    """
    torch.manual_seed(0)
    config = TinyLoRAConfig(trainable_dim=2, cache=False)
    model = apply_tiny_lora(nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), config, progress=False)
    vectors, x = trainable_vectors(model), torch.randn(4, 8)
    set_vectors(model)
    replicate_adapter(model)
    optimizer = torch.optim.AdamW(vectors, lr=0.1, weight_decay=0.5)
    sum(layer(x).square().mean() for layer in model).backward()
    optimizer.step()  # all have momentum now
    optimizer.zero_grad()
    before = [v.detach().clone() for v in vectors]
    some, frozen, _, always = model
    frozen.v.requires_grad_(False)
    (alone,) = torch.autograd.grad(some(x).square().mean(), some.v)
    sum(layer(x).square().mean() for layer in ([some] if rank == 0 else []) + [frozen, always]).backward()
    error = (some.v.grad - alone / world).abs().max()
    optimizer.step()
    moved = [float((v.detach() - old).abs().max()) for v, old in zip(vectors, before, strict=True)]
    assert min(moved[0], moved[3]) > 0
    return [moved[2], moved[1], float(error)]


def write_checkpoints(rank: int, world: int, layout: str, directory: str) -> None:
    """A distributed checkpoint and an adapter file from this layout."""
    placed = LAYOUTS[layout](model_of(torch.float32, 2), init_device_mesh("cpu", (world,)), CONFIG)
    set_vectors(placed.bare)
    checkpoint.save(placed.bare.state_dict(), checkpoint_id=os.path.join(directory, "dcp"))
    save_adapter_once(placed.bare, os.path.join(directory, "adapter.safetensors"))


def read_checkpoints(rank: int, world: int, layout: str, directory: str) -> list[float]:
    """Largest deviation of the logits from one process's, with the whole checkpoint and with the adapter file alone."""
    expected = layouts.one_process(model_of(torch.float32, 2), CONFIG)
    set_vectors(expected.bare)
    tokens, _ = batch()
    truth = expected.forward(tokens).detach()
    found = []
    for source in ("dcp", "adapter.safetensors"):
        bare = model_of(torch.float32, 2)
        placed = LAYOUTS[layout](bare, init_device_mesh("cpu", (world,)), CONFIG)
        if source == "dcp":
            with torch.no_grad():
                for parameter in bare.parameters():
                    parameter.zero_()
            state = bare.state_dict()
            checkpoint.load(state, checkpoint_id=os.path.join(directory, source))
            bare.load_state_dict(state)
        else:
            load_adapter(bare, Path(directory, source))
        found.append(layouts.relative(placed.forward(tokens[placed.rows]).detach(), truth[placed.rows]))
    return found


def uneven(rank: int, world: int) -> list[float]:
    """A column shard of 42 features over 4 ranks is 11, 11, 11 and 9: output, dx and dv beside the whole layer's."""

    def layer() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(20, 42)).double()

    whole, sharded = layer(), layer()
    parallelize_module(
        sharded, init_device_mesh("cpu", (world,)), {"0": ColwiseParallel(output_layouts=Replicate())}
    )
    results = []
    for model in (whole, sharded):
        apply_tiny_lora(model, config_of_one())
        set_vectors(model)
        x = torch.linspace(-1, 1, 5 * 20, dtype=torch.float64).view(5, 20).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, trainable_vectors(model)[0].grad))
    return [layouts.relative(found, expected) for expected, found in zip(*results, strict=True)]


def config_of_one():
    config = config_of(torch.float64)
    config.target_modules = None
    return config


def refusals(rank: int, world: int) -> list[str]:
    """What a layout without an update says."""
    mesh = init_device_mesh("cpu", (world,))
    model = model_of(torch.float32, 1)
    parallelize_module(model, mesh, parallel_plan(model, "", RowwiseParallel()))
    apply_tiny_lora(model, CONFIG, factors=factorize_shared(model, CONFIG))
    messages = []
    layer = model.layers[0].o_proj
    factors = layer.basis, layer.v, layer.projection, None
    for partial in ("avg", "max"):
        y = distribute_tensor(torch.ones(3, 24), mesh, [Replicate()])
        y = y.from_local(y.to_local(), mesh, [Partial(partial)])
        messages.append(error_of(lambda: sharded.update_sharded(y, layer.base, layer.name, factors, None)))
    vectors = {name: v.detach() for name, v in model.named_parameters() if v.requires_grad}
    tangents = {name: torch.ones_like(v) for name, v in vectors.items()}

    def loss(vectors: dict) -> torch.Tensor:
        return torch.func.functional_call(model, vectors, (batch()[0],)).square().mean()

    messages.append(error_of(lambda: torch.func.grad(loss)(vectors)))
    messages.append(error_of(lambda: torch.func.jvp(loss, (vectors,), (tangents,))))
    bank = AdapterBank(model, capacity=2)
    bank.add("a")
    with bank.use(["a"] * layouts.BATCH):
        messages.append(error_of(lambda: model(batch()[0])))
    bank.close()
    model.layers[0].k_proj.base.bias.requires_grad_()
    messages.append(error_of(lambda: model(batch()[0])))
    return messages


def demo_step(rank: int, world: int) -> np.ndarray:
    """The first moments of Adam after one learning step of the demo on four prompts, split over the ranks.

    Replies to the second and the fourth prompt all earn the same, so that a rank of its own for them has no gradient.
    """
    model = tiny_model()
    modules = len(target_names(model.module, PROJECTIONS))
    workers.adapt(model.module, adapter_config(13, modules))
    settings = Settings(steps=1, prompts=4, samples=4, lr=0.01, temperature=1.0)
    run = Run(model, task("digit-sums"), settings)
    prompts = [model.encode(problem.prompt) for problem in islice(run.problems, 4)]
    found = generate(model, prompts, [1.0] * 4, 8, torch.Generator().manual_seed(1))
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0] * 4, [1.0, 0.0, 0.0, 0.0], [0.0] * 4])
    own = torch.arange(rank, 4, world)
    run._learn([prompts[i] for i in own], found.select_prompts(own), rewards[own].flatten())
    moments = run.trainer.optimizer.state
    return torch.cat([moments[v]["exp_avg"] for v in trainable_vectors(model.module)]).numpy()


def error_of(call) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def check_all(rank: int, world: int, directory: str) -> dict:
    """Everything above, in one start of the processes."""
    found = {"sharing": sharing(rank, world), "failing": failing(rank, world), "uneven": uneven(rank, world)}
    found |= {"after a failure": after_a_failure(rank, world), "unused": unused(rank, world)}
    found |= {"refusals": refusals(rank, world), "demo": demo_step(rank, world)}
    pairs = {"FSDP2, adapted before": "tensor parallel, adapted after", "tensor parallel, adapted after": "DDP"}
    found["checkpoints"] = {}
    for number, (source, target) in enumerate(pairs.items()):
        place = os.path.join(directory, str(number))
        if rank == 0:
            os.mkdir(place)
        dist.barrier()
        write_checkpoints(rank, world, source, place)
        found["checkpoints"][source, target] = read_checkpoints(rank, world, target, place)
    return found
