"""Other work on the machine: processes that keep a core busy each."""
from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """That many, with the priority of this one."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
