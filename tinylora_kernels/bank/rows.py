"""Which entry of a block each row of a layer's input belongs to: told by shapes that allow no other answer, or refused.

The entries of ``bank.use`` are of what the model is called with, tokens [b, T], embeddings [b, T, E], images [b, ...]:

    ids [n]             one for each index of the first dimension: b = n, or b = k n where the inputs show that the k
                        rows of an entry are one prompt, side by side (generate's beams), or such ones that go on
    ids [n], n = b T    one for each token
    ids [b, 1]          as ids [b]
    ids [b, T], [1, T]  one for each token: packed prompts, time first

A layer's input [b, X, E] then has the entries along its first dimension, for any X, and [T, b, E] the model's first two
dimensions turned over. [m, E] says nothing of its order, even where m = b T: experts gather rows. It takes the user's
word that they are the model's (``in_order``). Where b = T, calls of other sizes tell whether a layer turns them over.
"""
from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor, nn

from ..layers.layer import TinyLoRALayer
from ..linear.plan import note_change
from ..method.selection import names_match

Shape = tuple[int, ...]
ANY = 0, 0  # dimensions and first size of an input, whatever they are


class Order(NamedTuple):
    """How a block's ids become those of a layer's rows, in equal shares of consecutive rows."""

    tokens: Shape | None = None  # the ids are expanded to it; None: an id for each share of the rows as they are
    turned: bool = False  # and then turned over
    holds_for: tuple[int, int] | None = None  # dimensions and first size of inputs of this order; None: ask again

    def of(self, ids: Tensor) -> Tensor:
        if self.tokens is not None:
            if ids.dim() == 1 and len(ids) != math.prod(self.tokens):
                ids = ids.repeat_interleave(self.tokens[0] // len(ids)).view(-1, *[1] * (len(self.tokens) - 1))
            ids = ids.reshape(self.tokens) if ids.dim() == 1 else ids.expand(self.tokens)
        return (ids.transpose(0, 1) if self.turned else ids).flatten()


class Adapted(Protocol):
    """What is asked here of a TinyLoRALayer, or of an accelerated layer of PEFT's."""

    samples_first: bool  # rows are samples: the features are channels

    @property
    def name(self) -> str:
        """Of the module, for messages."""

    def __hash__(self) -> int:
        """Layers are told apart as objects."""


class Call(NamedTuple):
    """What the model was called with, or the first layer where a part of it was called by itself."""

    rows: Shape  # of the input, the features left out
    by_first: bool  # an entry has an index of the first dimension, or some side by side; else it has a token


class Layouts:
    """What a bank knows of its model's layers.

    Attributes:
        in_order: layers whose rows are the model's, in their order, whatever the shape.
        listed: layers inside a ModuleList or ModuleDict: its owner may choose rows for each of its members.
        turned: layer -> whether it was seen to have the model's first two dimensions turned over.
        entries_first: the model was seen to have as many rows as there were entries, and other dimensions had not.
        way_out: what to do about a layer whose rows may be any, for messages; {name} is its last component.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, Adapted], in_order: Sequence[str] | bool,
        way_out: str = "if they are the model's in their order, say AdapterBank(..., in_order=[{name!r}])",
    ):  # fmt: skip
        names = [in_order] if isinstance(in_order, str) else list(in_order) if not isinstance(in_order, bool) else []
        unknown = next((name for name in names if not any(names_match(layer, name) for layer in layers)), None)
        if unknown is not None:
            raise ValueError(f"in_order: expected names of adapted modules, found {unknown!r}, which names none")
        self.in_order: set[Adapted] = {
            layer for full, layer in layers.items() if in_order is True or any(names_match(full, n) for n in names)
        }
        lists = (module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.ModuleDict)))
        every = set(layers.values())
        self.listed = {layer for holder in lists for layer in every.intersection(cast(Any, holder.modules()))}
        self.turned: dict[Adapted, bool] = {}
        self.entries_first = False
        self.way_out = way_out


class Rows:
    """The calls of one block.

    Args:
        ids: [n], or of two dimensions or more.
        layouts: of the bank.
        beams: rows of a call that is known to have beams.
    """

    def __init__(self, ids: Tensor, layouts: Layouts, beams: int = 0):
        self.shape: Shape = tuple(ids.shape)
        self.uniform = bool((ids == ids.flatten()[0]).all())  # then every order is the same
        self._layouts = layouts
        self._calls: dict[Shape, Call] = {}
        self._known_beams = beams
        self.beams = 0  # rows of a call that was shown to have beams
        self._prompts: Tensor | None = None  # what it was called with, [beams, ...]

    def see_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note of what the model is called with; raises as `see` does."""
        found = list(inputs_of(module, args, kwargs))
        if found:
            (name, main), contents = found[0], [content for _, content in found]
            rows = rows_of(main)
            goes_on = rows[1:] == (1,) or _has_past(kwargs)  # a token each: a model may keep its cache itself
            self.see(rows, f"{type(module).__name__}: {name}", contents, goes_on)

    def see(self, rows: Shape, what: str, contents: Sequence[Tensor] = (), goes_on: bool = False) -> None:
        """Take note of a call.

        Args:
            rows: shape of the main input, the features left out.
            what: that input, in messages.
            contents: all inputs, the main one first.
            goes_on: from calls before it.

        Raises:
            ValueError: its rows are not those of the entries, or that cannot be told.
        """
        last = next(reversed(self._calls), None)
        may_be_beams = len(self.shape) == 1 and rows[0] != self.shape[0] and math.prod(rows) != self.shape[0]
        if rows == last and not may_be_beams:
            return
        known = None if may_be_beams else self._calls.get(rows)
        call = known or Call(rows, self._is_by_first(rows, what, contents, goes_on))
        self._calls.pop(rows, None)
        self._calls[rows] = call
        if last is not None and len(last) != len(rows):
            note_change()  # an input [m, E] of a plan may be another one's now

    def _is_by_first(self, rows: Shape, what: str, contents: Sequence[Tensor], goes_on: bool) -> bool:
        found = f"{what} {list(rows)}"
        if len(self.shape) > 1:
            pairs = zip(self.shape, rows, strict=False)
            if len(self.shape) != len(rows) or any(ids not in (1, size) for ids, size in pairs):
                raise ValueError(
                    f"{found}: expected ids of that shape, or 1 in place of a dimension along which they are the same, "
                    f"found {list(self.shape)}"
                )
            return self.shape[0] == rows[0] and set(self.shape[1:]) == {1}
        (n,) = self.shape
        if rows[0] == n:
            if rows[1:2] == (n,) and not self._layouts.entries_first:
                raise ValueError(
                    f"{found}: the {n} entries may be of its first dimension or, time first, of its second; "
                    f"call the model with another length first, which tells of its layers too, or give ids of shape "
                    f"[{n}, 1] or [1, {n}]"
                )
            self._layouts.entries_first = True
            return True
        if math.prod(rows) == n:
            return False
        if rows[0] % n == 0 and self._are_beams(rows[0], contents, goes_on):
            return True
        raise ValueError(
            f"{found}: expected a row for each of the {n} entries, or beams of one prompt side by side, found "
            f"{rows[0]}; name one entry a row, or give ids by token {list(rows)}, or [1, {n}] where time is first"
        )

    def _are_beams(self, count: int, contents: Sequence[Tensor], goes_on: bool) -> bool:
        if count == self._known_beams or (count == self.beams and (goes_on or self._begins_as_before(contents))):
            return True
        if not contents or not _is_same_in_each(contents, len(contents[0]), self.shape[0]):
            return False
        self.beams, self._prompts = count, contents[0].detach()
        return True

    def _begins_as_before(self, contents: Sequence[Tensor]) -> bool:
        """Whether these are the prompts that were shown to have beams, perhaps with what each beam has said since."""
        if not contents or self._prompts is None:
            return False
        main, prompts = contents[0].detach(), self._prompts
        if main.dim() != prompts.dim() or main.dim() < 2 or main.shape[1] < prompts.shape[1]:
            return False
        begin = main[:, : prompts.shape[1]]
        return begin.shape == prompts.shape and bool((begin == prompts.to(begin.device)).all())

    def order(self, layer: Adapted, rows: Shape, flattened: bool = False) -> Order:
        """How the ids become those of a layer's rows.

        Args:
            rows: shape of the layer's input, the features left out.
            flattened: its rows are known to be those of the model's input, in their order.

        Raises:
            ValueError: that cannot be told.
        """
        if self.uniform:
            return Order(holds_for=ANY)
        if not self._calls:
            self.see(rows, f"{layer.name}: its input")
        trusted = layer in self._layouts.in_order
        for call in reversed(self._calls.values()):
            latest = call.rows == next(reversed(self._calls))
            order = self._flat(call, latest, layer, rows, flattened, trusted)
            order = order or self._in_shape(call, layer, rows, trusted)
            if order is not None:
                return order
        last = next(reversed(self._calls))
        raise ValueError(
            f"{layer.name}: expected an input [{last[0]}, ..., E], as the model was called with {list(last)}, found "
            f"{_shown(rows)}: its rows may be any (experts gather them); "
            + self._layouts.way_out.format(name=layer.name.rpartition(".")[2])
        )

    def _flat(
        self, call: Call, latest: bool, layer: Adapted, rows: Shape, flattened: bool, trusted: bool
    ) -> Order | None:
        """Of rows [m] that are the call's; of rows of more dimensions where the user says so."""
        count = math.prod(rows)
        own = latest and rows == call.rows and len(rows) == 1 and layer not in self._layouts.listed
        same = count == math.prod(call.rows) and (flattened or trusted)
        if call.by_first and (own or same or (trusted and count % call.rows[0] == 0)):
            return Order(holds_for=None if flattened else (len(rows) + 1, rows[0]))
        return Order(call.rows) if own or same else None

    def _in_shape(self, call: Call, layer: Adapted, rows: Shape, trusted: bool) -> Order | None:
        """Of an input that has the call's first two dimensions, as they are or turned over."""
        if layer.samples_first:
            return Order(holds_for=(len(rows) + 1, rows[0])) if call.by_first and rows[0] == call.rows[0] else None
        straight = len(rows) > 1 and (rows[0] == call.rows[0] if call.by_first else rows == call.rows)
        over = len(rows) == len(call.rows) == 2 and rows == call.rows[::-1]
        if not (straight or over):
            return None
        turned = False if trusted else self._layouts.turned.get(layer)
        if turned is None and rows[0] == rows[1]:
            raise ValueError(
                f"{layer.name}: its input {_shown(rows)} may have the entries along its first dimension or along its "
                "second; call the model with another length first, or say AdapterBank(..., in_order=True) if no layer "
                "turns them over"
            )
        if turned is None:
            turned = self._layouts.turned[layer] = over
        if turned:
            return Order(call.rows, turned=True) if over else None
        if not straight:
            return None
        return Order(holds_for=(len(rows) + 1, rows[0])) if call.by_first else Order(call.rows)


def _shown(rows: Shape) -> str:
    """ "[3, 4, E]"."""
    return f"[{', '.join(map(str, rows))}, E]"


def _is_same_in_each(contents: Sequence[Tensor], count: int, n: int) -> bool:
    """Whether the rows of each entry are one and the same in all inputs that have them, and others than the next
    entry's in some.
    """
    others = None  # [n - 1]
    for content in contents:
        if content.dim() < 2 or len(content) != count:
            continue
        each = content.detach().reshape(n, count // n, -1)
        if not bool((each == each[:, :1]).all()):
            return False
        differ = (each[1:, 0] != each[:-1, 0]).any(-1)
        others = differ if others is None else others | differ.to(others.device)
    return others is not None and bool(others.all())


def _has_past(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call comes with what calls before it have left, in transformers' words."""
    for name in ("past_key_values", "cache_params"):
        cache = kwargs.get(name)
        length = getattr(cache, "get_seq_length", None)
        if cache is not None and (length is None or bool(length() > 0)):
            return True
    return False


def watch(bank: Any, model: nn.Module, layers: Iterable[TinyLoRALayer], undo: list[Callable[[], None]]) -> None:
    """Have the model tell the bank's open block what it is called with; `undo` takes what undoes it.

    The model is every module that holds all adapted layers: what stands around it, or inside, may be called as well.
    """
    every = set(layers)
    whole = (module for module in model.modules() if set(_layers_of(module)) == every)
    for module in whole:
        undo.append(module.register_forward_pre_hook(_Watch(weakref.ref(bank)), with_kwargs=True).remove)


@dataclass(eq=False)
class _Watch:
    """The hook of `watch`. Copies and pickles of a model carry no bank, and theirs does nothing."""

    bank: Callable[[], Any] = lambda: None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bank = self.bank()
        if bank is not None:
            bank.blocks.note()
        rows: Rows | None = None if bank is None else getattr(bank.blocks.innermost.get(), "rows", None)
        if rows is not None and not rows.uniform:
            rows.see_call(module, args, kwargs)

    def __reduce__(self) -> tuple[type[_Watch], tuple[()]]:
        return _Watch, ()


def inputs_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a module is called with, what transformers calls the main one first."""
    named = [*(("its input", value) for value in args), *kwargs.items()]
    main = getattr(module, "main_input_name", None)
    for name, value in sorted(named, key=lambda item: (item[0] != main, item[0] != "inputs_embeds")):  # stable
        nested = value.items() if isinstance(value, Mapping) else [(name, value)]
        yield from ((str(key), tensor) for key, tensor in nested if isinstance(tensor, Tensor) and tensor.dim())


def rows_of(content: Tensor) -> Shape:
    """Shape of the rows of an input: ids [b, T]; features [b, E] or [b, T, E]; images and the like [b, ...]."""
    if not content.is_floating_point():
        return tuple(content.shape)
    return tuple(content.shape[:-1] if content.dim() in (2, 3) else content.shape[:1])


def _layers_of(module: nn.Module) -> Iterator[TinyLoRALayer]:
    return (below for below in module.modules() if isinstance(below, TinyLoRALayer))
