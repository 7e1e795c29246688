"""Training many adapters in one batch, each exactly as if it were alone: a sweep of rates and seeds in a single run."""
from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bank import tenancy
from ..bank.bank import AdapterBank
from ..bank.selection import Selection
from ..common.finite import as_finite
from ..common.interrupts import followed_by, undone_by
from .grpo import GRPOTrainer, reward_numbers
from .sft import negative_log_likelihood
from .trainer import as_mask, check_adam, is_of_an_optimizer, require_trainable


class PopulationAdam(torch.optim.Optimizer):
    """AdamW over the rows of a trainable bank: every adapter has its own rate, step count and gradient norm.

    An adapter that takes no part in a step is left alone, moments and count included, as a separate optimizer would
    leave it. Its state goes by names: whoever loads it needs the adapters' names, not their slots.

    Args:
        bank: an AdapterBank(..., trainable=True).
        lr: one rate, or {adapter name: rate} for every adapter that is stepped. torch's schedulers move the one, or a
            factor of all of them.
        betas, eps, weight_decay: as in torch.optim.AdamW.
        max_grad_norm: clip each adapter's joint gradient norm over its tie groups to this.
    """

    def __init__(
        self,
        bank: AdapterBank,
        lr: float | Mapping[Hashable, float] = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ):
        if not bank.parameters():
            raise ValueError("bank: expected trainable tables, found frozen ones; use AdapterBank(..., trainable=True)")
        check_adam(betas, eps, weight_decay, max_grad_norm, *(lr.values() if isinstance(lr, Mapping) else (lr,)))
        self.bank = bank
        self.rates = lr
        super().__init__(
            bank.parameters(),
            # lr: what a scheduler moves, the rate itself or the factor of all of them
            dict(
                lr=1.0 if isinstance(lr, Mapping) else float(lr), betas=betas, eps=eps, weight_decay=weight_decay,
                max_grad_norm=max_grad_norm,
            ),
        )  # fmt: skip

    @torch.no_grad()
    def step(  # type: ignore[override]  # adapters for torch's closure: what moves is named, never all that has a gradient
        self, adapters: Sequence[Hashable]
    ) -> dict[Hashable, float]:
        """One step of the adapters named; returns each one's gradient norm before clipping.

        Raises:
            KeyError: an adapter is not in the bank or has no rate.
            ValueError: there is no gradient, or one is not finite; it names the adapter. No adapter has moved.
        """
        names = list(dict.fromkeys(adapters))
        slots = torch.tensor([self.bank.slot(name) for name in names], device="cpu")
        rates = torch.tensor([self._rate(name) for name in names], dtype=torch.float64, device="cpu")
        (group,) = self.param_groups
        tables = [p for p in group["params"] if p.grad is not None]
        if not tables:
            raise ValueError("gradient: expected one of the bank's tables, found none; run the model under bank.use, "
                             "with autograd on, and call backward()")
        gradients = [p.grad[slots.to(p.device)] for p in tables]  # [n, u] for each tie group
        norms = torch.stack([g.double().square().sum(1).cpu() for g in gradients]).sum(0).sqrt()  # [n]
        if not bool(torch.isfinite(norms).all()):
            bad = names[int((~torch.isfinite(norms)).nonzero()[0])]
            raise ValueError(f"adapter {bad!r}: its gradient is not finite; no adapter was stepped")
        scale = torch.ones_like(norms)
        if group["max_grad_norm"] is not None:
            scale = (group["max_grad_norm"] / (norms + 1e-6)).clamp(max=1.0)
        changed = [tensor for table in tables for tensor in (table, *self._state_of(table).values())]
        before = [tensor[slots.to(tensor.device)] for tensor in changed]  # of the rows that move

        @torch.no_grad()
        def undo() -> None:
            for tensor, was in zip(changed, before, strict=True):
                tensor[slots.to(tensor.device)] = was

        with undone_by(undo):
            for table, gradient in zip(tables, gradients, strict=True):
                self._step_table(table, gradient, slots.to(table.device), rates, scale, group)
        return dict(zip(names, norms.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """As torch's optimizers have it, and under "adapters" whose row each is: {name: slot}."""
        tenancy.forget(self)
        return {**super().state_dict(), "adapters": {name: self.bank.slot(name) for name in self.bank.names()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from ``state_dict()``, in any bank of the same model.

        Every adapter goes on with the moments and the count that the state has under its name, whatever slot it had
        then and has now. One that the state does not know begins as new. A state without names, of an earlier version,
        is taken slot by slot, with a warning.

        Raises:
            ValueError: the state does not fit; nothing has changed then.
        """
        arranged = self._arranged(state_dict)
        super().load_state_dict(arranged)
        tenancy.is_of_now(self)

    def _arranged(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with its rows where the adapters of the same names are now."""
        if not isinstance(state, dict) or not is_of_an_optimizer({k: v for k, v in state.items() if k != "adapters"}):
            raise ValueError("population state: expected one of PopulationAdam, found no state of an optimizer")
        (group,) = self.param_groups
        tables, settings = group["params"], set(group) & {"betas", "eps", "weight_decay", "max_grad_norm"}
        for saved in state["param_groups"]:
            if len(state["param_groups"]) != 1 or len(saved["params"]) != len(tables) or not settings <= set(saved):
                raise ValueError(
                    f"population state: expected one group of {len(tables)} tables with the settings of PopulationAdam,"
                    f" found {[len(each['params']) for each in state['param_groups']]}; it belongs to another optimizer"
                )
        names = state.get("adapters")
        if names is None:
            warnings.warn("population state: it does not say whose its rows are; they are taken slot by slot",
                          stacklevel=3)
            now = then = torch.arange(self.bank.capacity, device="cpu")
        else:
            if not isinstance(names, dict) or not all(type(slot) is int and slot >= 0 for slot in names.values()):
                raise ValueError("population state: expected {name: slot} under 'adapters', found something else")
            known = [name for name in self.bank.names() if name in names]
            now, then = (
                torch.tensor([slot(name) for name in known], dtype=torch.int64, device="cpu")
                for slot in (self.bank.slot, names.__getitem__)
            )
        arranged = {
            index: {key: _rows_moved(index, key, tables, value, now, then) for key, value in _slots(index, kept)}
            for index, kept in state["state"].items() if kept
        }  # fmt: skip
        return {"state": arranged, "param_groups": state["param_groups"]}

    def _state_of(self, table: Tensor) -> dict[str, Tensor]:
        state = self.state[table]
        if not state:
            count = torch.zeros(len(table), dtype=torch.float64, device="cpu")
            state.update(step=count, exp_avg=torch.zeros_like(table), exp_avg_sq=torch.zeros_like(table))
        return state

    def _step_table(self, table: Tensor, gradient: Tensor, slots: Tensor, rates: Tensor, scale: Tensor, group: dict):
        state = self._state_of(table)
        beta1, beta2 = group["betas"]
        state["step"][slots.cpu()] += 1
        count = state["step"][slots.cpu()]  # [n]

        def column(values: Tensor) -> Tensor:  # [n] -> [n, 1] beside the table
            return values.to(table).unsqueeze(1)

        gradient = gradient * column(scale)
        # m = b1 m + (1 - b1) g ;  s = b2 s + (1 - b2) g^2
        mean = state["exp_avg"][slots].lerp(gradient, 1 - beta1)
        square = state["exp_avg_sq"][slots].mul(beta2).addcmul(gradient, gradient, value=1 - beta2)
        state["exp_avg"][slots], state["exp_avg_sq"][slots] = mean, square
        # v = (1 - lr wd) v - lr m / (1 - b1^t) / (sqrt(s / (1 - b2^t)) + eps)
        step_size = column(rates / (1 - beta1**count))
        denominator = square.sqrt() / column((1 - beta2**count).sqrt()) + group["eps"]
        decayed = table[slots] * column(1 - rates * group["weight_decay"])
        table[slots] = decayed - step_size * mean / denominator

    def _rate(self, name: Hashable) -> float:
        scheduled = self.param_groups[0].get("lr")  # None in a group of a state that was saved without
        if not isinstance(self.rates, Mapping):
            return float(self.rates if scheduled is None else scheduled)
        if name not in self.rates:
            raise KeyError(f"adapter {name!r}: it has no learning rate; lr names {len(self.rates)} others")
        return (1.0 if scheduled is None else float(scheduled)) * float(self.rates[name])


def _slots(index: object, kept: dict[str, Any]) -> list[tuple[str, Any]]:
    if set(kept) != {"step", "exp_avg", "exp_avg_sq"}:
        found = ", ".join(sorted(map(str, kept)))
        raise ValueError(f"population state: expected step, exp_avg and exp_avg_sq of table {index}, found {found}")
    return list(kept.items())


def _rows_moved(index: Any, key: str, tables: list[Tensor], value: Any, now: Tensor, then: Tensor) -> Tensor:
    """One slot of a table's state: the rows `then` where `now` says, the others zero."""
    if index not in range(len(tables)):
        raise ValueError(f"population state: expected {len(tables)} tables, found one of number {index!r}")
    row = () if key == "step" else tuple(tables[index].shape[1:])
    most = int(then.max()) + 1 if len(then) else 0
    if not isinstance(value, Tensor) or value.dim() != 1 + len(row) or value.shape[1:] != row or len(value) < most:
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"population state: expected {key} of table {index} to have {most} rows of shape {list(row)} or more, "
            f"found {found}; it belongs to another bank"
        )
    as_finite(f"population state: {key} of table {index}", value)
    moved = torch.zeros(len(tables[index]), *row, dtype=value.dtype, device=value.device)
    moved[now.to(value.device)] = value[then.to(value.device)]
    return moved


class PopulationTrainer:
    """What PopulationGRPO and PopulationSFT share: a loss for each adapter, one backward, one step of each.

    Args:
        bank: trainable.
        lr: one rate or {adapter name: rate}.
        optimizer_options: betas, eps, weight_decay, max_grad_norm, as in PopulationAdam.
    """

    def __init__(self, bank: AdapterBank, lr: float | Mapping[Hashable, float] = 1e-3, **optimizer_options):
        self.bank = bank
        self.optimizer = PopulationAdam(bank, lr, **optimizer_options)

    def _step(
        self, adapters: Sequence[Hashable], log_probs: Tensor, loss_of: Callable[[list[int]], tuple[Tensor, dict]]
    ) -> dict[Hashable, dict[str, float]]:
        """One step of every adapter named; loss_of(its rows) returns its loss and metrics."""
        if len(adapters) != len(log_probs):
            raise ValueError(f"adapters: expected one a completion [{len(log_probs)}], found {len(adapters)}")
        rows: dict[Hashable, list[int]] = {}
        for row, name in enumerate(adapters):
            rows.setdefault(name, []).append(row)
        losses, metrics = [], {}
        for name, own in rows.items():
            try:
                loss, metrics[name] = loss_of(own)
            except ValueError as error:
                raise ValueError(f"adapter {name!r}: {error}") from error
            losses.append(loss)
        slots = {name: self.bank.slot(name) for name in rows}
        self._expect_what_ran([slots[name] for name in adapters])
        # of the model's own, which log_probs reach where they were made outside of a block
        gradients = [(p, p.grad) for p in self.bank.model.parameters() if p.requires_grad]

        def put_back() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            for p, gradient in gradients:
                p.grad = gradient

        with followed_by(put_back):
            self.optimizer.zero_grad(set_to_none=True)
            for p, _ in gradients:
                p.grad = None
            # Rows of different adapters share no trained number, so the gradient of the sum is each one's own.
            torch.stack(losses).sum().backward()
            self._expect_no_others(list(slots.values()))
            norms = self.optimizer.step(list(rows))
        return {name: {**values, "grad_norm": norms[name]} for name, values in metrics.items()}

    def _expect_what_ran(self, slots: list[int]) -> None:
        """Inside a block with an entry for each completion, the adapters are those of the block, row for row."""
        block = self.bank.selected.get()
        if not isinstance(block, Selection) or block.ended or self.bank.blocks.by_generators:
            return  # log_probs of a block that has ended: nothing says any more what ran in it
        ran = block.entries_of(len(slots))
        for row, (here, named) in enumerate(zip(ran or slots, slots, strict=True)):
            if here != named:
                raise ValueError(
                    f"adapters: expected {self._shown(here)} at row {row}, as in this block of bank.use, found "
                    f"{self._shown(named)}; name what the rows ran, or call this after the block if log_probs are of "
                    "another one"
                )

    def _expect_no_others(self, slots: list[int]) -> None:
        """There is a gradient, and none of adapters that are not named. One named may well have none: zero rewards,
        equal ones, replies that cancel out.
        """
        found = [table.grad for table in self.bank.parameters() if table.grad is not None]
        if not found:
            raise ValueError(
                "log_probs: they do not depend on this bank's adapters; compute them under `with bank.use(adapters)`"
            )
        # NaN is left to the step: it spreads to rows without any weight
        moved = torch.stack([((g != 0).any(1) & torch.isfinite(g).all(1)).cpu() for g in found]).any(0)  # [K]
        moved[slots] = False
        if bool(moved.any()):
            other = self._shown(int(moved.nonzero()[0]))
            raise ValueError(
                f"log_probs: they depend on {other}, expected the adapters named alone; name what ran, row for row"
            )

    def _shown(self, slot: int) -> str:
        name = next((name for name in self.bank.names() if self.bank.slot(name) == slot), None)
        return "the bare base" if slot < 0 else f"adapter {name!r}" if name is not None else f"slot {slot}"


class PopulationGRPO(PopulationTrainer):
    """GRPO on many adapters at once: loss, advantages, gradient and optimizer state of each are its own.

        bank = AdapterBank(model, 21, trainable=True, names=runs)
        trainer = PopulationGRPO(bank, lr={run: rate_of(run) for run in runs}, group_size=8)
        adapters = [run for run in runs for _ in range(prompts * 8)]       # one entry a completion
        with bank.use(adapters):
            trainer.training_step(adapters, log_probs=..., old_log_probs=..., rewards=..., mask=...)

    Args:
        bank: trainable.
        lr: one rate or {adapter name: rate}.
        group_size, kl_coeff, clip_eps, clip_eps_high, loss_type, max_tokens, scale_rewards, tis_cap: as in GRPOTrainer.
        optimizer_options: betas, eps, weight_decay, max_grad_norm, as in PopulationAdam.
    """

    def __init__(
        self,
        bank: AdapterBank,
        lr: float | Mapping[Hashable, float] = 1e-3,
        group_size: int = 4,
        kl_coeff: float = 0.0,
        clip_eps: float = 0.2,
        *,
        clip_eps_high: float | None = None,
        loss_type: str = "grpo",
        max_tokens: int | None = None,
        scale_rewards: bool = True,
        tis_cap: float = 2.0,
        **optimizer_options,
    ):
        super().__init__(bank, lr, **optimizer_options)
        self._objective = GRPOTrainer(
            bank.model, group_size, kl_coeff, clip_eps, clip_eps_high=clip_eps_high, loss_type=loss_type,
            max_tokens=max_tokens, scale_rewards=scale_rewards, tis_cap=tis_cap,
            optimizer=lambda p: torch.optim.SGD(p),
        )  # fmt: skip

    def training_step(
        self,
        adapters: Sequence[Hashable],
        log_probs: Tensor,
        old_log_probs: Tensor | None,
        rewards: Tensor | Sequence[float],
        *,
        mask: Tensor | Sequence | None = None,
        **others: Tensor | None,
    ) -> dict[Hashable, dict[str, float]]:
        """One step of every adapter named; arguments as in GRPOTrainer.training_step.

        Args:
            adapters: [B] names, one a completion; a prompt's completions are consecutive and of one adapter. They are
                those that made log_probs, row for row: inside the block of bank.use that is checked; after it, that
                no other adapter has a gradient.

        Returns:
            {adapter: metrics of GRPOTrainer.training_step}.

        Raises:
            ValueError: an argument does not fit or a gradient is not finite; nothing has changed then.
            KeyError: an adapter is not in the bank or has no rate; nor then.
        """
        numbers = reward_numbers(rewards)
        require_trainable(log_probs)
        if numbers.shape != (len(log_probs),):
            raise ValueError(f"rewards: expected one per completion [{len(log_probs)}], found {list(numbers.shape)}")
        given = {"mask": as_mask(mask), **others, "old_log_probs": old_log_probs}
        for key, value in given.items():
            _expect_rows(key, value, log_probs)

        def loss_of(own: list[int]) -> tuple[Tensor, dict]:
            chosen: dict[str, Any] = {key: None if value is None else value[own] for key, value in given.items()}
            return self._objective.loss(log_probs[own], chosen.pop("old_log_probs"), numbers[own], **chosen)

        return self._step(adapters, log_probs, loss_of)


class PopulationSFT(PopulationTrainer):
    """Maximum likelihood on many adapters at once: loss, gradient and optimizer state of each are its own.

    Args:
        bank, lr, optimizer_options: as in PopulationTrainer.
    """

    def training_step(
        self, adapters: Sequence[Hashable], log_probs: Tensor, mask: Tensor | Sequence | None = None
    ) -> dict[Hashable, dict[str, float]]:
        """One step of every adapter named; log_probs and mask as in SFTTrainer.training_step, under ``bank.use``.

        Args:
            adapters: [B] names, one a sequence; those that made log_probs, as in PopulationGRPO.

        Returns:
            {adapter: loss, perplexity, tokens, grad_norm}.

        Raises:
            ValueError: an argument does not fit or a gradient is not finite; nothing has changed then.
            KeyError: an adapter is not in the bank or has no rate; nor then.
        """
        require_trainable(log_probs)
        selected = as_mask(mask)
        _expect_rows("mask", selected, log_probs)

        def loss_of(own: list[int]) -> tuple[Tensor, dict]:
            return negative_log_likelihood(log_probs[own], None if selected is None else selected[own])

        return self._step(adapters, log_probs, loss_of)


def _expect_rows(name: str, value: object, log_probs: Tensor) -> None:
    """A row for each of log_probs; what else is to be right about it the loss says."""
    if log_probs.dim() not in (1, 2) or not len(log_probs):
        raise ValueError(f"log_probs: expected non-empty [B] or [B, T], found {list(log_probs.shape)}")
    if value is not None and not (isinstance(value, Tensor) and value.shape[:1] == log_probs.shape[:1]):
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected the shape of log_probs {list(log_probs.shape)}, found {found}")
