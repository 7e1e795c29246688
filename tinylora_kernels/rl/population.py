"""Training many adapters in one batch, each exactly as if it were alone: a sweep of rates and seeds in a single run."""
from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from ..bank.bank import AdapterBank
from ..common.interrupts import undone_by
from .grpo import GRPOTrainer, reward_numbers
from .sft import negative_log_likelihood
from .trainer import check_adam


class PopulationAdam(torch.optim.Optimizer):
    """AdamW over the rows of a trainable bank: every adapter has its own rate, step count and gradient norm.

    An adapter that takes no part in a step is left alone, moments and count included, as a separate optimizer would
    leave it.

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
            ValueError: a gradient is not finite; it names the adapter, and no adapter has moved.
        """
        names = list(dict.fromkeys(adapters))
        slots = torch.tensor([self.bank.slot(name) for name in names], device="cpu")
        rates = torch.tensor([self._rate(name) for name in names], dtype=torch.float64, device="cpu")
        (group,) = self.param_groups
        tables = [p for p in group["params"] if p.grad is not None]
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
        self, adapters: Sequence[Hashable], count: int, loss_of: Callable[[list[int]], tuple[Tensor, dict]]
    ) -> dict[Hashable, dict[str, float]]:
        """One step of every adapter named; loss_of(its rows) returns its loss and metrics."""
        if len(adapters) != count:
            raise ValueError(f"adapters: expected one a completion [{count}], found {len(adapters)}")
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
        # Rows of different adapters share no trained number, so the gradient of the sum is each one's own.
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        try:
            norms = self.optimizer.step(list(rows))
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return {name: {**values, "grad_norm": norms[name]} for name, values in metrics.items()}


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
        rewards: Tensor,
        *,
        mask: Tensor | None = None,
        **others: Tensor | None,
    ) -> dict[Hashable, dict[str, float]]:
        """One step of every adapter named; arguments as in GRPOTrainer.training_step.

        Args:
            adapters: [B] names, one a completion; a prompt's completions are consecutive and of one adapter.

        Returns:
            {adapter: metrics of GRPOTrainer.training_step}.

        Raises:
            ValueError: an argument does not fit or a gradient is not finite; nothing has changed then.
        """
        rewards = reward_numbers(rewards)
        if rewards.shape != (len(log_probs),):
            raise ValueError(f"rewards: expected one per completion [{len(log_probs)}], found {list(rewards.shape)}")

        def loss_of(own: list[int]) -> tuple[Tensor, dict]:
            chosen = {key: None if value is None else value[own] for key, value in dict(mask=mask, **others).items()}
            old = None if old_log_probs is None else old_log_probs[own]
            return self._objective.loss(log_probs[own], old, rewards[own], **chosen)

        return self._step(adapters, len(log_probs), loss_of)


class PopulationSFT(PopulationTrainer):
    """Maximum likelihood on many adapters at once: loss, gradient and optimizer state of each are its own.

    Args:
        bank, lr, optimizer_options: as in PopulationTrainer.
    """

    def training_step(
        self, adapters: Sequence[Hashable], log_probs: Tensor, mask: Tensor | None = None
    ) -> dict[Hashable, dict[str, float]]:
        """One step of every adapter named; log_probs and mask as in SFTTrainer.training_step, under ``bank.use``.

        Args:
            adapters: [B] names, one a sequence.

        Returns:
            {adapter: loss, perplexity, tokens, grad_norm}.

        Raises:
            ValueError: an argument does not fit or a gradient is not finite; nothing has changed then.
        """

        def loss_of(own: list[int]) -> tuple[Tensor, dict]:
            return negative_log_likelihood(log_probs[own], None if mask is None else mask[own])

        return self._step(adapters, len(log_probs), loss_of)
