"""Many adapters over one frozen model: every row of a batch runs its own, in the same pass.

Once contracted, an adapter is r x r numbers a layer, so the kernels look M up per row and the batch costs what one
adapter costs. A bank holds K vectors for each tie group; the frozen factors are shared by all.
"""
from __future__ import annotations

import contextlib
import dataclasses
import heapq
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..common import modes
from ..common.atomic import write_atomically
from ..common.finite import as_finite
from ..common.interrupts import finish, undone_by
from ..common.scope import NO_BLOCK, Block, Scope, in_backward
from ..files.adapter import check_fits, describe_model, expect_shared_bases, warn_of_what_is_left_out
from ..files.format import AdapterError, encode
from ..files.inspect import inspect_adapter
from ..linear.plan import note_change
from ..method.config import V_DTYPES, check_choice, check_seed
from ..model.adapted import adapted_layers, expect_one_adapter, expect_unmerged
from .ids import BARE, check_name, ids_of
from .rows import Layouts, watch
from .seeds import OwnProjections
from .selection import Selection
from .tenancy import hand_on


class OwnVectors(Block):
    """As without any block, where others have one."""

    trace = NO_BLOCK


class AdapterBank:
    """K adapters of one adapted model, chosen row by row.

        bank = AdapterBank(model, capacity=1_000_000)
        bank.add("alice", vectors)
        with bank.use(["alice", None, "bob"]):       # one entry a prompt; None is the bare base
            model.generate(**three_prompts)

    Outside a ``use`` block the model runs its own vectors as before. A block holds in the context that opened it: other
    threads and tasks may have blocks of their own at the same time, and one without any is refused while somebody has
    one (``own_vectors``). Adapters may be added, changed and removed while batches run: a block of a frozen bank works
    on a copy of the vectors taken as it opens.

    Args:
        model: adapted by apply_tiny_lora or apply_lora_xs, all of one process (copies of it carry no bank).
        capacity: K, the adapters it can hold; memory is K times the trained numbers times the size of dtype.
        dtype: storage of the vectors; arithmetic is float32.
        trainable: the tables require gradients (``parameters()``); a block then reads the live table, with or without
            gradients, so that optimizer steps show at once. Needs float32.
        names: give the adapters these names and zero vectors at once.
        own_seeds: every adapter brings the seed of its random P; otherwise all share the model's. Costs 4 r r bytes for
            each adapter and layer, and u times as much in a trainable bank. For models of apply_tiny_lora.
        in_order: names of adapted modules, as in target_modules, whose rows are the model's own in their order though
            their shape [m, in] does not tell, such as OPT's fc1; True: all of them. Not experts that gather rows.

    Raises:
        ValueError: the model has no adapter, or it has a bank already, or it is merged, or an argument does not fit.
    """

    @modes.outside_inference_mode
    def __init__(
        self,
        model: nn.Module,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        trainable: bool = False,
        names: Sequence[Hashable] = (),
        own_seeds: bool = False,
        in_order: Sequence[str] | bool = (),
    ):
        layers = adapted_layers(model)
        if not layers:
            raise ValueError("model: expected an adapted model, found none; call apply_tiny_lora(model, config) first")
        if any(layer.bank is not None for layer in layers.values()):
            raise ValueError("model: expected no adapter bank, found one; close it first")
        expect_unmerged(layers, "AdapterBank")
        expect_one_adapter(layers, "AdapterBank")
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"capacity: expected an integer >= 1, found {capacity!r}")
        check_choice("dtype", dtype, V_DTYPES)
        if trainable and dtype is not torch.float32:
            raise ValueError(f"dtype: expected torch.float32 for a trainable bank, found {dtype}")
        self.model = model
        self.capacity = capacity
        owners = {layer.group: layer.owner for layer in layers.values()}
        self._groups = sorted(owners)
        self.tables: dict[int, Tensor] = {}  # tie group -> [K, u]
        for group in self._groups:
            v = owners[group].v
            table = torch.zeros(capacity, v.numel(), dtype=dtype, device=v.device)
            self.tables[group] = nn.Parameter(table) if trainable else table
        self._slots: dict[Hashable, int] = {}
        self._free = list(range(capacity))  # a heap: the lowest slot is handed out first
        self._live = torch.zeros(capacity, dtype=torch.bool, device="cpu")
        self._tenancies = torch.zeros(capacity, dtype=torch.int64, device="cpu")  # adapters that each slot has had
        self._lock = threading.Lock()
        self._closed = False
        self.blocks: Scope = Scope("bank.use", "call backward() inside `with bank.use(...)`")
        self.selected = self.blocks.innermost
        self._named = layers  # by the names that the model has now: it may have been put into another one
        self._layers = list(layers.values())
        self._layouts = Layouts(model, layers, in_order)
        self.own_projections = OwnProjections(self._layers, capacity, trainable) if own_seeds else None
        self._unwatch: list[Callable[[], None]] = []
        with undone_by(self._detach):
            for layer in self._layers:
                layer.bank = self
            watch(self, model, self._layers, self._unwatch)
            for name in names:
                self.add(name)

    def close(self) -> None:
        """Detach the bank: the model is as it was before, and ``use`` is an error."""
        finish(self._detach)

    def _detach(self) -> None:
        self._closed = True
        for layer in self._layers:
            layer.bank = None
        for undo in self._unwatch:
            undo()

    # What it holds

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: Hashable) -> bool:
        return name in self._slots

    def names(self) -> list[Hashable]:
        """The adapters in the bank, oldest first."""
        with self._lock:
            return list(self._slots)

    def slot(self, name: Hashable) -> int:
        """The id of an adapter: its row in every table, for ``use`` with a tensor of ids."""
        try:
            return self._slots[name]
        except KeyError:
            raise KeyError(f"adapter {name!r}: it is not in the bank of {len(self)}; add or load it first") from None

    def vectors(self, name: Hashable) -> Tensor:
        """A copy of an adapter's numbers, [groups, u]."""
        with self._lock:
            return self._vectors(self.slot(name))

    def seed(self, name: Hashable) -> int | None:
        """The seed of an adapter's random P; None where the model's P was not drawn from one (from_peft)."""
        with self._lock:
            return self._seed(self.slot(name))

    def parameters(self) -> list[nn.Parameter]:
        """The trainable tables [K, u], one for each tie group."""
        return [table for table in self.tables.values() if isinstance(table, nn.Parameter)]

    # Changing what it holds

    @modes.outside_inference_mode
    def add(self, name: Hashable, vectors: Tensor | Sequence | None = None, *, seed: int | None = None) -> int:
        """Add an adapter; returns its id.

        Args:
            name: anything hashable but None and numbers; None stands for the bare base, integers for ids.
            vectors: [groups, u], or a list of one [u] for each group; zeros (the base model) by default.
            seed: of its random P; the model's by default. Another one needs a bank with own_seeds=True.

        Raises:
            ValueError: the name is taken or not allowed, the shape does not fit, a number is not finite, the seed is
                not the bank's.
            RuntimeError: the bank is full.
        """
        check_name(name)
        vectors = self._check_vectors(name, vectors)
        seed = self._check_seed(name, seed)
        with self._lock:
            if name in self._slots:
                raise ValueError(f"adapter {name!r}: it is in the bank already; set() changes it")
            if not self._free:
                raise RuntimeError(f"adapter {name!r}: the bank is full ({self.capacity}); remove one first")
            slot = self._free[0]
            self._write(name, slot, vectors, seed)
            reused = bool(self._tenancies[slot])
            now = int(self._tenancies[slot]) + 1

            def take() -> None:
                if self._free and self._free[0] == slot:
                    heapq.heappop(self._free)
                if reused:
                    hand_on(self.parameters(), slot)
                    note_change()  # open blocks may read the slot's live row
                self._tenancies[slot] = now
                self._slots[name] = slot
                self._live[slot] = True

            finish(take)
        return slot

    @modes.outside_inference_mode
    def set(self, name: Hashable, vectors: Tensor | Sequence) -> None:
        """Replace an adapter's numbers, [groups, u], not its seed; blocks already open keep the old ones, but for those
        of a trainable bank, which read its table.
        """
        vectors = self._check_vectors(name, vectors)
        with self._lock:
            slot = self.slot(name)
            finish(lambda: self._write(name, slot, vectors, self._seed(slot)))

    def remove(self, name: Hashable) -> None:
        """Take an adapter out; blocks already open keep it, later ones refuse it. Those of a trainable bank keep it
        until another adapter has its place, and are an error then.
        """
        with self._lock:
            slot = self.slot(name)

            tried = False

            def give_back() -> None:
                nonlocal tried
                self._slots.pop(name, None)
                self._live[slot] = False
                if not (tried and slot in self._free):  # looked for, among all, after an interrupt alone
                    tried = True
                    heapq.heappush(self._free, slot)

            finish(give_back)

    @modes.outside_inference_mode
    def load(self, name: Hashable, path: str | os.PathLike[str]) -> int:
        """Add an adapter from a file of save_adapter; returns its id.

        Raises:
            AdapterError: the file is damaged, was trained on another base or with another config (another seed is fine
                where own_seeds=True), or carries bases of its own (a bank shares one basis a layer). The bank is as it
                was.
        """
        adapter = inspect_adapter(path)
        layers = self._named
        seed, own = adapter.config.seed, self.own_projections
        if own is not None:
            adapter = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, seed=own.model_seed))
        try:
            check_fits(layers, adapter)
            expect_shared_bases(layers, adapter, "a bank")
        except AdapterError as error:
            if seed == self._model_seed() or own is not None:
                raise AdapterError(f"{os.fspath(path)}: {error}") from None
            raise AdapterError(
                f"{os.fspath(path)}: {error}; AdapterBank(..., own_seeds=True) holds adapters of any seed"
            ) from None
        return self.add(name, adapter.v, seed=None if own is None else seed)

    def save(self, name: Hashable, path: str | os.PathLike[str]) -> None:
        """Write one adapter as save_adapter does; load_adapter and load() read it."""
        with self._lock:  # numbers and seed of one moment
            slot, own = self.slot(name), self.own_projections
            vectors, seed = self._vectors(slot), None if own is None else own.seeds[slot]
        described = describe_model(self.model, v=vectors)
        if seed is not None:
            described = dataclasses.replace(described, config=dataclasses.replace(described.config, seed=seed))
        write_atomically(path, encode(described))
        warn_of_what_is_left_out(self.model, os.fspath(path))

    @torch.no_grad()
    def _write(self, name: Hashable, slot: int, vectors: Tensor, seed: int | None) -> None:
        stored = {group: vectors[row] for row, group in enumerate(self._groups)}
        if self.own_projections is not None:
            # seed: of such a bank _check_seed lets no None by
            self.own_projections.write(f"adapter {name!r}", slot, stored, cast(int, seed))
        for group, v in stored.items():
            self.tables[group][slot] = v.to(self.tables[group])

    def _vectors(self, slot: int) -> Tensor:
        return torch.stack([self.tables[group].detach()[slot].cpu() for group in self._groups])

    def _seed(self, slot: int) -> int | None:
        return self._model_seed() if self.own_projections is None else self.own_projections.seeds[slot]

    def _model_seed(self) -> int | None:
        return getattr(self._layers[0].config, "seed", None)

    def _check_seed(self, name: Hashable, seed: int | None) -> int | None:
        """The adapter's seed; its projections are made here, outside the lock."""
        shared = self._model_seed()
        if seed is None:
            seed = shared
        if self.own_projections is not None:
            check_seed(seed)
            self.own_projections.of_seed(seed)
        elif seed != shared:
            raise ValueError(
                f"adapter {name!r}: expected seed {shared}, whose projections this bank shares, found {seed}; "
                "AdapterBank(..., own_seeds=True) holds adapters of any seed"
            )
        return seed

    def _check_vectors(self, name: Hashable, vectors: Tensor | Sequence | None) -> Tensor:
        shape = (len(self._groups), next(iter(self.tables.values())).shape[1])
        if vectors is None:
            return torch.zeros(shape, device="cpu")
        if not isinstance(vectors, Tensor):
            try:
                if isinstance(vectors, Sequence) and any(isinstance(v, Tensor) for v in vectors):
                    vectors = torch.stack([v.cpu() for v in vectors])
                vectors = torch.as_tensor(vectors, device="cpu")
            except (TypeError, ValueError, RuntimeError, AttributeError):  # ragged, or no numbers at all
                raise ValueError(
                    f"adapter {name!r}: expected vectors [groups, u] = {shape}, found {type(vectors).__name__} that "
                    "makes no tensor; torch.stack(trainable_vectors(model)) does"
                ) from None
        vectors = vectors.detach()
        if tuple(vectors.shape) != shape:
            raise ValueError(f"adapter {name!r}: expected vectors [groups, u] = {shape}, found {tuple(vectors.shape)}")
        return as_finite(f"adapter {name!r}: its vectors", vectors, next(iter(self.tables.values())).dtype).cpu()

    # Running it

    @contextlib.contextmanager
    def use(self, adapters: Sequence[Hashable | None] | Tensor) -> Iterator[None]:
        """Run the model in this block with one adapter an entry.

        An entry is an index of the first dimension of what the model is called with: a prompt of any length, with the
        beams of generate where it has them. Ids as a tensor [B, T] say it token by token, for packed prompts [1, T] and
        where time comes first ([1, B] then). Layers whose rows cannot be told to be those of the entries are refused.

        The block holds in this context: in threads and tasks that are started with a copy of it (asyncio's are,
        asyncio.to_thread, contextvars.copy_context().run), not in others, and not across a generator's yield. Where
        activations are recomputed (gradient checkpointing), ``backward()`` belongs into the block too.

        Args:
            adapters: B names, ids or None (the bare base), or a tensor of integers, -1 for the bare base.

        Raises:
            KeyError, IndexError: an adapter is not in the bank; nothing has run.
            ValueError: from the model, where the rows are not those of the entries.
            RuntimeError: the bank was closed; from the model, where it cannot be said which block its call belongs to,
                or where what is recomputed was computed in another one.
        """
        if self._closed:
            raise RuntimeError("bank.use: the bank was closed, and the model runs its own vectors; make another bank")
        with self._lock:
            self._follow_factors()
            ids = self._resolve(adapters)
            selection = Selection(self.tables, self.own_projections, ids, self._layouts, self._tenancies)
        with self._holding(selection):
            yield

    @contextlib.contextmanager
    def own_vectors(self) -> Iterator[None]:
        """Run the model with its own vectors in this block, whatever blocks of ``use`` are open in other threads."""
        with self._holding(OwnVectors()):
            yield

    @contextlib.contextmanager
    def _holding(self, block: Block) -> Iterator[None]:
        try:
            with self.blocks.holding(block):
                if block.of_generator:
                    note_change()  # a plan asks which block is innermost, not whose code runs
                yield
        finally:
            note_change()  # nor whether it has ended

    @modes.outside_inference_mode
    def _follow_factors(self) -> None:
        """P' of every adapter is made of the sigma that its layer has: after refresh_factors, of another one."""
        own = self.own_projections
        if own is None or not own.has_other_factors():
            return
        if self.blocks.is_open:
            raise RuntimeError(
                "bank.use: the factors of the model were computed again while a block is open; close it first"
            )
        own.of_seed.cache_clear()
        for name, slot in self._slots.items():
            self._write(name, slot, self._vectors(slot), own.seeds[slot])
        own.take_factors()

    def _resolve(self, adapters: Sequence[Hashable | None] | Tensor) -> Tensor:
        """Ids int64, every one of them live or BARE."""
        ids = ids_of(adapters, self.slot)
        known = ids == BARE
        inside = (ids >= 0) & (ids < self.capacity)
        known[inside] = self._live[ids[inside]]
        if not bool(known.all()):
            raise IndexError(f"adapter id {int(ids[~known][0])}: it is not in the bank of {len(self)} adapters")
        return ids

    def selection(self) -> Selection | None:
        """Of the innermost ``use`` block around the calling code; None outside.

        Raises:
            RuntimeError: it cannot be said which one that is, or what is recomputed here was computed in another one.
        """
        block = self.blocks.now()
        if block is None and in_backward() and self.parameters() and self.blocks.origin() is None:
            self.blocks.refuse_recomputing()
        if block is None and self.blocks.is_open:
            raise RuntimeError(
                "bank.use: a block is open in another thread or task, and this one has none; open one here, carry it "
                "over with contextvars.copy_context().run, or run the model's own in `with bank.own_vectors():`"
            )
        return block if isinstance(block, Selection) else None
