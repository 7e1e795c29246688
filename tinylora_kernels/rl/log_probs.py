"""Log-probabilities of given tokens without a second copy of the logits.

``log_softmax(logits.float())`` writes an fp32 tensor as large as the logits and autograd keeps it: for a vocabulary of
50,000 that is the largest tensor of the whole training step.  Here the forward keeps one number per token, and the
backward writes the gradient once, in the dtype of the logits.
"""
from __future__ import annotations

import torch

from ..common.words import described

# Scores whose fp32 softmax is alive at once, 13 MB: 64 rows of 50,000 words.
CHUNK = 64 * 50_000


def token_log_probs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """``log softmax(logits / temperature)[b, t, tokens[b, t]]`` as a [B, T] tensor.

    Args:
        logits: [B, T, V], any floating dtype, any strides.  ``logits[b, t]`` must be the scores *for* ``tokens[b, t]``:
            a causal model's output needs the shift ``token_log_probs(logits[:, :-1], input_ids[:, 1:])``.
        tokens: [B, T] integers in 0..V-1.  Padding must be a valid token too (clamp an ignore index, then mask).
        temperature: the temperature the tokens were sampled with; the policy GRPO optimises is the sampled one.

    Returns:
        [B, T] in fp32 (fp64 for fp64 logits), differentiable with respect to ``logits``.

    Raises:
        ValueError: shapes, dtypes, token range or temperature do not fit; one line naming the argument.
    """
    if logits.dim() != 3 or not logits.is_floating_point():
        raise ValueError(f"logits: expected a floating [B, T, V] tensor, found {described(logits)}")
    if tokens.shape != logits.shape[:2] or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens: expected integers of shape {list(logits.shape[:2])}, found {described(tokens)}")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a positive finite number, found {temperature}")
    vocabulary = logits.shape[2]
    if tokens.numel() and not bool(((tokens >= 0) & (tokens < vocabulary)).all()):
        raise ValueError(
            f"tokens: expected values in 0..{vocabulary - 1}, found {int(tokens.min())}..{int(tokens.max())}; "
            "clamp an ignore index and mask it out instead"
        )
    return _TokenLogProbs.apply(logits, tokens.long(), float(temperature))


class _TokenLogProbs(torch.autograd.Function):
    """log p = z[token] - logsumexp(z), z = logits / temperature; saved for backward: logsumexp, one number a token."""

    @staticmethod
    def forward(ctx, logits, tokens, temperature):
        accumulate = torch.promote_types(logits.dtype, torch.float32)
        chosen = logits.gather(2, tokens.unsqueeze(2)).squeeze(2).to(accumulate) / temperature  # [B, T]
        normalizer = torch.empty_like(chosen)  # [B, T]
        for b, rows in _chunks(logits):
            z = logits[b, rows].to(accumulate) / temperature  # [b, rows, V]
            normalizer[b, rows] = z.logsumexp(dim=-1)
        ctx.save_for_backward(logits, tokens, normalizer)
        ctx.temperature = temperature
        return chosen - normalizer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, tokens, normalizer = ctx.saved_tensors
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for b, rows in _chunks(logits):
            z = logits[b, rows].to(grad.dtype) / ctx.temperature  # [b, rows, V]
            scale = grad[b, rows].unsqueeze(-1) / ctx.temperature  # [b, rows, 1]
            # d log p / d logits = (onehot(token) - softmax(z)) / temperature
            chunk = torch.exp(z.sub_(normalizer[b, rows].unsqueeze(-1))).mul_(-scale)
            grad_logits[b, rows] = chunk.scatter_add_(-1, tokens[b, rows].unsqueeze(-1), scale).to(logits.dtype)
        return grad_logits, None, None


def _chunks(logits: torch.Tensor):
    """(slice of b, slice of t) pairs that cover [B, T]: whole short sequences, or a part of a long one.

    Slices of both never copy a shifted view of the logits, as flattening it would.
    """
    batch, length, vocabulary = logits.shape
    rows = max(1, CHUNK // max(1, vocabulary))
    sequences = max(1, rows // max(1, length))
    for b in range(0, batch, sequences):
        for start in range(0, length, rows):
            yield slice(b, b + sequences), slice(start, start + rows)
