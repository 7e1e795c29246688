"""The house as docs/architecture.md draws it: what stands where, which way imports run, and what importing it costs."""
from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tinylora_kernels"
ROOMS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
MODULES = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py", "_version.py"}
BESIDE = {"bench", "demo", "docs", "examples", "release"}  # folders beside the package whose code is tested too
LINT_IMPORTS = "import sys, importlinter.cli as cli; sys.exit(cli.lint_imports(no_cache=True, no_logo=True))"


def lint_imports(folder: Path) -> tuple[int, str]:
    """Exit status and report of import-linter with the folder's pyproject.toml and package."""
    done = subprocess.run([sys.executable, "-c", LINT_IMPORTS], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_import_contract_is_kept():
    status, report = lint_imports(ROOT)
    assert status == 0 and "0 broken" in report, report


# An import of a room above, and one back from a file to another of its room that imports it (projection.py).
@pytest.mark.parametrize(
    ("file", "planted", "broken"),
    [
        ("method/tying.py", "import tinylora_kernels.model.attach", "Rooms stand on the rooms below them"),
        ("method/parts.py", "from . import projection", "No circles"),
    ],
)
def test_the_import_contract_turns_red(file, planted, broken, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for source in PACKAGE.rglob("*.py"):
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text() + (f"\n{planted}\n" if source == PACKAGE / file else ""))
    status, report = lint_imports(tmp_path)
    assert status == 1 and re.search(f"{broken}.* BROKEN", report), report


def modules_after(code: str) -> set[str]:
    """Names of the modules in a fresh process that ran the code."""
    code += "; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_brings_little_beyond_torch():
    brought = modules_after("import tinylora_kernels") - modules_after("import torch")
    assert "tinylora_kernels.ops.dispatch" in brought
    heavy = {"torch._dynamo", "torch._inductor", "triton", "transformers", "sympy", "scipy", "peft", "trl", "vllm"}
    assert not heavy & brought
    foreign = [name for name in brought if name.partition(".")[0] != "tinylora_kernels"]
    assert len(foreign) <= 30, foreign  # 7 beside torch 2.13: safetensors, secrets, and what these import


def test_the_architecture_names_every_room_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text()
    (tree,) = re.findall(r"^tinylora_kernels/\n((?:  .*\n)*)", page, re.MULTILINE)
    drawn = set(re.findall(r"^  (\w+)/", tree, re.MULTILINE)), set(re.findall(r"^  (\w+\.py)", tree, re.MULTILINE))
    assert drawn == (ROOMS, MODULES)
    nested = {path.parent.name for path in PACKAGE.glob("*/*/__init__.py")}
    assert set(re.findall(r"^    (\w+)/", tree, re.MULTILINE)) == nested


def test_the_tests_mirror_the_house():
    """A test stands in the folder named as what it tests: a room, a module of the package or a folder beside it.

    sim/ runs GPU code without a GPU, gpu/ with one, guarantees/ holds what docs/guarantees.md promises; files beside
    the folders are shared by them, and this one is about the whole.
    """
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    nested = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*/*/__init__.py")}
    known = ROOMS | nested | {name.removesuffix(".py") for name in MODULES} | BESIDE | {"sim", "gpu", "guarantees"}
    assert {folder.as_posix() for folder in folders} - {"."} <= known
    assert [path.name for path in (ROOT / "tests").glob("test_*.py")] == [Path(__file__).name]


def test_pages_name_files_that_exist():
    named = re.compile(r"`([\w./]+/[\w.]*)[:`]")  # `ops/schema.py`, `files/format.py: encode`, `ops/dispatch.BACKENDS`
    starts = ROOMS | BESIDE | {"csrc", "docs", "tests", "tinylora_kernels"}
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/results/*.md")):
        for path in named.findall(page.read_text()):
            if path.partition("/")[0] in starts:
                found = [base / p for base in (ROOT, PACKAGE) for p in (path, f"{path.rpartition('.')[0]}.py")]
                assert any(p.exists() for p in found), f"{page.name}: no {path}"


def test_pages_keep_to_120_columns():
    for page in (ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        wide = [line for line in page.read_text().splitlines() if len(line) > 120 and not line.startswith("|")]
        assert not wide, f"{page.name}: {wide[0]}"
