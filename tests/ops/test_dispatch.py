"""The choice of backend: automatic with a reason, explicit or refused."""
import os
import subprocess
import sys

import pytest
import torch

from tinylora_kernels import ops
from tinylora_kernels.ops import dispatch


@pytest.fixture(autouse=True)
def fresh_choice():
    dispatch._choose.cache_clear()
    yield
    ops.set_backend(None)
    dispatch._choose.cache_clear()


def test_the_automatic_choice_is_the_first_that_can_run():
    available = [name for name, reason in ops.table("cpu") if reason is None]
    assert ops.choose("cpu", torch.float32, 2) == available[0] and available[-2:] == ["reference", "inductor"]


def test_an_explicit_choice_is_honoured_or_raises():
    ops.set_backend("reference")
    assert ops.choose("cpu", torch.float32, 2) == "reference"
    assert ops.choose("cpu", torch.float32, 2, backend="reference") == "reference"
    with pytest.raises(RuntimeError, match="'cuda' was asked for but cannot run: "):
        ops.choose("cpu", torch.float32, 2, backend="cuda")
    with pytest.raises(ValueError, match="expected one of cuda, triton, cpu, reference, inductor, found 'fast'"):
        ops.set_backend("fast")


def test_falling_back_says_why_once(monkeypatch):
    broken = ops.BACKENDS["cpu"]._replace(why_not=lambda *_: "the library is missing; run pip install .")
    monkeypatch.setitem(dispatch.BACKENDS, "cpu", broken)
    with pytest.warns(UserWarning, match="'cpu' is not used: the library is missing; run pip install ."):
        assert ops.choose("cpu", torch.float32, 2) == "reference"


@pytest.mark.parametrize("name, expected", [("reference", "reference"), ("cuda", "RuntimeError"), ("no", "ValueError")])
def test_the_environment_variable(name, expected):
    code = "import torch, tinylora_kernels.ops as ops; print(ops.choose('cpu', torch.float32, 2))"
    env = {**os.environ, "TINYLORA_BACKEND": name}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert expected in run.stdout + run.stderr
