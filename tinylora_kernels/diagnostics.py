"""What is installed and which backends run here: the report of `python -m tinylora_kernels`."""
from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import warnings

import torch

from ._version import __version__
from .common.finite import whole_number
from .common.words import one_line
from .linear import compiled, node
from .ops import dispatch
from .ops.native import cuda_driver
from .ops.native import library as native

PACKAGES = ("numpy", "safetensors", "triton", "transformers", "peft", "trl")  # used, where they are installed
DTYPES = (torch.float32, torch.bfloat16)  # the ones backends are asked about


def collect(rank: int = 2) -> dict:
    """Everything the report shows, as plain data.

    Args:
        rank: the frozen rank r that backends are asked about.
    """
    rank = whole_number("rank", rank)
    status = native.load()
    return {
        "package": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {cpu_name()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": {"torch": torch.version.cuda, "driver": cuda_driver.driver_version()},
        "packages": {name: version_of(name) for name in PACKAGES},
        "native": {
            "path": str(status.path),
            "error": status.error,
            "cpu_isa": status.isa,
            "cuda_code": status.has_cuda and (status.build["cuda"] or "compiled for the GPU when it is first used"),
            "compiler": status.build.get("compiler"),
            "node_error": f"{node.why_no_twin}; {compiled.outlook()}" if node.why_no_twin else None,
            "build_record": status.record,
        },
        "requested": dispatch.requested_backend(),
        "backends": {device: backends(device, rank) for device in ("cpu", "cuda")},
        "chosen": {device: chosen(device, rank) for device in ("cpu", "cuda")},
    }


def backends(device_type: str, rank: int) -> dict[str, str | None]:
    """For each backend: None if it serves float32 and bfloat16 tensors on this device, else why not."""
    reasons: dict[str, str | None] = {}
    for dtype in DTYPES:
        for name, reason in dispatch.table(device_type, dtype, rank):
            reasons[name] = reasons.get(name) or reason
    if device_type == "cuda" and not torch.cuda.is_available():
        missing = "this torch was built without CUDA" if torch.version.cuda is None else "no GPU is visible"
        reasons = {name: reason or missing for name, reason in reasons.items()}
    return reasons


def chosen(device_type: str, rank: int) -> dict[str, str | None]:
    """The backend that a call on this device would take, "float32 or bfloat16 one" where they differ, or its refusal.

    Both are None for the GPU where there is none.
    """
    if device_type == "cuda" and not torch.cuda.is_available():
        return {"backend": None, "refusal": None}
    # past the cache: a backend that is passed over is told of once, and that is for the call itself
    choose = dispatch._choose.__wrapped__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            names = dict.fromkeys(choose(device_type, dtype, rank, dispatch.requested_backend()) for dtype in DTYPES)
        except (RuntimeError, ValueError) as error:
            return {"backend": None, "refusal": one_line(error)}
    return {"backend": " or ".join(names), "refusal": None}


def version_of(package: str) -> str | None:
    """The installed version, None without one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The CPU's model name where the system tells."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"


def report(facts: dict) -> str:
    """The facts of `collect` as text."""
    library = facts["native"]
    state = f"not in use: {library['error']}" if library["error"] else f"loaded from {library['path']}"
    cuda = library["cuda_code"] or "none"
    if not library["cuda_code"] and (reason := library["build_record"].get("cuda_reason")):
        cuda += f" ({reason})"
    node = f"Python: the one in C++ is {library['node_error']}" if library["node_error"] else "C++"
    driver = "{}.{}".format(*facts["cuda"]["driver"]) if facts["cuda"]["driver"] else "none"
    packages = ", ".join(f"{name} {version or 'none'}" for name, version in facts["packages"].items())
    lines = [
        f"tinylora_kernels {facts['package']}   python {facts['python']}   torch {facts['torch']}",
        f"machine          {facts['machine']}",
        f"gpu              {facts['gpu'] or 'none'}",
        f"CUDA             torch's {facts['cuda']['torch'] or 'none'}, the driver's {driver}",
        f"packages         {packages}",
        f"native library   {state}",
    ]
    if not library["error"]:
        lines += [
            f"  CPU kernels    {library['cpu_isa']}",
            f"  CUDA kernels   {cuda}",
            f"  compiler       {library['compiler']}",
            f"  linear layers  one node of autograd in {node}",
        ]
    lines.append(f"backend asked    {facts['requested'] or 'none: the first available is taken'}")
    for device, table in facts["backends"].items():
        lines.append(f"backends for {device} tensors")
        taken, refusal = facts["chosen"][device]["backend"] or "", facts["chosen"][device]["refusal"]
        for name, reason in table.items():
            mark = "*" if name in taken.split(" or ") else " "
            lines.append(f" {mark} {name:<14} {'available' if reason is None else f'no: {reason}'}")
        if refusal:
            lines.append(f" ! every call is refused: {refusal}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """`info [--json] [--rank R]`"""
    parser = argparse.ArgumentParser(prog="python -m tinylora_kernels info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.add_argument("--rank", type=int, default=2, help="frozen rank that backends are asked about (default 2)")
    options = parser.parse_args(argv)
    try:
        facts = collect(whole_number("--rank", options.rank))
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(facts, indent=1) if options.json else report(facts))
    return 0
