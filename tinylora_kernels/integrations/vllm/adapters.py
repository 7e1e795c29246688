"""In the engine core: the adapters by name, their contents, and the ids under which the workers know them.

A request is bound to the numbers its adapter has when it comes in: it gets a name and a path that are their digest, by
which the prefix cache keys its blocks, and an id that no other numbers ever have. A changed adapter is new numbers
under the old name, so requests that run keep what they began with, and nothing has to be invalidated.

The workers are told an id's numbers before its first request is scheduled, through vLLM's own add_lora, and are told to
forget them once no name and no request refers to them.
"""
from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...files.format import AdapterError, read
from .family import Family, Recipe, recipe_of, without_path
from .requests import DEFAULT, INLINE

FIRST_ID = 1 << 20  # below are those that vLLM makes up for warming up
FORGOTTEN_FROM = 1024  # contents beyond those in use, before the next ones are dropped


@dataclass(frozen=True, eq=False)
class Content:
    """Numbers with their recipe, under one id for ever."""

    id: int
    path: str  # INLINE and the digest: what the prefix cache sees, as name and as path
    recipe: Recipe
    v: Tensor


@dataclass
class Named:
    """What an id of the caller's stands for."""

    name: str
    path: str
    content: Content


class Adapters:
    """The adapters of one engine core.

    Args:
        family: what it serves.
        make_request: (name, id, path) -> LoRARequest.
        send: gives a LoRARequest to the add_lora of every worker.
        forget: gives an id to the remove_lora of every worker.
        running: the ids of the requests in the engine, waiting or running.
        not_found: (name, path) -> the exception by which vLLM knows a missing file.
    """

    def __init__(
        self,
        family: Family,
        make_request: Callable[[str, int, str], Any],
        send: Callable[[Any], Any],
        forget: Callable[[int], Any],
        running: Callable[[], Iterable[int]],
        not_found: Callable[[str, str], Exception],
    ):
        self.family, self.make_request, self.not_found = family, make_request, not_found
        self._send, self._forget, self._running = send, forget, running
        self._named: dict[int, Named] = {}  # by the caller's id
        self._contents: dict[str, Content] = {}  # by path
        self._sent: dict[int, Content] = {}
        self._default: Content | None = None
        self._ids = itertools.count(FIRST_ID)
        self._lock = threading.Lock()  # requests are bound in the thread that receives them

    # vLLM's own calls, on the thread that steps

    def add(self, request: Any) -> bool:
        """add_lora: load, or load again where load_inplace says so or the path is another.

        Raises:
            AdapterError: the adapter does not fit this engine; nothing has changed.
        """
        name, path = request.lora_name, request.lora_path
        if name == DEFAULT:
            self._default = None if path == INLINE else self._told(self._content(name, path))
            return True
        with self._lock:
            known = self._named.get(request.lora_int_id)
        if known is None or known.path != path or known.name != name or request.load_inplace:
            content = self._told(self._content(name, path))
            with self._lock:
                self._named[request.lora_int_id] = Named(name, path, content)
            self._drop_unused()
        return True

    def remove(self, lora_id: int) -> bool:
        """remove_lora; requests that run keep their numbers."""
        with self._lock:
            return self._named.pop(lora_id, None) is not None

    def ids(self) -> set[int]:
        with self._lock:
            return set(self._named)

    def pin(self, lora_id: int) -> bool:
        """pin_lora: every named adapter stays in host memory as it is; this only checks that there is one."""
        if lora_id not in self.ids():
            raise ValueError(f"pin_lora: no adapter has the id {lora_id}")
        return True

    # Requests

    def bind(self, request: Any) -> tuple[Any, Content] | None:
        """(the LoRARequest to run under, its content) for a request with this LoRARequest, or None; on any thread.

        Raises:
            AdapterError: it names an adapter that is not known yet and does not fit.
        """
        if request is None:
            content = self._default
            return None if content is None else (self._under(content), content)
        name, path = request.lora_name, request.lora_path
        with self._lock:
            known = self._named.get(request.lora_int_id)
        if known is not None and (known.name, known.path) == (name, path):
            content = known.content
        else:
            content = self._content(name, path)
            if not path.startswith(INLINE):  # a file is read once, until it is asked for in place
                with self._lock:
                    self._named[request.lora_int_id] = Named(name, path, content)
        return self._under(content), content

    def _under(self, content: Content) -> Any:
        """The LoRARequest of a content. The prefix cache keys blocks by name and path, before 0.32 by name alone."""
        return self.make_request(content.path, content.id, content.path)

    def ensure(self, content: Content) -> None:
        """Before a request is scheduled: the workers know its numbers. On the thread that steps."""
        self._told(content)
        self._drop_unused()

    # Contents

    def _content(self, name: str, path: str) -> Content:
        """The content of a file, or of a path that holds the numbers themselves."""
        try:
            recipe, v = self._inline(path) if path.startswith(INLINE) else self._file(path)
        except FileNotFoundError:
            raise self.not_found(name, path) from None
        except (AdapterError, OSError) as error:
            raise AdapterError(f"adapter {name!r}: {without_path(error, path)}") from None
        v = v.to(torch.float32).contiguous()
        digest = hashlib.sha256(recipe.text.encode() + v.numpy().tobytes()).hexdigest()[:32]
        key = INLINE + digest
        with self._lock:
            found = self._contents.get(key)
            if found is None:
                found = self._contents[key] = Content(next(self._ids), key, recipe, v)
            return found

    def _file(self, path: str) -> tuple[Recipe, Tensor]:
        adapter = read(path)
        self.family.check(adapter)
        recipe = recipe_of(adapter)
        return (self.family.recipe if recipe == self.family.recipe else recipe), adapter.v

    def _inline(self, path: str) -> tuple[Recipe, Tensor]:
        recipe = self.family.recipe
        token, _, numbers = path.removeprefix(INLINE).rpartition(":")
        if token and token != self.family.token:
            raise AdapterError(
                "the numbers are of another config or base than the adapter this engine was started with"
            )
        try:
            raw = base64.b64decode(numbers, validate=True)
        except (binascii.Error, ValueError):
            raise AdapterError("expected numbers in base64 behind 'tinylora:'") from None
        groups, u = recipe.shape
        size = 4 * groups * u
        if len(raw) != size:
            raise AdapterError(f"expected {groups} x {u} float32 numbers, {size} bytes, found {len(raw)} bytes")
        v = torch.from_numpy(np.frombuffer(raw, dtype=np.float32).copy()).view(groups, u)
        self.family.check_vectors(v, recipe)
        return recipe, v

    def _told(self, content: Content) -> Content:
        """The content, which the workers know from here on."""
        if content.id not in self._sent:
            self._send(self.make_request("numbers", content.id, encode(content, self.family)))
            self._sent[content.id] = content
        return content

    def _drop_unused(self) -> None:
        """Forget the contents that no name and no request refers to, once there are many."""
        if len(self._sent) <= len(self._named) + FORGOTTEN_FROM:
            return
        with self._lock:
            used = {named.content.id for named in self._named.values()} | set(self._running())
            if self._default is not None:
                used.add(self._default.id)
            unused = [content for content in self._sent.values() if content.id not in used]
            for content in unused:
                self._contents.pop(content.path, None)
        for content in unused:
            del self._sent[content.id]
            self._forget(content.id)


def encode(content: Content, family: Family) -> str:
    """A content as the lora_path by which the workers get it."""
    numbers = base64.b64encode(content.v.numpy().tobytes()).decode()
    return f"{INLINE}{'' if content.recipe == family.recipe else content.recipe.text}|{numbers}"


def decode(path: str, family: Family) -> tuple[Recipe, Tensor]:
    text, _, numbers = path.removeprefix(INLINE).rpartition("|")
    recipe = Recipe.decode(text) if text else family.recipe
    v = torch.from_numpy(np.frombuffer(base64.b64decode(numbers), dtype=np.float32).copy())
    return recipe, v.view(recipe.shape)
