"""One adapted layer: a frozen module whose output is linear in its weight, and the in-place update of that output."""
from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..base.attributes import bias_of, brought, computes_weight, weight_of
from ..base.kinds import FORWARDED, as_stored, has_fresh_output, kind_of, weight_matrix
from ..base.quantised import without_bias
from ..base.weights import PLAIN, bias_offset, is_sharded, right_factor
from ..base.witness import Witness, witness
from ..common import modes
from ..common.finite import as_finite
from ..common.interrupts import undone_by
from ..common.scope import Scope
from ..factors.svd import SKETCH_COLUMNS, SKETCH_TOLERANCE, basis_sketch, compare_sketch
from ..functional import tiny_lora_linear, tiny_lora_update
from ..linear.plan import (
    Buffers,
    Chosen,
    HeldParts,
    HeldRight,
    Plan,
    changes,
    doubt_right,
    has_hooks,
    is_bare_product,
    is_plain_linear,
    make_plan,
    note_change,
    parts_for,
    right_for,
    take_factors,
)
from ..method.config import IDENTITY_FIELDS, Method
from ..method.parts import block_basis, compact_basis
from .channels import update_channels
from .switch import is_off, switched_off

PROJECTION_TOLERANCE = 1e-4  # of a sketch of P' that another machine has fitted: ratios of singular values are in it
_OTHER_WEIGHT = (
    "it is not the one that the layer was adapted to, and U and sigma are not of it; load the weights first and adapt "
    "the model then, or call refresh_factors(model)"
)
_ELSEWHERE = (
    "its weight is on the meta device, and its numbers, if any, are where an offloading hook keeps them; bring them "
    "back (accelerate.hooks.remove_hook_from_submodules), or do this before the model is offloaded"
)
_NOT_THE_MERGED_WEIGHT = (
    "it is not the one that merge(model) left there, and the update may be missing; call unmerge(model), which puts "
    "the model's own weights back, and load then"
)


class Selection(Protocol):
    """What a bank selected for a block: bank.selection.Selection, whose room is above this one."""

    def of(
        self, layer: TinyLoRALayer, device: torch.device, rows: tuple[int, ...], flattened: bool = False
    ) -> Chosen:
        """The vectors, their projection and the ids for the rows of one layer."""


class Bank(Protocol):
    """bank.bank.AdapterBank, to the layers it serves."""

    tables: dict[int, Tensor]  # tie group -> [K, u]
    selected: ContextVar[Any]
    blocks: Scope

    def selection(self) -> Selection | None:
        """Of the block of ``use`` that runs here now."""


class TinyLoRALayer(nn.Module):
    """A frozen layer whose output gets y += ((y U - c) M^T) U^T, M = sum_i v_i P'_i.

    The wrapped layer stays as it is under ``base``; its weight, bias and sizes are readable through this module. ``v``
    is one parameter for each tie group, registered on the group's first layer.

    Args:
        base: any kind of base.kinds.KINDS, or a module with a 2-D weight [out, in] and output [..., out].
        basis: [r, out] U^T; of parts block by block, as method.parts.block_basis arranges it.
        sigma: [r] singular values, or [k, r] of k parts.
        projection: [u, r, r] P', or [r, r] for LoRA-XS.
        v: [u] the trained numbers, or the TinyLoRALayer that holds them for this tie group.
        name, index, group: the module's qualified name, its position among the adapted modules, its tie group.
        count: of the modules that were adapted with it; None of a layer made by hand.
        config: what it was built from, a method.config.Method.
        degenerate: the singular subspace is arbitrary (equal singular values): files must carry the basis.
        parts: the output rows of each part of a fused projection that is adapted part by part.
        projection_index: of its P, the first part's if there are several; default index.
    """

    # To transformers, which saves one of the tensors that share memory and asks each module which may go: a head that
    # is tied to its embedding has its weight by this name now.
    _tied_weights_keys = {"base.weight": "weight"}

    base: nn.Module
    basis: Tensor
    sigma: Tensor
    projection: Tensor
    v: nn.Parameter  # its own, or that of the layer that holds it
    _base_type: type[nn.Module]
    _product: Callable[[nn.Module, Tensor, Tensor], Tensor] | None
    _fresh_output: bool
    _plan: Plan | None
    _right: HeldRight | None
    _parts: HeldParts | None
    _selection: Selection | None
    _factors_of: Witness | None
    _adapted_to: Witness | None
    _merged_to: Witness | None
    _in_doubt: bool | list[str]

    def __init__(
        self,
        base: nn.Module,
        basis: Tensor,
        sigma: Tensor,
        projection: Tensor,
        v: nn.Parameter | TinyLoRALayer,
        *,
        name: str = "layer",
        index: int = 0,
        group: int = 0,
        count: int | None = None,
        config: Method | None = None,
        degenerate: bool = False,
        parts: tuple[int, ...] | None = None,
        projection_index: int | None = None,
    ):
        super().__init__()
        self.__dict__["_plan"] = None  # how the last call ran, if the next ones can run like it
        self.__dict__["_right"] = None  # B^T and the weight it was computed from: linear.plan.right_for
        self.__dict__["_parts"] = None  # of a fused layer, and what they were taken from: linear.plan.parts_for
        self.__dict__["_selection"] = None  # the bank's at the last call
        self.__dict__["_factors_of"] = None  # the witness of the weight that U and sigma are of, bit for bit
        self.__dict__["_adapted_to"] = None  # of the same weight in the dtype that it has now
        self.__dict__["_merged_to"] = None  # of the weight with the update in it, while it is merged
        self.__dict__["_in_doubt"] = False  # whether the weight may be another one now: it was loaded, or emptied
        self.base = base
        self.name, self.index, self.group, self.config = name, index, group, config
        self.count = count
        self.degenerate = degenerate
        self.parts = parts
        self.projection_index = index if projection_index is None else projection_index
        self.enabled = True  # False: the bare base
        self.saved_weight: Tensor | None = None  # the base weight's own bits while it is merged
        self.bank: Bank | None = None  # the AdapterBank that holds other vectors for rows of a batch
        self.backend = getattr(config, "backend", None)
        device = weight_of(base).device
        # Of its own: they are written in place, and the caller may give them to another layer too.
        rows = torch.contiguous_format
        self.register_buffer("basis", basis.to(device, copy=True, memory_format=rows), persistent=False)
        self.register_buffer("sigma", sigma.to(device, copy=True, memory_format=rows), persistent=False)
        self.register_buffer("projection", projection.to(self.basis, copy=True, memory_format=rows), persistent=False)
        if isinstance(v, TinyLoRALayer):
            self._owner = (v,)  # in a tuple, or nn.Module would register the owner as a child
        else:
            self.register_parameter("v", v)
            self._owner = (self,)
        self._factors_are_of_this_weight()
        self.register_load_state_dict_post_hook(_doubt_what_was_loaded)
        kind = kind_of(base)
        self._look_at_base(base)
        self._is_lookup, self.samples_first = kind.lookup, kind.channels_first
        # of the output, counted from its end
        self._feature_axis = weight_of(base).dim() - 1 if self.samples_first else 1
        self._update: Callable[..., Tensor] = tiny_lora_update
        if self.samples_first:
            self._update = functools.partial(update_channels, -self._feature_axis)

    def forward(self, *args, **kwargs) -> Tensor:
        if not torch.compiler.is_compiling() and self._plan is not None and len(args) == 1 and not kwargs:
            y = self._plan.run(args[0])
            if y is not None:
                return y
        return self._forward(*args, **kwargs)

    def _forward(self, *args, **kwargs) -> Tensor:
        """The call with all questions asked."""
        # Straight from the dicts: through nn.Module.__getattr__ each name costs most of a microsecond, at every token.
        base, buffers = cast(nn.Module, self._modules["base"]), cast(Buffers, self._buffers)
        asked_at = 0 if torch.compiler.is_compiling() else changes()  # or a graph would be of this one count
        if not self.is_on():
            self._expect_its_base()
            return base(*args, **kwargs)
        if self._in_doubt:
            self.expect_its_weight()
        if type(base) is not self._base_type:
            self._look_at_base(base)
        basis, projection = buffers["basis"], buffers["projection"]
        v, adapter_ids, chosen = cast(Tensor, self._owner[0]._parameters.get("v")), None, None
        if v is None:
            raise RuntimeError(
                f"{self._owner[0].name}.v: expected a parameter, found that it is computed (parametrized) or removed; "
                "train v itself, after torch.nn.utils.parametrize.remove_parametrizations"
            )
        if self.bank is not None and (selection := self.bank.selection()) is not None:
            chosen = selection.of(self, basis.device, self._rows_of(*args, **kwargs))
            _, v, projection, adapter_ids, _ = chosen
        if v.device != basis.device:
            # a tie group that spans devices, or is offloaded
            v = cast(Tensor, brought(self._owner[0], "v", v)).to(basis.device)
        weight, bias = base._parameters.get("weight"), cast("Tensor | None", base._parameters.get("bias"))
        fresh = self._fresh_output and not has_hooks(base)
        update = functools.partial(self._update, backend=self.backend)
        one_input = len(args) == 1 and not kwargs
        if self._product and fresh and weight is not None and one_input and is_bare_product(base, args[0]):
            if type(base) is nn.Linear and is_plain_linear(weight, bias, args[0]):
                watched = modes.seen_by_a_mode() or modes.differentiated_by_torch()
                parts = None if watched else parts_for(self, projection)
                held = None if watched or parts is not None else right_for(self, args[0])
                if not watched and self._worth_a_plan(chosen):
                    self.__dict__["_plan"] = make_plan(self, self._owner[0], held, chosen, asked_at)
                right, samples = (None, None) if held is None else (held.right, held.samples)
                return tiny_lora_linear(
                    args[0], weight, bias, basis, v, projection, None, adapter_ids, right=right, samples=samples,
                    parts=parts, backend=self.backend,
                )  # fmt: skip
            # traced, cast by autocast, with a W that is trained, or of another kind
            y = self._product(base, args[0], weight)
            bias = None if bias is None else bias.to(y.dtype)
            return update(y, basis, v, projection, None, adapter_ids, bias=bias, inplace=True)
        if is_sharded(weight):
            from .sharded import sharded_forward  # loads torch.distributed: only where it is in use

            factors = basis, v, projection, adapter_ids
            return sharded_forward(base, self.name, factors, self._update_with_bias, self.backend, args, kwargs)
        if bias is not None and type(weight) not in PLAIN and (bare := self._without_bias(base)) is not None:
            y = bare(*args, **kwargs)
            self._expect_gradient_of(y, *args)
            return update(y, basis, v, projection, None, adapter_ids, bias=bias.to(y.dtype))
        y = base(*args, **kwargs)
        self._expect_output(y, basis)
        self._expect_gradient_of(y, *args)
        inplace = fresh and type(weight) in PLAIN
        return self._update_with_bias(y, basis, v, projection, adapter_ids, bias_of(base), inplace)

    def _look_at_base(self, base: nn.Module) -> None:
        """What the forward of the base is, by its class: libraries put other classes there (quantisers in training)."""
        kind = kind_of(base)
        product = kind.product if kind.is_product(base) else None
        self.__dict__.update(_base_type=type(base), _product=product, _fresh_output=has_fresh_output(base))

    def _expect_output(self, y: object, basis: Tensor) -> None:
        if isinstance(y, Tensor) and y.is_nested:  # its samples are asked
            return
        if not isinstance(y, Tensor) or y.dim() < self._feature_axis or y.shape[-self._feature_axis] != basis.shape[1]:
            found = f"one {list(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise ValueError(
                f"{self.name}: expected an output of {basis.shape[1]} features of {self._base_type.__name__}, as its "
                f"weight has, found {found}; leave it out by exclude_modules"
            )

    def _expect_gradient_of(self, y: Tensor, *inputs: object) -> None:
        """What comes before a base whose product has no gradient (torchao's dynamic int8) learns nothing."""
        if torch.compiler.is_compiling() or y.requires_grad or not torch.is_grad_enabled():
            return
        if any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            _warn_of_a_lost_gradient(self.name, f"{self._base_type.__name__} of {type(weight_of(self.base)).__name__}")

    def _update_with_bias(
        self, y: Tensor, basis: Tensor, v: Tensor, projection: Tensor, adapter_ids: Tensor | None, bias: Tensor | None,
        inplace: bool = False,
    ) -> Tensor:  # fmt: skip
        """The update of an output that has the layer's bias in it."""
        update = functools.partial(self._update, backend=self.backend)
        if bias is None or not bias.requires_grad:
            offset = bias_offset(basis, bias)
            return update(y, basis, v, projection, offset, adapter_ids, inplace=inplace)
        # The gradient of c = b U would be missing: b is taken out, and added again after the update.
        bias = bias.to(y.dtype)
        bare = y - bias.view(-1, *[1] * (self._feature_axis - 1)) if self._feature_axis > 1 else y - bias
        return update(bare, basis, v, projection, None, adapter_ids, bias=bias, inplace=True)

    @staticmethod
    def _without_bias(base: nn.Module) -> nn.Module | None:
        """A quantised layer without its bias, where neither a hook nor a library's ``forward`` is to see its output."""
        if torch.compiler.is_compiling() or "forward" in base.__dict__ or has_hooks(base):
            return None
        return without_bias(base)

    def is_on(self) -> bool:
        """Whether the update runs here: it is not merged into the weight, nor switched off, for good or in a block."""
        return self.enabled and self.saved_weight is None and not self._is_off_in_a_block()

    def _is_off_in_a_block(self) -> bool:
        return switched_off.matters() and is_off(self)

    def _expect_its_base(self) -> None:
        """Of a layer that is not on: its base holds what is asked for, its own weight or the merged one."""
        if self.saved_weight is None:
            return
        if self._is_off_in_a_block():
            raise RuntimeError(
                f"{self.name}: expected the bare base in a block of adapter_disabled, found the update merged into its "
                "weight; call unmerge(model) first"
            )
        if self._in_doubt:
            self.expect_its_weight()

    def _rows_of(self, x: Tensor) -> tuple[int, ...]:
        """Shape of the rows of an input: all but its features, (1,) of a single one."""
        if x.is_nested:
            raise ValueError(
                f"{self.name}: an AdapterBank needs the rows of its samples in one dense tensor, found a nested one; "
                "call to_padded_tensor first"
            )
        if self.samples_first:
            return tuple(x.shape[:1]) if x.dim() == self._feature_axis + 1 else (1,)
        return tuple(x.shape if self._is_lookup else x.shape[:-1]) or (1,)

    def _worth_a_plan(self, chosen: Chosen | None) -> bool:
        """Whether calls like this one are to be expected: of a bank's block from its second on, as in generation."""
        if switched_off.is_open or (self.bank is not None and self.bank.blocks.by_generators):
            return False
        if chosen is None:
            return self.bank is None
        before, self.__dict__["_selection"] = self._selection, chosen.selection
        return before is chosen.selection

    def __getstate__(self) -> dict:
        """Copies and pickles carry no bank: it belongs to the layers of one model in one process."""
        return {**self.__dict__, "bank": None, "_plan": None, "_right": None, "_parts": None, "_selection": None}

    # What the weight was

    def take_witness(self) -> None:
        """The weight as it is now is the one that U and sigma are of, or a cast of it; if merged, the merged one."""
        weight = weight_of(self.base)
        dense = type(weight) in PLAIN and weight.is_floating_point() and not weight.is_meta
        # Row-major: the same numbers in another memory format are the same weight.
        self.__dict__[self._witness_now()] = witness(weight.contiguous()) if dense else None
        self.__dict__["_in_doubt"] = False

    def _witness_now(self) -> str:
        """The attribute with the witness of what the base is to hold."""
        return "_adapted_to" if self.saved_weight is None else "_merged_to"

    def holds_what_was_merged(self) -> bool:
        """Whether the weight is still the merged one that take_witness saw; if nobody can tell, or another one was
        loaded (_NOT_THE_MERGED_WEIGHT says then to unmerge), yes.
        """
        weight, known = weight_of(self.base), self._merged_to
        return bool(self._in_doubt) or known is None or weight.is_meta or known.knows(weight.contiguous())

    def _factors_are_of_this_weight(self) -> None:
        self.take_witness()
        self.__dict__["_factors_of"] = self._adapted_to

    def weight_determines_factors(self) -> bool:
        """Whether U and sigma are those of the weight as it is now (before it was merged), bit for bit, as far as
        anybody can tell: it does not train, was not rounded to another dtype or quantised since, and is no other one.
        """
        weight, known, saved = weight_of(self.base), self._factors_of, self.saved_weight
        if weight.requires_grad or known is None or is_sharded(weight):
            return not weight.requires_grad
        own = weight if saved is None else as_stored(self.base, saved)
        return type(own) in PLAIN and own.is_floating_point() and known.is_exactly(own.contiguous())

    def has_another_rounding(self) -> bool:
        """Whether the weight is the one that U and sigma are of to some roundings of the same dtype, and not bit for
        bit: an average of equal weights.
        """
        weight, known = weight_of(self.base), self._factors_of
        if known is None or self.saved_weight is not None or type(weight) not in PLAIN:
            return False
        there = weight.contiguous()
        return there.dtype is known.dtype and not known.knows(there) and known.is_nearly(there)

    def _holds_its_weight(self) -> bool:
        """Whether the weight, whatever its dtype now, is the one that U and sigma are of, or of a merged layer the
        merged one; if nobody can tell, yes.
        """
        weight, known = weight_of(self.base), self.__dict__[self._witness_now()]
        if torch._C._functorch.is_functorch_wrapped_tensor(weight):
            return True  # torch.func.functional_call has put it there for this one call: what is doubted comes back
        if known is None or weight.requires_grad or type(weight) not in PLAIN:
            known = None  # it is quantized now, or is being trained, and U stays what it was
        elif weight.is_meta:
            return False
        with modes.out_of_sight():
            there = weight.contiguous()
            if known is not None and not known.cast(weight.dtype).knows(there):
                if not computes_weight(self.base) or not known.is_nearly(there):  # of casts, it is no cast itself
                    return False
            self.take_witness()
        return True

    def expect_its_weight(self) -> None:
        """Asked by whoever reads the factors together with the weight, or the weight that they were merged into.

        Raises:
            RuntimeError: another weight came than the one that U and sigma are of, or that was merged, or none since
                the layer was emptied; or it is elsewhere (offloaded).
        """
        if weight_of(self.base).is_meta:
            raise RuntimeError(f"{self.name}: {_ELSEWHERE}")
        if not self._in_doubt:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{self.name}: its weight may be another one now; call the model before compiling it")
        if not self._holds_its_weight():
            raise RuntimeError(f"{self.name}: {self._what_is_wrong()}")

    def _what_is_wrong(self) -> str:
        return _OTHER_WEIGHT if self.saved_weight is None else _NOT_THE_MERGED_WEIGHT

    def _identity(self) -> dict[str, object]:
        """What v belongs to: the same numbers in another layer, or with another config, are another function."""
        config = {name: getattr(self.config, name, None) for name in IDENTITY_FIELDS}
        config["fused"] = str(config["fused"])
        config["v_dtype"] = str(config["v_dtype"])
        given = getattr(self.config, "projection_sketch", None)
        return {
            "method": type(self.config).__name__, **config, "module": self.index, "tie group": self.group,
            "projection": None if given is None else given.flatten().tolist(),
            "sketch": basis_sketch(self.singular_basis()).flatten().tolist(),
        }  # fmt: skip

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if "v" in self._parameters and not keep_vars:
            destination[prefix + "v"].tinylora = self._identity()  # kept by pickles and copies of the tensor

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        key, error_messages = prefix + "v", others[-1]
        self.__dict__["_in_doubt"] = error_messages  # the weight comes next, with the base: _doubt_what_was_loaded
        note_change()
        if "v" in self._parameters and key in state_dict:
            ours, theirs = self._identity(), getattr(state_dict[key], "tinylora", None)
            if theirs is None or (ours["projection"] is not None and "projection" not in theirs):
                _warn_of_unlabelled_numbers()
            elif reason := _difference(ours, theirs):
                error_messages.append(f"{key}: {reason}; nothing was loaded into it")
                return
            if not bool(torch.isfinite(state_dict[key]).all()):
                reason = "expected finite numbers, found NaN or infinity"
                error_messages.append(f"{key}: {reason}; nothing was loaded into it")
                return
            if state_dict[key].dtype is not self.v.dtype:  # assign=True would train v in it; the dict is torch's copy
                state_dict[key] = state_dict[key].detach().to(self.v.dtype)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __setattr__(self, name: str, value) -> None:
        if name in ("weight", "bias") and "base" in self._modules:  # they are the base's: tie_weights() sets them here
            setattr(self.base, name, value)
        elif name == "v" and self.__dict__.get("_owner", (self,))[0] is not self and "_is_replica" not in self.__dict__:
            self.owner.v = value  # the group has one, which all its layers show; replicas of DataParallel have theirs
        else:
            super().__setattr__(name, value)
        self.__dict__["_plan"] = self.__dict__["_selection"] = None  # they would keep a bank that was closed
        note_change()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As setting it does: no plan is of another base."""
        super().add_module(name, module)
        note_change()

    @property
    def owner(self) -> TinyLoRALayer:
        """The layer of this tie group that holds ``v``."""
        return self._owner[0]

    @property
    def method(self) -> Method:
        """The config it was built from."""
        if self.config is None:
            raise ValueError(f"{self.name}: it was built without a config, and nothing says what its P' follows from")
        return self.config

    def weight_matrix(self) -> Tensor:
        """The frozen weight as [out, in]; base.kinds.weight_matrix."""
        return weight_matrix(self.base)

    def right_factor(self) -> Tensor:
        """B^T = U^T W, [r, in]: S V^T up to the SVD's residual, and exactly what the update implies."""
        self.expect_its_weight()
        return right_factor(self.basis, self.weight_matrix())

    def singular_basis(self) -> Tensor:
        """U^T [r, out] as files hold it, in the compact form if the layer has parts (method/parts.py)."""
        return compact_basis(self.basis, self.sigma.shape[1], self.parts) if self.parts else self.basis

    def expect_a_rule_for_projections(self) -> None:
        """Raises where P' came with its factors: beside others it would be another function, on the same weight too."""
        if self.method.projection_sketch is not None:
            raise ValueError(
                f"{self.name}: its P' belongs to the factors that its adapter brought, and nothing says what it is for "
                "others; load the weights that the adapter was made for, or call remove_adapter(model) and from_peft "
                "again"
            )

    @torch.no_grad()
    def set_factors(self, basis: Tensor, sigma: Tensor) -> None:
        """Take U^T [r, out] and sigma, of the weight as it is now or those that v was trained with; P' follows."""
        self.expect_a_rule_for_projections()
        projection = finite_projection(self.name, self.method, self.projection_index, sigma, self.base, basis.dtype)
        self.basis.copy_(block_basis(basis, self.parts) if self.parts else basis)
        self.sigma.copy_(sigma)
        self.projection.copy_(projection)
        self._factors_are_of_this_weight()
        take_factors(self)
        note_change()

    def keep(self) -> Callable[[], None]:
        """What puts the vector and the factors back as they are now."""
        names = [name for name in ("basis", "sigma", "projection", "v") if name in (*self._buffers, *self._parameters)]
        tensors = [(getattr(self, name).detach(), getattr(self, name).detach().clone()) for name in names]
        state = {name: self.__dict__[name] for name in ("degenerate", "_factors_of", "_adapted_to", "_in_doubt")}

        @torch.no_grad()
        def put_back() -> None:
            for tensor, was in tensors:
                tensor.copy_(was)
            self.__dict__.update(state)
            take_factors(self)
            note_change()

        return put_back

    def extra_repr(self) -> str:
        rank, features = self.basis.shape
        return f"rank={rank}, out_features={features}, group={self.group}, trained={self.v.numel()}"

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "v" and "_owner" in self.__dict__:
                if "v" in self._owner[0]._parameters:
                    return self._owner[0]._parameters["v"]
                raise
            if name in FORWARDED:
                return getattr(super().__getattr__("base"), name)
            raise

    def _apply(self, fn, recurse=True):
        """Move with the model, but keep v and the factors: bfloat16() must not round, to_empty() not empty them."""

        def keep_values(tensor: Tensor) -> Tensor:
            device = fn(tensor).device
            if tensor.is_meta and device.type != "meta":
                raise RuntimeError(
                    f"{self.name}: its vectors and factors were left on the meta device; load the weights and adapt "
                    "the model after to_empty()"
                )
            return tensor.to(device)

        if recurse:
            self.base._apply(fn)
        moved = super()._apply(keep_values, recurse=False)
        doubt_right(self)  # the weight is the same object, and may hold other values now
        self.__dict__["_in_doubt"] = not self._holds_its_weight()  # e.g. after to_empty()
        note_change()
        return moved


def finite_projection(
    name: str, method: Method, index: int, sigma: Tensor, base: nn.Module, dtype: torch.dtype
) -> Tensor:
    """P' of one module in the dtype of its basis.

    Raises:
        ValueError: alpha, or a ratio of singular values, is too large for the dtype, or sigma is no sigma.
    """
    projection = method.projection(index, sigma, kind_of(base).lookup)
    return as_finite(f"{name}: its projection, alpha times ratios of singular values", projection, dtype)


@contextmanager
def kept_unless_done(layers: Iterable[TinyLoRALayer]) -> Iterator[None]:
    """The layers' vectors and factors as they are, unless the block that changes them comes to its end."""
    kept = [layer.keep() for layer in layers]

    def put_back() -> None:
        for each in kept:
            each()

    with undone_by(put_back):
        yield


def _doubt_what_was_loaded(layer: TinyLoRALayer, incompatible_keys) -> None:
    """Called once the base has its part of a state dict; load_state_dict raises its error with the others."""
    error_messages = layer._in_doubt
    layer.__dict__["_in_doubt"] = not layer._holds_its_weight()
    if layer._in_doubt and isinstance(error_messages, list):
        error_messages.append(f"{layer.name}.weight: {layer._what_is_wrong()}")


def _difference(ours: dict, theirs: dict) -> str | None:
    """In what the numbers of a state dict belong to something else than this layer, one line; None if they do not."""
    for name, value in ours.items():
        if name == "projection" and value is not None:
            if not _is_near(theirs[name], value, PROJECTION_TOLERANCE):
                return "it was trained with other projections P"
        elif name == "sketch":
            if not _is_near(theirs[name], value, SKETCH_TOLERANCE):
                return "it was trained on another base: U is not the same"
        elif theirs.get(name) != value:
            return f"{name} is {theirs.get(name)} there and {value} in this model"
    return None


_without_gradient: set[str] = set()  # what was named already


def _warn_of_a_lost_gradient(name: str, what: str) -> None:
    if what not in _without_gradient:
        _without_gradient.add(what)
        warnings.warn(
            f"{name}: its base ({what}) gives its input no gradient: vectors of layers before it learn nothing; train "
            "on a base that does, and quantise then",
            stacklevel=4,
        )


def _is_near(found: list[float], expected: list[float], tolerance: float) -> bool:
    sketches = (torch.tensor(numbers, device="cpu").view(-1, SKETCH_COLUMNS) for numbers in (found, expected))
    a, b = sketches
    return a.shape == b.shape and compare_sketch(a, b) <= tolerance


@functools.cache
def _warn_of_unlabelled_numbers() -> None:
    warnings.warn(
        "a state dict brought vectors v that do not say what they were trained with (they were cloned, or came from a "
        "file of plain tensors): seed, scaling and base were not compared; save_adapter and load_adapter compare them",
        stacklevel=6,
    )
