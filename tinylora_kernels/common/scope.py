"""What holds for a block of code, in the context that opened the block and in no other.

A context variable alone leaves three ways to run under something else than was asked for, each without a word: a
generator that yields inside its block leaves it to whoever takes the item, and finds theirs when it goes on; blocks
that end out of order bring back one that has ended; the threads in which autograd runs a GPU's backward pass start
without it. Here the first is an error, the second ends what it began, and the third is carried.
"""
from __future__ import annotations

import ctypes
import functools
import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

import torch

from .interrupts import followed_by

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class Block:
    """One block, from when it is opened until it ends; what it is about is for a subclass to say."""

    outer: Block | None = None  # of the same context
    opener: FrameType | None = None  # the code that stands around it, while it is open
    thread = 0
    ended = False

    @property
    def of_generator(self) -> bool:
        return self.opener is not None and bool(self.opener.f_code.co_flags & _GENERATORS)


class Scope:
    """The open blocks of one kind, in all threads.

    Attributes:
        innermost: of this context; None outside. A fast path may compare it with a block it knows to be in force, as
            long as there is no block of a generator: ``by_generators``.
        is_open: some context has a block open.
        by_generators: a generator has one open.

    Args:
        name: what messages call its blocks.
    """

    def __init__(self, name: str):
        self.name = name
        self.innermost: ContextVar[Block | None] = ContextVar(name, default=None)
        self.is_open = self.by_generators = False
        self._open: list[Block] = []  # in the order they were opened
        self._lock = threading.Lock()
        self._key = f"tinylora {name} {id(self)}"

    @contextmanager
    def holding(self, block: Block) -> Iterator[None]:
        """Hold the block for a ``with`` statement of the caller, through any number of contextlib's managers."""
        block.opener, block.thread = _opener(), threading.get_ident()
        block.outer = self.innermost.get()
        with followed_by(lambda: self._end(block)):
            self._change(block, is_open=True)
            self._put(block)
            yield

    def _end(self, block: Block) -> None:
        block.ended = True
        self._change(block, is_open=False)
        block.opener = None  # its frame refers to the block
        remaining = self.innermost.get()
        while remaining is not None and remaining.ended:
            remaining = remaining.outer
        self._put(remaining)

    def now(self) -> Block | None:
        """The block that the calling code stands in; None outside.

        Raises:
            RuntimeError: it cannot be said which one that is.
        """
        block = self.innermost.get()
        if block is None and torch._C._current_graph_task_id() != -1:
            block = self._of_backward_pass()
        if self.by_generators:
            self._expect_order(block)
        if block is not None and block.ended:
            raise RuntimeError(
                f"{self.name}: this context was copied from a block that has ended; keep the block open until the work "
                "is done, or open one where it is done"
            )
        return block

    def _change(self, block: Block, is_open: bool) -> None:
        with self._lock:
            if is_open != (block in self._open):
                (self._open.append if is_open else self._open.remove)(block)
            self.is_open = bool(self._open)
            self.by_generators = any(block.of_generator for block in self._open)

    def _put(self, block: Block | None) -> None:
        self.innermost.set(block)
        _stash(self._key, block)  # autograd gives its threads what the thread that called backward() has here

    def _of_backward_pass(self) -> Block | None:
        if not torch._C._is_key_in_tls(self._key):
            return None
        block: Block | None = torch._C._get_obj_in_tls(self._key)
        if block is None:
            return None
        with self._lock:
            others = [other for other in self._open if other.thread == block.thread and not _within(block, other)]
        if others:  # asyncio changes contexts within a thread
            raise RuntimeError(
                f"{self.name}: the thread that called backward() has several blocks open in different contexts, and "
                "this one of autograd's cannot tell which of them it serves; let one finish before the next begins"
            )
        return block

    def _expect_order(self, block: Block | None) -> None:
        """Raises unless the innermost block is the one whose code runs here."""
        with self._lock:
            of_frame = {block.opener: block for block in self._open}  # the last one of each
        nearest: Block | None = None
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and nearest is None:
            nearest, frame = of_frame.get(frame), frame.f_back
        if nearest is not None and nearest is not block:
            raise RuntimeError(
                f"{self.name}: the block that this code stands in is not the innermost one any more: a generator was "
                "suspended inside its block; close the block before each yield, or open it around the whole loop"
            )
        own = block is not None and block.of_generator and block.thread == threading.get_ident()
        if nearest is None and own:
            raise RuntimeError(
                f"{self.name}: a generator opened the block that is in force here, and this code is not its own; close "
                "the block before each yield, or open it around the whole loop"
            )


def _stash(key: str, value: object) -> None:
    """torch._C._stash_obj_in_tls with a reference of its own: up to torch 2.11 it gives back one that it never took."""
    if not _store_counts():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    torch._C._stash_obj_in_tls(key, value)


@functools.cache
def _store_counts() -> bool:
    """Whether the store takes a reference to what it holds. Tried in a thread that ends: nothing can be taken out of a
    store again, and each backward pass copies the store of the thread that calls it several times (5 us an entry).
    """
    counts = []

    def probe() -> None:
        value = object()
        before = sys.getrefcount(value)
        torch._C._stash_obj_in_tls("tinylora probe", value)
        counts.append(sys.getrefcount(value) > before)
        if not counts[0]:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))

    thread = threading.Thread(target=probe)
    thread.start()
    thread.join()
    return counts[0]


def _within(block: Block | None, other: Block) -> bool:
    while block is not None and block is not other:
        block = block.outer
    return block is not None


def _opener() -> FrameType | None:
    """The code whose ``with`` statement opens a block here: not contextlib, nor a generator that it drives."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (_of_contextlib(frame) or _of_contextlib(frame.f_back)):
        frame = frame.f_back
    return frame


def _of_contextlib(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_globals.get("__name__") == "contextlib"
