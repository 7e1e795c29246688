"""Builds what is released: the sdist, and from it the wheels, checked before they are handed over.

    python release/wheels.py                  into dist/: sdist, CPU wheel and GPU wheel; where there is a compiler for
                                              aarch64 (aarch64-linux-gnu-g++) those for it too
    python release/wheels.py cpu gpu-aarch64  these wheels, and the sdist they are built from

A GPU wheel is a CPU wheel with device code in it, for every architecture and the ranks 1 and 2, the same on every
machine: it serves any CUDA from 12.0. A CPU wheel compiles that code where it finds a GPU.

Runs on Linux, x86-64 or aarch64, in an environment that has torch >= 2.10 (any build: its headers are what is used, no
GPU and no CUDA torch is needed), setuptools, wheel, cmake and ninja, with g++ and binutils on PATH, and for a GPU wheel
NVRTC of CUDA 12 (nvidia-cuda-nvrtc-cu12). No container: the symbols of a newer glibc and libstdc++ are kept out of the
library (csrc/manylinux.cpp), and audit.py reads the result. Objects and device code stay in build/wheels, so that a
second run compiles only what changed.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import audit
import standins

ROOT = Path(__file__).resolve().parents[1]
CROSS = "aarch64"  # the other machine that wheels are made for here
LIBRARY, RECORD = "tinylora_kernels/libtinylora.so", "tinylora_kernels/_build_record.json"
MEGABYTE = 10**6
# Machine code for every generation since Turing; sm_86 and sm_89 run that of sm_80. PTX of 100, not of 120: it serves
# those to come, and sm_110 too.
ARCHITECTURES = "75-real;80-real;90-real;100-real;120-real;100-virtual"
RANKS = "1 2"  # the method's; those of 4 and 8, which make a wheel twice as large, are compiled where they are used
COMPILER = "NVRTC 12."  # whose machine code every driver from 525 on takes


class Failure(Exception):
    """Why a wheel cannot be handed over."""


def machine_of(flavour: str) -> str:
    """gpu-aarch64 -> aarch64; without a machine, this one's."""
    return flavour.partition("-")[2] or platform.machine()


def cross_compiler(machine: str) -> str | None:
    """The C++ compiler for another machine, if there is one."""
    return shutil.which(f"{machine}-linux-gnu-g++")


def run(command: list, cwd: Path, **environment: str) -> None:
    """Run quietly; what it printed is the error if it fails."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise Failure(f"{' '.join(map(str, command))} failed:\n{done.stdout[-6000:]}")


def build_sdist(out: Path, work: Path) -> Path:
    """The source archive of this tree, and nothing written into the tree."""
    folder = work / "sdist"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run([sys.executable, "setup.py", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder], cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    return Path(shutil.copy2(archive, out / archive.name))


def unpack(archive: Path, work: Path) -> Path:
    """The source tree that the wheels are built from: what is not in the archive is not in them either."""
    source = work / "source"
    shutil.rmtree(source, ignore_errors=True)
    with tarfile.open(archive) as files:
        files.extractall(source, filter="data")
    (tree,) = source.iterdir()
    return tree.rename(source / "tinylora-kernels")  # the same path for every version, for the sake of kept objects


def build_wheel(flavour: str, source: Path, out: Path, work: Path) -> Path:
    """One wheel: the sources of the sdist, the kernels that `flavour` names."""
    environment = {
        "TINYLORA_LOCAL_VERSION": flavour.partition("-")[0],
        "TINYLORA_BUILD_DIR": str(work / f"objects-{flavour}"),
        "TINYLORA_BUILD_NATIVE": "1",
        "TINYLORA_CUDA_ARCHITECTURES": ARCHITECTURES if flavour.startswith("gpu") else "",
        "TINYLORA_CUDA_RANKS": RANKS,
        "TINYLORA_DEVICE_CODE_DIR": str(work / "device-code"),
        "TINYLORA_BUILD_NODE": "0",  # it serves one torch, a wheel all of them
    }
    machine = machine_of(flavour)
    if machine != platform.machine():
        environment |= for_another_machine(machine, source, work)
    folder = work / f"wheel-{flavour}"
    for left in (folder, source / "build"):
        shutil.rmtree(left, ignore_errors=True)
    platform_name = f"manylinux_2_28_{machine}"
    command = [sys.executable, "setup.py", "bdist_wheel", "--plat-name", platform_name, "--dist-dir", folder]
    run(command, cwd=source, **environment)
    (wheel,) = folder.glob("*.whl")
    check_wheel(wheel, flavour, work)
    return Path(shutil.copy2(wheel, out / wheel.name))


def for_another_machine(machine: str, source: Path, work: Path) -> dict[str, str]:
    """What setup.py is told to compile for it."""
    if not (compiler := cross_compiler(machine)) or machine != CROSS:
        fix = f"apt install g++-{machine}-linux-gnu" if machine == CROSS else f"build it on a machine of {machine}"
        raise Failure(f"{machine}: expected {machine}-linux-gnu-g++ on PATH, found none; {fix}")
    torch = Path(importlib.util.find_spec("torch").origin).parent
    return {
        "CXX": compiler,
        "CMAKE_TOOLCHAIN_FILE": str(source / f"release/{machine}.cmake"),
        "TINYLORA_TORCH_DIR": str(standins.torch_of_another_machine(torch, compiler, work / f"torch-{machine}")),
    }


def check_wheel(wheel: Path, flavour: str, work: Path) -> None:
    """Refuse a wheel without its kernels, tied to this machine, too large, or misnamed."""
    problems, label = [], flavour.partition("-")[0]
    ending = f"+{label}-py3-none-manylinux_2_28_{machine_of(flavour)}.whl"
    if not wheel.name.endswith(ending):
        problems.append(f"expected {ending} in its name")
    with zipfile.ZipFile(wheel) as files:
        record = json.loads(files.read(RECORD))
        if not record["library"] or record["cuda_reason"]:
            raise Failure(f"{wheel.name}: not built: {record['reason'] or record['cuda_reason']}")
        if label == "gpu" and not record["device_code"].startswith(COMPILER):
            problems.append(f"expected device code of {COMPILER}x, found that of {record['device_code'] or 'none'}")
        library = Path(files.extract(LIBRARY, work / "audited"))
    problems += audit.audit(library)
    if (machine := audit.Library(library).machine) != machine_of(flavour):
        problems.append(f"expected a library for {machine_of(flavour)}, found one for {machine}")
    limit, size = (1 if label == "cpu" else 5) * MEGABYTE, wheel.stat().st_size
    if size >= limit:
        problems.append(f"expected less than {limit / MEGABYTE} MB, found {size / MEGABYTE:.2f}")
    if problems:
        raise Failure("\n".join([f"{wheel.name}:", *problems]))


def report(paths: list[Path]) -> str:
    rows = []
    for path in paths:
        library = ""
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as files:
                library = f"   library {files.getinfo(LIBRARY).file_size / MEGABYTE:.2f} MB, audited"
        rows.append(f"{path.name:<72} {path.stat().st_size / MEGABYTE:5.2f} MB{library}")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flavours", nargs="*", help="cpu or gpu; cpu-aarch64 or gpu-aarch64")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the files go (default: dist)")
    parser.add_argument("--work", type=Path, default=ROOT / "build/wheels", help="where objects stay between runs")
    options = parser.parse_args()
    flavours = options.flavours or ["cpu", "gpu"]
    if not options.flavours and platform.machine() != CROSS and cross_compiler(CROSS):
        flavours += [f"cpu-{CROSS}", f"gpu-{CROSS}"]
    if unknown := [name for name in flavours if name.partition("-")[0] not in ("cpu", "gpu")]:
        parser.error(f"expected wheels out of cpu, gpu, cpu-{CROSS}, gpu-{CROSS}, found {', '.join(unknown)}")
    work, out = options.work.resolve(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        built = [build_sdist(out, work)]
        source = unpack(built[0], work)
        for flavour in flavours:
            print(f"building {flavour}", flush=True)
            built.append(build_wheel(flavour, source, out, work))
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    print(report(built))
    return 0


if __name__ == "__main__":
    sys.exit(main())
