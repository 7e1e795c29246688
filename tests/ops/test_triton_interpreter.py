"""The whole Triton backend under Triton's own interpreter (TRITON_INTERPRET=1), in a process of its own.

fp32 and fp16: the interpreter truncates where a GPU rounds fp32 to bf16. tests/sim/test_triton.py covers bf16.
"""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Interpreted for ten seconds a type: one type each. Every other case, and tests/sim/test_triton.py, runs them all.
ONE_TYPE = {"N130-D1536-r2-u1": "float32", "N12-D4864-r8-u1": "float16"}


def test_case_grid():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.test_triton_interpreter"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) >= 2 * 20 - len(ONE_TYPE) + 10


def _run() -> None:
    """Every case of a supported rank within the error budget, in both types; prints how many."""
    import functools
    import inspect

    import torch

    from tests.cases import CASES, assert_within_budget, make_case, run_ops
    from tests.part_cases import PART_CASES, assert_parts_within_budget, make_part_case, run_parts
    from tinylora_kernels.method.parts import SPECIALISED_RANKS
    from tinylora_kernels.ops.triton import launch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    inspect.getmembers = functools.cache(inspect.getmembers)  # the interpreter asks at every call of every function
    count = 0
    for case in (case for case in CASES if case.rank in SPECIALISED_RANKS):
        for dtype in ("float32", "float16"):
            if ONE_TYPE.get(str(case), dtype) != dtype:
                continue
            inputs, found = [], []
            # Where dv is a number or two, a few draws of the chain's error are small by luck: a case that fails on them
            # is judged on many.
            for draws in (2, 6, 24):
                inputs += [make_case(case, getattr(torch, dtype), draw) for draw in range(len(inputs), draws)]
                found += [run_ops(launch, one) for one in inputs[len(found) :]]
                try:
                    assert_within_budget(found, inputs)
                    break
                except AssertionError as error:
                    if draws == 24 or max(case.adapters, 1) * case.numbers >= 8:
                        raise AssertionError(f"{case}, {dtype}: {error}") from None
            count += 1
    for case in (c for c in PART_CASES if c.rank in SPECIALISED_RANKS and not c.inputs and c.rows < 100):
        draws = [make_part_case(case, torch.float32, draw) for draw in range(3)]
        assert_parts_within_budget([run_parts(launch, one) for one in draws], draws)
        count += 1
    print(count)


if __name__ == "__main__":
    _run()
