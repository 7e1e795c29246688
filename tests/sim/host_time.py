"""Host time of an adapted layer on a GPU, where there is none: the stand-in driver checks launches and runs nothing.

    python -m tests.sim.host_time

Microseconds of a call and of its backward pass, medians, the node in C++ past the dispatcher and through the ops in
turn: what the two differ by is the way from the node to the launch. All else here (the matrix product, the driver, the
allocator) is not what a machine with a GPU has.
"""
from __future__ import annotations

import sys

from . import standin

SCRIPT = """
import statistics, time, torch
from tests.gpu.test_direct import linear, random
from tinylora_kernels.linear import node

kernels = node.extension.use_kernels(0, 0)
caches = torch.zeros(8 << 20)  # 32 MB

def call(layer, x, g, cold):
    times = []
    for run in (lambda: layer(x), lambda: torch.autograd.backward(y, g)):
        if cold:
            caches.add_(1)
        begin = time.perf_counter()
        y = run()
        times.append(1e6 * (time.perf_counter() - begin))
    return times

torch.set_num_threads(1)
layer = linear(dtype=torch.bfloat16, out_features=64)
x, g = random(1, 16, dtype=torch.bfloat16).requires_grad_(), random(1, 64, dtype=torch.bfloat16)
print(f"{'caches':8}{'':10}{'forward':>10}{'backward':>10}")
for cold in (False, True):
    found = {"direct": [], "ops": []}
    for turn in range(20):
        for way, chosen in (("direct", kernels), ("ops", (0, 0))):
            node.extension.use_kernels(*chosen)
            found[way] += [call(layer, x, g, cold) for _ in range(5 if cold else 40)][2:]
    for way, times in found.items():
        forward, backward = (statistics.median(column) for column in zip(*times))
        print(f"{'empty' if cold else 'full':8}{way:10}{forward:10.1f}{backward:10.1f}")
assert not standin.report(), standin.report()
"""


def main() -> int:
    done = standin.run(standin.build(), SCRIPT, STANDIN_IDLE="1")
    print(done.stdout, done.stderr[-2000:], sep="", end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
