"""The CUDA kernels compiled for the CPU by g++ and run one fiber per thread, as a backend like any other.

    backend = Emulated(build("asan"), order="random", seed=3)
    t = backend.update(y, basis, v, projection, offset, bias, adapter_ids)

Modes: `plain` finds wrong results, deadlocks, divergent barriers and shuffles, and traps; `asan` also out-of-bounds and
misaligned accesses, integer overflow and undefined shifts; `race` also races between threads, warps and blocks.
"""
from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinylora_kernels.method.parts import SPECIALISED_RANKS
from tinylora_kernels.ops.native import nvrtc

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[2] / "csrc" / "cuda"
LIBRARY_HEADERS = (KERNELS.parent, HERE.parents[2] / "tinylora_kernels")
TORCH_SIDE = [KERNELS.parent / "common" / name for name in ("arguments.cpp", "tensors.cpp")]  # of the library
MODES = ("plain", "asan", "race")
ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)  # in the order of enum class Element
RANKS = SPECIALISED_RANKS
ORDERS = ("forward", "reverse", "random")

COMMON = ["-std=c++17", "-O1", "-g1", "-w", "-DTINYLORA_EMULATE", "-ffp-contract=off", "-fno-strict-aliasing"]
COMMON += ["-fPIC", "-fvisibility=hidden", "-x", "c++"]
SANITIZERS = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "race": ["-fsanitize=thread", "-DEMULATE_RACES"],
}
TELLING = ("fault: ", "wrong result: ", "runtime error: ", "ERROR: AddressSanitizer: ")


class Fault(Exception):
    """The emulated launch did something a GPU launch must not; the message is the emulator's or the sanitizer's."""


def why_not() -> str | None:
    """Why the emulator cannot be built here, or None."""
    return None if shutil.which("g++") else "g++ is not installed"


def _cache_directory() -> Path:
    directory = Path(os.environ.get("TINYLORA_SIM_CACHE", Path(tempfile.gettempdir()) / f"tinylora-sim-{os.getuid()}"))
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _included(source: Path, includes: list[Path]) -> list[Path]:
    """The file and everything that it includes, directly or not, from its own folder and these."""
    found = [source]
    for path in found:
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
            header = next((d / name for d in (path.parent, *includes) if (d / name).is_file()), None)
            if header and header not in found:
                found.append(header)
    return found


def compile_object(source: Path, flags: list[str], includes: list[Path]) -> Path:
    """Compile one file, unless an object from the same bytes and flags is in the cache."""
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in _included(source, includes):
        digest.update(path.name.encode() + path.read_bytes())
    target = _cache_directory() / f"{source.stem}-{digest.hexdigest()[:20]}.o"
    if not target.exists():
        command = ["g++", *flags, *(f"-I{d}" for d in includes)]
        partial = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-c", str(source), "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for the emulator:\n{done.stderr[:4000]}")
        partial.rename(target)
    return target


def link(objects: list[Path], mode: str) -> Path:
    """One executable from these objects, cached like them."""
    digest = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:20]
    target = _cache_directory() / f"run-{mode}-{digest}"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        sanitizer = SANITIZERS["asan"] if mode == "asan" else []  # race.cpp stands in for the thread sanitizer
        subprocess.run(["g++", *sanitizer, *map(str, objects), "-ldl", "-o", str(partial)], check=True)
        partial.rename(target)
    return target


def host_object(source: Path, kernels: Path = KERNELS) -> Path:
    """One plain C++ file that includes headers of the kernels' folder."""
    return compile_object(source, ["-std=c++17", "-O1", "-fPIC"], [kernels])


def host_sources(kernels: Path = KERNELS) -> list[Path]:
    """The launchers."""
    return [kernels / "launch.cpp", kernels / "kernel.cpp"]


def link_shared(objects: list[Path], *libraries: str) -> Path:
    """One shared library from these objects, cached like them."""
    digest = hashlib.sha256(" ".join(map(str, [*objects, *libraries])).encode()).hexdigest()[:20]
    target = _cache_directory() / f"{objects[0].stem}-{digest}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-shared", *map(str, objects), *libraries, "-o", str(partial)], check=True)
        partial.rename(target)
    return target


def runtime_objects(mode: str) -> list[Path]:
    flags = COMMON + [flag for flag in SANITIZERS[mode] if flag != "-fsanitize=thread"]
    names = ["scheduler.cpp"] + (["race.cpp"] if mode == "race" else [])
    return [compile_object(HERE / name, flags, [HERE, KERNELS]) for name in names]


def kernel_object(source: Path, mode: str, kernels: Path = KERNELS, defines: tuple[str, ...] = ()) -> Path:
    return compile_object(source, [*COMMON, *SANITIZERS[mode], *defines], [kernels, HERE])


def kernel_objects(mode: str, kernels: Path, ranks, dtypes) -> list[Path]:
    """The kernels of these ranks and element types."""
    modules = [nvrtc.defines(ELEMENTS.index(dtype), rank) for dtype in dtypes for rank in ranks]
    return [kernel_object(HERE / "kernels.cpp", mode, kernels, tuple(defines)) for defines in modules]


def host_objects(mode: str, kernels: Path) -> list[Path]:
    """The launchers and the device they launch on; host code, in which there is no race to look for."""
    sources = [*host_sources(kernels), HERE / "device.cpp"]
    return [kernel_object(source, "plain" if mode == "race" else mode, kernels) for source in sources]


def build_torch_ops() -> Path:
    """A library for torch.ops.load_library: the CUDA entry points, registered for CPU tensors in tinylora_emulated."""
    torch_directory = Path(torch.__file__).parent
    abi = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-isystem", f"{torch_directory}/include"]
    includes = [KERNELS, HERE, *LIBRARY_HEADERS]
    objects = [compile_object(source, COMMON + abi, includes) for source in (
        HERE / "torch_ops.cpp", KERNELS / "update.cpp", *TORCH_SIDE
    )]  # fmt: skip
    objects += kernel_objects("plain", KERNELS, RANKS, ELEMENTS) + host_objects("plain", KERNELS)
    objects += runtime_objects("plain")
    return link_shared(objects, f"-L{torch_directory}/lib", "-ltorch", "-ltorch_cpu", "-lc10")


def build(mode: str, *, kernels: Path = KERNELS, ranks=RANKS, dtypes=ELEMENTS) -> Path:
    """The driver for the kernels in that directory, with these ranks and element types compiled in."""
    objects = [kernel_object(HERE / "driver.cpp", mode, kernels), *kernel_objects(mode, kernels, ranks, dtypes)]
    objects += host_objects(mode, kernels)
    return link(objects + runtime_objects(mode), mode)


def run(executable: Path, stdin: bytes = b"", arguments: tuple[str, ...] = (), timeout: float = 300) -> bytes:
    """Run it; Fault with the first telling line if it does not end well."""
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    done = subprocess.run([executable, *arguments], input=stdin, capture_output=True, timeout=timeout, env=environment)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()
        telling = [line for line in lines if any(word in line for word in TELLING)]
        raise Fault((telling or lines or [f"exit status {done.returncode}"])[0])
    return done.stdout


def _raw(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return struct.pack("<q", -1)
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return struct.pack("<q", len(data)) + data


def _row_span(rows: Tensor) -> Tensor:
    """The memory from the first element to the last, gaps between rows included."""
    count, width = rows.shape
    return rows.as_strided([(count - 1) * rows.stride(0) + width if count else 0], [1])


SOURCE, TARGET, NOTHING = range(3)  # enum class Onto


@dataclass(frozen=True)
class Emulated:
    """A backend: the four ops, and those of parts, on 2-D activations.

    Attributes:
        skew, bias_skew: elements by which the rows, and the bias, miss 16-byte alignment.
        card: multiprocessors, and blocks that each of them runs at once.
        capturing: the stream is being captured into a graph.
    """

    executable: Path
    order: str = "forward"
    seed: int = 1
    skew: int = 0
    bias_skew: int = 0
    card: tuple[int, int] = (2, 2)
    capturing: bool = False

    def update(self, y, basis, v, projection, offset, bias, adapter_ids) -> Tensor:
        span, _, t, _ = self._call(SOURCE, y, None, basis, None, v, projection, offset, bias, adapter_ids, stays=True)
        _row_span(y).copy_(_tensor(span, y.dtype, (-1,)))
        return _tensor(t, torch.float32, (len(y), len(basis)))

    def update_backward(self, g, basis, v, projection, t, adapter_ids, need_input_grad) -> tuple[Tensor, Tensor]:
        g0 = torch.full(g.shape, torch.nan, dtype=g.dtype) if need_input_grad else g.new_empty(0)
        target = g0 if need_input_grad else None
        dv = self._backward(SOURCE, g, target, basis, None, v, projection, t, adapter_ids)
        return g0, dv

    def low_rank(self, x, right, basis, v, projection, bias, adapter_ids) -> tuple[Tensor, Tensor]:
        y = torch.full((len(x), basis.shape[1]), torch.nan, dtype=x.dtype)
        _, found, t, _ = self._call(NOTHING, x, y, right, basis, v, projection, None, bias, adapter_ids)
        return _tensor(found, x.dtype, y.shape), _tensor(t, torch.float32, (len(x), len(basis)))

    def update_input_grad(self, dx, right, g, basis, v, projection, t, adapter_ids, add) -> Tensor:
        return self._backward(TARGET if add else NOTHING, g, dx, basis, right, v, projection, t, adapter_ids)

    def update_parts(self, y, basis, v, projection, offset, bias, x, right, adapter_ids, ends, groups) -> Tensor:
        arrays = basis, v, projection, offset, x, right, adapter_ids
        span, _, t, _ = self._call_parts(y, bias, *arrays, None, ends, groups, transposed=False, writes=True)
        _row_span(y).copy_(_tensor(span, y.dtype, (-1,)))
        return _tensor(t, torch.float32, (len(ends), len(y), len(basis)))

    def update_parts_backward(
        self, g, basis, v, projection, t, adapter_ids, ends, groups, need_input_grad
    ) -> tuple[Tensor, Tensor]:
        g0 = torch.full(g.shape, torch.nan, dtype=g.dtype) if need_input_grad else g.new_empty(0)
        if t is None and not need_input_grad:
            return g0, v.new_empty(0)
        arrays = basis, v, projection, None, None, None, adapter_ids
        found = self._call_parts(g, None, *arrays, t, ends, groups, transposed=True, writes=need_input_grad)
        if found[0] != _raw(_row_span(g))[8:]:
            raise Fault("a backward op wrote to g")
        if need_input_grad:
            g0.copy_(_tensor(found[1], g.dtype, g.shape))
        return g0, _tensor(found[3], torch.float32, v.shape if t is not None else (0,))

    def _call_parts(
        self, y, bias, basis, v, projection, offset, x, right, ids, t, ends, groups, *, transposed, writes
    ) -> list[bytes]:
        """What y, g0, the coefficients and dv hold afterwards."""
        count, width = y.shape
        header = [
            1, transposed, writes, self.capturing, list(ELEMENTS).index(y.dtype), len(basis), len(ends), len(v), count,
            y.stride(0), 0 if x is None else x.shape[1], 0 if x is None else x.stride(0), v.shape[-1],
            1 if ids is None else v.shape[1], 1 if ids is None or not len(ids) else count // len(ids),
            ids is not None and ids.dtype is torch.int64, projection.dim() == 3, self.skew, self.bias_skew,
            ORDERS.index(self.order), self.seed, *self.card,
            *(number for pair in zip(ends, groups, strict=True) for number in pair),
        ]  # fmt: skip
        span = _row_span(y)
        arrays = [span, bias, basis, v, projection, offset, None if x is None else _row_span(x), right, ids, t]
        out = run(self.executable, struct.pack(f"<{len(header)}q", *map(int, header)) + b"".join(map(_raw, arrays)))
        sizes = [span.numel() * y.element_size(), count * width * y.element_size() if transposed and writes else 0]
        sizes += [0 if transposed else len(ends) * count * len(basis) * 4, v.numel() * 4 if t is not None else 0]
        ends_of = [sum(sizes[: i + 1]) for i in range(4)]
        return [out[end - size : end] for size, end in zip(sizes, ends_of, strict=True)]

    def _backward(self, onto, g, target, basis, other, v, projection, t, ids) -> Tensor:
        if t is None and target is None:
            return v.new_empty(0)
        found = self._call(onto, g, target, basis, other, v, projection, None, None, ids, t=t, transposed=True)
        if found[0] != _raw(_row_span(g))[8:]:
            raise Fault("a backward op wrote to g")
        if target is not None:
            _row_span(target).copy_(_tensor(found[1], target.dtype, (-1,)))
        return _tensor(found[3], torch.float32, v.shape if t is not None else (0,))

    def _call(
        self, onto, source, target, factor, other, v, projection, offset, bias, ids, *, t=None, transposed=False,
        stays=False,
    ) -> list[bytes]:  # fmt: skip
        """What the source, the target, the coefficients and dv hold afterwards."""
        count, width = source.shape
        written = source if target is None else target
        header = [
            0, transposed, stays, self.capturing, onto, ELEMENTS.index(source.dtype), len(factor), count,
            width, source.stride(0), written.shape[1], written.stride(0),
            v.shape[-1], 1 if ids is None else len(v), 1 if ids is None or not len(ids) else count // len(ids),
            ids is not None and ids.dtype is torch.int64, projection.dim() == 2,
            self.skew, self.bias_skew, ORDERS.index(self.order), self.seed, *self.card,
        ]  # fmt: skip
        spans = [_row_span(source), None if target is None else _row_span(target)]
        arrays = [*spans, bias, factor, other, v, projection, offset, ids, t]
        out = run(self.executable, struct.pack(f"<{len(header)}q", *map(int, header)) + b"".join(map(_raw, arrays)))
        sizes = [span.numel() * span.element_size() if span is not None else 0 for span in spans]
        sizes += [0 if transposed else count * len(factor) * 4, v.numel() * 4 if t is not None else 0]
        ends = [sum(sizes[: i + 1]) for i in range(4)]
        return [out[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _tensor(data: bytes, dtype: torch.dtype, shape) -> Tensor:
    if not data:
        return torch.empty([max(n, 0) for n in shape], dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
