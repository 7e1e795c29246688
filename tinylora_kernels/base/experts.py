"""The experts of transformers' mixture models, one matrix at a time.

transformers keeps the experts of a layer in one module with 3-D parameters: gate_up_proj [E, 2 i, h] and down_proj
[E, h, i] (or up_proj where there is no gate; [E, in, out] where it says is_transposed). Every matrix of such a stack is
adapted like a layer of its own: its own SVD, its own P, its place in a tie group. An ExpertSlice stands for one of them
and owns nothing; its qualified name is that of the parameter and the expert's number,
"model.layers.0.mlp.experts.gate_up_proj.3".

Modules are known by what transformers' use_experts_implementation gives them (transformers.integrations.moe), so all
its mixture models are covered and nothing is imported.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard, cast

from torch import Tensor, nn
from torch.nn import functional as F


class StackedExperts(nn.Module):
    """What a stack of experts says of itself, which is how one is known: the classes of transformers share no base."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool  # weights are [E, in, out]
    is_concatenated: bool  # rows of gate and of up one after the other, not in turns
    has_post_expert_norm: bool

    if TYPE_CHECKING:  # called by transformers' forward, where there is what they are for

        def _apply_gate(self, y: Tensor) -> Tensor: ...

        def act_fn(self, y: Tensor) -> Tensor: ...

        def post_expert_norm(self, y: Tensor) -> Tensor: ...


MARKS = tuple(StackedExperts.__annotations__)


def is_experts(module: nn.Module) -> TypeGuard[StackedExperts]:
    """Whether a module is a stack of experts as transformers' experts interface describes them."""
    attributes = vars(module)
    return all(mark in attributes for mark in MARKS) and "down_proj" in module._parameters


def stack_names(experts: StackedExperts) -> tuple[str, str]:
    """The parameters that hold the matrices, in the order they are applied."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def why_not_experts(experts: StackedExperts) -> str | None:
    """Why a stack of experts cannot be adapted, one line; None where it can."""
    if getattr(experts, "_is_expert_parallel", False):
        return "its experts are spread over ranks (expert parallel), so their numbers differ from rank to rank"
    for name in stack_names(experts):
        weight = experts._parameters.get(name)
        if weight is None or weight.dim() != 3 or not weight.is_floating_point():
            found = "none" if weight is None else f"{weight.dtype} {list(weight.shape)}"
            return f"expected {name} as a floating-point parameter [experts, ., .], found {found}"
    return None


class ExpertSlice(nn.Module):
    """One expert's matrix in a stack: a linear layer whose weight is a view of the stack, wherever that moves.

    Args:
        experts: the module that holds the stack.
        stack: "gate_up_proj", "up_proj" or "down_proj".
        expert: which one.
    """

    def __init__(self, experts: StackedExperts, stack: str, expert: int):
        super().__init__()
        self._experts = (experts,)  # in a tuple, or nn.Module would register it as a child
        self.stack, self.expert = stack, expert
        self.training = experts.training

    @property
    def experts(self) -> StackedExperts:
        return self._experts[0]

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as [in, out]."""
        return self.experts.is_transposed

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.experts._parameters[self.stack]).detach()[self.expert]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.experts, f"{self.stack}_bias").detach()[self.expert] if self.experts.has_bias else None

    @property
    def in_features(self) -> int:
        return self.weight.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1 if self.transposed else 0]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T if self.transposed else self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.stack}[{self.expert}], in_features={self.in_features}, out_features={self.out_features}"


def expert_slices(experts: StackedExperts) -> dict[str, ExpertSlice]:
    """Every matrix of a stack under its name below the module, "gate_up_proj.0" and on."""
    return {
        f"{stack}.{expert}": ExpertSlice(experts, stack, expert)
        for stack in stack_names(experts)
        for expert in range(experts.num_experts)
    }
