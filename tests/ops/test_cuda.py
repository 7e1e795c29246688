"""Why the CUDA kernels cannot run on a machine, and the device code made ready where they can: all made up here.

tests/sim/test_driver.py has the same behind a driver that is loaded.
"""
import hashlib
import multiprocessing
import os
import struct
import time

import pytest
import torch

from tinylora_kernels.ops.native import cuda, cuda_archive, cuda_code, cuda_driver, nvrtc
from tinylora_kernels.ops.native.nvrtc import CompileError, Target

SEVEN = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_100")


class Library:
    """What the native library does with device code, without one."""

    def __init__(self, archive: cuda_archive.Archive | None = None, refusal: bytes | None = None):
        self.archive, self.images = archive, []
        self.tinylora_why_not_cuda = lambda *_: refusal

    def tinylora_has_cuda_image(self, element, rank, architecture) -> bool:
        return any(image[:2] == (element, rank) and image[2] <= architecture for image in self.images)

    def tinylora_add_cuda_image(self, element, rank, architecture, ptx, code, size) -> None:
        assert size.value == len(code)
        self.images.append((element, rank, architecture, ptx, code))


@pytest.fixture
def machine(monkeypatch):
    """machine(torch's CUDA, the driver's, compute capability or None) pretends to be that machine."""

    def pretend(torch_cuda: str | None, driver: tuple[int, int] | None, capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(cuda_driver, "driver_version", lambda: driver)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(capability is not None))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda device: True, raising=False)

    return pretend


@pytest.fixture
def library(monkeypatch):
    """library(targets) holds an archive of these; the code of a module is its target's name."""

    def make(targets=SEVEN, ranks=nvrtc.RANKS, **options) -> Library:
        modules = [(element, rank) for rank in ranks for element in range(3)]
        code = {target: {module: f"{target} {module}".encode() for module in modules} for target in targets}
        made = Library(cuda_archive.Archive(cuda_archive.pack("// source", "NVRTC 12.9", code)), **options)
        monkeypatch.setattr(cuda_code, "archive_of", lambda library: library.archive)
        return made

    return make


@pytest.mark.parametrize(
    "torch_cuda, driver, capability, reason",
    [
        ("13.0", (13, 0), (9, 0), None),
        ("12.8", (12, 0), (8, 6), None),
        (None, (13, 0), None, "this torch was built without CUDA"),
        ("13.0", None, None, "no NVIDIA driver is installed"),
        ("12.8", (11, 8), (9, 0), "it runs CUDA 11.8, expected 12.0 or later. To change that: install driver 525"),
        ("13.0", (13, 0), None, "no GPU is visible"),
        ("13.0", (13, 0), (7, 0), "no code for the GPU: the GPU is sm_70, expected sm_75 or later"),
    ],
)
def test_reasons(machine, library, torch_cuda, driver, capability, reason):
    machine(torch_cuda, driver, capability)
    found = cuda.why_not(library(), torch.bfloat16, 2)
    assert found is None if reason is None else reason in found and "\n" not in found


def test_what_the_driver_says_is_a_reason(machine, library):
    machine("12.8", (12, 8), (9, 0))
    found = cuda.why_not(library(refusal=b"tinylora: cuInit failed"), torch.float32, 1)
    assert found == "the driver refuses: tinylora: cuInit failed"


@pytest.mark.parametrize(
    "capability, target",
    [(75, "sm_75"), (80, "sm_80"), (87, "sm_86"), (89, "sm_89"), (90, "sm_90"), (100, "sm_100"), (103, "sm_100"),
     (110, "compute_100"), (121, "sm_120"), (130, "compute_100"), (70, None), (61, None)],
)  # fmt: skip
def test_which_code_a_gpu_runs(library, capability, target):
    found = cuda_code.best_target(SEVEN, capability)
    assert target == (str(found) if found else None)
    if target:
        holder = library()
        for _ in range(2):
            cuda_code.make_ready(holder, torch.float16, 8, capability)
        (image,) = holder.images
        assert image[:2] == (2, 8) and image[4] == f"{target} (2, 8)".encode() and image[3] == ("compute" in target)


def test_an_archive_holds_what_was_packed():
    code = {"sm_90": {(0, 1): b"one" * 100, (2, 8): b""}, "compute_100": {(0, 1): b"\0\1"}}
    archive = cuda_archive.Archive(cuda_archive.pack("// ü\n", "NVRTC 12.9", code))
    assert archive.source == "// ü\n" and archive.compiler == "NVRTC 12.9" and archive.targets == tuple(code)
    assert {target: archive.modules(target) for target in archive.targets} == code


def test_an_archive_of_other_sources_is_an_error():
    with pytest.raises(ValueError, match=r"an archive of device code: expected another header than \['images'\]"):
        cuda_archive.Archive(struct.pack("<q", 13) + b'{"images": 1}')


def test_architectures_are_in_cmakes_notation():
    assert list(map(str, nvrtc.targets("75-real;80-virtual 90"))) == ["sm_75", "compute_80", "sm_90", "compute_90"]
    with pytest.raises(CompileError, match="architectures: expected numbers as in '80-real;90', found 'native'"):
        nvrtc.targets("native")


class Compiler(nvrtc.Nvrtc):
    """An NVRTC that knows three architectures, and counts what it compiles by files in a folder."""

    def __init__(self, folder, error: str | None = None, seconds: float = 0.0):
        self.folder, self.error, self.seconds, self.version, self.path = folder, error, seconds, (12, 9), "made up"

    def architectures(self):
        return [75, 80, 86, 90, 120]

    def compile(self, source, target, options=()):
        (self.folder / f"compiled-{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(self.seconds)
        if self.error:
            raise CompileError(self.error)
        return f"{target} {' '.join(options)}".encode()

    def compilations(self) -> int:
        return len(list(self.folder.glob("compiled-*")))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / f"cache/cuda-{os.geteuid()}"


def test_code_is_compiled_once_and_kept(monkeypatch, machine, library, tmp_path, cache, capsys):
    compiler = Compiler(tmp_path)
    monkeypatch.setattr(cuda_code, "_compiler", lambda: compiler)
    machine("12.9", (12, 9), (9, 0))
    for _ in range(3):  # three processes
        holder = library(targets=())
        assert cuda.why_not(holder, torch.bfloat16, 2) is None
        ((element, rank, architecture, ptx, code),) = holder.images
        assert (element, rank, architecture, ptx) == (1, 2, 90, False) and b"-DTINYLORA_RANK=2" in code
    assert compiler.compilations() == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"of bfloat16 and rank 2 for sm_90 with NVRTC 12.9; once, into {cache}" in line


def test_a_rank_that_was_left_out_is_compiled(monkeypatch, library, tmp_path, cache):
    compiler, holder = Compiler(tmp_path), library(ranks=(1, 2))
    monkeypatch.setattr(cuda_code, "_compiler", lambda: compiler)
    for rank in (1, 2, 4):
        cuda_code.make_ready(holder, torch.float32, rank, 90)
        assert compiler.compilations() == (rank == 4)
    assert b"-DTINYLORA_RANK=4" in holder.images[-1][-1]


def test_a_gpu_that_the_compiler_does_not_know_gets_ptx(tmp_path):
    compiler = Compiler(tmp_path)
    assert compiler.best_target(120) == Target(120, ptx=False)
    assert compiler.best_target(86) == compiler.best_target(89) == Target(80, ptx=False)
    assert compiler.best_target(130) == Target(120, ptx=True)
    with pytest.raises(CompileError, match="NVRTC 12.9 compiles for sm_75 and later, the GPU is sm_70"):
        compiler.best_target(70)


@pytest.mark.parametrize("damage", [b"", b"short", bytes(100), None])
def test_a_damaged_entry_is_compiled_again(tmp_path, cache, damage):
    compiler, target = Compiler(tmp_path), Target(90, ptx=False)
    code = cuda_code.compiled(compiler, "source", target, 0, 1)
    (entry,) = (path for path in cache.iterdir() if path.suffix != ".lock")
    content = entry.read_bytes()
    assert content == hashlib.sha256(entry.name.split("-")[1].encode() + code).digest() + code
    entry.write_bytes(content[:-1] + b"?" if damage is None else damage)
    assert cuda_code.compiled(compiler, "source", target, 0, 1) == code and compiler.compilations() == 2
    assert entry.read_bytes() == content


def _compile(compiler, results) -> None:
    results.put(cuda_code.compiled(compiler, "source", Target(90, ptx=False), 0, 1))


def test_two_processes_compile_once(tmp_path, cache):
    context = multiprocessing.get_context("fork")
    compiler, results = Compiler(tmp_path, seconds=0.5), context.Queue()
    processes = [context.Process(target=_compile, args=(compiler, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1 and compiler.compilations() == 1


def test_a_cache_that_cannot_be_written_costs_a_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "file"))
    assert cuda_code.compiled(Compiler(tmp_path), "source", Target(90, ptx=False), 0, 1)
    assert "for this process alone: " in capsys.readouterr().err


def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path, cache, capsys):
    compiler, target = Compiler(tmp_path), Target(90, ptx=False)
    code = cuda_code.compiled(compiler, "source", target, 0, 1)
    cache.chmod(0o777)
    assert cuda_code.compiled(compiler, "source", target, 0, 1) == code and compiler.compilations() == 2
    assert "for this process alone: no cache that is this user's to write" in capsys.readouterr().err
    cache.chmod(0o755)
    assert cuda_code.compiled(compiler, "source", target, 0, 1) == code and compiler.compilations() == 2


def test_what_the_compiler_says_is_a_reason(monkeypatch, machine, library, tmp_path, cache):
    machine("12.9", (12, 9), (11, 0))
    monkeypatch.setattr(cuda_code, "_compiler", lambda: Compiler(tmp_path, error="kernels.cu(1): error: no"))
    found = cuda.why_not(library(targets=("sm_90",)), torch.float32, 1)
    assert found == "no code for the GPU: kernels.cu(1): error: no"
    assert cuda_code.best_target(("sm_90",), 110) is None


def test_without_nvrtc_the_reason_names_the_package(monkeypatch, machine, library):
    machine("12.9", (12, 9), (9, 0))
    cuda_code._compiler.cache_clear()
    monkeypatch.delenv("TINYLORA_NVRTC", raising=False)
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", _nothing)
    found = cuda.why_not(library(targets=()), torch.float32, 1)
    assert found == (
        "no code for the GPU: libnvrtc.so.12 is not found. To change that: pip install nvidia-cuda-nvrtc-cu12"
    )
    monkeypatch.setenv("TINYLORA_NVRTC", "/nowhere/libnvrtc.so")
    assert "TINYLORA_NVRTC=/nowhere/libnvrtc.so does not load" in cuda.why_not(
        library(targets=()), torch.float32, 1
    )


def _nothing(path):
    raise OSError(f"{path}: cannot open shared object file")


def test_the_driver_of_this_machine_is_asked_without_an_error():
    version = cuda_driver.driver_version()
    assert version is None or version >= (11, 0)
