"""The engine's environment, before anything imports it; the base and the adapters, made once."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
}  # fmt: skip

pytest.importorskip("vllm", reason="make test-vllm has an environment for it")

from . import models  # noqa: E402


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return models.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapters(base, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    models.make_adapters(base, directory)
    return directory


@pytest.fixture(scope="session")
def texts(adapters) -> dict[str, list[list[int]]]:
    import json

    return json.loads((adapters / "texts.json").read_text())


@pytest.fixture(scope="session")
def prompts(base) -> list[list[int]]:
    return models.tokens(base)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not inside an engine: what it reads of memory it never wrote is masked by its own rules, not by ours."""
    yield
