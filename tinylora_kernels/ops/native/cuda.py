"""Whether this machine's NVIDIA driver and GPUs run the CUDA kernels, for which their device code is made ready."""
from __future__ import annotations

import ctypes

import torch

from . import cuda_code, cuda_driver
from .nvrtc import CompileError


def why_not(library: ctypes.CDLL, dtype: torch.dtype, rank: int) -> str | None:
    """None if the kernels of this element type and rank run on every GPU here, else the reason in one line.

    The code for a GPU is taken from the library or, where it has none, compiled: the first answer may take seconds.
    """
    if torch.version.cuda is None:
        return "this torch was built without CUDA. To change that: pip install torch from a CUDA index of pytorch.org"
    driver = cuda_driver.driver_version()
    if driver is None:
        return "no NVIDIA driver is installed (libcuda.so.1 was not found). To change that: install the driver"
    if driver < cuda_driver.OLDEST_CUDA:
        return (
            "the NVIDIA driver is too old: it runs CUDA {}.{}, expected {}.{} or later. To change that: install driver "
            "{} or newer".format(*driver, *cuda_driver.OLDEST_CUDA, cuda_driver.OLDEST_DRIVER)
        )
    if not torch.cuda.is_available():
        return "no GPU is visible. To change that: see nvidia-smi and CUDA_VISIBLE_DEVICES"
    devices = range(torch.cuda.device_count())
    for major, minor in sorted({torch.cuda.get_device_capability(device) for device in devices}):
        try:
            cuda_code.make_ready(library, dtype, rank, 10 * major + minor)
        except CompileError as error:
            return f"no code for the GPU: {error}"
    for device in devices:
        in_use = torch._C._cuda_hasPrimaryContext(device)  # type: ignore[attr-defined]
        if in_use:  # a context takes memory: none is made for an answer
            library.tinylora_why_not_cuda.restype = ctypes.c_char_p
            if reason := library.tinylora_why_not_cuda(device, cuda_code.ELEMENTS.index(dtype), rank):
                return f"the driver refuses: {reason.decode()}"
    return None
