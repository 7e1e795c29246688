"""The whole Triton backend under Triton's own interpreter (TRITON_INTERPRET=1), in a process of its own.

fp32 and fp16: the interpreter truncates where a GPU rounds fp32 to bf16. tests/sim/test_triton.py covers bf16.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_case_grid(dtype):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.test_triton_interpreter", dtype]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) >= 20


def _run(dtype_name: str) -> None:
    """Every case of a supported rank within the error budget; prints how many."""
    import torch

    from tests.cases import CASES, assert_within_budget, make_case, run_ops
    from tinylora_kernels.ops import triton_kernels

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    cases = [case for case in CASES if case.rank in triton_kernels.RANKS]
    for case in cases:
        count = 6 if case.rows * case.features < 20_000 else 2  # errors of a single number need several draws
        inputs = [make_case(case, getattr(torch, dtype_name), draw) for draw in range(count)]
        try:
            assert_within_budget([run_ops(triton_kernels, i) for i in inputs], inputs)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None
    print(len(cases))


if __name__ == "__main__":
    _run(sys.argv[1])
