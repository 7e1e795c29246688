"""Where what was computed once is kept for the next process."""
from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_directory() -> Path | None:
    """TINYLORA_CACHE, or ~/.cache/tinylora_kernels; None where neither exists (no home directory)."""
    named = os.environ.get("TINYLORA_CACHE")
    try:
        return Path(named).expanduser() if named else Path.home() / ".cache" / "tinylora_kernels"
    except RuntimeError:
        return None


def make_directory(directory: Path) -> None:
    """The directory and those above it; below one that hands its group on (setgid), as open to it as that one."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    above = directory.parent.stat().st_mode
    if above & stat.S_ISGID:
        directory.chmod(stat.S_IMODE(directory.stat().st_mode | above & (stat.S_ISGID | stat.S_IRWXG)))


def distrust(folder: Path) -> str | None:
    """Why what is in a folder is not to be run: others than this user may have put it there; None: it may be.

    Code is proven by nothing: a digest beside it says that it is whole, and not who wrote it.
    """
    try:
        status = os.lstat(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{folder} cannot be read ({error.strerror})"
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is no directory"
    if status.st_uid != os.geteuid():
        return f"{folder} is another user's"
    return f"others may write to {folder} (chmod go-w)" if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None
