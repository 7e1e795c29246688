"""A disk cache of factors by the content of the weight, and the fingerprint that names the content.

An entry that is missing, damaged, another key's, or written by another version is computed again, and so is one that
the weight itself disowns (proof.py). A disk that cannot be written to costs one warning. Writers race safely: an entry
appears whole, by a rename. The entries used longest ago make room for new ones; users of a group may share a directory.
"""
from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import stat
import warnings
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..common.atomic import open_regular, take_name
from ..common.cached import cache_directory, make_directory
from ..common.finite import finite_number
from ..common.threads import one_thread_each

CHUNK_ELEMENTS = 1 << 20
SUFFIX = ".factors"
DEFAULT_MB = 1024.0  # a model of 7B parameters takes about 10 at rank 2
MAX_HEADER = 4096  # bytes of an entry beside its tensors
_DIGEST = hashlib.sha256  # with the CPU's SHA instructions the fastest in hashlib; releases the GIL


def weight_fingerprint(weight: Tensor) -> str:
    """32 hex digits that depend on the shape and the values of a matrix [m, n], not on its dtype, strides or device.

    Runs of whole rows, about 2^20 entries each, are hashed separately (SHA-256), each in the narrowest of bf16, fp32
    and fp64 that holds all its values exactly; the fingerprint is the hash of the shape and these hashes. So a bf16
    checkpoint and its fp32 copy agree, and no second copy of the weight is made.
    """
    weight = weight.detach()
    m, n = weight.shape
    rows = max(1, CHUNK_ELEMENTS // max(1, n))
    whole = _DIGEST(f"tinylora weight {m} {n}".encode())
    with one_thread_each() as run:
        for digest in run(lambda begin: _chunk_digest(weight[begin : begin + rows]), range(0, m, rows)):
            whole.update(digest)
    return whole.hexdigest()[:32]


def size_limit() -> int:
    """Bytes that the entries may take together: TINYLORA_CACHE_MB of 2^20 bytes, or 1024 of them."""
    named = os.environ.get("TINYLORA_CACHE_MB")
    try:
        megabytes = float(named) if named else DEFAULT_MB
    except ValueError:
        megabytes = math.nan
    return int(finite_number("TINYLORA_CACHE_MB", megabytes, at_least=0.0) * 2**20)


def load(key: str, at_most: int) -> dict[str, Tensor] | None:
    """The tensors stored under key, or None; an entry of more than at_most bytes of tensors is none."""
    directory = cache_directory()
    if directory is None:
        return None
    path = directory / f"{key}{SUFFIX}"
    try:
        with open_regular(path) as file:
            entry = file.read(at_most + MAX_HEADER + 1)
        digest, payload = entry[:32], entry[32:]
        if len(payload) > at_most + MAX_HEADER or _digest(key, payload) != digest:
            return None
        tensors = safetensors.torch.load(payload)
    except PermissionError as error:
        _warn_once(f"cached factors in {directory} cannot be read ({error.strerror}): chmod g+r, or name another "
                   "directory in TINYLORA_CACHE")  # fmt: skip
        return None
    except (OSError, safetensors.SafetensorError):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # when it was used last
    return tensors


def store(key: str, tensors: dict[str, Tensor]) -> None:
    """Write an entry: SHA-256 of the key and the payload, then the payload (safetensors)."""
    directory, limit = cache_directory(), size_limit()
    if directory is None or limit == 0:
        return
    payload = safetensors.torch.save(tensors)
    try:
        make_directory(directory)
        permissions = directory.stat().st_mode & 0o666
        shared = permissions & stat.S_IWGRP  # what a group writes, it may read
        take_name(directory / f"{key}{SUFFIX}", _digest(key, payload) + payload, permissions if shared else None)
        _trim(directory, limit)
    except OSError as error:
        _warn_once(f"factors are not cached in {directory} ({error}); set TINYLORA_CACHE to a writable directory")


def _digest(key: str, payload: bytes) -> bytes:
    return _DIGEST(f"tinylora factors {key}\n".encode() + payload).digest()


def _trim(directory: Path, limit: int) -> None:
    """Remove the entries used longest ago until the others fit, and what older releases left unfinished."""
    files = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX) or entry.name.startswith(".writing-"):
                with contextlib.suppress(OSError):  # another process removed it
                    status = entry.stat(follow_symlinks=False)
                    if not stat.S_ISDIR(status.st_mode):
                        files.append((status.st_mtime_ns, status.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
            total -= size


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _chunk_digest(rows: Tensor) -> bytes:
    exact = _narrowest(rows.cpu().contiguous())
    name = str(exact.dtype).encode()
    return _DIGEST(name + exact.view(torch.uint8).numpy().data).digest() if exact.numel() else _DIGEST(name).digest()


def _narrowest(values: Tensor) -> Tensor:
    """The values in the narrowest of bf16, fp32 and fp64 that holds them all exactly."""
    if values.dtype == torch.float16:
        values = values.float()
    for dtype in (torch.bfloat16, torch.float32):
        if values.dtype == dtype:
            break
        # most weights show at once that they do not fit
        if all(torch.equal(part.to(dtype).to(part.dtype), part) for part in (values[:1], values)):
            return values.to(dtype)
    return values

