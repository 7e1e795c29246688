"""Builds the native library with CMake and ninja; without a compiler the package installs all the same.

One shared object, tinylora_kernels/libtinylora.so, holds the CPU kernels and, on Linux, the ops on NVIDIA GPUs. It uses
torch's stable ABI and no Python ABI, so one build serves every Python and every torch from 2.10 on, and finds NVIDIA's
driver at run time, so that it serves every CUDA and none. What was built, or why nothing was, is kept in
tinylora_kernels/_build_record.json for `python -m tinylora_kernels`.

Environment:
    TINYLORA_BUILD_NATIVE=0         install the pure Python package; 1: no installation without the native library
    TINYLORA_BUILD_CUDA=0           leave the ops on NVIDIA GPUs out
    TINYLORA_CUDA_ARCHITECTURES     for which device code is compiled now, by NVRTC, e.g. "80-real;90-virtual" (default:
                                    none; it is compiled for the GPU at hand when it is first used, by torch's NVRTC)
    TINYLORA_CUDA_RANKS             and for which ranks, e.g. "1 2" (default: all that there are kernels for)
    TINYLORA_NVRTC                  the file of NVRTC, where it is not found (pip install nvidia-cuda-nvrtc-cu12)
    TINYLORA_BUILD_NODE=0           leave out the C++ autograd node, which serves one release of torch (a wheel for all)
    TINYLORA_TORCH_DIR              the installed torch package to build against (default: this environment's)
    TINYLORA_BUILD_DIR              keep the objects there, so that the next build compiles only what changed
    TINYLORA_DEVICE_CODE_DIR        keep the device code there (default: in TINYLORA_BUILD_DIR)
    TINYLORA_LOCAL_VERSION          "gpu" makes the version 0.1.0+gpu
    MAX_JOBS                        parallel compilations

Wheels for other machines are built, checked and named by release/wheels.py.
"""
import concurrent.futures
import hashlib
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
PACKAGE = "tinylora_kernels"
NODE = runpy.run_path(str(ROOT / PACKAGE / "linear/build.py"))  # without the package, which needs torch
NVRTC = runpy.run_path(str(ROOT / PACKAGE / "ops/native/nvrtc.py"))
ARCHIVE = runpy.run_path(str(ROOT / PACKAGE / "ops/native/cuda_archive.py"))
LIBRARY = "libtinylora.so"
RECORD = "_build_record.json"
OLDEST_TORCH = (2, 10)


class BuildFailure(Exception):
    """Why no native library can be built here, and the command that would change it."""

    def __init__(self, reason: str, fix: str):
        super().__init__(reason)
        self.reason, self.fix = reason, fix


def torch_directory() -> Path:
    """The installed torch package. pip's build isolation hides it from sys.path, so site-packages are searched too."""
    if chosen := os.environ.get("TINYLORA_TORCH_DIR"):
        candidates = [Path(chosen)]
    else:
        spec = importlib.util.find_spec("torch")
        candidates = [Path(spec.origin).parent] if spec and spec.origin else []
        roots = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
        roots.append(site.getusersitepackages())
        for environment in environments():
            roots += sorted(environment.glob("lib/python3*/site-packages"))
        candidates += [Path(root) / "torch" for root in roots]
    for directory in candidates:
        if (directory / "include/torch/csrc/stable/library.h").is_file():
            return directory
    raise BuildFailure(
        "no torch with the stable ABI headers (2.10 or newer) in this environment",
        f"install torch, version 2.10 or newer, then: {install_again()}",
    )


def install_again() -> str:
    """The command. uv has no pip in its environments, and installs again what it once built of an archive."""
    if "UV" in os.environ:
        return "uv pip install --no-cache --reinstall --no-deps ."
    return "pip install --no-build-isolation --force-reinstall --no-deps ."


def environments() -> list[Path]:
    """Where the package may be going: what uv was told, the active environment, what `uv pip install` takes where none
    is active, a .venv here or above; then those whose Pythons are on PATH.
    """
    named = [os.environ.get(name) for name in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "CONDA_PREFIX")]
    found = [*told_to_uv(Path(f"/proc/{os.getppid()}")), *(Path(name) for name in named if name)]
    here = [Path(os.environ.get("PWD") or "."), Path.cwd(), ROOT]
    found += [folder / ".venv" for start in here for folder in (start.absolute(), *start.absolute().parents)]
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if python := shutil.which("python", path=folder) or shutil.which("python3", path=folder):
            found.append(Path(python).parent.parent)
    return found


def told_to_uv(process: Path) -> list[Path]:
    """The environments of uv's command line and variables; a build is shown one of its own in place of them."""
    try:
        words = (process / "cmdline").read_text().split("\0")
        lines = (process / "environ").read_text().split("\0")
        folder = (process / "cwd").resolve()
    except (OSError, UnicodeError):
        return []
    variables = dict(line.partition("=")[::2] for line in lines)
    pairs = zip(words, words[1:], strict=False)
    pythons = [following for word, following in pairs if word in ("-p", "--python")]
    pythons += [word.partition("=")[2] for word in words if word.startswith("--python=")]
    pythons += [variables.get("UV_PYTHON", "")]
    named = [folder / python for python in pythons if "/" in python]  # others are versions
    environments = [python.parent.parent if python.is_file() else python for python in named]
    return environments + [folder / variables[name] for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if variables.get(name)]


def check_torch_version(directory: Path) -> str:
    """The version string of that torch; refuses one older than the ABI target."""
    header = (directory / "include/torch/headeronly/version.h").read_text()
    found = [re.search(rf"#define TORCH_VERSION_{part} (\d+)", header) for part in ("MAJOR", "MINOR", "PATCH")]
    version = tuple(int(match.group(1)) for match in found if match)
    text = ".".join(map(str, version))
    if version[:2] < OLDEST_TORCH:
        raise BuildFailure(f"torch {text} is older than 2.10", "pip install --upgrade 'torch>=2.10'")
    return text


def find_tool(name: str, fix: str) -> str:
    if path := shutil.which(name):
        return path
    raise BuildFailure(f"{name} is not on PATH", fix)


def find_compiler() -> list[str]:
    """The command: [launcher,] compiler, options."""
    try:
        if command := NODE["find_compiler"]():
            return command
    except NODE["CompileError"] as error:
        raise BuildFailure(str(error), f"set CXX to a C++ compiler, or unset it, then: {install_again()}") from None
    raise BuildFailure(
        "no C++ compiler found",
        "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), "
        f"then: {install_again()}",
    )


def compiler_settings(command: list[str]) -> dict[str, str]:
    """The same for CMake, which takes "ccache g++ -m64" apart."""
    launched = len(command) > 1 and not command[1].startswith("-")
    launcher, compiler, options = command[:launched], command[launched], command[launched + 1 :]
    settings = {"CMAKE_CXX_COMPILER": shutil.which(compiler) or compiler}
    if launcher:
        settings["CMAKE_CXX_COMPILER_LAUNCHER"] = launcher[0]
    if options:
        settings["CMAKE_CXX_FLAGS"] = shlex.join(options)
    return settings


def cuda_archive(architectures: str, kept: Path) -> bytes:
    """The device code to embed: its sources, and machine code or PTX for these architectures ("80-real;90", or none).

    Args:
        kept: a folder for what was compiled, so that the next build compiles only what changed.
    """
    source = NVRTC["one_source"](ROOT / "csrc/cuda")
    kept.mkdir(parents=True, exist_ok=True)
    if not architectures:
        return ARCHIVE["pack"](source, "", {})
    compiler, targets = NVRTC["find"](), NVRTC["targets"](architectures)

    def compiled(target, element: int, rank: int) -> bytes:
        options = NVRTC["defines"](element, rank)
        key = hashlib.sha256("\n".join([str(compiler), str(target), *options, source]).encode()).hexdigest()[:32]
        path = kept / f"{target}-{element}-{rank}-{key}"
        if not path.is_file():
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(compiler.compile(source, target, options))
            unfinished.replace(path)
        return path.read_bytes()

    ranks = [int(rank) for rank in os.environ.get("TINYLORA_CUDA_RANKS", "").split()] or NVRTC["RANKS"]
    modules = [(element, rank) for rank in ranks for element in range(len(NVRTC["ELEMENTS"]))]
    with concurrent.futures.ThreadPoolExecutor(jobs()) as pool:
        futures = {(str(target), module): pool.submit(compiled, target, *module)
                   for target in targets for module in modules}  # fmt: skip
        code = {str(target): {module: futures[str(target), module].result() for module in modules}
                for target in targets}  # fmt: skip
    return ARCHIVE["pack"](source, str(compiler), code)


def jobs() -> int:
    """How many compilers run at once."""
    return int(os.environ.get("MAX_JOBS") or min(os.cpu_count() or 1, 8))


def run_cmake(cmake: str, settings: dict[str, str], log: Path) -> Path:
    """Configure and build, in a fresh directory unless one is to be kept; the library's path, or CalledProcessError."""
    kept = os.environ.get("TINYLORA_BUILD_DIR")
    directory = Path(kept or tempfile.mkdtemp(prefix="tinylora-build-"))
    try:
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        configure = [cmake, "-S", str(ROOT), "-B", str(directory), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        for command in (configure + definitions, [cmake, "--build", str(directory), "--parallel", str(jobs())]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            with log.open("a") as stream:
                stream.write(done.stdout)
            if done.returncode:
                raise subprocess.CalledProcessError(done.returncode, command, done.stdout)
        shutil.copy2(directory / LIBRARY, log.with_name(LIBRARY))
        return log.with_name(LIBRARY)
    finally:
        if not kept:
            shutil.rmtree(directory, ignore_errors=True)


def first_error(output: str) -> str:
    """The line of a build log that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if re.search(r"\b(error|Error|FAILED)\b", line)]
    lines = [line for line in lines if not line.startswith("FAILED:")] or lines
    return lines[0][:300] if lines else (output.strip().splitlines() or ["no output"])[-1][:300]


def build_native(destination: Path) -> dict:
    """Build the library into `destination`; returns the build record and never raises for a build that cannot be."""
    record = {"library": False, "cuda": False, "reason": None, "fix": None, "cuda_reason": None, "device_code": ""}
    library = destination / LIBRARY
    library.unlink(missing_ok=True)
    retry = install_again()
    try:
        if os.environ.get("TINYLORA_BUILD_NATIVE", "1") == "0":
            raise BuildFailure("switched off by TINYLORA_BUILD_NATIVE=0", f"TINYLORA_BUILD_NATIVE=1 {retry}")
        if platform.system() not in ("Linux", "Darwin"):
            raise BuildFailure(f"{platform.system()} is not supported by the native build", "use Linux, WSL or macOS")
        torch = torch_directory()
        record["torch"] = check_torch_version(torch)
        cmake = find_tool("cmake", f"pip install cmake && {retry}")
        find_tool("ninja", f"pip install ninja && {retry}")
        compiler = find_compiler()
        settings = {"TINYLORA_TORCH_DIR": str(torch), **compiler_settings(compiler)}
        record["compiler"] = shlex.join(compiler)
        log = destination / "_build.log"
        log.unlink(missing_ok=True)
        if platform.system() != "Linux":
            record["cuda_reason"] = f"there is no NVIDIA driver for {platform.system()}"
        elif os.environ.get("TINYLORA_BUILD_CUDA", "1") == "0":
            record["cuda_reason"] = "switched off by TINYLORA_BUILD_CUDA=0"
        with tempfile.TemporaryDirectory(prefix="tinylora-cuda-") as scratch:
            if not record["cuda_reason"]:
                folders = (os.environ.get(f"TINYLORA_{name}_DIR") for name in ("DEVICE_CODE", "BUILD"))
                kept = Path(next(filter(None, folders), scratch)) / "cuda"
                settings["TINYLORA_CUDA_ARCHIVE"] = str(write_archive(record, kept))
            run_cmake(cmake, settings, log)
        record["library"] = True
        log.unlink()
        record["node_reason"] = build_node(torch, destination)
    except BuildFailure as failure:
        record |= {"reason": failure.reason, "fix": failure.fix}
    except subprocess.CalledProcessError as error:
        record |= {"reason": f"the build failed: {first_error(error.output)}", "fix": f"{retry} -v  # shows the log"}
        print(error.output, file=sys.stderr)
    if not record["library"] and os.environ.get("TINYLORA_BUILD_NATIVE") == "1":
        raise SystemExit(f"tinylora-kernels: no native library: {record['reason']}; to change that: {record['fix']}")
    if not record["library"]:
        announce([
            "no native library: " + record["reason"],
            "the package is installed and runs on its reference backend (plain PyTorch), only slower",
            "to change that: " + record["fix"],
        ])  # fmt: skip
    (destination / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


def write_archive(record: dict, kept: Path) -> Path:
    """A file with the device code to embed; of the sources alone where more was asked for and cannot be."""
    asked = os.environ.get("TINYLORA_CUDA_ARCHITECTURES", "")
    try:
        archive = cuda_archive(asked, kept)
        record["device_code"] = ARCHIVE["Archive"](archive).compiler
    except NVRTC["CompileError"] as error:
        record["cuda_reason"] = f"no device code for {asked}: {error}"
        announce([record["cuda_reason"], "it will be compiled when it is first used"])
        archive = cuda_archive("", kept)
    record["cuda"] = True
    path = kept / f"{hashlib.sha256(archive).hexdigest()[:16]}.archive"  # another name: CMake embeds it anew
    path.write_bytes(archive)
    return path


def build_node(torch: Path, destination: Path) -> str | None:
    """Compile the C++ autograd node; None, or why layers will run the one in Python instead."""
    if os.environ.get("TINYLORA_BUILD_NODE", "1") == "0":
        return "switched off by TINYLORA_BUILD_NODE=0"
    try:
        NODE["compile_for"](torch, destination)
        return None
    except NODE["CompileError"] as error:
        announce([f"no C++ autograd node: {error}", "layers run the one in Python"])
        return str(error)


def announce(lines: list[str]) -> None:
    """Straight to the terminal where there is one: pip swallows the output of a build that succeeds."""
    text = "".join(f"tinylora-kernels: {line}\n" for line in lines)
    print(text, file=sys.stderr, end="")
    if not sys.stderr.isatty():
        try:
            with open("/dev/tty", "w") as terminal:
                terminal.write(text)
        except OSError:
            pass


class BuildLibrary(build_ext):
    """build_ext that runs CMake once, into the source tree for an editable install, else into the build tree."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        destination = ROOT / PACKAGE if in_place else Path(self.build_lib) / PACKAGE
        destination.mkdir(parents=True, exist_ok=True)
        build_native(destination)

    def get_outputs(self) -> list[str]:
        built = Path(self.build_lib) / PACKAGE
        return [str(path) for pattern in (LIBRARY, "libtinylora_node-*.so", RECORD) for path in built.glob(pattern)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class LabelledMetadata(egg_info):
    """Adds TINYLORA_LOCAL_VERSION to the version."""

    def finalize_options(self) -> None:
        if label := os.environ.get("TINYLORA_LOCAL_VERSION"):
            self.tag_build = f"+{label}"
        super().finalize_options()


class PlatformWheel(bdist_wheel):
    """Tagged py3-none-<platform>: the library depends on the machine and on no Python version."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        _, _, machine = super().get_tag()
        return "py3", "none", machine


if __name__ == "__main__":  # how build frontends run this file; importing it gives its functions
    setup(
        ext_modules=[Extension(f"{PACKAGE}.libtinylora", sources=[])],
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel, "egg_info": LabelledMetadata},
    )
