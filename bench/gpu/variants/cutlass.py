"""CUTLASS's product with the term in its epilogue (cutlass.cu): built where nvcc and a tree of CUTLASS are, by ctypes.

    python -m bench.gpu.variants.cutlass [--tree DIR] [--configs 128x256]

builds libtinylora_variants.so beside this file, about a minute a configuration on one core, and prints the registers
and spills of every kernel. The PyPI package nvidia-cutlass holds a tree (cutlass_library/source); with --target it can
lie anywhere. The library runs on Hopper alone, on machines with neither nvcc nor a tree too.
"""
from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cutlass.cu")
LIBRARY = Path(__file__).with_name("libtinylora_variants.so")
CONFIGS = ("128x256", "256x128", "64x256")  # tiles, in the order of CONFIG
SWIZZLES = (1, 8)  # tiles side by side that share operands in L2, at most
FLAGS = (
    "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr", "-DNDEBUG",
    "-Xcompiler=-fPIC", "-Xptxas=-v",
)  # fmt: skip
STATUS = {
    -1: "cannot multiply this shape, or these addresses (n and k must be multiples of 8)",
    -2: "wants a workspace",
    -3: "cannot prepare the launch",
    -4: "cannot be launched",
}


def find_tree(given: Path | None = None) -> Path | None:
    """A folder with CUTLASS's include/ and tools/util/include/."""
    if given is None and (found := importlib.util.find_spec("cutlass_library")) and found.origin:
        given = Path(found.origin).parent / "source"
    whole = given and all((given / part).is_dir() for part in ("include/cutlass", "tools/util/include"))
    return given if whole else None


def why_not_built(tree: Path | None = None) -> str | None:
    """None where the library can be built, else what is missing and how to get it."""
    if not shutil.which("nvcc"):
        return "no nvcc on the PATH: install the CUDA toolkit (12.4 or newer)"
    if find_tree(tree) is None:
        return "no tree of CUTLASS: pip install nvidia-cutlass, or name one with --tree"
    return None


def build(tree: Path | None = None, configs: tuple[str, ...] = CONFIGS, out: Path = LIBRARY) -> dict[str, list[str]]:
    """Configuration -> what the assembler says of its kernels: without the term and with it, for both layouts of W."""
    if problem := why_not_built(tree):
        raise RuntimeError(problem)
    root, said = find_tree(tree), {}
    with tempfile.TemporaryDirectory() as scratch:
        objects = []
        for name in configs:
            objects.append(str(Path(scratch) / f"{name}.o"))
            command = ["nvcc", *FLAGS, f"-DCONFIG={CONFIGS.index(name)}", f"-I{root}/include"]
            command += [f"-I{root}/tools/util/include", "-c", str(SOURCE), "-o", objects[-1]]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc: {done.stderr[-2000:]}")
            spills = re.findall(r"(\d+ bytes spill stores, \d+ bytes spill loads)", done.stderr)
            registers = re.findall(r"Used (\d+ registers)", done.stderr)
            said[name] = [", ".join(pair) for pair in zip(registers, spills, strict=True)]
        subprocess.run(["nvcc", "-shared", *objects, "-o", str(out)], check=True)
    return said


class Library:
    """The products of a library that was built; OSError where there is none."""

    def __init__(self, path: Path = LIBRARY) -> None:
        if not path.is_file():
            how = why_not_built() or "python -m bench.gpu.variants.cutlass builds it"
            raise OSError(f"{path.name} is not there: {how}")
        library, number, pointer = ctypes.CDLL(str(path)), ctypes.c_int, ctypes.c_void_p
        self.products = {}
        for config in CONFIGS:
            product = getattr(library, f"tinylora_product_{config}", None)
            if product is not None:  # of those that were asked for
                product.argtypes = [number] * 2 + [pointer] * 5 + [number] * 5 + [pointer]
                product.restype = number
                self.products[config] = product

    def product(
        self,
        x: Tensor,
        w: Tensor,
        d: Tensor,
        *,
        backward: bool,
        config: str,
        swizzle: int,
        multiprocessors: int,
        gains: Tensor | None = None,
        factor: Tensor | None = None,
        stream: int = 0,
    ) -> None:
        """d = x W^T + gains U^T, or backward x W + gains B^T, written; without gains the bare product.

        Args:
            x: [N, k] bf16, contiguous; d: [N, n]; w: W as it lies, [n, k], backward [k, n].
            gains: [r, N] fp32; factor: [r, n] fp32; r is what the library was built for, 2.
            swizzle: one of SWIZZLES; config: one of `products`.
        """
        for name, tensor in (("x", x), ("w", w), ("d", d)):
            if tensor.dtype is not torch.bfloat16 or not tensor.is_contiguous():
                raise ValueError(f"{name}: expected contiguous bfloat16, found {tensor.dtype}, {tensor.stride()}")
        status = self.products[config](
            not backward, gains is not None, x.data_ptr(), w.data_ptr(), d.data_ptr(),
            None if gains is None else gains.data_ptr(), None if factor is None else factor.data_ptr(),
            *d.shape, x.shape[1], multiprocessors, swizzle, stream,
        )  # fmt: skip
        if status:
            what = f"d {tuple(d.shape)}, x {tuple(x.shape)}"
            raise RuntimeError(f"cutlass {config} {STATUS.get(status, status)}: {what}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.variants.cutlass", description=__doc__)
    parser.add_argument("--tree", type=Path)
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=CONFIGS)
    parser.add_argument("--out", type=Path, default=LIBRARY)
    options = parser.parse_args(arguments)
    if problem := why_not_built(options.tree):
        print(f"not built: {problem}")
        return 2
    for config, kernels in build(options.tree, tuple(options.configs), options.out).items():
        print(config, *kernels, sep="\n    ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
