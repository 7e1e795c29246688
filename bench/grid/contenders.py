"""One adapter as every contender: the same function of x and v, written the ways a user might write it.

`build` feeds the gate, the timing and the memory measurement alike, so that all three see the same objects.

    frozen                  nn.Linear, nothing trained: the unit of every ratio
    frozen again            the same once more: what is left of its ratio to 1 is the noise of the run
    ours                    TinyLoRALayer
    delta                   F.linear(x, W + B R A): the update as the paper writes it, dense
    chain                   base(x) + x A^T R^T B^T in plain PyTorch
    chain compiled          the same under torch.compile
    peft                    PEFT's TinyLoRA as it comes: adapter in float32, x upcast to it
    peft no cast            with autocast_adapter_dtype=False (in float32 it is the same layer, so only for bf16)
    peft compiled, peft no cast compiled

A = sqrt(S) V^T and B = U sqrt(S), PEFT's split; ours is the same function with M = sqrt(S) R sqrt(S)^-1.

torch.compile runs with symbolic shapes and sees weights as arguments: one compilation serves the whole grid. The matrix
products are calls to the same GEMM library either way.
"""
from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylora_kernels.layers.layer import TinyLoRALayer
from tinylora_kernels.method.projection import scaled_projection

from .shapes import RANK, Case, Shape

FROZEN, AGAIN, OURS = "frozen", "frozen again", "ours"
COMPILED = ("chain compiled", "peft compiled", "peft no cast compiled")
NAMES = (FROZEN, AGAIN, OURS, "delta", "chain", "chain compiled", "peft", "peft no cast", *COMPILED[1:])
RIVALS = NAMES[3:]


@dataclass(frozen=True)
class Problem:
    """The data of one case: a weight with known leading singular triplets, one adapter, activations, a gradient.

    weight [out, in] and bias [out] in the case's dtype; left [out, r], sigma [r], right [in, r] fp32;
    fixed [u, r, r] P and v [u] fp32; x [1, tokens, in] and g [1, tokens, out] in the case's dtype.
    """

    case: Case
    weight: Tensor
    bias: Tensor | None
    left: Tensor
    sigma: Tensor
    right: Tensor
    fixed: Tensor
    v: Tensor
    x: Tensor
    g: Tensor


@functools.lru_cache(maxsize=1)
def planted_weight(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A Gaussian weight whose leading r singular triplets are planted, so that nobody has to compute them.

    Returns:
        W [out, in], U [out, r], sigma [r], V [in, r], all fp32: the rest of W is orthogonal to U and V, and shorter.
    """
    generator = torch.Generator().manual_seed(shape.out_features * 100_003 + shape.in_features)

    def orthonormal(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, RANK, generator=generator, dtype=torch.float64))[0].float()

    left, right = orthonormal(shape.out_features), orthonormal(shape.in_features)
    weight = torch.randn(shape.out_features, shape.in_features, generator=generator).div_(shape.in_features**0.5)
    weight.addmm_(left, left.T @ weight, alpha=-1).addmm_(weight @ right, right.T, alpha=-1)
    # The norm of the Gaussian part is about 1 + sqrt(out / in).
    sigma = torch.linspace(4, 3, RANK) * (1 + (shape.out_features / shape.in_features) ** 0.5)
    weight.addmm_(left * sigma, right.T)
    return weight, left, sigma, right


def make_problem(case: Case) -> Problem:
    """Draw the data of a case. x and g lean towards V and U, so that a missing or wrong update cannot pass the gate."""
    weight, left, sigma, right = planted_weight(case.shape)
    generator = torch.Generator().manual_seed(case.tokens * 1009 + case.numbers)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    return Problem(
        case, weight.to(case.dtype), normal(case.shape.out_features).to(case.dtype) if case.shape.bias else None,
        left, sigma, right,
        fixed=normal(case.numbers, RANK, RANK) / RANK**0.5,
        v=0.5 * normal(case.numbers) / case.numbers**0.5,
        x=(normal(1, case.tokens, case.shape.in_features) + 8 * normal(1, case.tokens, RANK) @ right.T).to(case.dtype),
        g=(normal(1, case.tokens, case.shape.out_features) + 8 * normal(1, case.tokens, RANK) @ left.T).to(case.dtype),
    )  # fmt: skip


def make_base(problem: Problem) -> nn.Linear:
    """The frozen layer, around the problem's own weight and bias."""
    out_features, in_features = problem.weight.shape
    base = nn.Linear(in_features, out_features, bias=problem.bias is not None, device="meta")
    base.weight = nn.Parameter(problem.weight, requires_grad=False)
    if problem.bias is not None:
        base.bias = nn.Parameter(problem.bias, requires_grad=False)
    return base


class LowRank(nn.Module):
    """What both plain versions hold: A [r, in], B [out, r] in the weight's dtype, P [u, r, r] and v [u] in fp32."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.base = make_base(problem)
        root = problem.sigma.sqrt()
        self.register_buffer("a", (root[:, None] * problem.right.T).to(problem.weight.dtype).contiguous())
        self.register_buffer("b", (problem.left * root).to(problem.weight.dtype).contiguous())
        self.register_buffer("fixed", problem.fixed.clone())
        self.v = nn.Parameter(problem.v.clone())

    def mixing(self) -> Tensor:
        # R = sum_i v_i P_i
        return torch.einsum("i,ijk->jk", self.v, self.fixed).to(self.a.dtype)


class DenseDelta(LowRank):
    def forward(self, x: Tensor) -> Tensor:
        # W' = W + B R A
        return F.linear(x, self.base.weight + (self.b @ self.mixing()) @ self.a, self.base.bias)


class Chain(LowRank):
    def forward(self, x: Tensor) -> Tensor:
        # y = W x + b + B R A x
        return self.base(x) + F.linear(F.linear(F.linear(x, self.a), self.mixing()), self.b)


def our_layer(problem: Problem) -> TinyLoRALayer:
    projection = scaled_projection(problem.fixed, problem.sigma, alpha=1.0, scaling="sqrt").float()
    basis = problem.left.T.contiguous()
    return TinyLoRALayer(make_base(problem), basis, problem.sigma, projection, nn.Parameter(problem.v.clone()))


def peft_layer(problem: Problem, *, cast: bool) -> nn.Module:
    """PEFT's TinyLoRA layer around the weight, built by get_peft_model itself and called without the model around it.

    PEFT runs a full SVD here, minutes at the larger widths. It is handed the planted triplets instead, and lays its
    buffers out from them as it always does.
    """
    from peft import TinyLoraConfig, get_peft_model

    holder = nn.Module()
    holder.linear = make_base(problem)
    config = TinyLoraConfig(r=RANK, u=problem.case.numbers, target_modules=["linear"])
    triplets = problem.left, problem.sigma, problem.right.T
    with mock.patch("torch.linalg.svd", return_value=triplets), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = get_peft_model(holder, config, autocast_adapter_dtype=cast).base_model.model.linear
    layer.tinylora_P["default"].copy_(problem.fixed)
    peft_vector(layer).data.copy_(problem.v)
    return layer


def peft_vector(layer: nn.Module) -> nn.Parameter:
    return layer.tinylora_v["default"]["0"]


@dataclass
class Contender:
    """A contender ready to run: `forward(x)`, the layer behind it, and its v (None: nothing is trained)."""

    name: str
    module: nn.Module
    v: nn.Parameter | None
    forward: Callable[[Tensor], Tensor]


def _call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


@functools.cache
def _compiled_call(kind: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """One compiled entry for each kind of contender; its guards and graphs are shared by all shapes."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.config.force_nn_module_property_static_shapes = False

    def call(module, x):
        return module(x)

    return torch.compile(call, dynamic=True)


def names_for(dtype: torch.dtype, *, compiled: bool = True) -> list[str]:
    """The contenders of a dtype: in fp32 PEFT's two settings are one layer."""
    names = [name for name in NAMES if compiled or name not in COMPILED]
    return names if dtype is not torch.float32 else [name for name in names if "no cast" not in name]


def build(problem: Problem, names: list[str]) -> dict[str, Contender]:
    """The contenders by name, all of one problem; they share its weight."""
    contenders = {}
    for name in names:
        kind = name.removesuffix(" compiled")
        if kind in (FROZEN, AGAIN):
            module, v = make_base(problem), None
        elif kind == OURS:
            module = our_layer(problem)
            v = module.v
        elif kind in ("peft", "peft no cast"):
            module = peft_layer(problem, cast=kind == "peft")
            v = peft_vector(module)
        else:
            module = {"delta": DenseDelta, "chain": Chain}[kind](problem)
            v = module.v
        forward = functools.partial(_compiled_call(kind), module) if kind != name else module
        contenders[name] = Contender(name, module, v, forward)
    return contenders
