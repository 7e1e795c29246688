"""The ops of the package, declared once.

Every backend implements the first two. With a frozen layer's output y0, the truncated SVD W ~ U S V^T and
M = sum_i v_i P'_i (Morris et al., arXiv 2602.04118, rewritten on the output side):

    update              t = y0 U - c          y  = y0 + b + (t M^T) U^T
    update_backward     a = g U               g0 = g  + (a M) U^T           dM = a^T t,  dv_i = <P'_i, dM>

t must be of W x alone. Where y0 is the product, the op adds the bias b; where the layer has added it, c = b U takes it
out again. Elements of y0 that are not finite count as zero in t: one inf leaves the rest of its row finite.

Around a frozen linear layer, with B^T = U^T W at hand, the matrix product may be added to a term of low rank instead:
y = x W^T + [b + (t M^T) U^T] with t = x B, and dx = g W + [(a M) B^T]. The terms in brackets:

    low_rank            t = x B               y  = b + (t M^T) U^T
    update_input_grad   a = g U               dx (+)= (a M) B^T             dM = a^T t,  dv_i = <P'_i, dM>

linear/rules.py says when that pays, and when the product had better come first (add=True).

    updated             (y, t) of `update`, y0 left as it is: where a dispatch mode may hand y0 out again

B^T is kept, and a weight may be written into unseen (weight.data): on a GPU, where looking would mean waiting, an op of
its own looks before each use,

    refresh_right       B^T = U^T W, unless samples of W are what they were when it was computed

on [blocks, 256] samples, of 64 columns each: sample i of a block lies in the i-th of 256 bands of rows (`samples_of`).

A fused projection, W = [W_1; ...; W_k] by output rows, has k updates of one y, each over its own columns with its own
U_p, P'_p, c_p and the v of its tie group. One op makes all of them on the whole y, so that nothing slices it:

    update_parts        t_p = y0_p U_p - c_p  y_p = y0_p + b_p + (t_p M_p^T) U_p^T
    update_parts_backward  a_p = g_p U_p      g0_p = g_p + (a_p M_p) U_p^T  dv_i = sum_p <P'_{p,i}, a_p^T t_p>

Where y0 is a column shard of the output its y0_p U_p is a part of a sum; then t_p = x B_p from the whole input, with
B_p^T = U_p^T W_p of the whole weight, and `basis` holds the shard's columns of U^T.

Shapes: N rows, D output and E input features, r the frozen rank, u trained numbers, K adapters.

    y, g         [..., D]   float32, bfloat16, float16 or float64; last stride 1, leading dimensions one row stride
    x, dx        [..., E]   the same
    bias         [D]        b, or None, dtype of y, contiguous
    basis        [r, D]     U^T, contiguous
    right        [r, E]     B^T, contiguous
    weight       [D, E]     W, dtype of y, any strides
    samples      [ceil(E / 64), 256]  int32, contiguous
    v            [u], or [K, u] with adapter_ids, contiguous, as are the next three
    projection   [u, r, r]  P': M = sum_i v_i P'_i;   or [r, r] (LoRA-XS, u = r * r): M = projection * v.view(r, r)
    offset       [r]        c, or None where y0 has no bias in it
    adapter_ids  [B]        int32 or int64, N a multiple of B; row n belongs to adapter_ids[n // (N / B)];
                            -1 leaves the row alone, any other id outside [0, K) is an error
    t, a         [N, r]

Of a fused projection with k parts and G tie groups:

    ends         k ints     the column after the last of each part, ascending, ends[-1] = D
    groups       k ints     the tie group of each part, in [0, G)
    basis        [r, D]     U_1^T, ..., U_k^T side by side; of a part of lower rank the last rows are zero
    v            [G, u], or [G, K, u] with adapter_ids
    projection   [k, u, r, r], or [k, r, r] (LoRA-XS)
    offset       [k, r]     not beside x, nor beside a bias
    x, right     [..., E], [k, r, E]  both or neither
    t            [k, N, r]

basis, right, v, projection, offset and t have the accumulation dtype: float64 where y is float64, float32 otherwise.

The words for all of it, here and in C++, CUDA and Triton: N, D, E, r, u, K as above; basis, right, offset, bias,
projection; mixing M; coefficients t or a [N, r]; gains t M^T or a M [N, r], what multiplies U^T or B^T.
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

UPDATE = (
    "update(Tensor(a!) y, Tensor basis, Tensor v, Tensor projection, Tensor? offset, Tensor? bias, "
    "Tensor? adapter_ids) -> Tensor"
)
UPDATED = (
    "updated(Tensor y, Tensor basis, Tensor v, Tensor projection, Tensor? offset, Tensor? bias, Tensor? adapter_ids, "
    "str backend) -> (Tensor, Tensor)"
)
UPDATE_BACKWARD = (
    "update_backward(Tensor g, Tensor basis, Tensor v, Tensor projection, Tensor? t, Tensor? adapter_ids, "
    "bool need_input_grad) -> (Tensor, Tensor)"
)
LOW_RANK = (
    "low_rank(Tensor x, Tensor right, Tensor basis, Tensor v, Tensor projection, Tensor? bias, Tensor? adapter_ids) "
    "-> (Tensor, Tensor)"
)
UPDATE_INPUT_GRAD = (
    "update_input_grad(Tensor(a!) dx, Tensor right, Tensor g, Tensor basis, Tensor v, Tensor projection, Tensor? t, "
    "Tensor? adapter_ids, bool add) -> Tensor"
)
UPDATE_PARTS = (
    "update_parts(Tensor(a!) y, Tensor basis, Tensor v, Tensor projection, Tensor? offset, Tensor? bias, Tensor? x, "
    "Tensor? right, Tensor? adapter_ids, int[] ends, int[] groups) -> Tensor"
)
UPDATE_PARTS_BACKWARD = (
    "update_parts_backward(Tensor g, Tensor basis, Tensor v, Tensor projection, Tensor? t, Tensor? adapter_ids, "
    "int[] ends, int[] groups, bool need_input_grad) -> (Tensor, Tensor)"
)

REFRESH_RIGHT = (
    "refresh_right(Tensor(a!) right, Tensor(b!) samples, Tensor weight, Tensor basis, bool force) -> ()"
)

# The same for Python's types, argument by argument.
Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]
Updated = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor]
]  # fmt: skip
UpdateBackward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool], tuple[Tensor, Tensor]
]  # fmt: skip
LowRank = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]
]  # fmt: skip
UpdateInputGrad = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool], Tensor
]  # fmt: skip

RefreshRight = Callable[[Tensor, Tensor, Tensor, Tensor, bool], None]
UpdateParts = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None,
     Sequence[int], Sequence[int]], Tensor
]  # fmt: skip
UpdatePartsBackward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Sequence[int], Sequence[int], bool],
    tuple[Tensor, Tensor]
]  # fmt: skip

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

RIGHT_COLUMNS, RIGHT_SAMPLES = 64, 256  # of a block of refresh_right

library = torch.library.Library("tinylora", "DEF")
library.define(UPDATE)
library.define(UPDATED)
library.define(UPDATE_BACKWARD)
library.define(LOW_RANK)
library.define(UPDATE_INPUT_GRAD)
library.define(UPDATE_PARTS)
library.define(UPDATE_PARTS_BACKWARD)
library.define(REFRESH_RIGHT)


def samples_shape(columns: int) -> tuple[int, int]:
    """[blocks, 256], of a weight [D, columns]."""
    return -(-columns // RIGHT_COLUMNS), RIGHT_SAMPLES


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 activations, float32 for everything else."""
    return torch.float64 if dtype is torch.float64 else torch.float32
