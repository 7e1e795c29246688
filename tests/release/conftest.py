"""The release scripts as modules; they are programs in a folder of the sources, not a part of the package."""
import importlib
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "release"


@pytest.fixture
def script(monkeypatch):
    """script("audit") imports release/audit.py."""
    if not SCRIPTS.is_dir():
        pytest.skip("no source tree beside the tests")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture
def shared_library(tmp_path):
    """shared_library(name, C source, *linker options) compiles one and returns its path."""
    if not shutil.which("cc"):
        pytest.skip("no cc on PATH")

    def compile_library(name: str, source: str, *options) -> Path:
        code = tmp_path / "source.c"
        code.write_text(source)
        command = ["cc", "-w", "-shared", "-fPIC", "-fno-builtin", code, "-o", tmp_path / name, *options]
        subprocess.run(list(map(str, command)), check=True)
        return tmp_path / name

    return compile_library
