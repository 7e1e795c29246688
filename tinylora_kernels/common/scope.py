"""What holds for a block of code, in the context that opened the block and in no other.

A context variable alone leaves four ways to run under something else than was asked for, each without a word: a
generator that yields inside its block leaves it to whoever takes the item, and finds theirs when it goes on; blocks
that end out of order bring back one that has ended; the threads in which autograd runs a GPU's backward pass start
without it; and activations are recomputed in the block of the backward pass, which need not be that of the forward one.
Here the first is an error, the second ends what it began, the third is carried, and the last is an error where the two
blocks ask for different things.
"""
from __future__ import annotations

import bisect
import ctypes
import functools
import inspect
import itertools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import NamedTuple, NoReturn

import torch

from .interrupts import followed_by

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
nodes_in_blocks = False  # autograd nodes were made in a block, of any scope: activations may be recomputed elsewhere
_numbers = itertools.count(1)


def in_backward() -> bool:
    """Whether a backward pass runs here, which may be recomputing activations."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Trace(NamedTuple):
    """What is left of a block that has ended: blocks that ask for the same leave the same."""

    meaning: int = 0  # 0: nothing was asked for
    layers: frozenset[int] | None = None  # ids of those that it is about, None: all

    def means(self, layer: object) -> int:
        return self.meaning if self.layers is None or id(layer) in self.layers else 0


NO_BLOCK = Trace()


class Block:
    """One block, from when it is opened until it ends; what it is about is for a subclass to say."""

    outer: Block | None = None  # of the same context
    opener: FrameType | None = None  # the code that stands around it, while it is open
    thread = 0
    ended = False

    @functools.cached_property
    def trace(self) -> Trace:
        return Trace(next(_numbers))

    @property
    def of_generator(self) -> bool:
        return self.opener is not None and bool(self.opener.f_code.co_flags & _GENERATORS)


class Trail:
    """In which blocks a thread made the autograd nodes, which torch numbers for each thread: the last changes."""

    KEPT = 1024

    def __init__(self) -> None:
        self._changes = [(0, NO_BLOCK)]  # the nodes from this one on, in blocks of this trace

    def enter(self, block: Block | None) -> None:
        """The thread's next nodes are made in this block. Done or not wherever it is interrupted."""
        global nodes_in_blocks
        trace, begin = NO_BLOCK if block is None else block.trace, torch._C._autograd._get_sequence_nr()
        last, before = self._changes[-1]
        if last == begin:  # no node was made since
            self._changes[-1] = begin, trace
        elif before != trace:
            nodes_in_blocks = nodes_in_blocks or before != NO_BLOCK
            self._changes.append((begin, trace))
        if len(self._changes) > 2 * self.KEPT:
            del self._changes[: self.KEPT]

    def of(self, node: int) -> Trace | None:
        """Of the block in which the node of this number was made; None: it was long ago."""
        place = bisect.bisect_right(self._changes, node, key=lambda change: change[0]) - 1
        return None if place < 0 else self._changes[place][1]


class _Here(NamedTuple):
    """Of the thread that calls backward(), for those in which autograd runs it."""

    block: Block | None
    trail: Trail
    recomputed_in: int | None = None  # the graph task that recomputes, in this block, what calls backward() now


class _OfThread(threading.local):
    """What a scope has in each thread."""

    def __init__(self) -> None:
        self.trail = Trail()


class Scope:
    """The open blocks of one kind, in all threads.

    Attributes:
        innermost: of this context; None outside. A fast path may compare it with a block it knows to be in force, as
            long as there is no block of a generator: ``by_generators``.
        is_open: some context has a block open.
        by_generators: a generator has one open.

    Args:
        name: what messages call its blocks.
        way_out: what to do about activations that are recomputed outside the block that made them, for messages.
    """

    def __init__(self, name: str, way_out: str):
        self.name, self.way_out = name, way_out
        self.innermost: ContextVar[Block | None] = ContextVar(name, default=None)
        self.is_open = self.by_generators = False
        self._open: list[Block] = []  # in the order they were opened
        self._lock = threading.Lock()
        self._of_thread = _OfThread()
        self._key = f"tinylora {name} {id(self)}"

    def matters(self) -> bool:
        """Whether code may stand in a block, or recompute what was made in one: else there is nothing to ask."""
        return self.is_open or (nodes_in_blocks and in_backward())

    def note(self) -> None:
        """The innermost block of this context is in force: a thread changes contexts without a word (asyncio)."""
        if not torch.compiler.is_compiling() and not in_backward():
            self._of_thread.trail.enter(self.innermost.get())

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

    def now(self, layer: object = None) -> Block | None:
        """The block that the calling code, of this layer, stands in; None outside.

        Raises:
            RuntimeError: it cannot be said which one that is.
        """
        block = self.innermost.get()
        if (recomputed := in_backward()) and block is None:
            block = self._of_backward_pass()
        if self.by_generators:
            self._expect_order(block)
        if recomputed and (block is not None or nodes_in_blocks):
            self._expect_made_in(block, layer)
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
        trail = self._of_thread.trail
        trail.enter(block)
        _stash(self._key, _Here(block, trail))  # autograd gives its threads what the thread that called backward() has

    def _here(self) -> _Here | None:
        """Of the thread that called backward(), in whichever thread it runs."""
        return torch._C._get_obj_in_tls(self._key) if torch._C._is_key_in_tls(self._key) else None

    def _expect_made_in(self, block: Block | None, layer: object) -> None:
        """Raises where what is recomputed here was computed in a block that asked for something else of the layer."""
        here, origin, now = self._here(), self.origin(), NO_BLOCK if block is None else block.trace
        if here is None or origin is None:
            return
        if origin.means(layer) != now.means(layer):
            self.refuse_recomputing()
        if here.recomputed_in is None:
            task = torch._C._current_graph_task_id()
            _stash(self._key, here._replace(recomputed_in=task))  # until this node is done: autograd puts back what was

    def refuse_recomputing(self) -> NoReturn:
        raise RuntimeError(
            f"{self.name}: activations are being recomputed outside the block that made them; {self.way_out}"
        )

    def origin(self) -> Trace | None:
        """Of the block in which that was computed which is recomputed here; None: nobody can tell."""
        node, here = torch._C._current_autograd_node(), self._here()
        if node is None or here is None:
            return None
        if here.recomputed_in not in (None, torch._C._current_graph_task_id()):
            # in the same block, a moment ago, in whichever thread of autograd's
            return NO_BLOCK if here.block is None else here.block.trace
        return here.trail.of(node._sequence_nr())

    def _of_backward_pass(self) -> Block | None:
        here = self._here()
        if here is None or here.block is None:
            return None
        block = here.block
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
