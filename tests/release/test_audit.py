"""What the native library asks of a machine, and that the auditor sees what it must not ask."""
import ctypes
import platform
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tinylora_kernels.ops.native import library as native

STATUS = native.load()
needs_library = pytest.mark.skipif(STATUS.error is not None, reason=f"native library: {STATUS.error}")
on_linux = pytest.mark.skipif(platform.system() != "Linux", reason="the audit reads ELF files")
pytestmark = on_linux


@needs_library
def test_the_library_needs_stable_shims_and_system_libraries_alone(script):
    audit = script("audit")
    library = audit.Library(native.LIBRARY)
    assert audit.foreign_libraries(library) == []
    assert audit.foreign_symbols(library) == []
    assert audit.exports(library) == [] and audit.runtime_inside(library) == []
    used = {symbol.name for symbol in library.symbols if symbol.undefined}
    assert {"torch_library_impl", "aoti_torch_get_dtype", "memcpy"} <= used  # the reader reads
    assert "libtorch_cpu.so" in library.needed
    assert not [name for name in library.needed if re.match(r"libtorch_python|libcuda", name)]


@needs_library
def test_the_library_runs_on_manylinux_2_28(script):
    compiler = re.fullmatch(r"gcc (\d+).*", STATUS.build["compiler"])
    if not compiler or int(compiler.group(1)) > 12:
        pytest.skip(f"wheels are built with gcc 12 or older, this library with {STATUS.build['compiler']}")
    audit = script("audit")
    problems = audit.too_new(audit.Library(native.LIBRARY))
    assert problems == []


def test_the_audit_sees_what_is_foreign(script, shared_library):
    audit = script("audit")
    cudart = shared_library("libcudart.so.13", "int cudaGetDeviceCount() {}", "-Wl,-soname,libcudart.so.13")
    driver = shared_library("libcuda.so.1", "int cuInit() {}", "-Wl,-soname,libcuda.so.1")
    source = """
        extern int _ZN2at5emptyEv(), PyLong_FromLong(), aoti_torch_get_current_cuda_stream(), aoti_torch_get_dtype();
        extern int cudaGetDeviceCount(int*), cuInit(int);
        const char* tinylora_name() { return "cudaErrorMemoryAllocation"; }
        __attribute__((weak)) extern int aoti_torch_cuda_weak();
        int tinylora_all() { int n; return _ZN2at5emptyEv() + PyLong_FromLong() + aoti_torch_get_current_cuda_stream()
                                          + aoti_torch_get_dtype() + cudaGetDeviceCount(&n) + cuInit(0)
                                          + aoti_torch_cuda_weak(); }
        int stray() { return 0; }
    """
    path = shared_library("bad.so", source, cudart, driver)
    found = "\n".join(audit.audit(path))
    for name in ("_ZN2at5emptyEv", "PyLong_FromLong", "cudaGetDeviceCount", "cuInit"):
        assert f"{name}: not a stable shim" in found
    assert "aoti_torch_get_current_cuda_stream: must be weak" in found
    assert "stray: exported" in found and "libcudart.so.13: not among the libraries allowed" in found
    assert "libcuda.so.1: not among the libraries allowed" in found and "CUDA's runtime is linked into it" in found
    assert "aoti_torch_get_dtype" not in found and "aoti_torch_cuda_weak" not in found


def test_the_audit_refuses_what_is_no_library(script, tmp_path):
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(ValueError, match="text.so: expected a 64-bit little-endian ELF file, found it to begin b'no "):
        script("audit").Library(tmp_path / "text.so")


def test_stand_ins_let_a_library_load(script, shared_library, tmp_path):
    """A library that needs another, which is nowhere to be found: what a CUDA build of torch is on a CPU machine."""
    standins = script("standins")
    absent = shared_library("libabsent.so.7", "int absent_count(void) { return 3; }", "-Wl,-soname,libabsent.so.7")
    wanting = "extern int absent_count(void); int tinylora_count(void) { return absent_count(); }"
    (tmp_path / "torch").mkdir()
    library = shared_library("torch/libwanting.so", wanting, absent)
    absent.unlink()
    with pytest.raises(OSError, match="libabsent.so.7"):
        ctypes.CDLL(str(library))
    assert standins.make(library.parent, tmp_path / "standins") == ["libabsent.so.7"]
    ctypes.CDLL(str(tmp_path / "standins/libabsent.so.7"))  # as LD_LIBRARY_PATH would have it found
    assert ctypes.CDLL(str(library)).tinylora_count() == standins.NO_DEVICE


def test_a_library_is_linked_against_the_shims_of_torch_alone(script, shared_library, tmp_path):
    """What is cross-compiled meets no torch of its machine: its names are enough, and any other is refused."""
    audit, standins = script("audit"), script("standins")
    real = Path(torch.__file__).parent
    there = standins.torch_of_another_machine(real, "cc", tmp_path / "torch")
    assert standins.torch_of_another_machine(real, "cc", there) == there  # again, over what is left from before
    assert (there / "include/torch/csrc/stable/library.h").is_file()
    link = [f"-L{there / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--no-as-needed", "-Wl,--no-undefined"]
    shim = "extern int aoti_torch_get_dtype(); int tinylora_f() { return aoti_torch_get_dtype(); }"
    library = audit.Library(shared_library("shim.so", shim, *link))
    assert library.machine == platform.machine() and "libtorch_cpu.so" in library.needed
    assert audit.foreign_symbols(library) == audit.exports(library) == []
    with pytest.raises(subprocess.CalledProcessError):
        shared_library("other.so", shim.replace("aoti_torch_get_dtype", "_ZN2at5emptyEv"), *link)
