"""Why a native library cannot be loaded here: from its file, before it is touched, and from the loader's words."""
from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import struct
import sys
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parents[2]
_MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine of the ELF header
_UPGRADE_TORCH = "pip install --upgrade 'torch>=2.10'"


def reinstall_command() -> str:
    """What puts a library for this machine beside the package: the command fits a checkout, or an installed wheel."""
    root = PACKAGE.parent
    if _installer() == "uv":
        install = "uv pip install --no-cache --no-deps --reinstall"
    else:
        install = "pip install --no-deps --force-reinstall"
    if (root / "setup.py").is_file():
        return f"{install} --no-build-isolation -e {root}"
    return f"{install} tinylora-kernels (see docs/installation.md for the wheels)"


def _installer() -> str:
    """ "pip", "uv" or another that says so; an environment made by uv has no pip."""
    try:
        return (importlib.metadata.distribution("tinylora-kernels").read_text("INSTALLER") or "").strip()
    except importlib.metadata.PackageNotFoundError:
        return ""


def damage(path: Path) -> str | None:
    """None if the file is whole and made for this kind of machine, as far as its header tells; else what is wrong.

    Asked before loading: the loader maps a file that was cut short, and touching the missing part kills the process.
    """
    if sys.platform != "linux":
        return None
    try:
        with path.open("rb") as file:
            header, size = file.read(64), os.fstat(file.fileno()).st_size
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return "it is not a Linux library, or was cut short"
    if header[4:6] != b"\x02\x01":
        return "it is built for another platform: expected a 64-bit little-endian library"
    (machine,) = struct.unpack_from("<H", header, 18)
    built = _MACHINES.get(machine, f"ELF machine {machine}")
    if built != platform.machine():
        return f"it is built for {built}, this machine is {platform.machine()}"
    (sections,) = struct.unpack_from("<Q", header, 40)  # the table that a linker writes last
    entry, count = struct.unpack_from("<HH", header, 58)
    if size < sections + entry * count:
        return f"it was cut short: expected at least {sections + entry * count} bytes, found {size}"
    return None


def explain(error: str) -> tuple[str, str]:
    """(what went wrong, the command that changes it) for what the loader said."""
    if symbol := re.search(r"undefined symbol: (\w+)", error):
        name = symbol.group(1)
        if name.startswith(("aoti_torch_", "torch_")):
            return f"torch {torch.__version__} has no {name}: expected torch 2.10 or newer", _UPGRADE_TORCH
        return f"symbol {name} is defined nowhere", reinstall_command()
    if version := re.search(r"version `(\w+_[\d.]+)' not found", error):
        from_source = "install a compiler and build from the sdist or a checkout: " + reinstall_command()
        return f"this system's C or C++ library is older than {version.group(1)}", from_source
    if re.search(r"failed to map segment|[Oo]peration not permitted|[Pp]ermission denied|executable stack", error):
        fix = f"move the environment off file systems mounted noexec, or allow {PACKAGE} to be mapped executable"
        return f"the system forbids mapping it ({error})", fix
    if library := re.search(r"(lib(?:torch|c10)\S*\.so\S*): cannot open shared object", error):
        return f"{library.group(1)} of torch {torch.__version__} is not found", _UPGRADE_TORCH
    return error, reinstall_command()
