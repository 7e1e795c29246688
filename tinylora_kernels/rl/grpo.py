"""One GRPO step on given log-probabilities and rewards.

Sources:
    GRPO     Shao et al., DeepSeekMath, arXiv 2402.03300, section 4.1: group-normalised advantages, the clipped
             surrogate averaged per sequence, the k3 estimator of the KL divergence (equation 4).
    DAPO     Yu et al., arXiv 2503.14476: the surrogate averaged over all tokens (section 3.3), a separate upper clip
             bound (section 3.1).
    Dr. GRPO Liu et al., arXiv 2503.20783: a constant divisor instead of the length, no division by the deviation.
    TIS      Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025: the gradient
             weighted by min(p_train / p_rollout, cap) when rollouts come from other weights, here those of a merge
             rounded to bf16.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from ..common.finite import finite_number, positive_number, whole_number
from ..common.words import one_line
from ..model.adapted import adapted_layers, adapter_disabled
from .trainer import VectorTrainer, check_log_probs, check_mask, require_trainable

LOSS_TYPES = ("grpo", "dapo", "dr_grpo")
# exp(20) = 4.9e8: a log-ratio beyond this is a broken rollout, and exp of it must not become inf * 0.
LOG_RATIO_LIMIT = 20.0


def group_advantages(
    rewards: torch.Tensor, group_size: int, *, scale: bool = True, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages within groups of ``group_size`` consecutive rewards (Shao et al., section 4.1.2).

        A_i = (reward_i - mean) / (std + eps)      std with the divisor G - 1, as in TRL and verl

    Args:
        rewards: [B] numbers, B divisible by ``group_size``; completions of one prompt are consecutive.
        scale: divide by the deviation; False is Dr. GRPO.

    Returns:
        advantages [B], computed in float64 and then rounded to the dtype of the rewards (float64 for integers), and a
        [B / group_size] mask of groups whose rewards are all equal: their advantages are exactly zero, so they carry
        no gradient.
    """
    size = whole_number("group_size", group_size)
    if rewards.numel() % size:
        raise ValueError(f"rewards: expected [B], B divisible by group_size {size}, found {list(rewards.shape)}")
    given = rewards.reshape(-1, size)  # [groups, G]
    flat = (given == given[:, :1]).all(dim=1)  # [groups]; rounding in the mean must not become an advantage
    grouped = given.double()
    if given.dtype == torch.int64:  # from the group's first one, which beyond 2^53 float64 may not tell from the next
        apart, room = given - given[:, :1], 2.0**62
        grouped = apart.double() if bool((grouped.abs() < room).all()) else grouped
    centered = grouped - grouped.mean(dim=1, keepdim=True)
    if scale:
        centered = centered / (grouped.std(dim=1, keepdim=True) + eps)
    advantages = centered.masked_fill(flat.unsqueeze(1), 0.0).view(-1)
    return advantages.to(rewards.dtype) if rewards.is_floating_point() else advantages, flat


class GRPOTrainer(VectorTrainer):
    """Group relative policy optimisation of a model's trainable parameters.

    Args:
        model: any module with parameters that require grad (``apply_tiny_lora`` leaves exactly the vectors v).
        group_size: completions per prompt; they are consecutive in every batch.
        kl_coeff: weight of the KL divergence from the reference model; 0 leaves it out of the loss.
        clip_eps, clip_eps_high: the ratio is clipped to [1 - clip_eps, 1 + clip_eps_high]; the upper bound defaults to
            the lower one (DAPO uses 0.28 above).
        lr: of the Adam optimizer built when ``optimizer`` is None.
        loss_type: how the per-token loss is averaged over B sequences of T_i tokens:
            "grpo"     1/B sum_i 1/T_i sum_t      (Shao et al., equation 3)
            "dapo"     1/sum_i T_i sum_i sum_t    (DAPO, section 3.3)
            "dr_grpo"  1/(B max_tokens) sum_i sum_t, max_tokens being the generation budget
        scale_rewards: divide advantages by the group's deviation (False for Dr. GRPO).
        tis_cap: upper bound of the importance weights of rollouts.
        optimizer_options: ``betas``, ``eps``, ``weight_decay``, ``max_grad_norm``, ``accumulation_steps`` and
            ``optimizer``, see ``VectorTrainer``.
    """

    def __init__(
        self,
        model: nn.Module,
        group_size: int = 4,
        kl_coeff: float = 0.0,
        clip_eps: float = 0.2,
        lr: float = 1e-5,
        *,
        clip_eps_high: float | None = None,
        loss_type: str = "grpo",
        max_tokens: int | None = None,
        scale_rewards: bool = True,
        tis_cap: float = 2.0,
        **optimizer_options,
    ):
        group_size = whole_number("group_size", group_size, at_least=2)
        finite_number("kl_coeff", kl_coeff, at_least=0.0)
        positive_number("clip_eps", clip_eps, below=1.0)
        if clip_eps_high is not None:
            positive_number("clip_eps_high", clip_eps_high)
        if loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type: expected one of {', '.join(LOSS_TYPES)}, found {loss_type!r}")
        if loss_type == "dr_grpo" and max_tokens is None:
            raise ValueError("max_tokens: loss_type 'dr_grpo' divides by the generation budget, found None")
        max_tokens = None if max_tokens is None else whole_number("max_tokens", max_tokens)
        positive_number("tis_cap", tis_cap)
        super().__init__(model, lr=lr, **optimizer_options)
        self.group_size = group_size
        self.kl_coeff = kl_coeff
        self.clip_eps = clip_eps
        self.clip_eps_high = clip_eps if clip_eps_high is None else clip_eps_high
        self.loss_type = loss_type
        self.max_tokens = max_tokens
        self.scale_rewards = scale_rewards
        self.tis_cap = tis_cap

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The frozen model, autograd off: run it inside to get ``ref_log_probs``.

        Raises:
            ValueError: the model has no adapter to switch off, or its update is merged into the weights.
        """
        layers = adapted_layers(self.model).values()
        if not layers:
            raise ValueError("reference: the model has no adapter to switch off; keep a copy of it as the reference")
        if not all(layer.is_on() for layer in layers):
            raise ValueError("reference: an adapter is merged or off already; call unmerge(model) first")
        with adapter_disabled(self.model), torch.no_grad():
            yield self.model

    def training_step(
        self,
        log_probs: torch.Tensor,
        old_log_probs: torch.Tensor | None,
        rewards: torch.Tensor | Sequence[float],
        *,
        mask: torch.Tensor | Sequence | None = None,
        ref_log_probs: torch.Tensor | None = None,
        rollout_log_probs: torch.Tensor | None = None,
    ) -> dict[str, float]:
        """One step on B completions, ``group_size`` consecutive ones per prompt.

        Args:
            log_probs: [B, T] per token, or [B] sums over each sequence (the ratio is then the sequence's); with grad.
            old_log_probs: same shape, of the policy at the start of the batch; None means on-policy (ratio 1).
            rewards: [B], any number type or a list; B divisible by ``group_size``. None is not a reward. Advantages
                are of the numbers as they are given, in float64, and rounded then.
            mask: [B, T] booleans or 0/1, or a list of them, 1 for completion tokens; default all.  Values outside it
                are never read.
            ref_log_probs: same shape, of the reference model (see ``reference``); needed when ``kl_coeff`` > 0.
            rollout_log_probs: same shape, as the sampler reported them, when it ran other weights than the trainer
                (merged, rounded); the loss is then weighted by min(exp(old - rollout), tis_cap).

        Returns:
            loss, policy_loss, kl, reward_mean, reward_std, zero_variance_groups (count), ratio_mean, clip_fraction,
            tis_weight_mean, tis_capped_fraction, grad_norm (before clipping), steps.

        Raises:
            ValueError: an argument does not fit; one line that names it.  Nothing has changed then.
        """
        loss, metrics, tokens = self._loss(
            log_probs, old_log_probs, rewards, mask, ref_log_probs, rollout_log_probs
        )  # fmt: skip
        norm = self._apply(loss, tokens if self.loss_type == "dapo" else len(log_probs))
        return {**metrics, "grad_norm": norm, "steps": self.steps}

    def loss(
        self,
        log_probs: torch.Tensor,
        old_log_probs: torch.Tensor | None,
        rewards: torch.Tensor | Sequence[float],
        *,
        mask: torch.Tensor | Sequence | None = None,
        ref_log_probs: torch.Tensor | None = None,
        rollout_log_probs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """What ``training_step`` minimises, a scalar with a graph, and its metrics; the same arguments and errors."""
        loss, metrics, _ = self._loss(log_probs, old_log_probs, rewards, mask, ref_log_probs, rollout_log_probs)
        return loss, metrics

    def _loss(
        self,
        log_probs: torch.Tensor,
        old_log_probs: torch.Tensor | None,
        rewards: torch.Tensor | Sequence[float],
        mask: torch.Tensor | Sequence | None,
        ref_log_probs: torch.Tensor | None,
        rollout_log_probs: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, float], float]:
        """The loss, its metrics, and the tokens it is of; sequences where log_probs are sums."""
        require_trainable(log_probs)
        selected = check_mask(mask, log_probs)
        check_log_probs("log_probs", log_probs, log_probs.shape, selected)
        for name, value in (
            ("old_log_probs", old_log_probs),
            ("ref_log_probs", ref_log_probs),
            ("rollout_log_probs", rollout_log_probs),
        ):
            if value is not None:
                check_log_probs(name, value, log_probs.shape, selected)
        if self.kl_coeff > 0 and ref_log_probs is None:
            raise ValueError("ref_log_probs: needed because kl_coeff > 0; compute them inside trainer.reference()")
        if self.loss_type == "dr_grpo" and selected is None:
            raise ValueError("log_probs: loss_type 'dr_grpo' counts tokens; pass log_probs of [B, T]")
        dtype = torch.promote_types(log_probs.dtype, torch.float32)
        given = self._check_rewards(rewards, log_probs, dtype)
        advantages, flat = group_advantages(given, self.group_size, scale=self.scale_rewards)  # [B], [groups]

        def tokens(value: torch.Tensor) -> torch.Tensor:  # [B, T]; [B, 1] for whole sequences; zero outside the mask
            value = value.to(log_probs.device, dtype)
            return value.unsqueeze(1) if selected is None else value.masked_fill(~selected, 0.0)

        new = tokens(log_probs)
        keep = torch.ones_like(new) if selected is None else selected.to(dtype)
        old = tokens(log_probs if old_log_probs is None else old_log_probs).detach()
        # ratio = p / p_old ;  surrogate = min(ratio A, clip(ratio, 1 - eps, 1 + eps_high) A)
        ratio = torch.exp((new - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
        advantage = advantages.to(log_probs.device, dtype).unsqueeze(1)  # [B, 1]
        clipped = ratio.clamp(1.0 - self.clip_eps, 1.0 + self.clip_eps_high)
        per_token = -torch.minimum(ratio * advantage, clipped * advantage)
        weight = torch.ones_like(old)
        if rollout_log_probs is not None:
            # weight = min(p_old / p_rollout, cap), a constant
            weight = torch.exp((old - tokens(rollout_log_probs).detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
        per_token = per_token * weight.clamp(max=self.tis_cap)
        policy_loss = loss = self._average(per_token, keep)
        kl = torch.zeros_like(loss)
        if ref_log_probs is not None:
            # k3 = p_ref / p - log(p_ref / p) - 1  >= 0
            log_ratio = (tokens(ref_log_probs).detach() - new).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            kl = self._average(torch.exp(log_ratio) - log_ratio - 1.0, keep)
            if self.kl_coeff > 0:
                loss = policy_loss + self.kl_coeff * kl
        bound_hit = ((ratio > 1.0 + self.clip_eps_high) & (advantage > 0)) | (
            (ratio < 1.0 - self.clip_eps) & (advantage < 0)
        )
        tokens_kept = keep.sum()
        count = tokens_kept.clamp(min=1.0)
        with torch.no_grad():
            metrics = {
                "loss": loss,
                "policy_loss": policy_loss,
                "kl": kl,
                "reward_mean": given.double().mean(),
                "reward_std": given.double().std(),
                "zero_variance_groups": flat.sum(),
                "ratio_mean": (ratio * keep).sum() / count,
                "clip_fraction": (bound_hit * keep).sum() / count,
                "tis_weight_mean": (weight.clamp(max=self.tis_cap) * keep).sum() / count,
                "tis_capped_fraction": ((weight > self.tis_cap) * keep).sum() / count,
            }
            scalars = [*metrics.values(), tokens_kept]
            values = torch.stack([value.detach().to(new) for value in scalars]).tolist()  # one transfer
        return loss, dict(zip(metrics, values[:-1], strict=True)), values[-1]

    def _check_rewards(self, rewards: object, log_probs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rewards [B] on the CPU, in float64 or int64, finite in ``dtype`` too."""
        numbers = reward_numbers(rewards)
        batch = log_probs.shape[0]
        if numbers.shape != (batch,):
            raise ValueError(f"rewards: expected one per completion [{batch}], found {list(numbers.shape)}")
        if batch % self.group_size:
            raise ValueError(f"rewards: {batch} completions are not divisible by group_size {self.group_size}")
        finite = torch.isfinite(numbers.to(dtype))
        if not bool(finite.all()):
            raise ValueError(f"rewards: {int((~finite).sum())} of {batch} are not finite")
        return numbers

    def _average(self, per_token: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """[B, T] -> scalar, see ``loss_type``; a sequence without tokens counts as zero."""
        if self.loss_type == "grpo":
            return ((per_token * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1.0)).mean()
        tokens = keep.sum().clamp(min=1.0)
        divisor = tokens if self.loss_type == "dapo" else keep.shape[0] * cast(int, self.max_tokens)
        return (per_token * keep).sum() / divisor


def reward_numbers(rewards: object) -> torch.Tensor:
    """Rewards as they are given, on the CPU: integers in int64, others in float64, lists of Python's floats as well.

    Raises:
        ValueError: one of them is no number, as of a reward function that has none to give.
    """
    try:
        numbers = torch.as_tensor(rewards, device="cpu").detach()
        if isinstance(rewards, (list, tuple)) and numbers.is_floating_point():  # torch's default dtype rounded them
            numbers = torch.as_tensor(rewards, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        listed = rewards if isinstance(rewards, (list, tuple)) else []
        if empty := [index for index, reward in enumerate(listed) if reward is None]:
            found = f"None at {empty[0]} ({len(empty)} of {len(listed)}); give a number, or leave its whole group out"
        else:
            found = f"a {type(rewards).__name__}: {one_line(error)}"
        raise ValueError(f"rewards: expected one number per completion, found {found}") from None
    if numbers.is_complex():
        raise ValueError("rewards: expected one number per completion, found complex numbers")
    return numbers.double() if numbers.is_floating_point() or numbers.dtype == torch.uint64 else numbers.long()
