"""NVIDIA's driver on this machine, asked without torch's CUDA."""
from __future__ import annotations

import ctypes
import functools
import sys

# The driver whose functions the library calls, and its CUDA (CUDA's release notes, "CUDA Toolkit and driver versions").
OLDEST_CUDA, OLDEST_DRIVER = (12, 0), "525"


@functools.cache
def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the installed driver runs, as (major, minor); None without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10
