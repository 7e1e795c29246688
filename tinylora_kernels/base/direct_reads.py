"""Modules that read a child's weight themselves instead of calling the child.

An update of a layer's output is applied where the layer is called. torch's MultiheadAttention hands out_proj.weight
to a function, its TransformerEncoderLayer does so with both linear layers when nobody trains, and Mamba's mixers with
dt_proj.weight: there the frozen weight is used as it is, and nothing would say so. Source code does.
"""
from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Iterable

from torch import nn

from .names import submodule

# self.<child>.weight as a value: not its dtype, shape or storage, not a type check, not an initialisation
READ = re.compile(
    r"self\.(\w+)\.weight\b(?!\s*(=[^=]|\.(dtype|device|shape|size|ndim|dim|numel|requires_grad|data|grad|is_\w+)\b))"
)
NO_USE = re.compile(r"\binit\w*\.|\binit_|isinstance\(|None")


@functools.cache
def weights_read_by(cls: type[nn.Module]) -> frozenset[str]:
    """Names of children whose weight a module class uses itself, as far as its source tells."""
    found = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        try:
            lines = [line.partition("#")[0] for line in inspect.getsource(base).splitlines()]
        except (OSError, TypeError):  # defined in a shell, or compiled
            continue
        found |= {match[1] for line in lines if not NO_USE.search(line) for match in READ.finditer(line)}
    return frozenset(found)


def read_directly(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The submodules among `names` whose weight the module around them reads: name -> class of that module."""
    found = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        cls: type = type(submodule(model, parent))
        if child in weights_read_by(cls):
            found[name] = cls.__name__
    return found


def warn_of_direct_reads(model: nn.Module, names: Iterable[str]) -> None:
    """Say which of the submodules to adapt may be bypassed, and what to do."""
    found = read_directly(model, names)
    if found:
        reads = sorted({f"{cls} reads self.{name.rpartition('.')[2]}.weight" for name, cls in found.items()})
        warnings.warn(
            f"{len(found)} of the modules to adapt may be bypassed: {', '.join(reads)} itself. Where it does, the "
            "frozen weight is used without the update, and v learns nothing there. Leave them out of target_modules; "
            "for torch's own transformer layers torch.backends.mha.set_fastpath_enabled(False) makes linear1 and "
            "linear2 safe",
            stacklevel=4,
        )
