"""The pages: their links lead somewhere, their Python is valid and calls what exists, and the first one runs.

`make docs` checks the site made of them: cross-references, the reference's names, the pages' places in it.
"""
from __future__ import annotations

import ast
import importlib
import inspect
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tinylora_kernels
from tests.examples.adder import LARGEST, save_adder
from tinylora_kernels import rl

ROOT = Path(__file__).parents[2]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "bench/results/**/*.md")
    for page in sorted(ROOT.glob(pattern))
}
BLOCKS = [
    pytest.param(page, code, id=f"{page}:{text[: found.start()].count(chr(10)) + 2}")
    for page, text in PAGES.items()
    for found in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for code in (found[1],)
]
FENCES = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINKS = [
    pytest.param(page, link, id=f"{page} to {link}")
    for page, text in PAGES.items()
    for link in sorted(set(re.findall(r"\]\(([^)\s]+)\)", FENCES.sub("", text))))
    if not re.match(r"https?://", link)
]
PARTNERS = {"peft", "trl", "transformers"}


def imported(code: str) -> dict[str, object]:
    """Name -> what it stands for, of everything that the block takes from this package and its partners."""
    found: dict[str, object] = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            root = node.module.partition(".")[0]
            if root in PARTNERS or "integrations" in node.module:
                pytest.importorskip("peft"), pytest.importorskip("trl")
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
                found[alias.asname or alias.name] = getattr(module, alias.name)
    return found


def calls(code: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, node


@pytest.fixture(autouse=True)
def examples_beside(monkeypatch):
    """Pages tell their readers to start in the folder of the examples."""
    monkeypatch.syspath_prepend(ROOT / "examples")


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_a_block_imports_what_exists_and_calls_it_as_it_is_declared(page, code):
    """Also without an import: what a block calls by a public name is this package's."""
    known = {name: getattr(tinylora_kernels, name) for name in tinylora_kernels.__all__} | imported(code)
    for name, call in calls(code):
        ours = getattr(known.get(name), "__module__", None) or ""
        if not ours.startswith("tinylora_kernels") or any(isinstance(a, ast.Starred) for a in call.args):
            continue
        keywords = {keyword.arg: ... for keyword in call.keywords if keyword.arg}
        inspect.signature(known[name]).bind_partial(*([...] * len(call.args)), **keywords)


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_to_a_file_and_a_heading_of_it(page, link):
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists(), f"{page}: no {path}"
    if anchor:
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs, f"{page}: no heading {anchor} in {path}"


def test_examples_of_integrations_are_ten_lines_at_most_and_there_is_one_for_each():
    blocks = [block.values[1] for block in BLOCKS if block.values[0] == "docs/integrations.md"]
    for code in blocks:
        assert len([line for line in code.splitlines() if line.strip()]) <= 10, code
    modules = Path(importlib.import_module("tinylora_kernels.integrations").__file__).parent.glob("*.py")
    for name in {path.stem for path in modules} - {"__init__", "peft_factors", "peft_adapters", "peft_model"}:
        assert f"tinylora_kernels.integrations.{name} " in "\n".join(blocks)


def test_the_first_steps_are_those_of_a_run(tmp_path, monkeypatch, capsys):
    """Every block of the page in turn, with a model that is made in seconds in place of the one from a hub."""
    blocks = [block.values[1] for block in BLOCKS if block.values[0] == "docs/first_steps.md"]
    code = "\n".join(blocks)
    for there, here in {
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': repr(str(save_adder(tmp_path / "adder"))),
        "additions(20)": f"additions({LARGEST})",
        "lr=0.003": "lr=0.02",
    }.items():
        assert there in code
        code = code.replace(there, here)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    random.seed(0)  # the page draws its questions and its samples as they come
    torch.manual_seed(0)
    exec(compile(code, "docs/first_steps.md", "exec"), names)
    assert (tmp_path / "adder.safetensors").is_file()
    printed = capsys.readouterr().out.splitlines()
    rewards = [float(line.split()[1]) for line in printed if re.fullmatch(r"\d+ [\d.]+", line)]
    assert len(rewards) == 10 and sum(rewards[-3:]) > sum(rewards[:3])


@pytest.mark.parametrize("module", [tinylora_kernels, rl], ids=lambda module: module.__name__)
def test_the_reference_has_every_public_name(module):
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.rst"))
    named = set(re.findall(r"^\.\. auto\w+:: (?:tinylora_kernels\.)?([\w.]+)", pages, re.MULTILINE))
    public = set(module.__all__) - {"functional"} | {"functional.tiny_lora_update", "functional.tiny_lora_linear"}
    assert public <= named


def test_the_page_of_examples_names_every_program():
    programs = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert programs == set(re.findall(r"\]\((\w+\.py)\)", PAGES["examples/README.md"]))
