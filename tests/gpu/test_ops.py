"""The checks that the simulators pass, on the device itself: the same shapes, the same assertions."""
import pytest
import torch

from tests.cases import Case, make_case, run_ops
from tests.part_cases import PART_CASES, PartCase, check_parts, drawn, run_parts
from tests.sim import checks
from tinylora_kernels import ops

from .places import OnDevice, kernels, on_a_card

PARTS = [case for case in PART_CASES if case.rank != 3] + [
    PartCase(500, (3584, 512, 512), (0, 0, 0), numbers=13),
    PartCase(300, (18944, 18944), (0, 1), numbers=13),
    PartCase(1, (3584, 512, 512), (0, 1, 0), numbers=13, adapters=5),
]
ON_DEVICE = ("budget", "not finite", "alignment", "rounding", "bare rows")


@kernels
@pytest.mark.parametrize("check", ON_DEVICE)
def test_checks(check, device, backend):
    """But the bits of rows without an adapter in Triton's g0: it writes them as it writes the others."""
    if (check, backend) == ("bare rows", "triton"):
        return
    checks.CHECKS[check](lambda skew=0, bias_skew=0, **_: OnDevice(device, backend, skew, bias_skew))


@kernels
def test_around_the_product(device, backend):
    """To the error of fp32 sums in the order of the GPU's kernels: the CPU's order costs more on the longest rows."""
    cases = [case for case in checks.ALL if device != "cpu" or case.features < 30000]
    checks.around(lambda: OnDevice(device, backend), cases=cases)


@kernels
@pytest.mark.parametrize("case", PARTS, ids=str)
def test_parts(case, device, backend):
    inputs = drawn(case, torch.bfloat16)
    found = [run_parts(OnDevice(device, backend), one) for one in inputs]
    check_parts(found, inputs, case)
    again = run_parts(OnDevice(device, backend), inputs[0])
    for name, first in vars(found[0]).items():
        assert torch.equal(getattr(again, name), first), name


@kernels
def test_a_kept_right_factor_follows_its_weight(device, backend):
    if ops.BACKENDS[backend].refresh_right is not None:
        checks.kept_right(lambda: OnDevice(device, backend))


@kernels
def test_a_rows_bits_depend_on_that_row_alone(device, backend):
    """In a batch of one, of few, and of as many as fill a card."""
    for features in (64, 3584, 5000, 18944):
        inputs = make_case(Case(700, features, numbers=13), torch.bfloat16).on(device)
        whole = run_ops(ops.BACKENDS[backend], inputs)
        factors = inputs.basis, inputs.v, inputs.projection
        for at in (slice(0, 1), slice(333, 350), slice(100, 300)):
            y, g = inputs.y[at].clone(), inputs.g[at].clone()
            t = ops.BACKENDS[backend].update(y, *factors, inputs.offset, None, None)
            g0, _ = ops.BACKENDS[backend].update_backward(g, *factors, t, None, True)
            assert torch.equal(y, whole.y[at]) and torch.equal(t, whole.t[at]) and torch.equal(g0, whole.g0[at])


@on_a_card
@kernels
def test_streams_do_not_share_what_a_launch_adds_up(device, backend):
    """dv of launches that run beside each other on several streams: the bits of one that runs alone."""
    inputs = [make_case(Case(2000, 1024, numbers=13), torch.bfloat16, draw).on(device) for draw in range(4)]
    run = ops.BACKENDS[backend]
    ts = [torch.randn(2000, 2, device=device) for _ in inputs]

    def dv(i):
        one = inputs[i]
        return run.update_backward(one.g, one.basis, one.v, one.projection, ts[i], None, False)[1]

    alone = [dv(i) for i in range(4)]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(50):
        found = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append(dv(i))
        torch.cuda.synchronize()
        for one, other in zip(found, alone, strict=True):
            assert torch.equal(one, other)
