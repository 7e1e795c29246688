"""PTX text -> Kernel: instructions, labels, parameters, shared variables. No semantics here.

The text is what nvcc -ptx or Triton wrote, unchanged. Comments, debug sections and directives that carry no meaning for
execution are dropped; .loc is kept, so that a finding can name the line of the CUDA or Python source.
"""
from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import LocalMemory, SimulationError

BITS = {
    "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32, "s32": 32,
    "f32": 32, "f16x2": 32, "bf16x2": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64, "f32x2": 64, "pred": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@!%p1 ld.global.v4.b32 {%r1, ...}, [%rd1+16];`."""

    name: str  # "ld"
    modifiers: tuple[str, ...]  # ("global", "v4", "b32")
    operands: tuple[str, ...]  # ("{%r1, %r2, %r3, %r4}", "[%rd1+16]")
    guard: str | None
    negated: bool
    where: str  # "line 127 (update.cuh:57)"

    @property
    def opcode(self) -> str:
        return ".".join((self.name, *self.modifiers))

    @functools.cached_property
    def types(self) -> tuple[str, ...]:
        return tuple(m for m in self.modifiers if m in BITS)


@dataclass
class Kernel:
    """One .entry with everything it names."""

    name: str
    parameters: dict[str, int] = field(default_factory=dict)  # name -> bytes, in order
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name -> index into code
    registers: dict[str, str] = field(default_factory=dict)  # "%r" (a numbered family) or a whole name -> type
    shared: dict[str, int] = field(default_factory=dict)  # name -> offset
    static_shared: int = 0  # bytes
    constants: dict[str, bytes] = field(default_factory=dict)  # initialised module variables
    threads: int | None = None  # .reqntid or .maxntid, flattened

    @functools.cached_property
    def narrowest(self) -> dict[str, int]:
        """Bytes of the narrowest access to "global" and "shared" memory: how fine their shadows must be."""
        sizes = {"global": [4], "shared": [4]}
        for i in self.code:
            space = next((m.split("::")[0] for m in i.modifiers if m.startswith(("global", "shared", "param"))), "")
            if i.name in ("ld", "st", "atom", "red"):
                for touched in (space,) if space else sizes:  # a generic address may be either
                    sizes.get(touched, []).append(BITS[i.types[-1]] // 8)
        return {space: min(found) for space, found in sizes.items()}

    def register_type(self, name: str) -> str | None:
        return self.registers.get(name) or self.registers.get(name.rstrip("0123456789"))


def split_operands(text: str) -> tuple[str, ...]:
    """'{%r1, %r2}, [%rd1+4]' -> ('{%r1, %r2}', '[%rd1+4]')."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return (*parts, last) if last else tuple(parts)


class _Module(NamedTuple):
    """What the kernels of one PTX text share."""

    text: str  # without comments and debug directives; line numbers are those of the PTX
    sources: dict[int, str]  # line -> "file:line"
    variables: list[str]  # declarations outside functions


@functools.lru_cache(maxsize=4)
def _module(ptx: str) -> _Module:
    text = "\n".join(_strip(ptx))
    return _Module(text, _source_lines(ptx), list(_module_statements(text)))


def parse(ptx: str, entry: str | None = None) -> Kernel:
    """The kernel of that name (or whose mangled name contains it); the only one where entry is None."""
    text, sources, variables = _module(ptx)
    entries = [m for m in re.finditer(r"\.entry\s+([\w$]+)", text) if entry is None or entry in m[1]]
    exact = [m for m in entries if m[1] == entry]
    if len(exact or entries) != 1:
        raise SimulationError(f"entry {entry!r}: expected one kernel, found {[m[1] for m in entries]}")
    match = (exact or entries)[0]
    kernel = Kernel(match[1])
    body_start = text.index("{", match.end())
    header = text[match.end() : body_start]
    body_end = _closing_brace(text, body_start)

    for name, size in _parameters(header):
        kernel.parameters[name] = size
    threads = re.search(r"\.(?:reqntid|maxntid)\s+([\d,\s]+)", header)
    if threads:
        kernel.threads = 1
        for extent in threads[1].split(","):
            kernel.threads *= int(extent)
    for statement in variables:
        _declare(kernel, statement)
    first_line = text.count("\n", 0, body_start) + 1
    for line, statement in _statements(_own_names(text[body_start + 1 : body_end]), first_line):
        _add_statement(kernel, statement, f"line {line}" + (f" ({sources[line]})" if line in sources else ""))
    return kernel


def _strip(ptx: str) -> list[str]:
    """Lines without comments and debug directives; line numbers are kept."""
    ptx = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), ptx, flags=re.S)
    ptx = re.sub(r"//[^\n]*", "", ptx)
    ptx = re.sub(r"\.section\s+\S+\s*\{.*?\}", lambda m: "\n" * m[0].count("\n"), ptx, flags=re.S)
    debug = re.compile(r"\s*\.(loc|file|version|target|address_size)\b")
    return ["" if debug.match(line) else line for line in ptx.split("\n")]


_LOC = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)(?:.*inlined_at\s+(\d+)\s+(\d+))?")


def _source_lines(ptx: str) -> dict[int, str]:
    """PTX line number -> 'file:line', from .file and .loc, with the caller's line where a function was inlined."""
    files = {m[1]: m[2].rsplit("/", 1)[-1] for m in re.finditer(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx, re.M)}
    for m in re.finditer(r'^\s*\.file\s+(\d+)\s+"[^"]*"\s+"([^"]+)"', ptx, re.M):
        files[m[1]] = m[2]
    sources, current = {}, None
    for number, line in enumerate(ptx.split("\n"), 1):
        loc = ".loc" in line and _LOC.match(line)
        if loc and loc[2] != "0":
            current = f"{files.get(loc[1], '?')}:{loc[2]}"
            if loc[3]:
                current += f", inlined at {files.get(loc[3], '?')}:{loc[4]}"
        elif current:
            sources[number] = current
    return sources


def _closing_brace(text: str, start: int) -> int:
    depth = 0
    for brace in re.compile("[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise SimulationError("unbalanced braces")


def _parameters(header: str) -> Iterator[tuple[str, int]]:
    inner = re.search(r"\((.*)\)", header, re.S)
    for declaration in split_operands(inner[1]) if inner else ():
        kind = re.search(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", declaration)[1]
        name, count = re.search(r"([\w$]+)(?:\[(\d+)\])?$", declaration).groups()
        yield name, BITS[kind] // 8 * int(count or 1)


def _module_statements(text: str) -> Iterator[str]:
    """Declarations outside functions."""
    at = 0
    for match in re.finditer(r"\.(?:entry|func)\b", text):
        if match.start() < at:
            continue
        yield from (s.strip() for s in text[at : match.start()].split(";") if s.strip())
        brace, semicolon = text.find("{", match.end()), text.find(";", match.end())
        declared_only = brace < 0 or 0 <= semicolon < brace
        at = semicolon + 1 if declared_only else _closing_brace(text, brace) + 1
    yield from (s.strip() for s in text[at:].split(";") if s.strip())


def _own_names(body: str) -> str:
    """Registers that braces declare, under names of their own: outside they may be another's (bar.red of nvcc)."""
    scopes = itertools.count()

    def rename(match: re.Match) -> str:
        scope, number = match[0], next(scopes)
        for names in re.findall(r"\.reg\s+\.\w+\s+([^;<]+);", scope):
            for name in names.split(","):
                scope = re.sub(rf"{re.escape(name.strip())}\b", f"{name.strip()}_of_{number}", scope)
        return scope

    return re.sub(r"\{[^{}]*\.reg\b[^{}]*\}", rename, body)


def _statements(body: str, line: int) -> Iterator[tuple[int, str]]:
    """(line, statement) pairs; labels keep their colon. Braces that open a scope are dropped: names do not clash."""
    start = counted = 0  # of the statement; up to where `line` has counted
    for mark in re.finditer("[;:{}]", body):
        text = body[start : mark.start()]
        statement = text.strip()
        if mark[0] in "{}" and not statement:
            start = mark.end()
        elif mark[0] == ";" or mark[0] == ":" and re.fullmatch(r"\s*[\w$]+", text):
            first = start + len(text) - len(text.lstrip())
            line += body.count("\n", counted, first)
            counted, start = first, mark.end()
            yield line, statement + (":" if mark[0] == ":" else "")


_VARIABLE = re.compile(
    r"\.(shared|global|const|local)\s+(?:\.attribute\S+\s+)?(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(\[\d*\])?"
    r"(?:\s*=\s*\{?(.*?)\}?$)?", re.S
)  # fmt: skip


def _declare(kernel: Kernel, statement: str) -> None:
    """A variable declaration, in the module or in the body."""
    match = _VARIABLE.search(statement)
    if not match:
        return
    space, align, kind, name, extent, values = match.groups()
    if space == "local":
        raise LocalMemory(f"{kernel.name} keeps {name}{extent or ''} in local memory")
    size = BITS[kind] // 8 * (1 if extent is None else int(extent[1:-1] or 0))
    if space == "shared" and name not in kernel.shared:
        alignment = int(align or BITS[kind] // 8)
        kernel.static_shared = -(-kernel.static_shared // alignment) * alignment
        kernel.shared[name] = kernel.static_shared
        kernel.static_shared += size
    elif space != "shared":
        numbers = (int(x, 0) % (1 << BITS[kind]) for x in (values or "").split(",") if x.strip())
        data = b"".join(number.to_bytes(BITS[kind] // 8, "little") for number in numbers)
        kernel.constants[name] = data.ljust(size, b"\0")


_INSTRUCTION = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z]\w*)([\w.:]*)\s*(.*)$", re.S)


def _add_statement(kernel: Kernel, statement: str, where: str) -> None:
    if statement.endswith(":"):
        kernel.labels[statement[:-1]] = len(kernel.code)
    elif statement.startswith(".reg"):
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
        for name in names.split(","):
            kernel.registers[name.strip().split("<")[0]] = kind
    elif statement.startswith("."):
        _declare(kernel, statement)
    else:
        negated, guard, name, modifiers, operands = _INSTRUCTION.match(statement).groups()
        kernel.code.append(
            Instruction(
                name, tuple(re.split(r"\.", modifiers)[1:]), split_operands(" ".join(operands.split())),
                guard, bool(negated), where,
            )
        )  # fmt: skip
