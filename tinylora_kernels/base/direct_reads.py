"""Modules that read a child's weight themselves instead of calling the child.

An update of a layer's output is applied where the layer is called. torch's MultiheadAttention hands out_proj.weight
to a function, its TransformerEncoderLayer does so with both linear layers when nobody trains, and Mamba's mixers with
dt_proj.weight: there the frozen weight is used as it is, and nothing would say so. Source code does.
"""
from __future__ import annotations

import fnmatch
import functools
import inspect
import re
import warnings
from collections.abc import Iterable

from torch import nn

from .names import named_modules

# self.<child>.weight as a value: not its dtype, shape or storage, not whether there is one, not an initialisation; a
# child may be a list's (self.heads[0]) or stand further down (self.model.embed_tokens)
READ = re.compile(
    r"self\.(\w+(?:\[\w+\]|\.\w+)*?)\.weight\b"
    r"(?!\s*(=[^=]|is\b|\.(dtype|device|shape|size|ndim|dim|numel|requires_grad|data|grad|is_\w+)\b))"
)
NO_USE = re.compile(r"\binit\w*\.|\binit_|isinstance\(|\.weight\s*=\s*self\b")  # the last ties one to another


@functools.cache
def weights_read_by(cls: type[nn.Module]) -> frozenset[str]:
    """Modules below one of this class whose weight it uses itself, as far as its source tells: paths as it has them."""
    found = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        try:
            lines = [line.partition("#")[0] for line in inspect.getsource(base).splitlines()]
        except (OSError, TypeError):  # defined in a shell, or compiled
            continue
        found |= {match[1] for line in lines if not NO_USE.search(line) for match in READ.finditer(line)}
    return frozenset(found)


def read_directly(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The submodules among `names` whose weight a module above them reads: name -> "Class reads self.path.weight"."""
    known: list[str] = list(names)
    found: dict[str, str] = {}
    for owner, module in named_modules(model):
        if not any(name.startswith(f"{owner}.".lstrip(".")) for name in known):
            continue
        cls: type = type(module)
        for path in weights_read_by(cls):
            # of a list's children one, or any of them
            below = re.sub(r"\[(\w+)\]", lambda index: f".{index[1]}" if index[1].isdigit() else ".*", path)
            for name in fnmatch.filter(known, f"{owner}.{below}".lstrip(".")):
                found[name] = f"{cls.__name__} reads self.{path}.weight"
    return found


def warn_of_direct_reads(model: nn.Module, names: Iterable[str]) -> None:
    """Say which of the submodules to adapt may be bypassed, and what to do."""
    found = read_directly(model, names)
    if found:
        reads = ", ".join(sorted(set(found.values())))
        warnings.warn(
            f"{len(found)} of the modules to adapt may be bypassed: {reads} itself. Where it does, the "
            "frozen weight is used without the update, and v learns nothing there. Leave them out of target_modules; "
            "for torch's own transformer layers torch.backends.mha.set_fastpath_enabled(False) makes linear1 and "
            "linear2 safe",
            stacklevel=4,
        )
