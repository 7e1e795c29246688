"""The C++ node that is there: beside the package, or in a cache that the first call to miss it had it compiled into.

A wheel cannot hold the nodes of all torches and Pythons (280 KB each), so a process that would run one and finds none
has it compiled (build.py) by a process of its own, once for each torch and Python, and runs the node in Python
meanwhile. Nobody waits for it: the compiling process stands back behind all others, goes on where its parent ends, and
puts the library there whole. The processes of a user that want the same one, the ranks of a job, have it compiled
once: whoever holds the lock does. Beside the library lies a record (build.Record) of its SHA-256, or of why there is
none: a failure is tried again with another compiler, or after a week; after a kill twice more before that.

Code is proven by nothing, so the folder in the cache belongs to one user and is closed to others, or is not used.

TINYLORA_NODE=0 switches it off; with TINYLORA_NODE=ready one that is there is used, and none is compiled.
"""
from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch

from ..common.atomic import open_regular
from ..common.caches import cache_directory, distrust, make_directory
from ..ops.native import library, library_file
from . import build

TORCH = Path(torch.__file__).parent
ATTEMPTS = 3  # that may be killed before it is left at that
PATIENCE = 7 * 86400.0  # seconds for which a failure is remembered

_forked = threading.Event()
_asked = threading.Lock()  # taken by the first call that would have run the node, for good
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked.set)


def load() -> tuple[ModuleType | None, str | None]:
    """The extension for this torch and Python, or None and why there is none that can be used."""
    if os.environ.get("TINYLORA_NODE") == "0":
        return None, "switched off by TINYLORA_NODE=0"
    name, reasons = build.file_name(TORCH), []
    for path in (build.PACKAGE / name, _cached()):
        if path is None or not path.is_file():
            continue
        if damage := library_file.damage(path):
            reasons.append(f"{path} does not load: {damage}")
            continue
        try:
            return _import(path), None
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(f"{path} does not load: {error}")
    if not reasons and any(build.PACKAGE.glob(build.of_other_sources(name))):
        reasons.append("compiled from other sources than those of this package")
    return None, reasons[0] if reasons else f"not compiled for torch {torch.__version__}"


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{__package__}._node", path)
    assert spec is not None and spec.loader is not None  # as of every file with an extension's suffix
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.use_kernels(*library.kernels())
    return module


def wanted(take: Callable[[ModuleType], None]) -> None:
    """A call would have run the node in C++, and there is none: have it compiled, unless something speaks against it.

    Args:
        take: what is to be done with the extension, in a thread of its own, once it is there.
    """
    if not _asked.acquire(blocking=False) or why_not() is not None:
        return
    with contextlib.suppress(RuntimeError):  # no more threads
        threading.Thread(target=_compile, args=(take,), name="tinylora node", daemon=True).start()


def why_not() -> str | None:
    """What speaks against having the node compiled by itself, and what to do; None: nothing."""
    if (setting := os.environ.get("TINYLORA_NODE", "")) in ("0", "ready"):
        return f"TINYLORA_NODE={setting} has none compiled"
    if not hasattr(os, "register_at_fork"):
        return f"that is done by itself on Linux and macOS. To change that: {build.COMMAND}"
    if _forked.is_set() or _is_data_worker():
        return f"a forked process or a data loader's worker has none compiled. To change that: {build.COMMAND}"
    if getattr(sys, "frozen", False) or not Path(sys.executable or "").name.startswith("python"):
        return f"sys.executable ({sys.executable}) is no Python that could do it. To change that: {build.COMMAND}"
    try:
        compiler, _ = build.find_tools()
    except build.CompileError as error:
        return str(error)
    if (folder := _folder()) is None:
        return f"there is no home directory. To change that: name a directory in TINYLORA_CACHE, or {build.COMMAND}"
    if problem := _problem(folder):
        return f"{problem}. To change that: name another directory in TINYLORA_CACHE, or {build.COMMAND}"
    if (cached := _cached()) is not None:
        return f"{cached} is as it was compiled. To change that: remove it, or {build.COMMAND}"
    return _failure(folder / build.file_name(TORCH), compiler)


def outlook() -> str:
    """What will become of a node that is not there."""
    if reason := why_not():
        return reason
    folder = _folder()
    if folder is not None and folder.is_dir():
        try:
            with _locked(folder, wait=False):
                pass
        except BlockingIOError:
            return "a process compiles it now"
    return "the first call of an adapted layer has it compiled, in the background"


def _failure(node: Path, compiler: list[str]) -> str | None:
    """Why an attempt that failed is not made again, in the words of the one that did."""
    record = build.read_record(node)
    if record is None or record.tools != build.describe_tools(compiler):
        return None
    with contextlib.suppress(OSError):
        if time.time() - build.record_of(node).stat().st_mtime > PATIENCE:
            return None
    if record.error:
        return f"{record.error}. To change that: {build.COMMAND}"
    if record.attempts >= ATTEMPTS:
        return f"compiling it was interrupted {record.attempts} times. To change that: {build.COMMAND}"
    return None


def _compile(take: Callable[[ModuleType], None]) -> None:
    """In a thread that nobody waits for: wait for the node, or have it compiled, and hand it over."""
    folder = _folder()
    assert folder is not None  # or something spoke against it
    with contextlib.suppress(OSError):  # a full disk, or no more processes
        make_directory(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        with _locked(folder, wait=True) as lock:
            if why_not() is None:  # nobody has made it, or failed, while this thread waited
                _remove_unfinished(folder, lock)
                _have_compiled(folder, lock)
    extension, _ = load()
    if extension is not None:
        take(extension)


def _remove_unfinished(folder: Path, lock: int | None) -> None:
    """What processes that were killed have left."""
    for left in folder.glob(f"{build.UNFINISHED}*"):
        if lock is not None or time.time() - left.stat().st_mtime > PATIENCE:
            shutil.rmtree(left, ignore_errors=True)


def _have_compiled(folder: Path, lock: int | None) -> None:
    nowhere = subprocess.DEVNULL  # a pipe would keep its reader waiting after this process has ended
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", build.__file__, TORCH, folder], stdin=nowhere, stdout=nowhere, stderr=nowhere,
        pass_fds=() if lock is None else (lock,),  # held as long as one of the two lives
    )  # fmt: skip
    logging.getLogger("tinylora_kernels").warning(
        f"tinylora_kernels: the C++ node of linear layers is being compiled for torch {torch.__version__}, once, in "
        "the background; layers run the one in Python until then, which is slower (TINYLORA_NODE=0: always)"
    )
    if (status := process.wait()) > 0:
        error = f"the process that was to compile it ended with status {status}"
        tools = build.describe_tools(build.find_tools()[0])
        build.write_record(folder / build.file_name(TORCH), build.Record(tools, 1, error))


def _is_data_worker() -> bool:
    data = sys.modules.get("torch.utils.data")
    return data is not None and data.get_worker_info() is not None


# The folder in the cache


def _folder() -> Path | None:
    directory = cache_directory()
    return None if directory is None or not hasattr(os, "geteuid") else directory / f"node-{os.geteuid()}"


def _problem(folder: Path) -> str | None:
    """Why the folder cannot be written to, or what is in it not be trusted, in words; None: neither."""
    if reason := distrust(folder):
        return reason
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} cannot be written to"


def _cached() -> Path | None:
    """The library in the cache, if it is there, byte for byte as it was compiled."""
    folder = _folder()
    if folder is None or distrust(folder) is not None:
        return None
    path = folder / build.file_name(TORCH)
    record = build.read_record(path)
    try:
        with open_regular(path) as file:
            if record is None or hashlib.sha256(file.read()).hexdigest() != record.digest:
                return None
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a cache that cannot be written to
        os.utime(path)  # when it was used last
    return path


@contextlib.contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[int | None]:
    """A descriptor that holds the folder's lock; None where the file system has no locks.

    Raises:
        BlockingIOError: another process holds it, and nobody waits.
    """
    import fcntl  # not on Windows

    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    held: int | None = descriptor
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            held = None
        yield held
        if held is not None:
            fcntl.flock(held, fcntl.LOCK_UN)  # of processes that were forked meanwhile, too
    finally:
        os.close(descriptor)
