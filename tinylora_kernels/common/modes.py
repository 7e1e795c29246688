"""What of torch looks on while a layer runs.

Dispatch modes: each op they see they may answer from memory the next time, as selective activation checkpointing does.
Under one, nothing is written in place into what an op returned, and what is computed once and kept is computed out of
sight: an op that runs at the first call alone would shift all later answers.

Transforms of torch.func and forward mode: they take plain operations apart, an op of ours they cannot.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

# Decorates what makes parameters and factors: made as inference tensors, they could never be trained.
outside_inference_mode = torch.inference_mode(False)


def seen_by_a_mode() -> bool:
    """Whether a TorchDispatchMode is on; torch.compile's own do not count."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def out_of_sight() -> AbstractContextManager[object]:
    """For what is computed once and kept: no mode sees it, and no transform wraps it."""
    in_transform = not torch.compiler.is_compiling() and _in_transform()
    return _unseen() if in_transform or seen_by_a_mode() else nullcontext()


@contextmanager
def _unseen() -> Iterator[None]:
    with temporarily_clear_interpreter_stack(), _disable_current_modes():
        yield


def differentiated_by_torch() -> bool:
    """Whether torch.func's transforms or forward-mode differentiation look on, in traced code too: within it, or around
    it. Then everything is made of plain operations, and nothing is kept.
    """
    return _in_transform() or forward_ad._current_level >= 0  # Dynamo guards on the level that it reads


def is_taken_apart(grad: Tensor) -> bool:
    """Whether an incoming gradient is one of many (is_grads_batched, vectorize=True: a vmap older than torch.func's),
    or a transform or forward mode looks on.
    """
    if torch.compiler.is_compiling():
        return differentiated_by_torch()
    return differentiated_by_torch() or torch._C._functorch.is_legacy_batchedtensor(grad)


def _in_transform() -> bool:
    return torch._C._are_functorch_transforms_active()


# torch.compiler.assume_constant_result, without its import: read, it would be a call in every graph. Dynamo opens the
# transforms that it traces, and guards on those that were open.
vars(_in_transform)["_dynamo_marked_constant"] = True
