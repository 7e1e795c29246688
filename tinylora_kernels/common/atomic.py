"""Files and directories that appear whole or not at all: written beside, synced to disk, renamed.

What is being written has a name of its own beside the target, and is locked (flock) as long as its writer lives. So the
next writer in a directory can tell what a killed one left there from what is in work, and removes it.
"""
from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from typing import BinaryIO

_UNFINISHED = re.compile(r"\.tinylora-[0-9a-f]{16}")
_NO_LOCKS_PATIENCE = 86400.0  # seconds after which a leftover is one, on a file system without locks
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV)  # of renameat2: this file system cannot
# of a directory that stays where it is: a mount point, or one in a directory that this user may not write to
_FIXED = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading; a FIFO or a device, at which opening or reading may wait for ever, is refused.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        _expect_regular(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the file by ``data`` or leave it as it was: written beside it, synced to disk, renamed.

    A link is followed. A file that is replaced gives its owner, mode and extended attributes to the new one, as far as
    this user may.

    Raises:
        OSError: it cannot be written, or something else than a regular file has the name.
    """
    name = os.fsdecode(path)
    if os.path.basename(name) in ("", os.curdir, os.pardir):  # a directory's name, whether it is there or not
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    _replace_files({os.path.realpath(name): data})


def _replace_files(files: dict[str, bytes]) -> None:
    """Each one as write_atomically; none is replaced before all of them are written."""
    directories = {os.path.dirname(path) for path in files}
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            _expect_regular(path, os.stat(path).st_mode)
    for directory in directories:
        remove_leftovers(directory)
    with contextlib.ExitStack() as stack:
        fresh = {}
        for path, data in files.items():
            fresh[path], descriptor = stack.enter_context(_beside(os.path.dirname(path)))
            _keep_ownership(path, descriptor)
            _write(descriptor, data)
            os.fsync(descriptor)
        for path, temporary in fresh.items():
            os.replace(temporary, path)
    for directory in directories:
        sync_directory(directory)


def take_name(path: str | os.PathLike[str], data: bytes, mode: int | None) -> None:
    """A new file in the place of whatever has the name, a link or a FIFO too; not synced.

    Args:
        mode: of the file; None: what the umask leaves of 0o666.
    """
    directory = os.path.dirname(os.path.abspath(path))
    remove_leftovers(directory)
    with _beside(directory) as (temporary, descriptor):
        if mode is not None:
            os.fchmod(descriptor, mode)
        _write(descriptor, data)
        os.replace(temporary, path)


def write_directory(target: str, files: dict[str, bytes]) -> None:
    """All files or none, in a directory that is there at every moment: written beside it, synced, exchanged with it.

    Where it holds other things too or has to stay the directory it is (this process works in it, something is mounted
    there, its parent may not be written to), and on a file system that cannot exchange two names, the files of a
    directory that is there are replaced one by one, the last one first, each of them whole.
    """
    stays = os.path.isdir(target) and (_is_worked_in(target) or others_in(target, files))
    if stays or not _put_in_place(target, files):
        _replace_files({os.path.realpath(os.path.join(target, name)): files[name] for name in reversed(files)})


def others_in(directory: str, names: Iterable[str]) -> list[str]:
    """What the directory holds beside these, and beside what writers have in work there."""
    return sorted(name for name in {*os.listdir(directory)} - {*names} if not _UNFINISHED.fullmatch(name))


def _is_worked_in(target: str) -> bool:
    """Whether the working directory is this one or below it."""
    try:
        return os.path.commonpath((os.getcwd(), target)) == target
    except (FileNotFoundError, ValueError):  # it was removed, or is on another drive
        return False


def _put_in_place(target: str, files: dict[str, bytes]) -> bool:
    """Write the directory beside the target and give it its name; False where the one that is there has to stay."""
    try:
        _exchange(target, files)
    except OSError as error:
        if error.errno not in _FIXED or not os.path.isdir(target):
            raise
        return False
    return True


def _exchange(target: str, files: dict[str, bytes]) -> None:
    parent = os.path.dirname(target)
    os.makedirs(parent, exist_ok=True)  # as save_pretrained does; of a file the directory has to be there
    remove_leftovers(parent)
    with _beside(parent, is_directory=True) as (fresh, descriptor):
        _keep_ownership(target, descriptor)
        for name, data in files.items():
            with open(os.path.join(fresh, name), "wb") as file:
                _keep_ownership(os.path.join(target, name), file.fileno())
                _write(file.fileno(), data)
                os.fsync(file.fileno())
        os.fsync(descriptor)
        try:
            os.rename(fresh, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not _exchanged(fresh, target):
                for name in reversed(files):
                    os.replace(os.path.join(fresh, name), os.path.join(target, name))
                sync_directory(target)
        sync_directory(parent)


def sync_directory(directory: str) -> None:
    """Make a rename in this directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(directory: str) -> None:
    """Remove what writers that were killed left unfinished in this directory, as far as this user may."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if not _UNFINISHED.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError):
                descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if _is_abandoned(descriptor):
                        _remove(entry.path)
                finally:
                    os.close(descriptor)


@contextlib.contextmanager
def _beside(directory: str, is_directory: bool = False) -> Iterator[tuple[str, int]]:
    """A new name in the directory and its descriptor, locked; whatever bears the name at the end is removed."""
    while True:
        path = os.path.join(directory, f".tinylora-{secrets.token_hex(8)}")
        descriptor = -1
        try:
            # Until it is locked, another writer may take it for a leftover.
            try:
                if is_directory:
                    os.mkdir(path)
                else:
                    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                raise FileNotFoundError(f"{directory}: there is no such directory to write to; make it first") from None
            if is_directory:
                with contextlib.suppress(FileNotFoundError):
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if descriptor >= 0 and _lock(descriptor) is not False and _is_at(path, descriptor):
                yield path, descriptor
                return
        finally:
            _remove(path)
            if descriptor >= 0:
                os.close(descriptor)


def _write(descriptor: int, data: bytes) -> None:
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        file.write(data)


def _expect_regular(path: str | os.PathLike[str], mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "expected a regular file, found a FIFO, a socket or a device", os.fspath(path))


def _lock(descriptor: int) -> bool | None:
    """Lock what was opened, without waiting; None where the file system has no locks."""
    import fcntl  # not on Windows

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_abandoned(descriptor: int) -> bool:
    locked = _lock(descriptor)
    return time.time() - os.fstat(descriptor).st_mtime > _NO_LOCKS_PATIENCE if locked is None else locked


def _is_at(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove(path: str) -> None:
    """Remove a file or a directory, if it is there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError:  # EISDIR, or EPERM on macOS
        shutil.rmtree(path, ignore_errors=True)


def _keep_ownership(path: str, descriptor: int) -> None:
    """Give the new file the owner, mode and extended attributes of the one at the path, as far as this user may."""
    try:
        old, new = os.stat(path), os.fstat(descriptor)
    except FileNotFoundError:
        return
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        for owner in (old.st_uid, -1):  # another user's file: its group at least
            with contextlib.suppress(PermissionError):
                os.fchown(descriptor, owner, old.st_gid)
                break
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
    if sys.platform == "linux":  # access lists are among them
        with contextlib.suppress(OSError):
            for name in os.listxattr(path):
                os.setxattr(descriptor, name, os.getxattr(path, name))


def _exchanged(a: str, b: str) -> bool:
    """Swap what two names stand for, in one step; False where this system or file system cannot."""
    libc, exchange = ctypes.CDLL(None, use_errno=True), 2
    names = os.fsencode(a), os.fsencode(b)
    if hasattr(libc, "renameat2"):  # RENAME_EXCHANGE, of Linux
        here = -100  # AT_FDCWD
        failed = libc.renameat2(here, names[0], here, names[1], exchange)
    elif hasattr(libc, "renamex_np"):  # RENAME_SWAP, of macOS
        failed = libc.renamex_np(*names, exchange)
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in _NOT_HERE:
        return False
    raise OSError(code, os.strerror(code), a, None, b)
