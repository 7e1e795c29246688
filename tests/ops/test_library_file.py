"""A library that cannot be loaded: a reason and the command that changes it, whatever is wrong; never a crash."""
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch

from tinylora_kernels.ops.native import library as native
from tinylora_kernels.ops.native import library_file

PACKAGE = library_file.PACKAGE
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="ELF files")
needs_library = pytest.mark.skipif(native.load().error is not None, reason=f"native library: {native.load().error}")
needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no cc on PATH")


@pytest.fixture
def load(monkeypatch, tmp_path):
    """load(bytes or C source) puts a file in the library's place and tries to load it; returns the error."""

    def attempt(content: bytes | str) -> str:
        library = tmp_path / f"{abs(hash(content))}.so"  # the loader knows a file it has seen by its name
        if isinstance(content, str):
            command = ["cc", "-w", "-shared", "-fPIC", "-xc", "-", "-o", str(library)]
            subprocess.run(command, input=content, text=True, check=True)
        else:
            library.write_bytes(content)
        monkeypatch.setattr(native, "LIBRARY", library)
        status = native.load.__wrapped__()
        assert not status.has_cuda and status.isa is None
        return status.error

    return attempt


@on_linux
@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"MZ" + bytes(100), b"<html>not found</html>" * 9])
def test_what_is_no_library(load, content):
    error = load(content)
    assert "does not load: it is not a Linux library, or was cut short. To change that: pip install" in error


@on_linux
@needs_library
def test_a_library_of_another_platform_or_cut_short(load):
    whole = native.LIBRARY.read_bytes()
    assert "expected a 64-bit little-endian library" in load(whole[:4] + b"\x01" + whole[5:])
    assert "it is built for ELF machine 243, this machine is" in load(whole[:18] + struct.pack("<H", 243) + whole[20:])
    for size in (4096, len(whole) // 2, len(whole) - 1):
        assert f"it was cut short: expected at least {len(whole)} bytes, found {size}" in load(whole[:size])


@on_linux
@needs_compiler
def test_a_library_that_the_loader_or_the_package_refuses(load):
    torch_too_old = load("void aoti_torch_of_tomorrow(void); void f(void) { aoti_torch_of_tomorrow(); }")
    assert f"torch {torch.__version__} has no aoti_torch_of_tomorrow: expected torch 2.10 or newer" in torch_too_old
    assert torch_too_old.endswith("To change that: pip install --upgrade 'torch>=2.10'")
    assert "symbol tinylora_build_info is defined nowhere" in load("int other;")
    older = 'const char* tinylora_build_info() { return "version=0.0.7"; } const char* tinylora_isa() { return ""; }'
    assert "is of version 0.0.7, the package of " in load(older)
    assert "was built from older sources of version " in load(older.replace("0.0.7", native.__version__))
    other_interface = f"{native.__version__}\\ninterface={'0' * 64}"  # kernels.h was another
    assert "was built from older sources of version " in load(older.replace("0.0.7", other_interface))


@pytest.mark.parametrize(
    "said, reason, fix",
    [
        ("libtinylora.so: /lib/libc.so.6: version `GLIBC_2.28' not found", "older than GLIBC_2.28", "compiler"),
        ("x.so: failed to map segment from shared object: Operation not permitted", "forbids mapping", "noexec"),
        ("x.so: cannot open shared object file: Permission denied", "forbids mapping", "noexec"),
        ("x.so: cannot enable executable stack as shared object requires", "forbids mapping", "noexec"),
        ("libtorch_cpu.so: cannot open shared object file: No such file", "libtorch_cpu.so of torch", "--upgrade"),
        ("something nobody foresaw", "something nobody foresaw", "--force-reinstall"),
    ],
)
def test_what_the_loader_says_is_explained(said, reason, fix):
    found = library_file.explain(said)
    assert reason in found[0] and fix in found[1]


def test_a_package_without_a_library_imports_reports_and_computes(tmp_path):
    """A copy of the sources that nobody built, in a fresh process that asks for the CPU kernels."""
    ignored = shutil.ignore_patterns("*.so", "_build_record.json", "__pycache__", "*.safetensors")
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=ignored)
    code = """
import torch, warnings, tinylora_kernels as tl
from tinylora_kernels import __main__, functional
__main__.main(["info"])
y, basis, v, projection = torch.ones(3, 8), torch.eye(2, 8), torch.ones(1), torch.ones(1, 2, 2)
try:
    functional.tiny_lora_update(y, basis, v, projection)
except RuntimeError as error:
    print("error:", error)
tl.set_backend(None)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(functional.tiny_lora_update(y, basis, v, projection)[0, :3].tolist())
print("warned:", *[warning.message for warning in caught])
"""
    environment = os.environ | {"TINYLORA_BACKEND": "cpu", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    why = "not built: the package was copied here without being built. To change that: pip install "
    assert f"native library   not in use: {why}" in done.stdout
    assert f"   cpu            no: {why}" in done.stdout and "   reference      available" in done.stdout
    assert f" ! every call is refused: backend 'cpu' was asked for but cannot run: {why}" in done.stdout
    assert f"error: backend 'cpu' was asked for but cannot run: {why}" in done.stdout
    assert "[3.0, 3.0, 1.0]" in done.stdout  # y U = (1, 1), M of ones: both columns gain 2
    assert f"warned: tinylora_kernels: backend 'cpu' is not used: {why}" in done.stdout


@pytest.mark.parametrize(
    ("installer", "command"), [("pip\n", "pip install"), ("uv", "uv pip install --no-cache"), (None, "pip install")]
)
def test_the_command_is_that_of_the_installer_at_hand(monkeypatch, installer, command):
    """An environment made by uv has no pip."""
    class Distribution:
        def read_text(self, name):
            return installer

    monkeypatch.setattr(library_file.importlib.metadata, "distribution", lambda name: Distribution())
    assert library_file.reinstall_command().startswith(command)
