"""How tensors, dtypes, names and other errors are written in messages."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def described(tensor: Tensor) -> str:
    """ "bfloat16 [4, 8]"."""
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def listed(names: Sequence[object], limit: int = 5) -> str:
    """ "a, b, c and 7 more"."""
    texts = (str(name) for name in names[:limit])
    shown = ", ".join(text if len(text) <= 200 else f"{text[:200]}..." for text in texts)
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def one_line(error: BaseException) -> str:
    """The message of another error, as part of ours."""
    return " ".join(str(error).split())[:200]
