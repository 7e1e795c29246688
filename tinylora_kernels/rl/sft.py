"""One step of supervised fine-tuning: the negative log-likelihood of given tokens."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .log_probs import token_log_probs
from .trainer import VectorTrainer, check_log_probs, check_mask, require_trainable

IGNORE_INDEX = -100  # as in transformers: labels that are not trained on


class SFTTrainer(VectorTrainer):
    """Maximum likelihood on a model's trainable parameters.

    Args:
        model: any module with parameters that require grad.
        lr: of the Adam optimizer built when ``optimizer`` is None.
        optimizer_options: ``betas``, ``eps``, ``weight_decay``, ``max_grad_norm``, ``accumulation_steps`` and
            ``optimizer``, see ``VectorTrainer``.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-4, **optimizer_options):
        super().__init__(model, lr=lr, **optimizer_options)

    def training_step(
        self,
        log_probs: torch.Tensor | None = None,
        mask: torch.Tensor | Sequence | None = None,
        *,
        logits: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> dict[str, float]:
        """One step; give either ``log_probs`` or ``logits`` and ``labels``.

        Args:
            log_probs: [B, T] per token, averaged over the tokens of the batch that ``mask`` selects, or [B] sums over
                each sequence, averaged over sequences.
            mask: [B, T] booleans or 0/1, or a list of them, 1 for tokens to learn; default all.  Values outside it are
                never read.
            logits: [B, T, V] of a causal model.
            labels: [B, T] as transformers takes them: ``labels[b, t]`` is the token *at* position t (predicted by
                ``logits[b, t - 1]``; the shift happens here), -100 where nothing is to be learned.

        Returns:
            loss, perplexity (of the trained tokens; of the sequences for [B]), tokens (or sequences) trained on,
            grad_norm (before clipping), steps.

        Raises:
            ValueError: an argument does not fit; one line that names it.  Nothing has changed then.
        """
        if logits is not None and labels is not None and log_probs is None:
            if mask is not None:
                raise ValueError(f"mask: it goes with log_probs; mark ignored labels with {IGNORE_INDEX}")
            log_probs, mask = _shifted(logits, labels)
        elif log_probs is None or logits is not None or labels is not None:
            raise ValueError("training_step: expected either log_probs, or logits together with labels")
        require_trainable(log_probs)
        loss, metrics = negative_log_likelihood(log_probs, mask)
        norm = self._apply(loss, metrics["tokens"])
        return {**metrics, "grad_norm": norm, "steps": self.steps}


def negative_log_likelihood(
    log_probs: torch.Tensor, mask: torch.Tensor | Sequence | None
) -> tuple[torch.Tensor, dict[str, float]]:
    """What ``SFTTrainer`` minimises, a scalar with a graph, and its metrics; arguments as in ``training_step``."""
    selected = check_mask(mask, log_probs)
    check_log_probs("log_probs", log_probs, log_probs.shape, selected)
    kept = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
    if selected is not None:
        kept = kept.masked_fill(~selected, 0.0)
    count = log_probs.numel() if selected is None else int(selected.sum())
    # loss = - sum log p / count, 0 of no tokens
    loss = -kept.sum() / max(count, 1)
    value = loss.detach()
    return loss, {"loss": float(value), "perplexity": float(value.exp()), "tokens": count}


def _shifted(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels: expected the first two dimensions of logits [B, T, V] = {list(logits.shape)}, "
            f"found {list(labels.shape)}"
        )
    if logits.shape[1] < 2:
        raise ValueError("logits: a sequence of one token predicts nothing; expected T >= 2")
    targets = labels[:, 1:].to(logits.device)
    learned = targets != IGNORE_INDEX
    return token_log_probs(logits[:, :-1], targets.masked_fill(~learned, 0)), learned
