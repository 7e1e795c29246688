"""The aarch64 CPU wheel in an aarch64 Python with an aarch64 torch, emulated on a machine of another kind.

    make test-aarch64                 builds the wheel, installs it there, asks what matrix_check.py asks on three
                                      kinds of CPU, and puts it behind the ops' tests (tests/remote.py)
    python release/aarch64.py -k dx   the same with arguments for pytest, and the wheel that is in dist
    build/aarch64/usr/bin/python      that Python; QEMU_CPU=neoverse-n1 chooses the CPU

Needs Debian's apt-get and dpkg (root is not needed, and nothing is installed into the system), qemu-user, the compiler
of wheels.py, and 1.3 GB below build/. torch is the newest that PyPI has for aarch64 without CUDA's gigabytes, and the
oldest that the package takes. Emulation says what is computed and not how fast: no times are taken.
"""
from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/aarch64.csv"
COLUMNS = ("cpu", "isa", "python", "torch", "float32_error", "date")
TORCH = "2.10.0"
REQUIREMENTS = "numpy safetensors tqdm typing_extensions sympy networkx jinja2 fsspec filelock".split()
# qemu's name -> the instruction set that is chosen on it
CPUS = {"neoverse-n1": "neon", "max,sve=off": "neon_bf16", "max,sve-default-vector-length=32": "sve256"}
TESTS = ("tests/ops/test_native.py", "tests/ops/test_parts.py")
WIDEST = "max,sve-default-vector-length=32"


class Failure(Exception):
    """What is missing, or did not work, in one line."""


def run(command: list, **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise Failure(f"{Path(command[0]).name}: {lines[-1]}")
    return done.stdout


def need(program: str, package: str) -> None:
    if not shutil.which(program):
        raise Failure(f"expected {program} on PATH, found none: apt install {package}")


def unpack_system(folder: Path) -> None:
    """Debian's Python for arm64 with the libraries it needs; apt's state for it is its own."""
    state = folder / "apt"
    for part in ("state/lists/partial", "cache/archives/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    settings = state / "apt.conf"
    settings.write_text(
        f'APT::Architecture "arm64"; APT::Architectures {{"arm64";}}; Dir::State "{state / "state"}";\n'
        f'Dir::State::status "{state / "status"}"; Dir::Cache "{state / "cache"}";\n'
    )
    variables = os.environ | {"APT_CONFIG": str(settings)}
    run(["apt-get", "update", "-q"], env=variables)
    wanted = ["python3", "libstdc++6", "libgomp1"]
    run(["apt-get", "install", "-q", "-y", "--download-only", "--no-install-recommends", *wanted], env=variables)
    for package in sorted((state / "cache/archives").glob("*.deb")):
        run(["dpkg", "-x", package, folder])


def python_of(folder: Path) -> str:
    """3.11, as the distribution has it."""
    names = [path.name.removeprefix("python") for path in folder.glob("usr/bin/python3.*")]
    return next(name for name in names if name.removeprefix("3.").isdigit())


def pip(folder: Path, *wanted: str | Path) -> None:
    """Install wheels for aarch64 where that Python looks for them."""
    version = python_of(folder)
    packages = folder / f"usr/local/lib/python{version}/dist-packages"
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--upgrade"]
    command += ["--only-binary=:all:", "--python-version", version, "--implementation", "cp", "--target", packages]
    for abi in (f"cp{version.replace('.', '')}", "abi3", "none"):
        command += ["--abi", abi]
    for platform in ("manylinux_2_28", "manylinux_2_17", "manylinux2014"):
        command += ["--platform", f"{platform}_aarch64"]
    run([*command, *wanted])


def emulated_python(folder: Path) -> Path:
    """A program that is that Python, also to itself: what it starts by sys.executable is emulated too."""
    program, real = folder / "usr/bin/python", folder / f"usr/bin/python{python_of(folder)}"
    program.write_text(
        "#!/bin/sh\n"
        "unset PYTHONPATH VIRTUAL_ENV\n"
        f"export QEMU_LD_PREFIX={folder} PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONWARNINGS=ignore\n"
        f'exec qemu-aarch64 -0 {program} {real} "$@"\n'
    )
    program.chmod(0o755)
    return program


def prepare(folder: Path, wheel: Path) -> Path:
    """The emulated Python with torch and this wheel; what is there from an earlier run is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("usr/bin/python3")):
        print("unpacking an aarch64 Python", flush=True)
        unpack_system(folder)
    packages = folder / f"usr/local/lib/python{python_of(folder)}/dist-packages"
    if not list(packages.glob(f"torch-{TORCH}*")):
        print(f"installing torch {TORCH} for aarch64", flush=True)
        pip(folder, "--no-deps", f"torch=={TORCH}")
        pip(folder, *REQUIREMENTS)
    pip(folder, "--no-deps", wheel)
    tests = packages / "tests"
    if not tests.is_symlink():
        tests.symlink_to(ROOT / "tests")
    return emulated_python(folder)


def check(python: Path, cpu: str) -> dict:
    """What matrix_check.py says on that CPU."""
    variables = os.environ | {"QEMU_CPU": cpu, "OMP_NUM_THREADS": "1"}
    facts = json.loads(run([python, ROOT / "release/matrix_check.py", "cpu"], env=variables).splitlines()[-1])
    if facts["isa"] != CPUS[cpu]:
        raise Failure(f"{cpu}: expected {CPUS[cpu]}, found {facts['isa']}")
    error, date = f"{facts['error']:.1e}", datetime.date.today().isoformat()
    return {"cpu": cpu, "float32_error": error, "date": date} | {n: facts[n] for n in ("isa", "python", "torch")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder of the wheel")
    parser.add_argument("--work", type=Path, default=ROOT / "build/aarch64", help="where that Python is kept")
    options, tests = parser.parse_known_args()
    try:
        need("qemu-aarch64", "qemu-user")
        need("dpkg", "dpkg")
        wheels = sorted(options.dist.glob("*+cpu-*_aarch64.whl"))
        if len(wheels) != 1:
            raise Failure(f"{options.dist}: expected one +cpu wheel for aarch64, found {len(wheels)}: make wheels")
        python = prepare(options.work.resolve(), wheels[0].resolve())
        rows = []
        for cpu in CPUS:
            rows.append(check(python, cpu))
            print(*(rows[-1][name] for name in COLUMNS), sep="  ", flush=True)
        with RESULTS.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    remote = {"TINYLORA_REMOTE": str(python), "QEMU_CPU": WIDEST, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.remote", *TESTS, *tests]
    return subprocess.run(command, cwd=ROOT, env=os.environ | remote).returncode


if __name__ == "__main__":
    sys.exit(main())
