"""Where what was computed once is kept for the next start."""
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
