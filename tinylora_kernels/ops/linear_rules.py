"""Which way around the product of a frozen linear layer is fastest on the CPU. linear_node.cpp has the same rules.

MKL's products of 32 and 64 bits add to what is there at no cost that can be measured, where a pass over the finished
result has to fetch it again. oneDNN's of 16 bits pay for it more than that pass costs, so there the product comes first;
but for a bias torch copies it into y and adds to that anyway. Measured on two threads of a Zen 4, forward and backward over
the frozen layer, geometric means of 9 layers 128 to 4864 wide, with the product first and last throughout:

    tokens            1      8    128    512
    fp32, first   1.027  1.026  1.017  1.033
    fp32, last    1.012  0.997  1.002  1.002
    bf16, first   1.007  1.010  1.023  1.024
    bf16, last    1.028  1.027  1.042  1.046
"""
from __future__ import annotations

from torch import Tensor


def product_last(weight: Tensor, bias: Tensor | None) -> bool:
    """y = [b + (t M^T) U^T] + x W^T, rather than an update of x W^T + b."""
    return weight.itemsize >= 4 or bias is not None


def product_last_in_backward(weight: Tensor) -> bool:
    """dx = [(a M) B^T] + g W, rather than dx = g W updated, or g updated and then multiplied."""
    return weight.itemsize >= 4


def updates_input_grad(weight: Tensor) -> bool:
    """Whether the update goes past the weight, to dx. Where the product comes first, that reads and writes [N, in] which it
    has just left in the caches; the copy of g that would do instead writes [N, out] afresh.
    """
    return product_last_in_backward(weight) or weight.shape[1] <= 2 * weight.shape[0]
