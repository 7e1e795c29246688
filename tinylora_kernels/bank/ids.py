"""What a caller may name adapters by: names, None, and integers in any form; nothing that merely could be one."""
from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

BARE = -1  # the id of a row that runs the frozen base alone
LARGEST = 2**63 - 1


def check_name(name: Hashable) -> None:
    """A name is hashable and no number: integers are ids, and what equals one would be taken for another."""
    if name is None or not _is_name(name):
        raise ValueError(f"adapter name: expected a name, found {name!r}; integers are ids, None is the bare base")


def ids_of(adapters: Any, slot: Callable[[Hashable], int]) -> Tensor:
    """Ids int64 on the CPU, in the shape of what names them: a list, lists of one length, a tensor or an array.

    Args:
        slot: name -> id.

    Raises:
        ValueError: it is none of these, or holds something else than names, None and integers.
        IndexError: it is empty, or an integer that no id can be.
    """
    if isinstance(adapters, str):
        adapters = [adapters]
    if _is_array(adapters):
        adapters = _of_array(adapters)
    if isinstance(adapters, Tensor):
        ids = _of_tensor(adapters)
    elif isinstance(adapters, (list, tuple, range)):
        ids = torch.tensor(_of_list(list(adapters), slot), dtype=torch.int64, device="cpu")
    else:
        raise ValueError(f"adapters: expected a list of names and ids, or integers, found {_described(adapters)}")
    if ids.dim() == 0 or not ids.numel():
        raise IndexError(f"adapters: expected at least one entry in one dimension or more, found {tuple(ids.shape)}")
    return ids


def _of_tensor(ids: Tensor) -> Tensor:
    if ids.dtype not in _INTEGERS or ids.layout is not torch.strided or ids.is_meta:
        raise ValueError(f"adapters: expected a tensor of integers, found {_described(ids)}")
    ids = ids.detach().cpu()
    signed = ids.long()
    if ids.dtype is torch.uint64 and bool((signed < 0).any()):
        raise IndexError(f"adapter id {int(signed[signed < 0][0]) + 2**64}: no bank is that large")
    return signed


def _of_list(entries: list[Any], slot: Callable[[Hashable], int]) -> list[Any]:
    if any(isinstance(entry, list) for entry in entries):
        if len({len(entry) if isinstance(entry, list) else -1 for entry in entries}) > 1:
            raise ValueError("adapters: expected lists of one length, found some that are longer or no lists")
        return [_of_list(entry, slot) for entry in entries]
    return [_id_of(entry, slot) for entry in entries]


def _id_of(entry: Any, slot: Callable[[Hashable], int]) -> int:
    if entry is None:
        return BARE
    if _is_name(entry):
        return slot(entry)
    integer = entry.dtype in _INTEGERS if isinstance(entry, Tensor) else type(entry).__name__ not in ("bool", "bool_")
    try:
        number = operator.index(entry) if integer else None
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"adapters: expected names, None and integers, found {_described(entry)}")
    if not -LARGEST <= number <= LARGEST:
        raise IndexError(f"adapter id {str(number)[:40]}: no bank is that large")
    return number


_INTEGERS = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def _is_name(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    if isinstance(value, str):  # NumPy's is an array too
        return True
    return not (isinstance(value, (numbers.Number, Tensor)) or _is_array(value))


def _is_array(value: object) -> bool:
    """Of NumPy, or of a library that gives its arrays over to it."""
    return hasattr(value, "__array__") and not isinstance(value, (Tensor, numbers.Number))


def _of_array(array: Any) -> Tensor | list[Any]:
    import numpy

    values = numpy.asarray(array)
    if values.dtype.kind in "UO" and values.ndim:
        return values.tolist()
    if values.dtype.kind not in "iu":
        raise ValueError(f"adapters: expected an array of names or integers, found {values.dtype} {list(values.shape)}")
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=True))


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"[:80]
