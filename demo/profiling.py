"""Where one training step spends its time: our kernels, the frozen model's matrix products, the rest."""
from __future__ import annotations

import time
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

from .training import Run

# addmm_: the product of our layers, which is added to the term of rank r where that is at hand
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::mkldnn_linear"}


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of one step; kernels maps an op to (calls, milliseconds)."""

    total: float
    products: float
    kernels: dict[str, tuple[int, float]]

    @property
    def kernel_total(self) -> float:
        return sum(milliseconds for _, milliseconds in self.kernels.values())

    def describe(self) -> str:
        share = 100 / self.total
        ops = ", ".join(f"{calls} x {name} {ms:.0f} ms" for name, (calls, ms) in self.kernels.items())
        return (
            f"one step of {self.total:.0f} ms: {self.kernel_total:.0f} ms ({share * self.kernel_total:.1f}%) in our "
            f"kernels,\n  {self.products:.0f} ms ({share * self.products:.1f}%) in the frozen model's matrix products, "
            f"the rest in its other layers and in Python\n  ({ops})"
        )


def profile_step(run: Run) -> Breakdown:
    """One more step of a run under torch's profiler (which itself slows small operations down)."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        run.step()
        total = 1e3 * (time.perf_counter() - begin)
    events = profiler.key_averages()
    kernels = {e.key: (e.count, e.self_cpu_time_total / 1e3) for e in events if e.key.startswith("tinylora::")}
    products = sum(e.self_cpu_time_total for e in events if e.key in PRODUCTS) / 1e3
    return Breakdown(total, products, kernels)
