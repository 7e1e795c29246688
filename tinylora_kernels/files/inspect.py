"""What an adapter file holds, as a table for the terminal."""
from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

from ..common.words import dtype_name
from ..method.tying import module_kind
from .format import AdaptedModule, AdapterError, AdapterFile, encode_config, read


def inspect_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """Read and check a file without any model; ``format_adapter`` prints the result.

    Raises:
        AdapterError: it is not an intact adapter file.
        OSError: it cannot be read.
    """
    return read(path)


def format_adapter(adapter: AdapterFile, every_module: bool = False, width: int = 100) -> str:
    """A table of at most ``width`` columns: one line per kind of module, or per module."""
    v = adapter.v.double()
    config = ", ".join(f"{key}={value!r}" for key, value in encode_config(adapter.config).items())
    lines = [
        f"{type(adapter.config).__name__.removesuffix('Config')} adapter, {adapter.size:,} bytes",
        f"trained  {v.numel()} numbers = {v.shape[0]} groups x {v.shape[1]}, "
        f"{dtype_name(adapter.v.dtype)}, {adapter.v.nbytes} bytes",
        f"v        norm {float(v.norm()):.4g}, largest {float(v.abs().max()):.4g}",
        *textwrap.wrap(f"config   {config}", width, subsequent_indent=" " * 9),
        "",
    ]
    if every_module:
        head = ("module", "shape", "group", "weight", "basis")
        rows = [
            (m.name, _shape(m), str(m.group), m.fingerprint[:8], "stored" if m.basis is not None else "from the weight")
            for m in adapter.modules
        ]
    else:
        head = ("kind of module", "modules", "shape", "groups", "bases stored")
        kinds: dict[tuple[str, str], list[AdaptedModule]] = {}
        for module in adapter.modules:
            kinds.setdefault((module_kind(module.name), _shape(module)), []).append(module)
        rows = [
            (kind, str(len(ms)), shape, _span([m.group for m in ms]), str(sum(m.basis is not None for m in ms)))
            for (kind, shape), ms in kinds.items()
        ]
    columns = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    # The name gives way first: the other columns are what one compares.
    columns[0] = max(8, min(columns[0], width - sum(columns[1:]) - 2 * (len(columns) - 1)))
    for row in (head, *rows):
        name = row[0] if len(row[0]) <= columns[0] else "..." + row[0][3 - columns[0] :]
        cells = [name.ljust(columns[0]), *(cell.rjust(n) for cell, n in zip(row[1:], columns[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(line if len(line) <= width else line[: width - 3] + "..." for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m tinylora_kernels inspect FILE``: print the table, or one line on stderr and status 1."""
    parser = argparse.ArgumentParser(prog="python -m tinylora_kernels inspect", description="Show an adapter file.")
    parser.add_argument("file")
    parser.add_argument("--all", action="store_true", help="a line for each module instead of each kind")
    arguments = parser.parse_args(argv)
    try:
        adapter = inspect_adapter(arguments.file)
    except (AdapterError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(format_adapter(adapter, arguments.all, shutil.get_terminal_size((100, 24)).columns))
    return 0


def _shape(module: AdaptedModule) -> str:
    return "x".join(map(str, module.shape))


def _span(groups: list[int]) -> str:
    low, high = min(groups), max(groups)
    return str(low) if low == high else f"{low}..{high}"
