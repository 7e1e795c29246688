"""Torch's threads spent on independent pieces of work instead of inside each small product.

A product of a megabyte is too small to split: factorising 3584 x 3584 with two threads inside each product took 1.8
times as long as with one, and two matrices side by side on a thread each 0.6 times (two cores, 5a5a410; in no table).
Pieces of one matrix keep that gain with one matrix in memory, and what runs on one thread has the same bits whatever
the number of threads. bench/results/startup.csv has what a whole model takes.
"""
from __future__ import annotations

import threading
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


class _Held:
    """How many threads of the process are inside one_thread_each, and what torch's count was before the first came.

    A thread that starts meanwhile finds a count of one, which is not its own: left to it, it would stay at that.
    """

    inside: dict[int, int] = {}  # thread -> how deep
    before = 1


_held_lock = threading.Lock()


@contextmanager
def one_thread_each() -> Iterator[Run]:
    """Give `run(function, arguments)`, a map over torch.get_num_threads() workers; torch itself is held to one thread.

    The calling thread's torch.set_num_threads is put back on leaving, whichever threads are inside beside it. Threads
    started inside inherit one.
    """
    own = threading.get_ident()
    depth, threads, pool = _Held.inside.get(own, 0), 0, None

    def run(function: Callable[[Argument], Result], arguments: Sequence[Argument]) -> list[Result]:
        if pool is None or len(arguments) < 2:
            return serial(function, arguments)
        return list(pool.map(function, arguments))

    def put_back() -> None:
        with _held_lock:
            if depth:
                _Held.inside[own] = depth
            else:
                _Held.inside.pop(own, None)
            if threads:
                torch.set_num_threads(threads)
        if pool is not None:
            pool.shutdown()

    with followed_by(put_back):
        with _held_lock:
            found = torch.get_num_threads()
            if not _Held.inside:
                _Held.before = found
            elif found == 1 and not depth:
                found = _Held.before
            threads = found
            _Held.inside[own] = depth + 1
            torch.set_num_threads(1)
        pool = ThreadPoolExecutor(threads) if threads > 1 else None
        yield run
