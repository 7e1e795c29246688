"""What the GRPO and SFT steps share: the optimizer over the trained numbers, and a step that is all or nothing."""
from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..common.finite import finite_number, positive_number, whole_number
from ..common.interrupts import undone_by
from ..common.words import listed, one_line
from ..model.adapted import adapted_layers, expect_all_vectors

# What torch's schedulers add to an optimizer's groups, there or not as one was made.
OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}


def check_adam(
    betas: tuple[float, float], eps: float, weight_decay: float, max_grad_norm: float | None, *rates: object
) -> None:
    """The numbers of an Adam optimizer; ValueError names the one that is out of range."""
    for rate in rates:
        finite_number("lr", rate, at_least=0.0)
    for beta in betas:
        finite_number("betas", beta, at_least=0.0, below=1.0)
    finite_number("eps", eps, at_least=0.0)
    finite_number("weight_decay", weight_decay, at_least=0.0)
    if max_grad_norm is not None:
        positive_number("max_grad_norm", max_grad_norm)


class VectorTrainer:
    """Optimizer, gradient clipping, gradient accumulation and resume for a model's trainable parameters.

    Args:
        model: any module; the parameters with ``requires_grad`` are trained.  After ``apply_tiny_lora`` those are the
            vectors v, one per tie group.
        lr, betas, eps, weight_decay: of the Adam optimizer built here (decoupled weight decay, as in AdamW).
        max_grad_norm: clip the joint Euclidean norm of the gradient to this; None leaves it alone.
        accumulation_steps: calls of ``training_step`` whose gradients make one optimizer step: that of all their
            sequences in one batch, however unequal the numbers of tokens or sequences.
        optimizer: a ready ``torch.optim.Optimizer`` over these parameters, or a function from the list of parameters
            to one; lr, betas, eps and weight_decay are then its own business.

    A step either happens whole or raises and leaves parameters, optimizer state and accumulated gradients as they were.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        accumulation_steps: int = 1,
        optimizer: torch.optim.Optimizer | Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    ):
        self.model = model
        expect_all_vectors(adapted_layers(model), "model")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("model: no parameter requires grad; call apply_tiny_lora(model, config) first")
        check_adam(betas, eps, weight_decay, max_grad_norm, lr)
        self.max_grad_norm = max_grad_norm
        self.accumulation_steps = whole_number("accumulation_steps", accumulation_steps)
        if optimizer is None:
            optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        elif not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer(self.parameters)
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} computes the loss several times a step, by step(closure); take "
                "one whose step() takes the gradients as they are, such as Adam"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held.isdisjoint(id(p) for p in self.parameters):
            raise ValueError("optimizer: it holds none of the model's trainable parameters; build it from this model")
        self.optimizer = optimizer
        self.steps = 0  # optimizer steps taken
        self._pending = 0  # micro-steps accumulated since the last optimizer step
        self._weight = 0.0  # of those: what their averages were divided by

    def state_dict(self) -> dict:
        """Optimizer state and step count; the trained numbers themselves are the model's (``save_adapter``).

        Raises:
            RuntimeError: gradients are accumulated but not yet applied; finish the step first.
        """
        if self._pending:
            raise RuntimeError(
                f"state_dict: {self._pending} of {self.accumulation_steps} accumulation steps are pending; "
                "save after the optimizer step"
            )
        return {"version": 1, "steps": self.steps, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Resume from ``state_dict()``; anything that does not fit raises ValueError and changes nothing."""
        if not isinstance(state, dict) or set(state) != {"version", "steps", "optimizer"}:
            raise ValueError("trainer state: expected the keys version, steps and optimizer")
        if state["version"] != 1:
            raise ValueError(f"trainer state: expected version 1, found {state['version']!r}")
        steps, inner = whole_number("trainer state: steps", state["steps"], at_least=0), state["optimizer"]
        if not is_of_an_optimizer(inner):
            raise ValueError("trainer state: its optimizer entry is not the state of a torch optimizer")
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        sizes = [len(group["params"]) for group in inner["param_groups"]]
        if sizes != [len(group["params"]) for group in self.optimizer.param_groups]:
            raise ValueError(
                f"trainer state: it covers {sum(sizes)} parameters, this optimizer holds {len(held)}; "
                "it belongs to another model"
            )
        for name, value in ((name, value) for group in inner["param_groups"] for name, value in group.items()):
            for number in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(number, float):
                    finite_number(f"trainer state: {name}", number)
        for index, slots in inner["state"].items():
            if index not in range(len(held)):
                raise ValueError(f"trainer state: it knows a parameter {index!r}, this optimizer holds {len(held)}")
            for slot, value in slots.items():
                if isinstance(value, torch.Tensor) and value.dim() and value.shape != held[index].shape:
                    raise ValueError(
                        f"trainer state: {slot} of parameter {index} has shape {list(value.shape)}, "
                        f"expected {list(held[index].shape)}; it belongs to another model"
                    )
                if isinstance(value, torch.Tensor) and not bool(torch.isfinite(value).all()):
                    raise ValueError(f"trainer state: {slot} of parameter {index} holds NaN or infinity")
        put_back, before = _keep(self.optimizer), (self.steps, self._pending, self._weight)

        def undo() -> None:
            put_back()
            self.steps, self._pending, self._weight = before

        with undone_by(undo):
            self._take(inner)
            self.steps = steps
            self._pending, self._weight = 0, 0.0

    def _take(self, inner: dict) -> None:
        """Load the optimizer's state; ValueError, with the optimizer half changed, where it is of another kind."""
        kind, settings = type(self.optimizer).__name__, [set(group) for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(inner)
        except Exception as error:
            raise ValueError(f"trainer state: {kind} does not take it: {one_line(error)}") from error
        for was, group, saved in zip(settings, self.optimizer.param_groups, inner["param_groups"], strict=True):
            # after loading: torch adds what states of earlier versions lack
            lacks = was - set(group) - OF_SCHEDULERS
            beyond = set(saved) - was - OF_SCHEDULERS - {"param_names"}
            if lacks or beyond:
                found = f"lacks {listed(sorted(lacks))}" if lacks else f"has {listed(sorted(map(str, beyond)))}"
                raise ValueError(f"trainer state: expected the settings of {kind}, found one that {found}; "
                                 "it belongs to another kind of optimizer")
            for p in group["params"]:
                slots = {name for name, value in self.optimizer.state.get(p, {}).items() if value is not None}
                wanted = _slots_of(self.optimizer, group, p.dim()) if slots else None
                if wanted is not None and slots != wanted:
                    raise ValueError(f"trainer state: expected {listed(sorted(wanted)) or 'nothing'} for a parameter "
                                     f"of {kind}, found {listed(sorted(map(str, slots)))}; it belongs to another kind "
                                     "of optimizer")

    def _expect_the_models_vectors(self) -> None:
        held = {id(p) for p in self.parameters}
        for name, layer in adapted_layers(self.model).items():
            if layer.owner is layer and layer.v.requires_grad and id(layer.v) not in held:
                raise ValueError(
                    f"{name}.v: expected the parameter that this trainer was made with, found another one that trains: "
                    "it would stand still; write into v.data, or make the trainer anew"
                )

    def _apply(self, loss: torch.Tensor, weight: float) -> float:
        """Backward and, when the accumulation window is full, the optimizer step.  Returns the gradient norm.

        Args:
            loss: an average.
            weight: what it was divided by, tokens or sequences; 0: there was nothing to average, and the loss is 0.
        """
        self._expect_the_models_vectors()
        accumulated = [p.grad for p in self.parameters]
        before = self.steps, self._pending, self._weight
        put_back: list[Callable[[], None]] = []

        def undo() -> None:
            for each in put_back:
                each()
            for p, gradient in zip(self.parameters, accumulated, strict=True):
                p.grad = gradient
            self.steps, self._pending, self._weight = before

        with undone_by(undo):
            for p in self.parameters:
                p.grad = None
            loss.backward()
            fresh = [p.grad for p in self.parameters]
            if all(g is None for g in fresh):
                raise ValueError("log_probs: they do not depend on any trainable parameter of this trainer's model")
            total = self._weight + weight
            if self._pending and total:
                # the average of all so far: g <- (W a + w g) / (W + w)
                shares = self._weight / total, weight / total
                fresh = [_mixed(a, g, *shares) for a, g in zip(accumulated, fresh, strict=True)]
            norm = torch.nn.utils.get_total_norm([g for g in fresh if g is not None])
            if not bool(torch.isfinite(norm)):
                raise ValueError(f"gradient: its norm is {float(norm)}; the step was not taken")
            for p, gradient in zip(self.parameters, fresh, strict=True):
                p.grad = gradient
            self._pending, self._weight = self._pending + 1, total
            if self._pending == self.accumulation_steps:
                put_back.append(_keep(self.optimizer))
                if self.max_grad_norm is not None:
                    torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.steps += 1
                self._pending, self._weight = 0, 0.0
        return float(norm)


def is_of_an_optimizer(state: object) -> bool:
    """Whether it is laid out as torch's optimizers lay out their states."""
    if not isinstance(state, dict) or set(state) != {"state", "param_groups"}:
        return False
    slots, groups = state["state"], state["param_groups"]
    return (
        isinstance(slots, dict) and all(isinstance(value, dict) for value in slots.values())
        and isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
        and all(isinstance(group.get("params"), list) for group in groups)
    )  # fmt: skip


def _slots_of(optimizer: torch.optim.Optimizer, settings: dict[str, Any], dimensions: int) -> set[str] | None:
    """What an optimizer of this kind keeps of a parameter: seen on one of its own. None: that cannot be seen."""
    kind = type(optimizer)
    try:
        known = set(inspect.signature(kind).parameters) - {"params", "capturable", "fused"}
        one = torch.zeros((1,) * dimensions, requires_grad=True, device="cpu")
        tried = kind([one], **{name: value for name, value in settings.items() if name in known})
        one.grad = torch.zeros_like(one)
        tried.step()
    except Exception:  # of a class with arguments, or a step, of its own
        return None
    return {name for name, value in tried.state[one].items() if value is not None}


def _keep(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """What puts an optimizer's parameters, state and settings back as they are now."""
    held = optimizer.state, optimizer.param_groups
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [p.detach().clone() for p in parameters]
    state = {p: _copied(slots) for p, slots in optimizer.state.items()}
    settings = [_copied({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]

    @torch.no_grad()
    def put_back() -> None:
        optimizer.state, optimizer.param_groups = held
        for p, was in zip(parameters, numbers, strict=True):
            p.copy_(was)
        for p in list(optimizer.state):
            if p not in state:
                del optimizer.state[p]
        for p, slots in state.items():
            optimizer.state[p] = _copied(slots)
        for group, was in zip(optimizer.param_groups, settings, strict=True):
            for setting in set(group) - set(was) - {"params"}:
                del group[setting]
            group.update(_copied(was))

    return put_back


def _copied(values: dict) -> dict:
    return {k: v.clone() if isinstance(v, torch.Tensor) else copy.deepcopy(v) for k, v in values.items()}


def _mixed(a: torch.Tensor | None, b: torch.Tensor | None, of_a: float, of_b: float) -> torch.Tensor | None:
    parts = [gradient * share for gradient, share in ((a, of_a), (b, of_b)) if gradient is not None]
    return sum(parts[1:], parts[0]) if parts else None


def require_trainable(log_probs: torch.Tensor) -> None:
    """The log-probabilities must carry a graph; a merged model is the usual reason why they do not."""
    if not isinstance(log_probs, torch.Tensor) or not log_probs.requires_grad:
        raise ValueError(
            "log_probs: no gradient flows through them; compute them with autograd on, from the adapted model "
            "(not merged, adapters enabled)"
        )


def check_log_probs(name: str, value: torch.Tensor, shape: torch.Size, mask: torch.Tensor | None) -> None:
    """``value`` must be floating, of ``shape`` and finite wherever the mask selects a token."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a floating tensor, found {found}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected the shape of log_probs {list(shape)}, found {list(value.shape)}")
    finite = torch.isfinite(value)
    if mask is not None:
        finite = finite | ~mask.to(value.device)
    if not bool(finite.all()):
        raise ValueError(f"{name}: {int((~finite).sum())} of {value.numel()} values are not finite")


def as_mask(mask: object) -> torch.Tensor | None:
    """The mask as a tensor: a list or an array will do."""
    if mask is None or isinstance(mask, torch.Tensor):
        return mask
    try:
        return torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        found = f"a {type(mask).__name__}: {one_line(error)}"
        raise ValueError(f"mask: expected booleans or zeros and ones [B, T], found {found}") from None


def check_mask(mask: object, log_probs: torch.Tensor) -> torch.Tensor | None:
    """The mask as booleans on the device of ``log_probs`` ([B, T]; True or 1: a completion token), or None for [B].

    It may select no token: there is nothing to learn then.
    """
    if log_probs.dim() not in (1, 2) or len(log_probs) == 0:
        raise ValueError(f"log_probs: expected non-empty [B] or [B, T], found {list(log_probs.shape)}")
    if log_probs.dim() == 1:
        if mask is not None:
            raise ValueError("mask: log_probs are sums over whole sequences [B]; a mask needs log_probs of [B, T]")
        return None
    mask = as_mask(mask)
    if mask is None:
        return torch.ones(log_probs.shape, dtype=torch.bool, device=log_probs.device)
    if mask.shape != log_probs.shape:
        raise ValueError(f"mask: expected the shape of log_probs {list(log_probs.shape)}, found {list(mask.shape)}")
    selected = mask.to(log_probs.device).bool()
    if not bool((selected == mask.to(log_probs.device)).all()):
        raise ValueError("mask: expected booleans or zeros and ones")
    return selected
