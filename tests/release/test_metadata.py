"""What is published about the package: its version, needs, licence and types, read from metadata built afresh."""
import ast
import email
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinylora_kernels
from tinylora_kernels._version import __version__

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(tinylora_kernels.__file__).parent
CORE = {"torch", "numpy", "safetensors", "tqdm"}
ON_REQUEST = ("integrations",)  # imported only by who asks for them, and has their extras
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no source tree beside the tests")


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metadata")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return email.message_from_string((folder / "tinylora_kernels.egg-info/PKG-INFO").read_text())


def imported(path: Path) -> set[str]:
    """Packages that a module cannot be imported without: not those inside a function or a try."""
    statements = ast.parse(path.read_text()).body
    names = [alias.name for s in statements if isinstance(s, ast.Import) for alias in s.names]
    names += [s.module for s in statements if isinstance(s, ast.ImportFrom) and s.level == 0]
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


def test_the_core_needs_four_packages_and_uses_all_of_them(metadata):
    needs = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert {re.match(r"[\w-]+", need).group() for need in needs} == CORE and "torch>=2.10" in needs
    core = [p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] not in ON_REQUEST]
    device = set((PACKAGE / "ops" / "triton").glob("*kernels.py"))  # imported where there is a Triton to launch them
    uses = set().union(*(imported(path) for path in core if path not in device))
    assert uses == CORE


def test_the_extras(metadata):
    assert {"peft", "trl", "demo", "bench", "test"} <= set(metadata.get_all("Provides-Extra"))


def test_version_licence_and_python(metadata):
    assert metadata["Version"] == __version__ and metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0" and metadata.get_all("License-File") == ["LICENSE"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert (PACKAGE / "py.typed").is_file()
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_a_label_makes_a_local_version(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLORA_LOCAL_VERSION", "gpu")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert f"\nVersion: {__version__}+gpu\n" in (tmp_path / "tinylora_kernels.egg-info/PKG-INFO").read_text()
