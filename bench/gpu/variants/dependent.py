"""Programmatic dependent launch, of Hopper and newer: blocks of a kernel start while the one before it still runs.

A kernel that is launched so may do what does not depend on the one before, and then waits for its end (`gdc_wait`).
The one before says from when on it may start (`gdc_launch_dependents`). Whoever launches plainly waits for all.
"""
from __future__ import annotations

import dataclasses


def why_not() -> str | None:
    """None where this Triton can launch so, else what it lacks."""
    try:
        import triton
        import triton.language as tl
        from triton.backends.nvidia.compiler import CUDAOptions
    except ImportError as error:
        return f"no Triton for NVIDIA ({error})"
    lacks = [name for name in ("gdc_wait", "gdc_launch_dependents") if not hasattr(tl.extra.cuda, name)]
    lacks += ["launch_pdl"] * ("launch_pdl" not in {field.name for field in dataclasses.fields(CUDAOptions)})
    return f"Triton {triton.__version__} has no {', '.join(lacks)}" if lacks else None


def option(asked: bool) -> dict[str, bool]:
    """What a launch is given."""
    return {"launch_pdl": True} if asked else {}
