"""Compiles CUDA sources for the simulators; what a source compiles to is kept by the hash of everything that went in."""
from __future__ import annotations

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


def compile_cached(source: Path, suffix: str, *flags: str, also: tuple[Path, ...] = ()) -> Path:
    """`nvcc flags -o OUT source`; `also`: other files the result depends on."""
    digest = hashlib.sha256(" ".join((NVCC, source.name, *flags)).encode())
    for path in (source, *also):
        digest.update(path.read_bytes())
    out = _CACHE / f"{source.stem}-{digest.hexdigest()[:24]}{suffix}"
    if not out.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        part = out.with_suffix(f".part{suffix}")
        done = subprocess.run([NVCC, "-std=c++17", *flags, "-o", part, source], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc {source.name}: {done.stderr[-3000:]}")
        part.rename(out)
    return out


def ptx(source: Path, capability: int, *flags: str, also: tuple[Path, ...] = ()) -> str:
    """The PTX of a source for compute_XY, with line numbers of the source."""
    return compile_cached(source, ".ptx", f"-arch=compute_{capability}", "-ptx", "-lineinfo", *flags, also=also).read_text()
