"""What is trained: TinyLoRA, LoRA-XS, LoRA through PEFT, or every weight."""
from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from demo.generation import Assignment
from demo.models import PROJECTIONS, LanguageModel
from tinylora_kernels import AdapterBank, LoRAXSConfig, TinyLoRAConfig, apply_lora_xs, apply_tiny_lora
from tinylora_kernels.rl import GRPOTrainer, PopulationGRPO, PopulationSFT, SFTTrainer

TINYLORA, LORA_XS, LORA, FULL = "TinyLoRA", "LoRA-XS", "LoRA", "full"
OPTIMIZER = dict(betas=(0.9, 0.95), max_grad_norm=1.0)  # the demo's


@dataclass(frozen=True)
class Method:
    """One way to train a model.

    Attributes:
        kind: TINYLORA, LORA_XS, LORA or FULL.
        rank: of the frozen factors, or of LoRA's.
        u: trained numbers in each tie group (TinyLoRA).
        n_tie, tying: modules that share a vector, and which (TinyLoRA, LoRA-XS).
        storage: what v is rounded to after every step; optimizer state and arithmetic are float32 (TinyLoRA).
    """

    kind: str
    rank: int = 2
    u: int = 1
    n_tie: int = 1
    tying: str = "tiled"
    storage: str = "float32"

    @property
    def label(self) -> str:
        """What tells two methods of a study apart."""
        if self.kind == FULL:
            return FULL
        if self.kind == LORA:
            return f"LoRA r={self.rank}"
        tied = "" if self.n_tie == 1 else f" n_tie={self.n_tie}" + (" structured" if self.tying == "structured" else "")
        if self.kind == LORA_XS:
            return f"LoRA-XS r={self.rank}{tied}"
        stored = "" if self.storage == "float32" else f" {self.storage}"
        return f"TinyLoRA r={self.rank} u={self.u}{tied}{stored}"

    @property
    def bytes_a_number(self) -> int:
        return getattr(torch, self.storage).itemsize

    @property
    def many_at_once(self) -> bool:
        """Whether runs can share a batch, each with an adapter of its own."""
        return self.kind in (TINYLORA, LORA_XS)

    @property
    def family(self) -> Method:
        """The same for methods whose adapters fit one bank: TinyLoRA's P_i does not depend on u, so an adapter that
        moves the first numbers of every group alone is the one that has no others."""
        return replace(self, u=0) if self.kind == TINYLORA else self


@dataclass
class Run:
    """One learning rate and seed of a method, with random numbers of its own."""

    method: Method
    rate: float
    seed: int
    generator: torch.Generator = field(init=False)
    rewards: list[float] = field(default_factory=list, init=False)  # mean of each step; of SFT, minus the loss
    lengths: list[float] = field(default_factory=list, init=False)  # tokens of a reply, mean of each step; GRPO

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def name(self) -> str:
        return f"{self.method.label}, lr {self.rate:g}, seed {self.seed}"


class Together:
    """Runs that share every batch: an adapter of a bank for each, with the random P of its own seed.

    Their methods are of one family; the bank is as wide as the widest.
    """

    def __init__(self, model: LanguageModel, runs: Sequence[Run], trainer: Callable[..., object]):
        self.model, self.runs = model, list(runs)
        widest = max((run.method for run in runs), key=lambda method: method.u)
        adapt(model.module, widest, seed=0)
        tinylora = widest.kind == TINYLORA
        self.bank = AdapterBank(model.module, len(runs), trainable=True, own_seeds=tinylora)
        for run in runs:
            self.bank.add(run.name, seed=run.seed if tinylora else None)
        if tinylora:
            used = torch.tensor([run.method.u for run in runs]).unsqueeze(1)  # [K, 1]
            for table in self.bank.parameters():  # [K, u]
                moves = (torch.arange(table.shape[1]) < used).to(table)
                table.register_hook(lambda gradient, moves=moves: gradient * moves)
        self.storage = getattr(torch, widest.storage)
        self.trainer = trainer(self.bank, {run.name: run.rate for run in runs})

    def numbers(self, run: Run) -> int:
        tables = self.bank.parameters()
        return len(tables) * run.method.u if run.method.kind == TINYLORA else sum(t.shape[1] for t in tables)

    def assignment(self, owners: Sequence[Run]) -> Assignment:
        """The adapters of these prompts' owners."""
        return Assignment(self.bank, torch.tensor([self.bank.slot(run.name) for run in owners]))

    def step(self, owners: Sequence[Run], log_probs: Tensor, *data: Tensor | None, mask: Tensor) -> dict[str, dict]:
        """A step of each owner on its completions; metrics by run name."""
        metrics = self.trainer.training_step([run.name for run in owners], log_probs, *data, mask=mask)
        if self.storage != torch.float32:
            with torch.no_grad():
                for table in self.bank.parameters():
                    table.copy_(table.to(self.storage))
        return metrics

    def norm(self, run: Run) -> float:
        return self.bank.vectors(run.name).norm().item()


class Alone:
    """One run on a model of its own."""

    def __init__(self, model: LanguageModel, runs: Sequence[Run], trainer: Callable[..., object]):
        (self.run,) = runs
        self.model = model
        adapt(model.module, self.run.method, seed=self.run.seed)
        self.trained = [p for p in model.module.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.trained]
        self.trainer = trainer(model.module, self.run.rate)

    def numbers(self, run: Run) -> int:
        return sum(p.numel() for p in self.trained)

    def assignment(self, owners: Sequence[Run]) -> None:
        return None

    def step(self, owners: Sequence[Run], log_probs: Tensor, *data: Tensor | None, mask: Tensor) -> dict[str, dict]:
        return {self.run.name: self.trainer.training_step(log_probs, *data, mask=mask)}

    def norm(self, run: Run) -> float:
        """How far the trained numbers are from where they started."""
        pairs = zip(self.trained, self.start, strict=True)
        moved = [(p.detach() - start).double().square().sum() for p, start in pairs]
        return torch.stack(moved).sum().sqrt().item()


def attach(
    base: LanguageModel, runs: Sequence[Run], objective: str, samples: int, alone: bool = False
) -> Together | Alone:
    """Learners on a copy of the base; several runs need methods of one family, ``many_at_once`` and not ``alone``."""
    model = replace(base, module=copy.deepcopy(base.module))
    shared = runs[0].method.many_at_once and not alone
    make = Together if shared else Alone
    if objective == "grpo":
        kind = PopulationGRPO if shared else GRPOTrainer
        return make(model, runs, lambda of, lr: kind(of, group_size=samples, lr=lr, **OPTIMIZER))
    kind = PopulationSFT if shared else SFTTrainer
    return make(model, runs, lambda of, lr: kind(of, lr=lr, **OPTIMIZER))


def adapt(module: nn.Module, method: Method, seed: int) -> None:
    """Leave exactly the method's parameters trainable; seed is that of P, or of LoRA's random A."""
    if method.kind == TINYLORA:
        apply_tiny_lora(
            module,
            TinyLoRAConfig(
                frozen_rank=method.rank, trainable_dim=method.u, n_tie=method.n_tie, tying=method.tying,
                target_modules=PROJECTIONS, seed=seed,
            ),
            progress=False,
        )  # fmt: skip
    elif method.kind == LORA_XS:
        config = LoRAXSConfig(rank=method.rank, n_tie=method.n_tie, tying=method.tying, target_modules=PROJECTIONS)
        apply_lora_xs(module, config, progress=False)
    elif method.kind == LORA:
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(seed)
        config = LoraConfig(r=method.rank, lora_alpha=2 * method.rank, target_modules=PROJECTIONS)
        inject_adapter_in_model(config, module)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("lora_" in name)
    elif method.kind == FULL:
        # float32: in bfloat16 a weight swallows steps below 0.4% of itself
        module.float().requires_grad_(True)
    else:
        raise ValueError(f"method: expected {TINYLORA}, {LORA_XS}, {LORA} or {FULL}, found {method.kind!r}")
