"""Which way around the product of a frozen linear layer is fastest, decided once for both nodes.

The terms of rank r need B^T = U^T W at hand; "last" is the product added to them:

    forward     y = x W^T + b, then updated             last:         y  = [b + (t M^T) U^T] + x W^T,  t = x B
    backward    dx = (g + (a M) U^T) W, a copy of g     past weight:  dx = g W, then dx += (a M) B^T
                                                        and last:     dx = [(a M) B^T] + g W

On the CPU: MKL's products of 32 and 64 bits add to what is there at no cost that can be measured, where a pass over
the finished result has to fetch it again. oneDNN's of 16 bits pay for it more than that pass costs, so there the
product comes first; but for a bias torch copies it into y and adds to that anyway. The grid
(bench/results/layers.csv.gz) times what was decided alone, so what it was decided by stands here. Forward and
backward over the frozen layer on two threads, geometric means of 9 layers with the product first and last
throughout, on a Zen 4 (7e18614, 128 to 4864 wide) and, bf16 only, on a Sapphire Rapids (e9a5fa9, 576 to 8960 wide),
where AMX makes the product four times as fast:

    tokens              1      8    128    512
    fp32, first     1.027  1.026  1.017  1.033
    fp32, last      1.012  0.997  1.002  1.002
    bf16, first     1.007  1.010  1.023  1.024
    bf16, last      1.028  1.027  1.042  1.046
    AMX, first      0.998  1.004  1.046  1.070
    AMX, last       1.024  1.030  1.068  1.093

Where x is much wider than y, as in k and down projections, the terms around the product move more bytes than an
update of y and a copy of g: N (in + 2 out) against 2 N out numbers forward, N (2 in + out) against 2 N out backward.
Six such layers of 576 to 8960 inputs in fp32 on the Sapphire Rapids (e9a5fa9):

    first           1.008  1.003  1.031  1.022
    last            0.987  0.999  1.032  1.047

On a GPU the output of a gate or up projection is what takes long to pass: the term first, then addmm, forward and
backward (1.07 and 1.07 to 1.12 of the frozen layer on an H200, bench/results/gpu, where the update takes 1.19 to
1.21); for q, k, v, o and down projections the update. Of few rows the product reads W and little else, and every
launch counts.
"""
from __future__ import annotations

from torch import Tensor

# Bits of an order; node.cpp has the same.
LAST_FORWARD = 1
PAST_WEIGHT = 2
LAST_BACKWARD = 4


def by_parts(weight: Tensor) -> bool:
    """Whether a fused layer's update goes part by part, after the product, and not as one of the rank of all of them.

    The rank of all reads k times the factors, and a row of zeros for every row that fills it up: on a GPU, whose
    caches the factors keep busy as it is (counted, not timed). On the CPU the rows are what takes time: q, k and v of
    960 x 576, gate and up of 3072 x 576, 512 rows, forward and backward over frozen, one thread of a busy Xeon: fp32
    1.05 and 1.05 as one, 1.05 and 1.05 by parts.
    """
    return weight.device.type != "cpu"


GPU_ROWS = 512  # of a call whose product comes last; node.cpp has the same


def product_order(weight: Tensor, bias: Tensor | None) -> int:
    """The bits for W [out, in] and b, where B^T can be had; 0: product first, gradient through the weight."""
    if weight.device.type != "cpu":
        return LAST_FORWARD | PAST_WEIGHT | LAST_BACKWARD if weight.shape[0] > 2 * weight.shape[1] else 0
    if weight.shape[1] > 2 * weight.shape[0]:
        return 0
    wide_numbers = weight.itemsize >= 4
    last_forward = LAST_FORWARD if wide_numbers or bias is not None else 0
    return last_forward | PAST_WEIGHT | (LAST_BACKWARD if wide_numbers else 0)


def wants_right(order: int, training: bool) -> bool:
    """Whether a call takes B^T: training, the input wants a gradient."""
    return bool(order & LAST_FORWARD or (training and order & PAST_WEIGHT))
