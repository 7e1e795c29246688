"""One adapted layer: a frozen module whose output is linear in its weight, and the in-place update of that output."""
from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ..base.kinds import FORWARDED, has_fresh_output, kind_of, weight_matrix
from ..base.weights import PLAIN, bias_offset, is_sharded, right_factor
from ..functional import tiny_lora_linear, tiny_lora_update
from ..linear.plan import Chosen, has_hooks, is_plain_linear, make_plan, note_change, right_for
from ..method.parts import block_basis, compact_basis
from .channels import update_channels


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
        config: what it was built from, a method.config.Method.
        degenerate: the singular subspace is arbitrary (equal singular values): files must carry the basis.
        parts: the output rows of each part of a fused projection that is adapted part by part.
        projection_index: of its P, the first part's if there are several; default index.
    """

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
        config=None,
        degenerate: bool = False,
        parts: tuple[int, ...] | None = None,
        projection_index: int | None = None,
    ):
        super().__init__()
        self.__dict__["_plan"] = None  # how the last call ran, if the next ones can run like it
        self.__dict__["_right"] = None  # B^T and the weight it was computed from: linear.plan.right_for
        self.__dict__["_selection"] = None  # the bank's at the last call
        self.base = base
        self.name, self.index, self.group, self.config = name, index, group, config
        self.degenerate = degenerate
        self.parts = parts
        self.projection_index = index if projection_index is None else projection_index
        self.enabled = True  # False: the bare base, e.g. while the update is merged into its weight
        self.saved_weight: Tensor | None = None  # the base weight's own bits while it is merged
        self.bank = None  # the AdapterBank that holds other vectors for rows of a batch
        self.backend = getattr(config, "backend", None)
        device = base.weight.device
        self.register_buffer("basis", basis.to(device).contiguous(), persistent=False)
        self.register_buffer("sigma", sigma.to(device), persistent=False)
        self.register_buffer("projection", projection.to(self.basis).contiguous(), persistent=False)
        self.register_buffer("offset", bias_offset(self.basis, getattr(base, "bias", None)), persistent=False)
        if isinstance(v, TinyLoRALayer):
            self._owner = (v,)  # in a tuple, or nn.Module would register the owner as a child
        else:
            self.register_parameter("v", v)
            self._owner = (self,)
        self._fresh_output = has_fresh_output(base)
        kind = kind_of(base)
        channels_first = kind is not None and kind.channels_first
        self._update = functools.partial(update_channels, 1 - base.weight.dim()) if channels_first else tiny_lora_update

    def forward(self, *args, **kwargs) -> Tensor:
        if not torch.compiler.is_compiling() and self._plan is not None and len(args) == 1 and not kwargs:
            y = self._plan.run(args[0])
            if y is not None:
                return y
        return self._forward(*args, **kwargs)

    def _forward(self, *args, **kwargs) -> Tensor:
        """The call with all questions asked."""
        # Straight from the dicts: through nn.Module.__getattr__ each name costs most of a microsecond, at every token.
        base, buffers = self._modules["base"], self._buffers
        if not self.enabled:
            return base(*args, **kwargs)
        basis, projection = buffers["basis"], buffers["projection"]
        v, adapter_ids, chosen = self._owner[0]._parameters["v"], None, None
        if self.bank is not None and (selection := self.bank.selection()) is not None:
            chosen = Chosen(selection, *selection.of(self, basis.device))
            _, v, projection, adapter_ids = chosen
        if v.device != basis.device:
            v = v.to(basis.device)  # a tie group that spans devices
        fresh = self._fresh_output and not has_hooks(base)
        if fresh and len(args) == 1 and not kwargs and is_plain_linear(base, args[0]):
            weight, bias = base._parameters["weight"], base._parameters["bias"]
            right = right_for(self, args[0])
            if self._worth_a_plan(chosen):
                self.__dict__["_plan"] = make_plan(self, self._owner[0], right, chosen)
            return tiny_lora_linear(
                args[0], weight, bias, basis, v, projection, buffers["offset"], adapter_ids, right=right,
                backend=self.backend,
            )  # fmt: skip
        factors = basis, v, projection, buffers["offset"], adapter_ids
        if is_sharded(base._parameters.get("weight")):
            from .sharded import sharded_forward  # loads torch.distributed: only where it is in use

            update = functools.partial(self._update, backend=self.backend)
            return sharded_forward(base, self.name, factors, update, self.backend, args, kwargs)
        inplace = fresh and type(base._parameters.get("weight")) in PLAIN
        return self._update(base(*args, **kwargs), *factors, inplace=inplace, backend=self.backend)

    def _worth_a_plan(self, chosen: Chosen | None) -> bool:
        """Whether calls like this one are to be expected: of a bank's block from its second on, as in generation."""
        if chosen is None:
            return self.bank is None
        before, self.__dict__["_selection"] = self._selection, chosen.selection
        return before is chosen.selection

    def __getstate__(self) -> dict:
        """Copies and pickles carry no bank: it belongs to the layers of one model in one process."""
        return {**self.__dict__, "bank": None, "_plan": None, "_right": None, "_selection": None}

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__(name, value)
        self.__dict__["_plan"] = self.__dict__["_selection"] = None  # they would keep a bank that was closed
        note_change()

    @property
    def owner(self) -> TinyLoRALayer:
        """The layer of this tie group that holds ``v``."""
        return self._owner[0]

    def weight_matrix(self) -> Tensor:
        """The frozen weight as [out, in]; base_layers.weight_matrix."""
        return weight_matrix(self.base)

    def right_factor(self) -> Tensor:
        """B^T = U^T W, [r, in]: S V^T up to the SVD's residual, and exactly what the update implies."""
        return right_factor(self.basis, self.weight_matrix())

    def singular_basis(self) -> Tensor:
        """U^T [r, out] as files hold it, in the compact form if the layer has parts (method/parts.py)."""
        return compact_basis(self.basis, self.sigma.shape[1], self.parts) if self.parts else self.basis

    @torch.no_grad()
    def set_factors(self, basis: Tensor, sigma: Tensor) -> None:
        """Take the U^T [r, out] and sigma that the numbers were trained with: P' and the offset follow from them."""
        self.basis.copy_(block_basis(basis, self.parts) if self.parts else basis)
        self.sigma.copy_(sigma)
        self.projection.copy_(self.config.projection(self.projection_index, sigma, kind_of(self.base).lookup))
        if self.offset is not None:
            self.offset.copy_(bias_offset(self.basis, self.base.bias))

    def extra_repr(self) -> str:
        rank, features = self.basis.shape
        return f"rank={rank}, out_features={features}, group={self.group}, trained={self.v.numel()}"

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "v" and "_owner" in self.__dict__:
                return self._owner[0]._parameters["v"]
            if name in FORWARDED:
                return getattr(super().__getattr__("base"), name)
            raise

    def _apply(self, fn, recurse=True):
        """Move with the model, but keep v and the factors in their own dtype: model.bfloat16() must not round v."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype is tensor.dtype else tensor.to(moved.device)

        if recurse:
            self.base._apply(fn)
        moved = super()._apply(keep_dtype, recurse=False)
        self.__dict__["_right"] = None  # the weight is the same object, and may hold other values now
        note_change()
        return moved
