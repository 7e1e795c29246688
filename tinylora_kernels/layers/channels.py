"""The update of a convolution's output, whose features are channels: dimension 1 of [B, C, ...]."""
from __future__ import annotations

from torch import Tensor

from ..functional import tiny_lora_update


def update_channels(axis: int, y: Tensor, *factors, **options) -> Tensor:
    """tiny_lora_update over the channels of y.

    Args:
        axis: of the channels, counted from the end: -2 in [B, C, L], -3 in [B, C, H, W].
        y: the convolution's output, with or without a batch dimension.
        factors, options: as in tiny_lora_update; adapter_ids are one a sample.

    Returns:
        The adapted output in the layout of y. In channels_last every pixel is a row of memory, and nothing is copied;
        in the standard layout the output is turned over and back, two passes more.
    """
    rows = y.movedim(axis, -1)  # [B, ..., C]
    out = tiny_lora_update(rows, *factors, **options).movedim(-1, axis)
    return out if rows.is_contiguous() else out.contiguous()
