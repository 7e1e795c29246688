"""What a measurement depends on, for every row of every result file."""
from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from tinylora_kernels._version import __version__
from tinylora_kernels.linear import build, node
from tinylora_kernels.ops.native import library as native

os.environ.setdefault("TINYLORA_NODE", "ready")  # what runs is not to change in the midst of a measurement
ROOT = Path(__file__).resolve().parents[2]  # the checkout, where this is one


def describe() -> dict[str, str]:
    """CPU, instruction set of our kernels, threads, versions, commit, a fingerprint of the code, and the date.

    A commit marked with + has changes on top in the package or its native sources.
    """
    return {
        "cpu": cpu_model(),
        "isa": native.load().isa or "none",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "peft": _version("peft"),
        "transformers": _version("transformers"),
        "tinylora_kernels": __version__,
        "commit": commit(),
        "code": code_fingerprint(),
        "date": datetime.date.today().isoformat(),
    }


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "tinylora_kernels", "csrc").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


@functools.cache
def code_fingerprint() -> str:
    """First digits of the SHA-256 of what a step executes: the native libraries and the Python around them.

    A run is resumed only where this has not changed.
    """
    package = native.LIBRARY.parent
    rooms = [package / name for name in ("ops", "linear", "layers")]
    sources = [package / "functional.py", *(path for room in rooms for path in sorted(room.rglob("*.py")))]
    sources += [build.SOURCE, *build.INCLUDED]
    digest = hashlib.sha256((node.why_no_twin or "linear node").encode())
    for path in [*sources, native.LIBRARY]:
        digest.update(path.read_bytes() if path.is_file() else b"none")
    return digest.hexdigest()[:10]


def results_directory() -> Path:
    """bench/results of the checkout, or of the current directory for an installed package."""
    root = ROOT if (ROOT / "pyproject.toml").is_file() else Path.cwd()
    return root / "bench" / "results"
