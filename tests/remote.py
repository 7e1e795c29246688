"""Another Python's native library behind the tests of this one: its kernels run there, the reference here.

    TINYLORA_REMOTE=COMMAND python -m pytest -p tests.remote tests/ops/test_native.py

COMMAND is a program that behaves like the other Python, which has torch, this package with its library, and these
tests: on a machine that is emulated (release/aarch64.py), where the float64 reference of thousands of cases would take
hours, or that is reached over a network. Arguments and results cross as bytes, strides and what lies between rows too.
"""
from __future__ import annotations

import builtins
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from tinylora_kernels.ops.native import library

OPS = ("update", "update_backward", "low_rank", "update_input_grad", "update_parts", "update_parts_backward")


class Packed(NamedTuple):
    """A tensor on its way: its whole storage, and where in it the numbers lie."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: bytes

    def unpack(self) -> Tensor:
        storage = torch.frombuffer(bytearray(self.storage), dtype=torch.uint8) if self.storage else torch.empty(0)
        whole = storage.untyped_storage()
        return torch.empty(0, dtype=self.dtype).set_(whole, self.offset, self.shape, self.strides)


def storage_of(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def pack(value: Any) -> Any:
    if isinstance(value, Tensor):
        storage = storage_of(value).numpy().tobytes()
        return Packed(value.dtype, tuple(value.shape), value.stride(), value.storage_offset(), storage)
    return tuple(map(pack, value)) if type(value) is tuple else value


def unpack(value: Any) -> Any:
    if isinstance(value, Packed):
        return value.unpack()
    return tuple(map(unpack, value)) if type(value) is tuple else value


def send(stream: BinaryIO, message: Any) -> None:
    pickle.dump(message, stream)
    stream.flush()


# The other Python

def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """(function, threads, arguments, named arguments) -> (result, the arguments' storages), or an error; to the end."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty holds NaN, as in conftest.py
    torch.utils.deterministic.fill_uninitialized_memory = True
    functions = {name: getattr(library, name) for name in (*OPS, "load", "use_isa", "products")}
    functions["has_products"] = lambda: bool(library._functions().tinylora_has_products())
    while True:
        try:
            name, threads, args, named = pickle.load(requests)
        except EOFError:
            return
        torch.set_num_threads(threads)
        args, named = unpack(args), {key: unpack(value) for key, value in named.items()}
        try:
            result = functions[name](*args, **named)
            left = [storage_of(v).numpy().tobytes() for v in (*args, *named.values()) if isinstance(v, Tensor)]
            send(answers, (pack(result), left))
        except Exception as error:
            send(answers, (type(error).__name__, str(error)))


# This one

class Remote:
    """The other Python, and its library's functions by name."""

    def __init__(self, command: str):
        self._process = subprocess.Popen([command, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(self, name: str, *args: Any, **named: Any) -> Any:
        packed = {key: pack(value) for key, value in named.items()}
        send(self._process.stdin, (name, torch.get_num_threads(), tuple(map(pack, args)), packed))
        result, left = pickle.load(self._process.stdout)
        if isinstance(left, str):
            raise getattr(builtins, result)(left)
        tensors = [value for value in (*args, *named.values()) if isinstance(value, Tensor)]
        for tensor, storage in zip(tensors, left, strict=True):
            if storage != storage_of(tensor).numpy().tobytes():
                storage_of(tensor).copy_(torch.frombuffer(bytearray(storage), dtype=torch.uint8))
        return unpack(result)

    def function(self, name: str) -> Callable[..., Any]:
        return lambda *args, **named: self.call(name, *args, **named)


def pytest_configure(config: Any) -> None:
    """Before the tests are imported: they ask at once which instruction sets there are."""
    command = os.environ["TINYLORA_REMOTE"]
    remote, load = Remote(command), library.load
    status = remote.call("load")
    assert status.error is None, status.error
    for name in (*OPS, "use_isa", "products"):
        setattr(library, name, remote.function(name))
    library._functions = lambda: SimpleNamespace(tinylora_has_products=remote.function("has_products"))
    library.load = lambda: status
    library.load.__wrapped__ = load.__wrapped__
    sys.executable = command  # of the tests that start a Python


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Beside the tests of the library those that ask for an instruction set: the rest reach the ops through torch."""
    items[:] = [item for item in items if item.path.name == "test_native.py" or "isa" in item.fixturenames]


if __name__ == "__main__":
    from tests import remote  # under the name by which its tensors travel

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not mix with them
    remote.serve(sys.stdin.buffer, answers)
