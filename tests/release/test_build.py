"""The build: what it does where it cannot compile, and what the library it makes depends on."""
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from tinylora_kernels import TinyLoRAConfig, _version, apply_tiny_lora, diagnostics, save_adapter
from tinylora_kernels import __main__ as command_line
from tinylora_kernels.linear import build as node_build
from tinylora_kernels.linear import compiled
from tinylora_kernels.ops import dispatch
from tinylora_kernels.ops.native import library as native

ROOT = Path(__file__).resolve().parents[2]
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no source tree beside the tests")
needs_compiler = pytest.mark.skipif(not (shutil.which("c++") and shutil.which("nm")), reason="no c++ and nm on PATH")
VARIABLES = ("TINYLORA_BUILD_NATIVE", "TINYLORA_BUILD_CUDA", "TINYLORA_CUDA_ARCHITECTURES", "TINYLORA_TORCH_DIR",
             "TINYLORA_BUILD_NODE", "TINYLORA_NODE", "CXX")  # fmt: skip


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, with its announcements kept off the terminal."""
    spec = importlib.util.spec_from_file_location("tinylora_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "announce", lambda lines: None)
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return module


def failing_cmake(build, monkeypatch, fails):
    """Let run_cmake succeed or fail by its settings, compiling nothing; returns the settings of each attempt."""
    attempts = []

    def run_cmake(cmake, settings, log):
        attempts.append(settings)
        log.write_text("")
        if fails(settings):
            output = "FAILED: x.o\nx.cu(3): error: no such thing\nninja: stopped"
            raise subprocess.CalledProcessError(1, "cmake", output)
        log.with_name(build.LIBRARY).write_bytes(b"library")

    monkeypatch.setattr(build, "run_cmake", run_cmake)
    monkeypatch.setattr(build, "find_tool", lambda name, fix: name)
    monkeypatch.setattr(build, "build_node", lambda torch, destination: None)
    return attempts


@needs_sources
def test_without_a_compiler_the_record_says_what_to_do(build, monkeypatch, tmp_path):
    (tmp_path / build.LIBRARY).write_bytes(b"from an earlier build")
    monkeypatch.setattr(build, "find_tool", lambda name, fix: name)
    monkeypatch.setattr(build.shutil, "which", lambda name, path=None: None)
    record = build.build_native(tmp_path)
    assert not record["library"] and not (tmp_path / build.LIBRARY).exists()
    assert record["reason"] == "no C++ compiler found" and "apt install g++" in record["fix"]
    assert json.loads((tmp_path / build.RECORD).read_text()) == record


@needs_sources
def test_without_torch_headers_the_record_says_what_to_do(build, monkeypatch, tmp_path):
    monkeypatch.setenv("TINYLORA_TORCH_DIR", str(tmp_path))
    record = build.build_native(tmp_path)
    assert "no torch with the stable ABI headers" in record["reason"] and "--no-build-isolation" in record["fix"]


@needs_sources
def test_switched_off(build, monkeypatch, tmp_path):
    monkeypatch.setenv("TINYLORA_BUILD_NATIVE", "0")
    assert build.build_native(tmp_path)["reason"] == "switched off by TINYLORA_BUILD_NATIVE=0"


@needs_sources
def test_without_a_compiler_of_device_code_the_sources_are_embedded(build, monkeypatch, tmp_path):
    """It is compiled where a GPU is found: nothing is missing from the library."""
    archives = []
    attempts = failing_cmake(build, monkeypatch, fails=lambda settings: False)
    run_cmake = build.run_cmake

    def look(cmake, settings, log):
        archives.append(build.ARCHIVE["Archive"](Path(settings["TINYLORA_CUDA_ARCHIVE"]).read_bytes()))
        run_cmake(cmake, settings, log)

    monkeypatch.setattr(build, "run_cmake", look)
    monkeypatch.setenv("TINYLORA_CUDA_ARCHITECTURES", "90-real")
    monkeypatch.setenv("TINYLORA_NVRTC", str(tmp_path / "libnvrtc.so"))
    record = build.build_native(tmp_path)
    assert len(attempts) == 1 and record["library"] and record["cuda"] and not record["device_code"]
    reason = f"no device code for 90-real: TINYLORA_NVRTC={tmp_path}/libnvrtc.so does not load"
    assert record["cuda_reason"].startswith(reason)
    assert archives[0].targets == () and "rows_kernel" in archives[0].source
    monkeypatch.delenv("TINYLORA_CUDA_ARCHITECTURES")
    assert build.build_native(tmp_path)["cuda_reason"] is None


@needs_sources
def test_a_failing_build_leaves_a_reason(build, monkeypatch, tmp_path):
    failing_cmake(build, monkeypatch, fails=lambda settings: True)
    record = build.build_native(tmp_path)
    assert not record["library"] and record["reason"] == "the build failed: x.cu(3): error: no such thing"


@needs_sources
def test_without_the_cpp_node_the_rest_is_built(build, monkeypatch, tmp_path):
    run_node = build.build_node
    failing_cmake(build, monkeypatch, fails=lambda settings: False)
    monkeypatch.setattr(build, "build_node", run_node)
    monkeypatch.setenv("CXX", str(compiler_that_fails(tmp_path)))
    record = build.build_native(tmp_path)
    assert record["library"] and record["node_reason"] == "cxx: node.cpp:1: error: no such header"
    monkeypatch.setenv("TINYLORA_BUILD_NODE", "0")
    assert build.build_native(tmp_path)["node_reason"] == "switched off by TINYLORA_BUILD_NODE=0"


def compiler_that_fails(folder: Path) -> Path:
    path = folder / "cxx"
    path.write_text("#!/bin/sh\necho 'node.cpp:1: error: no such header'\nexit 1\n")
    path.chmod(0o755)
    return path


def test_the_node_belongs_to_one_torch(tmp_path):
    release, commit = torch.__version__.split("+")[0], torch.version.git_version[:8]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    sources = b"".join(path.read_bytes() for path in (node_build.SOURCE, *node_build.INCLUDED))
    sources = hashlib.sha256(sources).hexdigest()[:8]
    expected = f"libtinylora_node-{release}-{commit}-{sources}{suffix}"
    assert node_build.file_name(Path(torch.__file__).parent) == expected
    (tmp_path / "version.py").write_text("__version__ = '9.1.0a0+local'\ncuda: str = '13.0'\n")
    assert node_build.file_name(tmp_path) == f"libtinylora_node-9.1.0a0-unknown-{sources}{suffix}"


def test_compiling_the_node_fails_in_one_line_and_leaves_nothing(monkeypatch, tmp_path, capsys):
    compiler, destination = compiler_that_fails(tmp_path), tmp_path / "package"
    destination.mkdir()
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(node_build.CompileError, match="^cxx: node.cpp:1: error: no such header$"):
        node_build.compile_for(Path(torch.__file__).parent, destination)
    assert not list(destination.iterdir())
    monkeypatch.setattr(node_build.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(node_build.CompileError, match=r"^no Python.h in .*: install the headers of Python"):
        node_build.compile_for(Path(torch.__file__).parent, destination)
    monkeypatch.setattr(node_build, "find_compiler", lambda: None)
    assert command_line.main(["compile"]) == 1
    assert capsys.readouterr().err == "compile: no C++ compiler found (Debian, Ubuntu: apt install g++)\n"


def test_why_the_node_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(node_build, "PACKAGE", tmp_path)
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    assert compiled.load() == (None, f"not compiled for torch {torch.__version__}")
    path = tmp_path / node_build.file_name(Path(torch.__file__).parent)
    path.write_bytes(b"cut short")
    assert compiled.load() == (None, f"{path} does not load: it is not a Linux library, or was cut short")
    monkeypatch.setenv("TINYLORA_NODE", "0")
    assert compiled.load() == (None, "switched off by TINYLORA_NODE=0")


@needs_sources
def test_cuda_can_be_switched_off(build, monkeypatch, tmp_path):
    attempts = failing_cmake(build, monkeypatch, fails=lambda settings: False)
    monkeypatch.setenv("TINYLORA_BUILD_CUDA", "0")
    record = build.build_native(tmp_path)
    assert record["cuda_reason"] == "switched off by TINYLORA_BUILD_CUDA=0" and not record["cuda"]
    assert "TINYLORA_CUDA_ARCHIVE" not in attempts[0]


@needs_sources
def test_headers_are_those_of_the_installed_torch(build):
    directory = build.torch_directory()
    assert directory == Path(torch.__file__).parent
    assert build.check_torch_version(directory) == torch.__version__.split("+")[0]


@needs_sources
def test_headers_are_found_without_sys_path(build, monkeypatch):
    """Build isolation hides the environment's packages from sys.path."""
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert build.torch_directory().samefile(Path(torch.__file__).parent)


@pytest.fixture
def uv_process(tmp_path):
    """uv(words, **variables) -> what /proc has of it while it builds, in the folder tmp_path."""

    def uv(words: str, **variables: str) -> Path:
        process = tmp_path / "process"
        process.mkdir()
        (process / "cmdline").write_text("\0".join(f"uv pip install {words}".split()) + "\0")
        (process / "environ").write_text("".join(f"{name}={value}\0" for name, value in variables.items()))
        (process / "cwd").symlink_to(tmp_path)
        python = tmp_path / "env/bin/python"
        python.parent.mkdir(parents=True)
        python.touch()
        return process

    return uv


@needs_sources
@pytest.mark.parametrize(
    ("words", "variables"),
    [
        (".", {"VIRTUAL_ENV": "env"}),
        (".", {"CONDA_PREFIX": "env"}),
        (".", {"UV_PYTHON": "env/bin/python"}),
        ("--python env/bin/python .", {}),
        ("--python=env/ .", {}),
        ("-p ./env -q .", {}),
        ("--python env/bin/python .", {"VIRTUAL_ENV": "another"}),
    ],
)
def test_what_uv_was_told_is_where_the_package_goes(build, uv_process, tmp_path, words, variables):
    """uv's build has a VIRTUAL_ENV of its own."""
    first, *_ = build.told_to_uv(uv_process(words, **variables))
    assert first.samefile(tmp_path / "env")


@needs_sources
def test_a_version_is_no_environment(build, uv_process, tmp_path):
    assert build.told_to_uv(uv_process("--python 3.12 .", UV_PYTHON="3.12")) == []
    assert build.told_to_uv(tmp_path / "nothing") == []


@needs_sources
def test_every_python_on_path_is_asked(build, monkeypatch, tmp_path):
    """The first may be that of the build itself."""
    for name in ("build", "goal"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin/python").touch(mode=0o755)
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / name / "bin") for name in ("build", "goal", "none")))
    assert build.environments()[-2:] == [tmp_path / "build", tmp_path / "goal"]


@needs_sources
def test_under_uv_the_way_back_is_by_uv(build, monkeypatch, tmp_path):
    monkeypatch.setenv("UV", "/usr/bin/uv")
    monkeypatch.setenv("TINYLORA_TORCH_DIR", str(tmp_path))
    assert "uv pip install --no-cache" in build.build_native(tmp_path)["fix"]


AVX2, AVX512 = ["-mavx2", "-mfma", "-mf16c"], ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
BF16 = "-march=armv8.2-a+bf16"
ISAS = {
    "avx2": ("x86_64", AVX2, "avx2_kernels"),
    "avx512": ("x86_64", AVX2 + AVX512, "avx512_kernels"),
    "avx512_bf16": ("x86_64", [*AVX2, *AVX512, "-mavx512bf16"], "avx512_bf16_rows"),
    "neon": ("aarch64", [], "neon_kernels"),
    "neon_bf16": ("aarch64", [BF16], "neon_bf16_rows"),
    "sve256": ("aarch64", [f"{BF16}+sve", "-msve-vector-bits=256"], "sve256_kernels"),
}


@needs_sources
@pytest.mark.parametrize("isa", ISAS)
def test_no_wide_instructions_leave_their_file(isa, tmp_path):
    """An inline function compiled with an instruction set and external linkage may be picked by the linker for all."""
    machine, flags, expected = ISAS[isa]
    tools = [tool if machine == platform.machine() else f"{machine}-linux-gnu-{tool}" for tool in ("g++", "nm")]
    if not all(map(shutil.which, tools)):
        pytest.skip(f"no {' and '.join(tools)} on PATH")
    source, target = ROOT / f"csrc/cpu/{isa}.cpp", tmp_path / "out.o"
    # -O0: nothing is inlined, so every function that could leak is there to be seen.
    command = [tools[0], "-std=c++17", "-O0", "-c", "-w", *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    listing = subprocess.run([tools[1], "-C", "--defined-only", target], capture_output=True, text=True, check=True)
    symbols = [line.split(" ", 2)[1:] for line in listing.stdout.splitlines()]
    external = [name.split("(")[0] for kind, name in symbols if kind not in "tdbr"]
    assert external == [f"tinylora::cpu::{expected}"]


def test_the_version_is_the_same_everywhere():
    assert importlib.metadata.version("tinylora-kernels") == _version.__version__
    if native.load().error is None:
        assert native.load().build["version"] == _version.__version__


def test_info_reports_backends_and_reasons(capsys):
    assert command_line.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"tinylora_kernels {_version.__version__}" in text and "backends for cpu tensors" in text
    assert next(line for line in text.splitlines() if line.endswith(" available")).startswith(" * ")
    assert command_line.main(["info", "--json", "--rank", "3"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["cpu"]["reference"] is None
    assert facts["backends"]["cpu"]["cuda"] == "it runs on NVIDIA GPUs, the tensors are on cpu"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("asked", [None, *dispatch.BACKENDS, "bogus"])
def test_info_stars_what_a_call_takes_or_tells_its_refusal(asked, device, monkeypatch):
    monkeypatch.setattr(dispatch, "requested", asked)
    facts = diagnostics.collect()
    _, _, page = diagnostics.report(facts).partition(f"backends for {device} tensors\n")
    page = page.split("backends for")[0].splitlines()
    stars = [line.split()[1] for line in page if line.startswith(" * ")]
    told = [line.removeprefix(" ! every call is refused: ") for line in page if line.startswith(" ! ")]
    if device == "cuda" and not torch.cuda.is_available():
        assert not stars and not told
        return
    try:
        wanted = [dispatch.choose(device, torch.float32, 2)]
    except (RuntimeError, ValueError) as error:
        assert told == [str(error)] and not stars
    else:
        assert stars == wanted and not told
    assert asked is None or (stars or told[0]).count(asked) == 1 or asked in told[0]


@pytest.mark.parametrize("rank", ["0", "-3", "1.5", "x"])
def test_info_of_no_rank(rank, capsys):
    with pytest.raises(SystemExit) as error:
        command_line.main(["info", "--rank", rank])
    assert error.value.code == 2 and "--rank: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="^rank: expected an integer >= 1, found"):
        diagnostics.collect(float(rank) if rank == "1.5" else rank if rank == "x" else int(rank))


def test_asking_what_would_be_chosen_takes_no_warning_away(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: native.Status(native.LIBRARY, "not built"))
    dispatch._choose.cache_clear()
    try:
        assert diagnostics.collect()["chosen"]["cpu"] == {"backend": "reference", "refusal": None}
        with pytest.warns(UserWarning, match="backend 'cpu' is not used: not built"):
            assert dispatch.choose("cpu", torch.float32, 2) == "reference"
    finally:
        dispatch._choose.cache_clear()


def test_info_shows_why_there_is_no_library(monkeypatch):
    missing = native.Status(native.LIBRARY, "not built: no C++ compiler found. To change that: apt install g++")
    monkeypatch.setattr(native, "load", lambda: missing)
    facts = diagnostics.collect()
    assert facts["backends"]["cpu"]["cpu"] == missing.error
    assert "native library   not in use: not built: no C++ compiler found" in diagnostics.report(facts)


def test_unknown_command(capsys):
    assert command_line.main(["frobnicate"]) == 2
    assert "command: expected one of info" in capsys.readouterr().err
    assert command_line.main(["--help"]) == 0
    assert "usage: python -m tinylora_kernels" in capsys.readouterr().out


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "tinylora_kernels"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "backends for cpu tensors" in done.stdout


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """An adapter file of more lines than a pipe holds, and of names that ASCII does not have."""
    path = tmp_path_factory.mktemp("many") / "adapter.safetensors"
    model = torch.nn.ModuleDict({f"é☃{n}": torch.nn.Linear(4, 4) for n in range(1500)})
    apply_tiny_lora(model, TinyLoRAConfig(frozen_rank=1, cache=False), progress=False)
    save_adapter(model, path)
    return str(path)


# what is written to a reader that has gone, to a full disk and in a locale of few letters -> status, the one line said
SPOILED = {
    "a reader that sees enough": ("inspect --all {many} | (read line; exec 0<&-; sleep 1)", 1, None),
    "a reader that sees nothing": ("info | true", 1, None),
    "help for nobody": ("--help | true", 1, None),
    "a full disk": ("inspect --all {many} > /dev/full", 1, "inspect: [Errno 28] No space left on device"),
    "a full disk, a short text": ("--help > /dev/full", 1, "--help: [Errno 28] No space left on device"),
    "no output at all": ("--help >&-", 0, None),
    "no such file": ("inspect {many}.not | cat", 1, "No such file or directory"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_output_that_cannot_be_written_is_one_line_or_none(how, many):
    command, status, said = SPOILED[how]
    command = f"{sys.executable} -m tinylora_kernels {command.format(many=many)}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    errors = [line for line in done.stderr.splitlines() if "Traceback" in line or "rror" in line or "xception" in line]
    assert done.returncode == status and (said in done.stderr if said else not errors), done.stderr
    assert len(errors) <= 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_are_shown_in_any_locale(encoding, many):
    done = subprocess.run(
        [sys.executable, "-m", "tinylora_kernels", "inspect", many], capture_output=True, timeout=300,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    shown = {"ascii": b"\\xe9\\u2603", "latin-1": b"\xe9\\u2603", "utf-8": "é☃".encode()}[encoding]
    assert done.returncode == 0 and shown in done.stdout and not done.stderr
