"""Empty stand-ins for the CUDA libraries that a CUDA build of torch wants, for machines that only test its CPU side.

    python release/standins.py SITE_PACKAGES/torch/lib FOLDER

A registry may hold torch for every Python, but as CUDA builds alone, which ask for gigabytes of NVIDIA's libraries to
be imported at all. What they ask for is names: here is a library of each missing name, and a function of each missing
name, which answers 100 ("no CUDA device"). With FOLDER in LD_LIBRARY_PATH such a torch is imported and computes on the
CPU. Nothing that needs a GPU works in it.

And stand-ins for torch itself, of another machine, to link against: what a library takes from it is names too.
"""
from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import audit

NO_DEVICE = 100


def load(name: str) -> ctypes.CDLL | None:
    """A library of this machine, None where it has none of that name."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def missing_functions(libraries: dict[str, audit.Library], system: list[ctypes.CDLL]) -> set[str]:
    """Symbols that these libraries use, and that neither they, nor the system, nor Python define."""
    symbols = [symbol for library in libraries.values() for symbol in library.symbols]
    used = {symbol.name for symbol in symbols if symbol.undefined and not symbol.weak}
    used -= {symbol.name for symbol in symbols if not symbol.undefined}
    used = {name for name in used if not name.startswith(("Py", "_Py"))}
    return {name for name in used if not any(hasattr(library, name) for library in system)}


def make(torch_lib: Path, folder: Path) -> list[str]:
    """Write the stand-ins into `folder`; the names of the libraries that were missing."""
    libraries = {path.name: audit.Library(path) for path in torch_lib.glob("*.so*") if path.is_file()}
    needed = {name for library in libraries.values() for name in library.needed} - libraries.keys()
    found = {name: load(name) for name in sorted(needed)}
    missing = [name for name, library in found.items() if library is None]
    functions = missing_functions(libraries, [library for library in found.values() if library])
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "standins.c"
    # In a library of their own: the loader refuses a symbol without a version in the very library a version names.
    source.write_text("".join(f"long {name}(void) {{ return {NO_DEVICE}; }}\n" for name in sorted(functions)))
    standins = folder / "libtinylora_standins.so"
    compile_shared = ["cc", "-w", "-shared", "-fPIC", "-fno-builtin", f"-L{folder}", "-Wl,--no-as-needed"]
    subprocess.run([*compile_shared, source, "-o", standins, f"-Wl,-soname,{standins.name}"], check=True)
    empty = folder / "empty.c"
    empty.write_text("")
    for name in missing:
        link = [f"-Wl,-soname,{name}", "-ltinylora_standins", "-Wl,-rpath,$ORIGIN"]
        subprocess.run([*compile_shared, empty, "-o", folder / name, *link], check=True)
    return missing


def torch_of_another_machine(torch: Path, compiler: str, folder: Path) -> Path:
    """`folder` as a torch package for `compiler`: the headers of `torch`, and libraries of its stable shims, empty."""
    symbols = [symbol for path in torch.glob("lib/lib*.so") for symbol in audit.Library(path).symbols]
    shims = {symbol.name for symbol in symbols if not symbol.undefined and audit.STABLE_SHIM.fullmatch(symbol.name)}
    (folder / "lib").mkdir(parents=True, exist_ok=True)
    (folder / "include").unlink(missing_ok=True)
    (folder / "include").symlink_to(torch / "include")
    for name, functions in {"torch": [], "torch_cpu": sorted(shims), "c10": []}.items():
        source = folder / f"{name}.c"
        source.write_text("".join(f"void {function}(void) {{}}\n" for function in functions))
        command = [compiler, "-w", "-shared", "-fPIC", "-x", "c", source, "-o", folder / f"lib/lib{name}.so"]
        subprocess.run([*command, f"-Wl,-soname,lib{name}.so"], check=True)
    return folder


if __name__ == "__main__":
    print("\n".join(make(Path(sys.argv[1]), Path(sys.argv[2]))))
