"""Numbers that no arithmetic can use are refused where they come in: NaN, infinity, and what a dtype makes infinite."""
from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from .words import dtype_name


def as_finite(what: str, numbers: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers in a dtype, default their own, all of them real and finite there.

    Raises:
        ValueError: one is not; the message begins with `what`.
    """
    if numbers.is_complex():
        raise ValueError(f"{what}: expected real numbers, found {dtype_name(numbers.dtype)}")
    stored = numbers if dtype is None else numbers.to(dtype)
    finite = torch.isfinite(stored)
    if not bool(finite.all()):
        found = numbers[~finite].flatten()[0].item()
        raise ValueError(f"{what}: expected finite numbers in {dtype_name(stored.dtype)}, found {found:g}")
    return stored


def whole_number(name: str, value: object, at_least: int = 1) -> int:
    """An integer of at least so much, as an int; no boolean, and no float that merely could be one.

    Raises:
        ValueError: it is not; the message names it.
    """
    try:
        number = at_least - 1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = at_least - 1
    if number < at_least:
        raise ValueError(f"{name}: expected an integer >= {at_least}, found {repr(value)[:60]}")
    return number


def positive_number(name: str, value: object, below: float = math.inf) -> float:
    """A real number in (0, below), as a float; infinity is one where nothing is said.

    Raises:
        ValueError: it is not; the message names it.
    """
    if below == math.inf and isinstance(value, float) and value == math.inf:
        return value
    number = finite_number(name, value, below=below)
    if number <= 0:
        raise ValueError(f"{name}: expected a positive number, found {value!r}")
    return number


def finite_number(name: str, value: object, at_least: float = -math.inf, below: float = math.inf) -> float:
    """A real number in [at_least, below), as a float.

    Raises:
        ValueError: it is not; the message names it.
    """
    if isinstance(value, float):
        number = value
    else:
        try:
            number = math.nan if isinstance(value, (bool, str, bytes, complex)) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor
            number = math.nan
    if not (at_least <= number < below and math.isfinite(number)):
        limits = "" if at_least == -math.inf else f" of at least {at_least:g}"
        limits += "" if below == math.inf else f", below {below:g}"
        too_long = isinstance(value, int) and value.bit_length() > 200
        found = "an integer of absurd length" if too_long else repr(value)[:60]
        raise ValueError(f"{name}: expected a finite number{limits}, found {found}")
    return number
