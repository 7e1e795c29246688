"""The oracle itself: against the textbook formula W + alpha U S R V^T in float64, gradcheck, and the error budget."""
import pytest
import torch

from tests.cases import CASES, DTYPES, assert_within_budget, exact, make_case, run_ops
from tinylora_kernels.functional import tiny_lora_update
from tinylora_kernels.method.projection import scaled_projection
from tinylora_kernels.ops import reference

GRID = [pytest.param(case, id=str(case)) for case in CASES]


@pytest.mark.parametrize("scaling", ["left", "sqrt"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_update_equals_the_textbook_formula(rank, bias, scaling):
    torch.manual_seed(0)
    out_features, in_features, numbers, rows, alpha = 48, 32, 3, 17, 0.7
    W = torch.randn(out_features, in_features, dtype=torch.float64)
    b = torch.randn(out_features, dtype=torch.float64) if bias else None
    x = torch.randn(rows, in_features, dtype=torch.float64, requires_grad=True)
    P = torch.randn(numbers, rank, rank, dtype=torch.float64)
    v = torch.randn(numbers, dtype=torch.float64, requires_grad=True)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]

    # textbook: W' = W + alpha U S R V^T, or with S split evenly around R
    R = torch.einsum("u,ujk->jk", v, P)
    middle = S.diag() @ R if scaling == "left" else S.sqrt().diag() @ R @ S.sqrt().diag()
    truth = torch.nn.functional.linear(x, W + alpha * U @ middle @ Vh, b)

    offset = U.T @ b if bias else None
    projection = scaled_projection(P, S, alpha, scaling)
    y = tiny_lora_update(
        torch.nn.functional.linear(x, W, b), U.T.contiguous(), v, projection, offset, backend="reference"
    )
    g = torch.randn_like(y)
    for found, expected in zip(
        (y, *torch.autograd.grad(y, (x, v), g)), (truth, *torch.autograd.grad(truth, (x, v), g)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", [c for c in GRID if c.values[0].rows * c.values[0].features < 600])
def test_gradcheck(case):
    inputs = make_case(case, torch.float64)
    y, v = inputs.y.clone().requires_grad_(), inputs.v.clone().requires_grad_()

    def run(y, v):
        return tiny_lora_update(
            y, inputs.basis, v, inputs.projection, inputs.offset, inputs.adapter_ids, backend="reference"
        )

    if y.numel() == 0:
        dy, dv = torch.autograd.grad(run(y, v).sum(), (y, v))
        assert dy.shape == y.shape and not dv.any()
    else:
        assert torch.autograd.gradcheck(run, (y, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GRID)
def test_reference_in_low_precision_is_within_the_budget(case, dtype):
    draws = [make_case(case, dtype, draw) for draw in range(4)]
    assert_within_budget([run_ops(reference, inputs) for inputs in draws], draws)


def test_rows_of_the_bare_base_are_untouched_and_have_no_gradient():
    inputs = make_case(next(c for c in CASES if c.adapters), torch.float32)
    bare = inputs.adapter_ids == -1
    out = run_ops(reference, inputs)
    assert bare.any() and torch.equal(out.y[bare], inputs.y[bare]) and torch.equal(out.g0[bare], inputs.g[bare])
    used = torch.zeros(len(inputs.v), dtype=torch.bool).index_fill_(0, inputs.adapter_ids[~bare], True)
    assert torch.equal(exact(inputs).dv.ne(0).any(1), used)
