"""Fused projections for the tests of update_parts: each part is an Inputs of its own, so that truth and yardstick are
those of `update`.
"""
from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tests.cases import BUDGET, Case, Inputs, Outputs, chain, error, exact, make_case
from tinylora_kernels.ops import reference
from tinylora_kernels.ops.schema import accumulation_dtype


@dataclass(frozen=True)
class PartCase:
    """Like Case, with parts of these sizes in these tie groups; inputs: E, t = x B of a column shard (0: t = y0 U)."""

    rows: int
    sizes: tuple[int, ...]
    groups: tuple[int, ...]
    rank: int = 2
    numbers: int = 1
    bias: bool = True
    lora_xs: bool = False
    adapters: int = 0
    per_sequence: bool = False
    inputs: int = 0
    pad: int = 0
    adds_bias: bool = False

    def __str__(self) -> str:
        parts = [f"N{self.rows}", "x".join(map(str, self.sizes)), "g" + "".join(map(str, self.groups)), f"r{self.rank}"]
        parts += [f"u{self.numbers}"] + ["nobias"] * (not self.bias) + ["xs"] * self.lora_xs
        parts += [f"K{self.adapters}{'seq' * self.per_sequence}"] if self.adapters else []
        parts += [f"E{self.inputs}"] * bool(self.inputs) + [f"pad{self.pad}"] * bool(self.pad)
        return "-".join(parts + ["addsbias"] * self.adds_bias)


PART_CASES = (
    PartCase(0, (16, 8), (0, 0)),
    PartCase(1, (1, 1), (0, 0), rank=1),
    PartCase(5, (7, 33, 12), (0, 1, 0), numbers=13),
    PartCase(17, (64, 32, 32), (0, 0, 0), numbers=4),
    PartCase(20, (576, 192, 192), (0, 1, 2), numbers=13, adapters=5),
    PartCase(24, (40, 24), (0, 1), rank=4, numbers=3, adapters=3, per_sequence=True, bias=False),
    PartCase(9, (129, 65), (0, 0), rank=8, numbers=2, pad=3),
    PartCase(6, (31, 17, 5, 2), (1, 0, 1, 0), rank=3, numbers=5),
    PartCase(12, (48, 16), (1, 0), lora_xs=True, numbers=4),
    PartCase(12, (48, 16), (0, 0), rank=4, lora_xs=True, numbers=16, adapters=64),
    PartCase(130, (1536, 1536), (0, 0), numbers=1),
    PartCase(3, (2100, 300), (0, 1), numbers=2, inputs=4100),
    PartCase(18, (64, 32, 32), (0, 1, 1), numbers=3, adapters=4, inputs=90, bias=False),
    PartCase(2, (9000, 40), (0, 0)),
    PartCase(21, (64, 33, 32), (0, 1, 0), numbers=3, bias=False, adds_bias=True),
    PartCase(24, (40, 24), (0, 1), rank=4, numbers=3, adapters=5, bias=False, adds_bias=True, pad=8),
    PartCase(9, (40, 24), (0, 1), numbers=3, inputs=50, bias=False, adds_bias=True),
)


@dataclass(frozen=True)
class PartInputs:
    """y, g [N, D]; the frozen tensors as update_parts takes them; `parts` has the same numbers part by part."""

    y: Tensor
    g: Tensor
    basis: Tensor
    v: Tensor
    projection: Tensor
    offset: Tensor | None
    bias: Tensor | None
    x: Tensor | None
    right: Tensor | None
    adapter_ids: Tensor | None
    ends: list[int]
    groups: list[int]
    parts: list[Inputs]

    def forward(self) -> tuple:
        """The arguments of update_parts after y."""
        return (self.basis, self.v, self.projection, self.offset, self.bias, self.x, self.right, self.adapter_ids,
                self.ends, self.groups)  # fmt: skip

    def backward(self, t: Tensor | None, need_input_grad: bool = True) -> tuple:
        """The arguments of update_parts_backward."""
        return (self.g, self.basis, self.v, self.projection, t, self.adapter_ids, self.ends, self.groups,
                need_input_grad)  # fmt: skip

    def clone_y(self) -> Tensor:
        if self.y.dim() != 2 or self.y.stride(0) == self.y.shape[1]:
            return self.y.clone()
        padded = torch.full((len(self.y), self.y.stride(0)), float("nan"), dtype=self.y.dtype)
        return padded[:, : self.y.shape[1]].copy_(self.y)


def make_part_case(case: PartCase, dtype: torch.dtype, draw: int = 0) -> PartInputs:
    parts = []
    vectors: dict[int, Tensor] = {}
    for p, (size, group) in enumerate(zip(case.sizes, case.groups, strict=True)):
        one = make_case(
            Case(case.rows, size, case.rank, case.numbers, case.bias and not case.inputs, case.lora_xs, case.adapters,
                 case.per_sequence, adds_bias=case.adds_bias), dtype, draw * 100 + p,
        )  # fmt: skip
        ids = parts[0].adapter_ids if parts else one.adapter_ids
        v = vectors.setdefault(group, one.v)
        parts.append(Inputs(one.y, one.g, one.basis, v, one.projection, one.offset, one.bias, ids))
    y, g = (torch.cat([getattr(p, name) for p in parts], dim=1) for name in ("y", "g"))
    if case.pad:
        y, g = (torch.nn.functional.pad(rows, (0, case.pad), value=float("nan"))[:, : y.shape[1]] for rows in (y, g))
    x = right = None
    if case.inputs:
        generator = torch.Generator().manual_seed(draw)
        x = torch.randn(case.rows, case.inputs, generator=generator).to(dtype)
        right = torch.randn(len(parts), case.rank, case.inputs, generator=generator) / case.inputs**0.5
        right = right.to(accumulation_dtype(dtype))
    return PartInputs(
        y, g, torch.cat([p.basis for p in parts], dim=1),
        torch.stack([vectors[group] for group in sorted(vectors)]), torch.stack([p.projection for p in parts]),
        torch.stack([p.offset for p in parts]) if parts[0].offset is not None else None,
        torch.cat([p.bias for p in parts]) if parts[0].bias is not None else None,
        x, right, parts[0].adapter_ids, list(accumulate(case.sizes)), list(case.groups), parts,
    )  # fmt: skip


def run_parts(backend, inputs: PartInputs) -> Outputs:
    """Both ops of a backend on copies of the inputs."""
    y = inputs.clone_y()
    t = backend.update_parts(y, *inputs.forward())
    g0, dv = backend.update_parts_backward(*inputs.backward(t))
    return Outputs(y, t, g0, dv)


def one_by_one(run, inputs: PartInputs) -> Outputs:
    """Outputs of `run`, given each part as an Inputs; dv summed over the parts of a tie group. Not for x and right."""
    outs = [run(part) for part in inputs.parts]
    dv = torch.zeros_like(inputs.v, dtype=outs[0].dv.dtype)
    for group, out in zip(inputs.groups, outs, strict=True):
        dv[group] += out.dv
    return Outputs(torch.cat([o.y for o in outs], 1), torch.stack([o.t for o in outs]),
                   torch.cat([o.g0 for o in outs], 1), dv)  # fmt: skip


def assert_parts_within_budget(found: list[Outputs], inputs: list[PartInputs], *, budget: float = BUDGET) -> None:
    """cases.assert_within_budget, against the exact parts and the plain chain of each."""
    truths, chains = [one_by_one(exact, i) for i in inputs], [one_by_one(chain, i) for i in inputs]
    for name in ("y", "t", "g0", "dv"):
        result, truth, plain = (torch.stack([getattr(o, name) for o in outs]) for outs in (found, truths, chains))
        ours, theirs = error(result, truth), error(plain, truth)
        rounding = torch.finfo(result.dtype).eps
        assert ours <= max(budget * theirs, rounding), f"{name}: error {ours:.3g}, the plain chain's {theirs:.3g}"


def check_parts(found: list[Outputs], inputs: list[PartInputs], case: PartCase) -> None:
    """Within the budget; a shard, whose y0 U is not t, to fp32's error and one rounding."""
    if not case.inputs:
        return assert_parts_within_budget(found, inputs)
    for ours, one in zip(found, inputs, strict=True):
        truth = run_parts(reference, one)
        assert error(ours.t, truth.t) < 2e-6 and error(ours.y, truth.y) < 2 * torch.finfo(ours.y.dtype).eps
        assert error(ours.g0, truth.g0) < 2 * torch.finfo(ours.y.dtype).eps and error(ours.dv, truth.dv) < 1e-5


def drawn(case: PartCase, dtype: torch.dtype) -> list[PartInputs]:
    return [make_part_case(case, dtype, draw) for draw in range(3)]
