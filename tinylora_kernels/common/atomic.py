"""Files and directories that appear whole or not at all: written beside, synced to disk, renamed."""
from __future__ import annotations

import os
import secrets
import shutil


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the file by ``data`` or leave it as it was: written beside it, synced to disk, renamed."""
    path = os.path.realpath(path)
    directory = os.path.dirname(path)
    temporary = os.path.join(directory, f".tinylora-{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_directory(directory)


def sync_directory(directory: str) -> None:
    """Make a rename in this directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_directory(target: str, files: dict[str, bytes]) -> None:
    """All files or none: written to a sibling, synced, renamed; an earlier export is moved aside and then removed."""
    parent = os.path.dirname(target)
    fresh = os.path.join(parent, f".tinylora-{secrets.token_hex(8)}")
    old = fresh + "-old"
    os.mkdir(fresh)
    try:
        for name, data in files.items():
            with open(os.path.join(fresh, name), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        sync_directory(fresh)
        replaces = os.path.lexists(target)
        if replaces:
            os.rename(target, old)
        try:
            os.rename(fresh, target)
        except BaseException:
            if replaces:
                os.rename(old, target)
            raise
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    sync_directory(parent)
    shutil.rmtree(old, ignore_errors=True)
