"""Where these tests run: on a card where there is one; elsewhere with the CPU's backends, so that nothing is tried on a
card for the first time.
"""
from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tinylora_kernels import ops

DEVICES = ["cpu"] if not torch.cuda.is_available() else ["cuda"]
PLACES = [
    (device, name)
    for device in DEVICES
    for name in ("cuda", "triton", "cpu", "reference")
    if ops.BACKENDS[name].why_not(device, torch.bfloat16, 2) is None
]
everywhere = pytest.mark.parametrize("device, backend", PLACES)
kernels = pytest.mark.parametrize("device, backend", [place for place in PLACES if place[1] != "reference"])
on_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and graphs exist on a GPU only: make gpu")


@dataclasses.dataclass(frozen=True)
class OnDevice:
    """A backend for CPU tensors that runs on a device: what the checks of the simulators are given.

    Attributes:
        skew, bias_skew: elements by which rows, and the bias, miss 16-byte alignment on the device.
    """

    device: str
    name: str
    skew: int = 0
    bias_skew: int = 0

    def update(self, y, basis, v, projection, offset, bias, adapter_ids):
        there = self._put(y, self.skew)
        bias = None if bias is None else self._put(bias, self.bias_skew)
        t = self._backend.update(there, *self._all(basis, v, projection, offset), bias, *self._all(adapter_ids))
        y.copy_(there)
        return t.cpu()

    def update_backward(self, g, basis, v, projection, t, adapter_ids, need_input_grad):
        g = self._put(g, self.skew)
        g0, dv = self._backend.update_backward(g, *self._all(basis, v, projection, t, adapter_ids), need_input_grad)
        return g0.cpu(), dv.cpu()

    def low_rank(self, *tensors):
        y, t = self._backend.low_rank(*self._all(*tensors))
        return y.cpu(), t.cpu()

    def update_input_grad(self, dx, *tensors_and_add):
        *tensors, add = tensors_and_add
        there = self._put(dx, 0)
        dv = self._backend.update_input_grad(there, *self._all(*tensors), add)
        dx.copy_(there)
        return dv.cpu()

    def update_parts(self, y, *others):
        there, *others = self._put(y, self.skew), *self._all(*others[:-2]), *others[-2:]
        t = self._backend.update_parts(there, *others)
        y.copy_(there)
        return t.cpu()

    def update_parts_backward(self, g, *others):
        g0, dv = self._backend.update_parts_backward(
            self._put(g, self.skew), *self._all(*others[:-3]), *others[-3:]
        )  # fmt: skip
        return g0.cpu(), dv.cpu()

    def refresh_right(self, right, samples, weight, basis, force):
        kept, seen = self._all(right, samples)
        self._backend.refresh_right(kept, seen, *self._all(weight, basis), force)
        right.copy_(kept), samples.copy_(seen)

    @property
    def _backend(self) -> ops.dispatch.Backend:
        return ops.BACKENDS[self.name]

    def _all(self, *tensors: Tensor | None) -> list[Tensor | None]:
        return [None if tensor is None else self._put(tensor, 0) for tensor in tensors]

    def _put(self, tensor: Tensor, skew: int) -> Tensor:
        """A copy with the same strides, that starts `skew` elements past an aligned address."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        memory = torch.zeros(max(span, 0) + skew, dtype=tensor.dtype, device=self.device)
        return memory.as_strided(tensor.shape, tensor.stride(), skew).copy_(tensor)
