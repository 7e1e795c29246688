"""Binds a static library to the oldest version of each glibc symbol, so that what links it runs on older systems.

    python release/old_glibc.py /usr/local/cuda/lib64/libcudart_static.a OUT.a

A linker takes the newest version of a symbol that this machine's glibc has: pthread_create of glibc 2.36 is
pthread_create@GLIBC_2.34, and what links it does not load under 2.28. But glibc keeps the older versions for programs
linked before, and an object that names one ("pthread_create@GLIBC_2.2.5") is bound to it. So the undefined symbols of
the static CUDA runtime are renamed to the oldest version this machine has, where the newest one is too new. Needs nm
and objcopy, which come with gcc.
"""
from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = (2, 28)


def libc_versions(libc: str) -> dict[str, list[tuple[tuple[int, ...], str]]]:
    """Symbol -> its versions in this libc, oldest first, each as (number, name)."""
    listing = subprocess.run(["nm", "-D", "--defined-only", libc], check=True, capture_output=True, text=True).stdout
    versions: dict[str, list] = {}
    for symbol, version in re.findall(r" [A-Za-z] (\w+)@+(GLIBC_[\d.]+)$", listing, re.MULTILINE):
        number = tuple(map(int, version.removeprefix("GLIBC_").split(".")))
        versions.setdefault(symbol, []).append((number, version))
    return {symbol: sorted(found) for symbol, found in versions.items()}


def renames(archive: Path, libc: str) -> dict[str, str]:
    """Undefined symbol of the archive -> the same with an older version, where the newest is beyond the limit."""
    listing = subprocess.run(["nm", "--undefined-only", archive], check=True, capture_output=True, text=True).stdout
    wanted = set(re.findall(r" U (\w+)$", listing, re.MULTILINE))
    found = {name: versions for name, versions in libc_versions(libc).items() if name in wanted}
    return {
        name: f"{name}@{versions[0][1]}"
        for name, versions in found.items()
        if versions[-1][0] > LIMIT and versions[0][0] <= LIMIT
    }


def bind_to_old_glibc(archive: Path, target: Path) -> int:
    """Write `archive` with older versions to `target`; how many symbols were renamed."""
    libc = subprocess.run(["c++", "-print-file-name=libc.so.6"], check=True, capture_output=True, text=True).stdout
    table = renames(archive, libc.strip())
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".symbols") as lines:
        lines.write("".join(f"{old} {new}\n" for old, new in sorted(table.items())))
        lines.flush()
        subprocess.run(["objcopy", f"--redefine-syms={lines.name}", archive, target], check=True)
    return len(table)


if __name__ == "__main__":
    print(f"{bind_to_old_glibc(Path(sys.argv[1]), Path(sys.argv[2]))} symbols bound to older versions")
