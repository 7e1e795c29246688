"""What Inductor makes of the dissolved update for an H100: counted in the code that it generates; nothing is run."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Inductor's code for GPUs is Triton's")

SCRIPT = Path(__file__).with_name("inductor_gpu.py")
pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA of its own")


@pytest.fixture(scope="module")
def counts(tmp_path_factory) -> tuple[dict, Path]:
    """(way, phase) -> kernels, ops and bytes of Qwen2.5-7B's block at 8192 tokens; and the code."""
    folder = tmp_path_factory.mktemp("code")
    command = [sys.executable, str(SCRIPT), "--ways", "frozen", "inductor", "--code", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row["way"], row["phase"]): row for row in rows}, folder


def test_on_a_gpu_the_update_dissolves_and_the_block_moves_hardly_more_bytes(counts):
    rows, _ = counts
    assert all(row["ops"] == 0 for row in rows.values())
    # The update by kernels reads and writes every y and g once more: 1.45 forward, 1.30 backward.
    for phase, most in (("forward", 1.13), ("backward", 1.02)):
        assert rows["inductor", phase]["bytes"] < most * rows["frozen", phase]["bytes"]


def test_t_and_the_term_are_in_the_kernels_that_were_there(counts):
    rows, folder = counts
    # Forward: all M in one, and q', k' and v' before they are turned and transposed.
    assert rows["inductor", "forward"]["kernels"] == rows["frozen", "forward"]["kernels"] + 4
    code = (folder / "inductor-forward.py").read_text()
    (swiglu,) = {line.split(".run")[0].strip() for line in code.splitlines() if "silu" in line and ".run(" in line}
    kernel = code[code.index(f"def {swiglu}(") :]
    kernel = kernel[: kernel.index("''', device_str")]
    assert kernel.count("tl.sum(") == 4  # t of gate and of up, r = 2
    assert kernel.count("+ 18944*x0") == 5  # y0 of either for t, and again for the term, and their product
