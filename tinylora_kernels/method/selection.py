"""Which modules a config names: by names, by regular expressions, by the numbers of their layers. As in PEFT.

A list holds names: a module's full name, its last component ("q_proj") or a dotted suffix ("self_attn.q_proj"). A
string may be one such name, or a regular expression that the whole name has to match: r".*layers\\.[0-3]\\..*_proj".
"""
from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet

ALL_LINEAR = "all-linear"
_A_NAME = re.compile(r"[\w.-]+")

Wanted = Sequence[str] | str  # names, or an expression
Numbers = Sequence[int] | int


def names_match(name: str, pattern: str) -> bool:
    """Whether a qualified name is the pattern or ends with it, at a dot."""
    return name == pattern or name.endswith("." + pattern)


def is_expression(wanted: object) -> bool:
    """Whether it is read as a regular expression: a string with more in it than a name may have."""
    return isinstance(wanted, str) and _A_NAME.fullmatch(wanted) is None


def entries(wanted: Wanted) -> list[str]:
    """What was asked for, one by one."""
    return [wanted] if isinstance(wanted, str) else list(wanted)


def matched_by(asked: str | AbstractSet[str], names: Iterable[str]) -> set[str]:
    """What matches a module which goes by these names: of a set of names those that do, or the expression."""
    if isinstance(asked, str):
        return {asked} if any(re.fullmatch(asked, name) for name in names) else set()
    return {suffix for name in names for suffix in suffixes(name) if suffix in asked}


def suffixes(name: str) -> Iterator[str]:
    """All that names_match takes for the name: "a.b.c", "b.c" and "c"."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


def layer_number(name: str, patterns: Wanted | None = None) -> int | None:
    """The 3 of "model.layers.3.self_attn.q_proj": the first number in a name, or the first after a pattern.

    Args:
        patterns: names of the lists of layers, regular expressions for a component: "layers", ["encoder.block", "h"];
            of several the first that is there.
    """
    before = [rf"(?:{pattern})\." for pattern in entries(patterns)] if patterns else [""]
    every = (re.search(rf"(?:^|\.){each}(\d+)(?=\.|$)", name) for each in before)
    return next((int(found[1]) for found in every if found), None)


def checked_names(field: str, wanted: object) -> Wanted | None:
    """None, a name, an expression, or a list of names; ValueError names the field."""
    if wanted is None:
        return None
    what = "a list of module names, a name or a regular expression"
    if isinstance(wanted, str) and wanted:
        if is_expression(wanted):
            checked_expression(field, wanted)
        return wanted
    if not isinstance(wanted, (Sequence, AbstractSet)) or isinstance(wanted, (str, bytes)):
        raise ValueError(f"{field}: expected {what}, found {wanted!r}")
    names = sorted(wanted, key=str) if isinstance(wanted, AbstractSet) else list(wanted)  # a set has no order
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{field}: expected {what}, found {wanted!r}")
    return names


def checked_expression(field: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{field}: {expression!r} is no name and no regular expression: {error}") from None


def checked_numbers(field: str, numbers: object) -> Numbers | None:
    """None, a layer's number, or several: a list, a range; ValueError names the field."""
    if numbers is None or (type(numbers) is int and numbers >= 0):
        return numbers
    if isinstance(numbers, (Sequence, AbstractSet)) and not isinstance(numbers, (str, bytes)):
        listed = sorted(numbers, key=str) if isinstance(numbers, AbstractSet) else list(numbers)
        if listed and all(type(number) is int and number >= 0 for number in listed):
            return listed
    raise ValueError(f"{field}: expected layer numbers >= 0, one, a list or a range, found {numbers!r}")


def asked_numbers(numbers: Numbers) -> Collection[int]:
    """The numbers as a collection."""
    return (numbers,) if isinstance(numbers, int) else numbers
