"""A disk cache of factors by the content of the weight, and the fingerprint that names the content.

An entry that is missing, damaged, or written by another version is computed again; a disk that cannot be written to
costs one warning. Writers race safely: an entry appears whole, by a rename.
"""
from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import warnings
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..common.threads import one_thread_each

CHUNK_ELEMENTS = 1 << 20
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


def cache_directory() -> Path | None:
    """TINYLORA_CACHE, or ~/.cache/tinylora_kernels; None where neither exists (no home directory)."""
    named = os.environ.get("TINYLORA_CACHE")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache" / "tinylora_kernels"
    except RuntimeError:
        return None


def load(key: str) -> dict[str, Tensor] | None:
    """The tensors stored under key, or None."""
    directory = cache_directory()
    if directory is None:
        return None
    try:
        entry = (directory / f"{key}.factors").read_bytes()
        digest, payload = entry[:32], entry[32:]
        return safetensors.torch.load(payload) if _DIGEST(payload).digest() == digest else None
    except (OSError, safetensors.SafetensorError):
        return None


def store(key: str, tensors: dict[str, Tensor]) -> None:
    """Write an entry: SHA-256 of the payload, then the payload (safetensors)."""
    directory = cache_directory()
    if directory is None:
        return
    payload = safetensors.torch.save(tensors)
    temporary = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".writing-", delete=False) as file:
            temporary = file.name
            file.write(_DIGEST(payload).digest() + payload)
        os.replace(temporary, directory / f"{key}.factors")
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        _warn_once(str(directory), str(error))


@functools.cache
def _warn_once(directory: str, error: str) -> None:
    warnings.warn(
        f"factors are not cached in {directory} ({error}); set TINYLORA_CACHE to a writable directory", stacklevel=3
    )


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

