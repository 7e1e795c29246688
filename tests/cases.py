"""The shapes that every test and benchmark shares, their inputs, and the error budget.

A case names the shape; `make_case` draws its inputs from the case alone, so that two tests see the same numbers.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylora_kernels.ops import reference
from tinylora_kernels.ops.schema import accumulation_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BUDGET = 2.0  # our error against float64 over the plain low-rank chain's error in the same dtype


@dataclass(frozen=True)
class Case:
    """N rows, D features, rank r, u numbers; adapters: K (0: one vector, no ids); pad: extra columns between rows.

    bias: the rows have the layer's bias in them, which the offset takes out; adds_bias: they have not; the op adds it.
    """

    rows: int
    features: int
    rank: int = 2
    numbers: int = 1
    bias: bool = True
    lora_xs: bool = False
    adapters: int = 0
    per_sequence: bool = False
    pad: int = 0
    adds_bias: bool = False

    def __str__(self) -> str:
        parts = [f"N{self.rows}", f"D{self.features}", f"r{self.rank}", f"u{self.numbers}"]
        parts += [] if self.bias else ["nobias"]
        parts += ["xs"] if self.lora_xs else []
        parts += [f"K{self.adapters}{'seq' if self.per_sequence else ''}"] if self.adapters else []
        parts += [f"pad{self.pad}"] if self.pad else []
        parts += ["addsbias"] if self.adds_bias else []
        return "-".join(parts)


CASES = (
    Case(0, 64),
    Case(1, 1, rank=1),
    Case(1, 576),
    Case(3, 1, rank=1, numbers=5),
    Case(5, 7, rank=2, numbers=13),
    Case(4, 31, rank=4, numbers=3, bias=False),
    Case(17, 33, rank=8, numbers=257),
    Case(9, 100, rank=3, numbers=2),
    Case(6, 65, rank=5, numbers=4, pad=3),
    Case(33, 576, rank=1, numbers=1, bias=False),
    Case(64, 896, rank=2, numbers=13),
    Case(130, 1536, rank=2, numbers=1),
    Case(40, 1000, rank=4, numbers=13, pad=24),
    Case(20, 576, rank=2, numbers=4, pad=1),
    Case(12, 4864, rank=8, numbers=1),
    Case(3, 18944, rank=2, numbers=13),
    Case(2, 40001, rank=2, numbers=1),
    Case(16, 129, rank=2, lora_xs=True, numbers=4),
    Case(16, 256, rank=8, lora_xs=True, numbers=64),
    Case(24, 200, rank=2, numbers=3, adapters=5),
    Case(24, 576, rank=2, numbers=13, adapters=3, per_sequence=True),
    Case(10, 65, rank=4, numbers=2, adapters=64, bias=False),
    Case(37, 513, rank=2, numbers=13, bias=False, adds_bias=True),
    Case(6, 40, rank=3, numbers=2, bias=False, adds_bias=True, pad=8),
    Case(24, 200, rank=4, numbers=3, adapters=5, bias=False, adds_bias=True),
)


@dataclass(frozen=True)
class Inputs:
    y: Tensor  # [N, D], possibly with padded rows
    g: Tensor  # [N, D]
    basis: Tensor  # [r, D]
    v: Tensor  # [u] or [K, u]
    projection: Tensor  # [u, r, r] or [r, r]
    offset: Tensor | None  # [r]
    bias: Tensor | None  # [D]
    adapter_ids: Tensor | None

    def to(self, dtype: torch.dtype) -> Inputs:
        """Activations in dtype, the rest in its accumulation dtype."""
        accumulate = accumulation_dtype(dtype)
        move = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, tensor in move.items():
            if tensor is not None and name != "adapter_ids":
                move[name] = _keep_rows(tensor, tensor.to(dtype if name in ("y", "g", "bias") else accumulate))
        return Inputs(**move)

    def on(self, device: torch.device | str) -> Inputs:
        """The same inputs on a device, strides kept."""
        move = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Inputs(**{k: None if t is None else _keep_rows(t, t.to(device)) for k, t in move.items()})

    def clone_y(self) -> Tensor:
        return _keep_rows(self.y, self.y)


def _keep_rows(like: Tensor, values: Tensor) -> Tensor:
    """A copy of values with the row stride of like."""
    if like.dim() != 2 or like.stride(0) == like.shape[1]:
        return values.clone()
    shape = like.shape[0], like.stride(0)
    out = torch.full(shape, float("nan"), dtype=values.dtype, device=values.device)[:, : like.shape[1]]
    return out.copy_(values)


def _seed(case: Case, draw: int) -> int:
    """Of the case alone, and the one it had before there were fields that are at their defaults."""
    fields = dataclasses.astuple(case)
    return hash((fields if case.adds_bias else fields[:-1], draw)) % 2**31


def make_case(case: Case, dtype: torch.dtype, draw: int = 0) -> Inputs:
    """Inputs whose activations are exact in dtype, so that float64 and dtype start from the same numbers."""
    generator = torch.Generator().manual_seed(_seed(case, draw))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    stride = case.features + case.pad
    y, g = (normal(case.rows, stride).to(dtype)[:, : case.features] for _ in range(2))
    basis = torch.linalg.qr(normal(max(case.features, case.rank), case.rank))[0][: case.features].T.contiguous()
    v = normal(*([case.adapters] if case.adapters else []), case.numbers) / case.numbers**0.5
    projection = normal(case.rank, case.rank) if case.lora_xs else normal(case.numbers, case.rank, case.rank)
    ids = None
    if case.adapters:
        count = case.rows // 4 if case.per_sequence else case.rows
        ids = torch.randint(-1, case.adapters, (count,), generator=generator)
    accumulate = accumulation_dtype(dtype)
    return Inputs(
        y, g, basis.to(accumulate), v.to(accumulate), projection.to(accumulate),
        normal(case.rank).to(accumulate) if case.bias else None,
        normal(case.features).to(dtype) if case.adds_bias else None, ids,
    )  # fmt: skip


@dataclass(frozen=True)
class Outputs:
    y: Tensor
    t: Tensor
    g0: Tensor
    dv: Tensor

    def cpu(self) -> Outputs:
        return Outputs(self.y.cpu(), self.t.cpu(), self.g0.cpu(), self.dv.cpu())


def run_ops(backend, inputs: Inputs) -> Outputs:
    """Both ops of a backend (anything with update and update_backward) on copies of the inputs."""
    y = inputs.clone_y()
    t = backend.update(y, inputs.basis, inputs.v, inputs.projection, inputs.offset, inputs.bias, inputs.adapter_ids)
    g0, dv = backend.update_backward(inputs.g, inputs.basis, inputs.v, inputs.projection, t, inputs.adapter_ids, True)
    return Outputs(y, t, g0, dv)


def exact(inputs: Inputs) -> Outputs:
    """The float64 truth for these very inputs."""
    return run_ops(reference, inputs.to(torch.float64))


class _Chain:
    """The plain PyTorch low-rank chain in the activation dtype, as a user would write it: the budget's yardstick."""

    @staticmethod
    def _mixing(inputs_v, projection, ids, rows):
        if ids is None:
            return reference.contract(inputs_v, projection)
        ids = ids.repeat_interleave(rows // max(len(ids), 1))
        mixing = reference.contract(inputs_v[ids.clamp(min=0)], projection)
        return mixing * (ids >= 0).view(-1, 1, 1)

    # Contiguous: where a CPU has AMX, oneDNN's bfloat16 product of a strided matrix multiplies the columns between its
    # rows by zero, and they are NaN here (torch 2.13, D = 1000, 24 columns of padding).
    @classmethod
    def update(cls, y, basis, v, projection, offset, bias, ids):
        low = basis.to(y.dtype)  # [r, D]
        t = y.contiguous() @ low.T - (0 if offset is None else offset.to(y.dtype))
        mixing = cls._mixing(v, projection, ids, len(y)).to(y.dtype)
        z = t @ mixing.T if ids is None else (mixing @ t.unsqueeze(-1)).squeeze(-1)
        y.copy_((y if bias is None else y + bias) + z @ low)
        return t

    @classmethod
    def update_backward(cls, g, basis, v, projection, t, ids, need_input_grad):
        low = basis.to(g.dtype)
        a = g.contiguous() @ low.T
        mixing = cls._mixing(v, projection, ids, len(g)).to(g.dtype)
        z = a @ mixing if ids is None else (a.unsqueeze(-2) @ mixing).squeeze(-2)
        g0 = g + z @ low
        if ids is None:
            return g0, reference.contract_backward(a.T @ t, projection.to(g.dtype))
        rows = ids.repeat_interleave(len(g) // max(len(ids), 1))
        outer = (a.unsqueeze(-1) * t.unsqueeze(-2))[rows >= 0]
        per_row = reference.contract_backward(outer, projection.to(g.dtype))
        return g0, torch.zeros_like(v, dtype=g.dtype).index_add_(0, rows[rows >= 0], per_row)


def chain(inputs: Inputs) -> Outputs:
    return run_ops(_Chain, inputs)


def error(found: Tensor, truth: Tensor) -> float:
    """Root-mean-square error relative to the truth's root-mean-square."""
    if truth.numel() == 0:
        return 0.0
    difference = (found.double() - truth.double()).square().mean().sqrt()
    return float(difference / truth.double().square().mean().sqrt().clamp(min=1e-30))


def assert_within_budget(
    found: Outputs | list[Outputs], inputs: Inputs | list[Inputs], *, budget: float = BUDGET
) -> None:
    """error of ours <= budget x error of the plain chain, for y, t, g0 and dv; never below the dtype's own rounding.

    Errors are pooled over the draws given: where an output is a handful of numbers, one draw of the chain's error is
    small by luck as often as not.
    """
    if isinstance(found, Outputs):
        found, inputs = [found], [inputs]
    truths, chains = [exact(i) for i in inputs], [chain(i) for i in inputs]
    for name in ("y", "t", "g0", "dv"):
        result, truth, plain = (torch.stack([getattr(o, name) for o in outs]) for outs in (found, truths, chains))
        ours, theirs = error(result, truth), error(plain, truth)
        # Where the chain happens to be exact (a single column, a single row) one rounding of the result is allowed.
        rounding = torch.finfo(result.dtype).eps
        assert ours <= max(budget * theirs, rounding), f"{name}: error {ours:.3g}, the plain chain's {theirs:.3g}"
