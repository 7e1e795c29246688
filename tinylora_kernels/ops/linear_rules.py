"""Which way around the product of a frozen linear layer is fastest on the CPU. linear_node.cpp has the same rules.

MKL's products of 32 and 64 bits add to what is there at no cost that can be measured, where a pass over the finished
result has to fetch it again. oneDNN's of 16 bits pay for it more than that pass costs, so there the product comes first;
but for a bias torch copies it into y and adds to that anyway. Forward and backward over the frozen layer on two threads,
geometric means of 9 layers with the product first and last throughout, on a Zen 4 (128 to 4864 wide) and, bf16 only, on a
Sapphire Rapids (576 to 8960 wide), where AMX makes the product four times as fast:

    tokens              1      8    128    512
    fp32, first     1.027  1.026  1.017  1.033
    fp32, last      1.012  0.997  1.002  1.002
    bf16, first     1.007  1.010  1.023  1.024
    bf16, last      1.028  1.027  1.042  1.046
    AMX, first      0.998  1.004  1.046  1.070
    AMX, last       1.024  1.030  1.068  1.093

Where x is much wider than y, as in k and down projections, the terms around the product move more bytes than an update of y
and a copy of g: N (in + 2 out) against 2 N out numbers forward, N (2 in + out) against 2 N out backward. Six such layers of
576 to 8960 inputs in fp32 on the Sapphire Rapids:

    first           1.008  1.003  1.031  1.022
    last            0.987  0.999  1.032  1.047
"""
from __future__ import annotations

from torch import Tensor


def product_last(weight: Tensor, bias: Tensor | None) -> bool:
    """y = [b + (t M^T) U^T] + x W^T, rather than an update of x W^T + b."""
    return (weight.itemsize >= 4 or bias is not None) and updates_input_grad(weight)


def product_last_in_backward(weight: Tensor) -> bool:
    """dx = [(a M) B^T] + g W, rather than dx = g W updated, where updates_input_grad."""
    return weight.itemsize >= 4


def updates_input_grad(weight: Tensor) -> bool:
    """Whether the update goes past the weight, to dx, rather than into a copy of g. The same comparison of in and out is
    made forward.
    """
    return weight.shape[1] <= 2 * weight.shape[0]
