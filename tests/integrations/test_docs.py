"""The examples of docs/integrations.md: short, valid, and of names that exist."""
import ast
import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
PARTNERS = {"peft", "trl"}


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_is_ten_lines_at_most_and_imports_what_exists(code):
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            root = node.module.partition(".")[0]
            if root in PARTNERS or "integrations" in node.module:
                pytest.importorskip("peft"), pytest.importorskip("trl")
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_there_is_an_example_for_every_integration():
    modules = Path(importlib.import_module("tinylora_kernels.integrations").__file__).parent.glob("*.py")
    text = "\n".join(EXAMPLES)
    for name in {path.stem for path in modules} - {"__init__", "peft_factors", "peft_adapters", "peft_model"}:
        assert f"tinylora_kernels.integrations.{name} " in text
