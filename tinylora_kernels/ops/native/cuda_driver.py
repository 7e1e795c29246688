"""Whether this machine's NVIDIA driver and GPU can run the code in the native library."""
from __future__ import annotations

import ctypes
import functools
import re
import sys

import torch

# The oldest Linux driver of each CUDA major version (CUDA's release notes, table "CUDA Toolkit and driver versions").
_OLDEST_DRIVER = {12: "525", 13: "580"}


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


def why_not(toolkit: str, architectures: str) -> str | None:
    """None if the library's CUDA code runs here, else the reason in one line, with the fix.

    Args:
        toolkit: version of the CUDA toolkit that compiled it, such as "13.0.88".
        architectures: what it was compiled for, in CMake's notation: "75-real 80-real 90".
    """
    if torch.version.cuda is None:
        return "this torch was built without CUDA. To change that: pip install torch from a CUDA index of pytorch.org"
    driver = driver_version()
    if driver is None:
        return "no NVIDIA driver is installed (libcuda.so.1 was not found). To change that: install the driver"
    major = int(toolkit.split(".")[0])
    if driver[0] < major:
        needed = _OLDEST_DRIVER.get(major, f"for CUDA {major}")
        return (
            f"the NVIDIA driver is too old: it runs CUDA {driver[0]}.{driver[1]}, the library was built with {toolkit}"
            f". To change that: install driver {needed} or newer, or the wheel for CUDA {driver[0]}"
        )
    if not torch.cuda.is_available():
        return "no GPU is visible. To change that: see nvidia-smi and CUDA_VISIBLE_DEVICES"
    capability = torch.cuda.get_device_capability()
    if not covers(architectures, capability):
        found, fix = "sm_{}{}".format(*capability), "build from the sources on this machine"
        return f"the GPU is {found}, the library was built for {architectures}. To change that: {fix}"
    return None


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a GPU of this compute capability.

    Machine code ("-real", or no suffix) runs on the same major version from its minor version on; PTX ("-virtual", or
    no suffix) is compiled by the driver for everything later. Code for "90a" runs on 9.0 alone.
    """
    if architectures == "native":
        return True
    for number, exact, kind in re.findall(r"(\d+)([af]?)(-real|-virtual)?", architectures):
        built = divmod(int(number), 10)
        if exact:
            if built == capability:
                return True
        elif kind != "-virtual" and built[0] == capability[0] and built <= capability:
            return True
        elif kind != "-real" and built <= capability:
            return True
    return False
