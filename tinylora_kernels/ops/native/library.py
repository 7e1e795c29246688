"""The native library: CPU and CUDA kernels behind the ops, loaded once, never an error at import."""
from __future__ import annotations

import ctypes
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._version import __version__
from ...method.parts import SPECIALISED_RANKS
from ..schema import ACTIVATION_DTYPES
from . import cuda, cuda_code, library_file

INTERFACE = Path(__file__).with_name("kernels.h")  # of what linear/node.cpp calls in the library
LIBRARY = library_file.PACKAGE / "libtinylora.so"
RECORD = library_file.PACKAGE / "_build_record.json"
CPU_ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "neon", "neon_bf16", "sve256")
PRODUCT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of the library
PRODUCT_VECTORS = 4  # a multiple of: multiplied together
PRODUCT_STEP = 32  # a multiple of: columns of the padded sums


Record = dict[str, Any]  # JSON: texts, and whether there is a library and CUDA in it


@dataclass(frozen=True)
class Status:
    """What the native library can do here.

    Attributes:
        path: the library file, whether or not it could be loaded.
        error: None if it is loaded, else one line that says why not and what would change it.
        has_cuda: it runs on NVIDIA GPUs.
        isa: instruction set the CPU kernels run with, one of CPU_ISAS.
        build: facts of the build: version, compiler, torch_target, interface (SHA-256 of kernels.h), cuda (what device
            code is embedded, "sm_90 ...").
        record: what setup.py wrote about its attempt, {} if it left nothing.
    """

    path: Path
    error: str | None
    has_cuda: bool = False
    isa: str | None = None
    build: dict[str, str] = field(default_factory=dict)
    record: Record = field(default_factory=dict)


@functools.cache
def load() -> Status:
    """Load the library into this process, once; what went wrong is in the result."""
    record = _build_record()
    if not LIBRARY.is_file():
        reason = record.get("reason") or "the package was copied here without being built"
        return _unusable(f"not built: {reason}", record.get("fix"), record)
    if damage := library_file.damage(LIBRARY):
        return _unusable(f"{LIBRARY.name} does not load: {damage}", None, record)
    try:
        torch.ops.load_library(str(LIBRARY))
        library = ctypes.CDLL(str(LIBRARY))
        for function in (library.tinylora_build_info, library.tinylora_isa):
            function.restype = ctypes.c_char_p
    except (OSError, RuntimeError, AttributeError) as error:
        reason, fix = library_file.explain(str(error.__cause__ or error))  # torch wraps what the loader said
        return _unusable(f"{LIBRARY.name} does not load: {reason}", fix, record)
    build = dict(line.split("=", 1) for line in library.tinylora_build_info().decode().splitlines())
    if build["version"] != __version__:
        return _unusable(f"{LIBRARY.name} is of version {build['version']}, the package of {__version__}", None, record)
    if build.get("interface") != hashlib.sha256(INTERFACE.read_bytes()).hexdigest():
        return _unusable(f"{LIBRARY.name} was built from older sources of version {__version__}", None, record)
    isa = library.tinylora_isa().decode()
    refusal = isa.removeprefix("error: ") if isa.startswith("error: ") else None
    try:
        archive = cuda_code.archive_of(library)
        if archive:
            cuda_code.provide_to(library)
    except (ValueError, AttributeError) as error:  # another archive than this one reads, a function that is missing
        return _unusable(f"{LIBRARY.name} was built from older sources of version {__version__}: {error}", None, record)
    if archive:
        build |= {"cuda": " ".join(archive.targets), "cuda_compiler": archive.compiler}
    return Status(LIBRARY, refusal, archive is not None, None if refusal else isa, build, record)


def _unusable(reason: str, fix: str | None, record: Record) -> Status:
    return Status(LIBRARY, f"{reason}. To change that: {fix or library_file.reinstall_command()}", record=record)


def _build_record() -> Record:
    try:
        return dict(json.loads(RECORD.read_text()))
    except (OSError, ValueError):
        return {}


def use_isa(name: str) -> bool:
    """Run the CPU kernels with this instruction set from now on; False, and no change, if this machine cannot.

    For tests and benchmarks. The environment variable TINYLORA_CPU_ISA does the same for a whole process.
    """
    if name not in CPU_ISAS:
        raise ValueError(f"isa: expected one of {', '.join(CPU_ISAS)}, found {name!r}")
    if load().error:
        return False
    return bool(ctypes.CDLL(str(LIBRARY)).tinylora_use_isa(name.encode()))


def can_multiply(weight: Tensor) -> bool:
    """Whether `products` takes rows of this weight. Not those of a subclass, whose numbers may lie elsewhere."""
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.layout == torch.strided
    on_cpu = plain and weight.device.type == "cpu" and weight.stride(1) == 1
    if not on_cpu or weight.dtype not in PRODUCT_DTYPES or load().error:
        return False
    return bool(_functions().tinylora_has_products())


def products(rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """X W^T [p, N] and (X W^T) W [p, D] in fp32, reading W once, on the calling thread and without the GIL.

    Args:
        rows: W [N, D], as `can_multiply` wants it.
        x: X fp32 [p, D].
    """
    (count, width), vectors = rows.shape, len(x)
    padded = -(-vectors // PRODUCT_VECTORS) * PRODUCT_VECTORS
    padded_width = -(-width // PRODUCT_STEP) * PRODUCT_STEP
    if padded > vectors:
        x = torch.nn.functional.pad(x, (0, 0, 0, padded - vectors))
    x = x.contiguous()
    y, sums = x.new_empty(count, padded), x.new_zeros(padded, padded_width)
    _functions().tinylora_products(
        PRODUCT_DTYPES.index(rows.dtype), rows.data_ptr(), rows.stride(0), count, width,
        x.data_ptr(), padded, y.data_ptr(), sums.data_ptr(), padded_width,
    )  # fmt: skip
    return y[:, :vectors].T, sums[:vectors, :width]


def same_numbers(offsets: Tensor, bits: Tensor) -> Callable[[int], bool]:
    """base.witness.Witness.knows, asked of the address of a weight on the CPU: it takes a microsecond.

    Args:
        offsets, bits: the witness's; the caller keeps them alive.
    """
    runs, run = bits.shape
    size = bits.element_size()
    return functools.partial(
        _functions().tinylora_same_numbers, offsets.data_ptr(), bits.data_ptr(), runs, run * size, size
    )


def kernels() -> tuple[int, int]:
    """Addresses of the library's Kernels (kernels.h), CPU and CUDA, which linear/node.cpp calls; 0: not in there."""
    status = load()
    if status.error:
        return 0, 0
    library = _functions()
    return library.tinylora_cpu_kernels(), library.tinylora_cuda_kernels() if status.has_cuda else 0


@functools.cache
def _functions() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.tinylora_products.argtypes = [
        ctypes.c_int, pointer, size, size, size, pointer, size, pointer, pointer, size
    ]  # fmt: skip
    library.tinylora_products.restype = None
    library.tinylora_cpu_kernels.restype = pointer
    if load().has_cuda:
        library.tinylora_cuda_kernels.restype = pointer
    library.tinylora_same_numbers.argtypes = [pointer, pointer, size, size, size, pointer]
    library.tinylora_same_numbers.restype = ctypes.c_bool
    return library


# The overloads, not the packets: no overload resolution on every call.
update = torch.ops.tinylora.update.default
update_backward = torch.ops.tinylora.update_backward.default
update_parts = torch.ops.tinylora.update_parts.default
update_parts_backward = torch.ops.tinylora.update_parts_backward.default
low_rank = torch.ops.tinylora.low_rank.default
update_input_grad = torch.ops.tinylora.update_input_grad.default
refresh_right = torch.ops.tinylora.refresh_right.default


def why_not_cpu(device_type: str, dtype: torch.dtype, rank: int) -> str | None:
    """None if the CPU kernels serve this request, else the reason in one line."""
    if device_type != "cpu":
        return f"it runs on the CPU, the tensors are on {device_type}"
    if load().error:
        return load().error
    return _why_not_dtype(dtype)


def why_not_cuda(device_type: str, dtype: torch.dtype, rank: int) -> str | None:
    """None if the CUDA kernels serve this request, else the reason in one line."""
    if device_type != "cuda":
        return f"it runs on NVIDIA GPUs, the tensors are on {device_type}"
    status = load()
    if status.error:
        return status.error
    if not status.has_cuda:
        reason = status.record.get("cuda_reason") or "switched off"
        return f"built without CUDA: {reason}. To change that: {library_file.reinstall_command()}"
    if torch.version.hip:
        return "it runs on NVIDIA GPUs, this torch is for AMD"
    if rank not in SPECIALISED_RANKS:
        return f"rank {rank}: the CUDA kernels exist for ranks {', '.join(map(str, SPECIALISED_RANKS))}"
    if dtype not in cuda_code.ELEMENTS:
        return f"{dtype} activations: the CUDA kernels take float32, bfloat16 and float16"
    return cuda.why_not(_functions(), dtype, rank)


def _why_not_dtype(dtype: torch.dtype) -> str | None:
    if dtype in ACTIVATION_DTYPES:
        return None
    return f"{dtype} activations: expected float32, bfloat16, float16 or float64"
