"""Several processes on one machine that talk through gloo, and what each of them found."""
from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

# Children are forked from a server that has imported these once.
PRELOAD = ["tests.distributed.layouts", "tests.distributed.checks"]
TIMEOUT = 120  # seconds: a rank that waits longer has lost the others


def run(world: int, function: Callable, *arguments) -> list:
    """function(rank, world, *arguments) in `world` processes with a gloo group; their results by rank.

    Raises:
        RuntimeError: with the traceback of the first rank that failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as directory, context.Pool(world, maxtasksperchild=1) as pool:
        store = os.path.join(directory, "store")
        calls = [pool.apply_async(_enter, (rank, world, store, function, arguments)) for rank in range(world)]
        return [call.get(TIMEOUT + 60) for call in calls]


def _enter(rank: int, world: int, store: str, function: Callable, arguments: tuple):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # as in conftest.py
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
    try:
        return function(rank, world, *arguments)
    finally:
        dist.destroy_process_group()
