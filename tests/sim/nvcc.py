"""Compiles CUDA sources for the simulators; results are kept by the hash of everything that went in."""
from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
_CACHE = Path(tempfile.gettempdir()) / "tinylora_kernels_nvcc"

needs_nvcc = pytest.mark.skipif(not Path(NVCC).exists(), reason="needs nvcc from the CUDA toolkit")


def compile_cached(source: Path, *flags: str, include: Path | None = None, keep: str = "*.ptx") -> Path:
    """A folder with the result of `nvcc flags -I include -o out source` and the intermediate files that match `keep`.

    Beside the source, the files of `include` are all that the result may depend on.
    """
    digest = hashlib.sha256(" ".join((NVCC, source.name, *flags)).encode())
    for path in (source, *sorted(include.glob("*.*") if include else ())):
        digest.update(path.name.encode() + path.read_bytes())
    folder = _CACHE / f"{source.stem}-{digest.hexdigest()[:24]}"
    if folder.exists():
        return folder
    _CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as scratch:
        work = Path(scratch)
        out = work / "result" / "out"
        out.parent.mkdir()
        folders = [f"-I{include}"] if include else []
        command = [NVCC, "-std=c++17", "-lineinfo", *flags, *folders, "-keep", "-keep-dir", work, "-o", out, source]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc {source.name}: {(done.stderr or done.stdout)[-3000:]}")
        for kept in work.glob(keep):
            kept.rename(out.parent / kept.name)
        with contextlib.suppress(OSError):  # another process was quicker
            out.parent.rename(folder)
    return folder


def ptx(source: Path, capability: int, *flags: str, include: Path | None = None) -> str:
    """The PTX of one source for compute_XY, with line numbers of the source."""
    return (compile_cached(source, f"-arch=compute_{capability}", "-ptx", *flags, include=include) / "out").read_text()
