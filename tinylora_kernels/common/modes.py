"""Dispatch modes of torch that look on: each op they see they may answer from memory the next time.

Selective activation checkpointing does. Under one, nothing is written in place into what an op returned, and what is
computed once and kept is computed out of sight: an op that runs at the first call alone would shift all later answers.
"""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils._python_dispatch import _disable_current_modes

# Decorates what makes parameters and factors: made as inference tensors, they could never be trained.
outside_inference_mode = torch.inference_mode(False)


def seen_by_a_mode() -> bool:
    """Whether a TorchDispatchMode is on; torch.compile's own do not count."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def out_of_sight() -> AbstractContextManager[object]:
    """For what is computed once and kept: no mode sees it."""
    return _disable_current_modes() if seen_by_a_mode() else nullcontext()
