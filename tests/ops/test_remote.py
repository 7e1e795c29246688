"""What remote.py carries to another Python and back, here to this one: bytes, strides, errors."""
import sys

import pytest
import torch

from tests import remote
from tests.cases import Case, make_case
from tinylora_kernels.ops import reference
from tinylora_kernels.ops.native import library as native

pytestmark = pytest.mark.skipif(native.load().error is not None, reason=f"native library: {native.load().error}")


@pytest.fixture(scope="module")
def there():
    return remote.Remote(sys.executable)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_written_there_is_written_here(there, dtype):
    inputs = make_case(Case(6, 65, rank=2, numbers=3, pad=3), dtype)
    rest = inputs.basis, inputs.v, inputs.projection, inputs.offset, None
    expected, y = inputs.clone_y(), inputs.clone_y()
    around = remote.storage_of(y).clone()
    t = native.update(expected, *rest, None)
    assert torch.equal(there.call("update", y, *rest, adapter_ids=None), t) and torch.equal(y, expected)
    assert y.stride() == (68, 1) and not torch.equal(remote.storage_of(y), around)
    g = inputs.g[:1].expand(6, 65)  # one row for all
    found = there.call("update_backward", g, *rest[:3], t, None, True)
    for ours, truth in zip(found, reference.update_backward(g, *rest[:3], t, None, True), strict=True):
        torch.testing.assert_close(ours, truth)


def test_errors_and_threads_arrive(there):
    with pytest.raises(ValueError, match="isa: expected one of portable, .*, found 'sse'"):
        there.call("use_isa", "sse")
    assert there.call("load") == native.load()
    assert there.call("use_isa", "portable") and there.call("load").isa == native.load().isa  # as it was found
    nothing = torch.zeros(0, 4), torch.ones(1, 4), torch.ones(1), torch.ones(1, 1, 1), None, None, None
    assert there.call("update", *nothing).shape == (0, 1)
