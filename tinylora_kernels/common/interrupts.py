"""Changes that end whole, finished or undone, whatever interrupts them: Ctrl-C, a signal's handler, memory that is out.

    finish(work)                        what has begun is finished, then the interrupt is raised

    with undone_by(undo):               or it is undone
        ...
    with followed_by(end):              what was set for a while is put back
        ...
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


def finish(work: Callable[[], object]) -> None:
    """Do the work to its end; what interrupts it is raised afterwards.

    Args:
        work: it begins again from its start after an interrupt, and must lead to the same from wherever it stopped.

    Raises:
        Exception: of the work itself, where it fails a second time.
    """
    interrupt: BaseException | None = None
    while True:
        try:
            work()
            break
        except BaseException as error:
            if isinstance(error, Exception) and isinstance(interrupt, Exception):
                raise
            interrupt = error
    if interrupt is not None:
        raise interrupt


@contextmanager
def undone_by(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo`, as `finish` does, where the block does not come to its end: from wherever it stopped."""
    try:
        yield
    except BaseException:
        finish(undo)
        raise


@contextmanager
def followed_by(end: Callable[[], object]) -> Iterator[None]:
    """Call `end`, as `finish` does, after the block: a `finally` may be interrupted before its first line."""
    try:
        yield
        finish(end)
    except BaseException:
        finish(end)
        raise
