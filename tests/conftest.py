"""Shared fixtures: every torch.empty is filled with NaN, so that an element nobody wrote cannot pass for a result.

Also the order of the files: the longest first, so that no process of several is left alone with one at the end.
"""
import importlib.util
import os
from pathlib import Path

import pytest
import torch

# These have an environment of their own: make test-vllm.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["integrations/vllm"]
LONGEST_FIRST = (  # half a minute or more of one core each; the rest in the order they are collected
    "sim/test_ptx_cuda.py", "sim/test_triton.py", "guarantees/test_compiled_node.py", "sim/test_driver.py",
    "bench/test_bench.py", "integrations/test_trl.py", "sim/test_cuda_static.py", "ops/test_triton_interpreter.py",
    "sim/test_cuda_host.py", "integrations/test_compile.py", "factors/test_svd.py", "demo/test_demo.py",
    "sim/test_cuda_ops.py", "sim/test_cuda_parts.py", "bench/test_gpu_parts.py", "examples/test_examples.py",
)  # fmt: skip


os.environ.setdefault("TINYLORA_NODE", "ready")  # nor is a node compiled behind a test's back


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist would start with the files of the most tests


def pytest_collection_modifyitems(items):
    folder = Path(__file__).parent
    rank = {folder / name: n for n, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(autouse=True)
def poisoned_memory():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
