"""What is installed and what stands beside it: the compiler asked for, the torch that is there, Triton, whole cores."""
from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from tinylora_kernels.common.threads import one_thread_each
from tinylora_kernels.linear import build as node_build
from tinylora_kernels.linear import compiled
from tinylora_kernels.ops import dispatch
from tinylora_kernels.ops.triton import launch

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent


def python(script: str, *paths: Path) -> subprocess.CompletedProcess:
    path = os.pathsep.join(map(str, (*paths, ROOT)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


# Cores


@pytest.mark.parametrize("order", ["first in, first out", "first in, last out"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_threads_that_load_at_once_leave_everybody_their_cores(count, order):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        entered = [threading.Event() for _ in range(count)]
        leave = [threading.Event() for _ in range(count)]
        inside, after = {}, {}

        def loads(number):
            with one_thread_each() as run:
                inside[number] = torch.get_num_threads()
                assert run(lambda x: x + 1, [1, 2, 3]) == [2, 3, 4]
                with one_thread_each():
                    pass
                inside[number] = max(inside[number], torch.get_num_threads())
                entered[number].set()
                leave[number].wait()
            after[number] = torch.get_num_threads()

        threads = [threading.Thread(target=loads, args=(number,)) for number in range(count)]
        for thread, event in zip(threads, entered, strict=True):
            thread.start()
            event.wait()
        for number in range(count) if order.endswith("first out") else reversed(range(count)):
            leave[number].set()
            threads[number].join()
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert set(inside.values()) == {1} and set(after.values()) == {4}
        assert later == [4] and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_a_failure_inside_leaves_the_cores_too():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError), one_thread_each(), one_thread_each() as run:
            run(lambda x: {}[x], [1, 2])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# Triton beside it

USES = """
    import torch, tinylora_kernels as t
    from tinylora_kernels.ops import dispatch
    model = t.apply_tiny_lora(torch.nn.Sequential(torch.nn.Linear(32, 16)), t.TinyLoRAConfig(
        target_modules=["0"], init="uniform", cache=False), progress=False)
    model(torch.randn(3, 32)).sum().backward()
    assert t.trainable_vectors(model)[0].grad is not None
    print(dispatch.choose("cpu", torch.float32, 2), dict(dispatch.table("cuda"))["triton"])
"""
BROKEN = {
    "an ImportError": "raise ImportError('libtriton.so: undefined symbol')",
    "another error": "raise RuntimeError('it is\\nbroken')",
    "an exit": "raise SystemExit(3)",
    "nothing in it": "",
    "no language": "__version__ = '3.6.0'\nimport sys\nsys.modules['triton.language'] = None",
    "no syntax": "def (:",
    "no specification": "import sys; __spec__ = None",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_triton_costs_nothing_but_itself(kind, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(BROKEN[kind])
    before = "import triton\n" if kind == "no specification" else ""
    done = python(before + textwrap.dedent(USES), tmp_path)
    assert done.returncode == 0, done.stderr
    chosen, _, reason = done.stdout.strip().partition(" ")
    assert chosen == dispatch.choose("cpu", torch.float32, 2) and "triton" not in chosen
    assert reason.startswith("triton cannot be imported (") and reason.endswith("): pip install triton")


@pytest.mark.parametrize("value", ["1", "true", "yes", "on"])
def test_its_interpreter_is_for_who_asks(value, monkeypatch):
    expected = {dtype: dispatch.choose("cpu", dtype, 2) for dtype in (torch.float32, torch.bfloat16)}
    monkeypatch.setenv("TRITON_INTERPRET", value)
    dispatch._choose.cache_clear()
    try:
        for rank in (1, 2, 4, 8, 3):
            assert dispatch.choose("cpu", torch.float32, rank) != "triton"
        assert {dtype: dispatch.choose("cpu", dtype, 2) for dtype in expected} == expected
        if launch.is_installed():
            assert dispatch.choose("cpu", torch.float32, 2, "triton") == "triton"
    finally:
        dispatch._choose.cache_clear()


# The compiler


@pytest.fixture
def setup_py(monkeypatch):
    for name in ("CXX", "TINYLORA_TORCH_DIR", "TINYLORA_BUILD_NATIVE", "TINYLORA_BUILD_NODE"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("tinylora_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "announce", lambda lines: None)
    return module


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """ccache, my-g++ and "a c++" on PATH: they write what they were called with, and what was asked for."""
    folder = tmp_path / "tools"
    folder.mkdir()
    script = '#!/bin/sh\necho "$(basename "$0") $@" >> "$0.calls"\n'
    write = 'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo library > "$2"; fi; shift; done\n'
    for name in ("ccache", "my-g++", "a c++"):
        path = folder / name
        path.write_text(script + ('exec "$@"\n' if name == "ccache" else write))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


ASKED = {  # CXX -> launcher, compiler, options
    "my-g++": (None, "my-g++", None), "ccache my-g++": ("ccache", "my-g++", None),
    "my-g++ -m64": (None, "my-g++", "-m64"), "ccache my-g++ -m64 -pipe": ("ccache", "my-g++", "-m64 -pipe"),
    "'a c++' -m64": (None, "a c++", "-m64"), "ccache 'a c++' '-DX=1 2'": ("ccache", "a c++", "'-DX=1 2'"),
}  # fmt: skip


@pytest.mark.parametrize("cxx", ASKED)
@pytest.mark.parametrize("absolute", [False, True])
def test_the_compiler_that_was_asked_for_is_the_one(cxx, absolute, setup_py, tools, monkeypatch, tmp_path):
    launcher, compiler, options = ASKED[cxx]
    if absolute:
        words = [str(tools / word) if (tools / word).exists() else word for word in shlex.split(cxx)]
        cxx = shlex.join(words)
    monkeypatch.setenv("CXX", cxx)
    settings = setup_py.compiler_settings(setup_py.find_compiler())
    assert settings["CMAKE_CXX_COMPILER"] == str(tools / compiler)
    assert Path(settings.get("CMAKE_CXX_COMPILER_LAUNCHER", "None")).name == str(launcher)
    assert settings.get("CMAKE_CXX_FLAGS") == options
    (tmp_path / "package").mkdir()
    library = node_build.compile_for(TORCH, tmp_path / "package")
    assert library.read_text() == "library\n" and os.listdir(tmp_path / "package") == [library.name]
    called = (tools / f"{compiler}.calls").read_text()
    assert all(option in called for option in shlex.split(options or ""))
    assert (tools / "ccache.calls").exists() == (launcher is not None)


@pytest.mark.parametrize("cxx", ["none-such", "ccache none-such", "none-such my-g++", "/no/such/c++ -O2"])
def test_a_compiler_that_is_not_there_is_not_replaced_in_silence(cxx, setup_py, tools, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CXX", cxx)
    missing = next(word for word in cxx.split() if "such" in word)
    with pytest.raises(node_build.CompileError, match=f"^CXX={cxx}: {missing} is not on PATH$".replace("+", r"\+")):
        node_build.compile_for(TORCH, tmp_path)
    record = setup_py.build_native(tmp_path)
    assert not record["library"] and record["reason"] == f"CXX={cxx}: {missing} is not on PATH"
    assert record["fix"].startswith("set CXX to a C++ compiler, or unset it")
    assert node_build.main([]) == 1 and capsys.readouterr().err.startswith(f"compile: CXX={cxx}: {missing}")
    monkeypatch.setenv("TINYLORA_BUILD_NATIVE", "1")  # asked for: no installation without it
    with pytest.raises(SystemExit, match="^tinylora-kernels: no native library: CXX=.*; to change that: set CXX"):
        setup_py.build_native(tmp_path)


def test_a_node_of_older_sources_is_named_and_replaced(tools, monkeypatch, tmp_path):
    monkeypatch.setattr(node_build, "PACKAGE", tmp_path)
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "tools"))
    monkeypatch.setenv("CXX", "my-g++")
    name = node_build.file_name(TORCH)
    digest = name.split(".cpython")[0][-8:]
    older = [tmp_path / name.replace(digest, f"{number:08x}") for number in (1, 0xABCDEF)]
    others = [tmp_path / name.replace("libtinylora_node-", "libtinylora_node-9."), tmp_path / f"{name}.txt"]
    for path in (*older, *others):
        path.write_bytes(b"as it was")
    assert compiled.load() == (None, "compiled from other sources than those of this package")
    node_build.compile_for(TORCH, tmp_path)
    assert {*tmp_path.iterdir()} == {*others, tmp_path / name, tmp_path / "tools"}
    (tmp_path / name).unlink()
    assert compiled.load() == (None, f"not compiled for torch {torch.__version__}")


# torch, from a build that is kept apart


def environment_with_torch(folder: Path) -> Path:
    package = folder / "lib" / "python3.11" / "site-packages" / "torch"
    header = package / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    return package


PLACES = ["active", "uv's project", "conda", "here", "above", "beside the sources", "first on PATH"]


@pytest.mark.parametrize("place", PLACES)
def test_the_torch_of_the_environment_it_goes_into_is_found(place, setup_py, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_py.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda name: str(tmp_path / "isolated"))
    monkeypatch.setattr(setup_py.site, "getsitepackages", lambda: [])
    monkeypatch.setattr(setup_py.site, "getusersitepackages", lambda: str(tmp_path / "isolated"))
    monkeypatch.setattr(setup_py, "ROOT", tmp_path / "sources")
    for name in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    elsewhere = tmp_path / "elsewhere" / "below"
    elsewhere.mkdir(parents=True)
    (tmp_path / "sources").mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("PWD", str(elsewhere))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(setup_py.BuildFailure, match="no torch with the stable ABI headers"):
        setup_py.torch_directory()
    named = {"active": "VIRTUAL_ENV", "uv's project": "UV_PROJECT_ENVIRONMENT", "conda": "CONDA_PREFIX"}
    above = {"here": elsewhere, "above": elsewhere.parent, "beside the sources": tmp_path / "sources"}
    folder = above[place] / ".venv" if place in above else tmp_path / "environment"
    package = environment_with_torch(folder)
    if place in named:
        monkeypatch.setenv(named[place], str(folder))
    if place == "first on PATH":
        (folder / "bin").mkdir()
        (folder / "bin" / "python").write_text("#!/bin/sh\n")
        (folder / "bin" / "python").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder / "bin"))
    assert setup_py.torch_directory() == package
