"""Torch's threads spent on independent pieces of work instead of inside each small product.

A product of a megabyte is too small to split: factorising 3584 x 3584 with two threads inside each product took 1.8
times as long as with one, and two matrices side by side on a thread each 0.6 times (two cores, 5a5a410; in no table).
Pieces of one matrix keep that gain with one matrix in memory, and what runs on one thread has the same bits whatever
the number of threads. bench/results/startup.csv has what a whole model takes.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from .interrupts import followed_by

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class Run(Protocol):
    """A map over independent pieces of work, in order, perhaps on several threads."""

    def __call__(
        self, function: Callable[[Argument], Result], arguments: Sequence[Argument], /
    ) -> list[Result]: ...  # fmt: skip


def serial(function: Callable[[Argument], Result], arguments: Sequence[Argument]) -> list[Result]:
    return [function(argument) for argument in arguments]


@contextmanager
def one_thread_each() -> Iterator[Run]:
    """Give `run(function, arguments)`, a map over torch.get_num_threads() workers; torch itself is held to one thread.

    The calling thread's torch.set_num_threads is put back on leaving. Threads started inside inherit one.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def run(function: Callable[[Argument], Result], arguments: Sequence[Argument]) -> list[Result]:
        if pool is None or len(arguments) < 2:
            return serial(function, arguments)
        return list(pool.map(function, arguments))

    def put_back() -> None:
        if pool is not None:
            torch.set_num_threads(threads)
            pool.shutdown()

    with followed_by(put_back):
        if pool is not None:
            torch.set_num_threads(1)
        yield run
