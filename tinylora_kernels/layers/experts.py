"""Adapted experts: transformers' own forward, with the update after each of its two grouped products.

transformers sorts the routed tokens by expert, so that the rows of one expert lie side by side; every expert's update
is then one call on its rows, in place. All of a stack's updates are one node of the graph, which saves r numbers a row.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..base.attributes import bias_of
from ..base.experts import StackedExperts, stack_names
from ..base.weights import bias_offset
from ..common import modes
from ..ops import BACKENDS, choose, reference, refuse_second_derivatives, run_update
from ..ops.schema import accumulation_dtype
from .layer import TinyLoRALayer


class AdaptedExperts(nn.Module):
    """A stack of experts with an adapted layer for each of its matrices, or for some of them.

    The frozen module stays as it is under ``base``, and its attributes are readable through this one; the layers are
    under their stack's name and the expert's number, ``gate_up_proj.0`` and on. Whatever experts implementation the
    model's config asks for, the grouped one runs here ("grouped_mm"; all compute the same function), until the update
    is merged. Hooks and a forward put on the frozen module itself are passed by.

    Args:
        base: the experts module.
        layers: adapted ExpertSlices of base by their names below it.
    """

    base: StackedExperts

    def __init__(self, base: StackedExperts, layers: Mapping[str, TinyLoRALayer]):
        super().__init__()
        # Where the module comes from; at the head of this file it would make transformers a requirement.
        from transformers.integrations.moe import grouped_mm_experts_forward

        self._forward = grouped_mm_experts_forward
        self.training = base.training
        self.base = base  # before the layers: what is loaded or moved is there when they are asked whose it is
        for stack in stack_names(base):
            own = {name.rpartition(".")[2]: layer for name, layer in layers.items() if name.startswith(stack + ".")}
            if own:
                self._modules[stack] = nn.ModuleDict(own)  # add_module finds the base's attribute of this name

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, h], top_k_index [tokens, k] experts, top_k_weights [tokens, k] -> [tokens, h]."""
        layers = [layer for stack in stack_names(self.base) for layer in self.layers_of(stack).values()]
        on = [layer.is_on() for layer in layers]
        for layer, is_on in zip(layers, on, strict=True):
            if is_on or layer.saved_weight is not None:
                layer.expect_its_weight()
        if not any(on):
            return self.base(hidden_states, top_k_index, top_k_weights)  # merged: the frozen module as it was
        seen = _WithUpdates(self, _Routing(top_k_index, self.base.num_experts))
        try:
            output = self._forward(seen, hidden_states, top_k_index, top_k_weights)
        except NotImplementedError as error:
            if forward_ad._current_level < 0:
                raise
            raise RuntimeError(
                "experts: torch carries no tangent of forward mode through their grouped product; use torch.func.grad, "
                "vjp or jacrev instead of jvp, jacfwd or dual numbers"
            ) from error
        if seen.updated != list(stack_names(self.base)):
            raise RuntimeError(
                f"experts: expected transformers to run {' and '.join(stack_names(self.base))} through the experts "
                f"interface of version 5.23, found {seen.updated}; this version of transformers is not supported"
            )
        return output

    def layers_of(self, stack: str) -> Mapping[str, TinyLoRALayer]:
        """Expert's number -> adapted layer; empty where the stack is not adapted."""
        return cast(Mapping[str, TinyLoRALayer], self._modules.get(stack, {}))

    def updated(self, stack: str, y: Tensor, routing: _Routing) -> Tensor:
        """The output [rows, D] of one grouped product, rows sorted by expert, with every expert's update."""
        vectors: dict[Tensor, int] = {}  # every trained tensor once, in order of first use
        pieces = []
        for name, layer in self.layers_of(stack).items():
            start, end = routing.rows_of(int(name))
            if layer.is_on() and start < end:
                pieces.append(_piece(layer, start, end, y, vectors, routing))
        if not pieces:
            return y
        bias = self.base._parameters.get(f"{stack}_bias")
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{next(iter(self.layers_of(stack).values())).name}: expected a frozen {stack}_bias, found one that is "
                "trained (c = b U is taken for a constant here); freeze it with requires_grad_(False)"
            )
        pieces.sort(key=lambda piece: piece.rows.start)
        y = y if y.stride(-1) == 1 else y.contiguous()
        accumulate = accumulation_dtype(y.dtype)
        ready = [v.to(device=y.device, dtype=accumulate) for v in vectors]
        wanting = torch.is_grad_enabled() and (y.requires_grad or any(v.requires_grad for v in ready))
        if wanting and not modes.differentiated_by_torch():
            return _ExpertsUpdate.apply(y, pieces, *ready)
        return _update_pieces(y, pieces, ready)[0]

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)


class _Routing:
    """Which rows belong to which expert, and to which sample of the batch, after transformers' sort by expert."""

    def __init__(self, top_k_index: Tensor, experts: int):
        if torch._C._functorch.is_batchedtensor(top_k_index):
            raise RuntimeError(
                "experts: expected one routing of the tokens, found one for each sample of a torch.func.vmap; call the "
                "model once for each sample"
            )
        self._index = top_k_index
        counts = top_k_index.reshape(-1).bincount(minlength=experts)
        self._ends = [0, *counts.cumsum(0).tolist()]  # one synchronisation with the device

    def rows_of(self, expert: int) -> tuple[int, int]:
        return self._ends[expert], self._ends[expert + 1]

    @property
    def tokens(self) -> int:
        return self._index.shape[0]

    def per_row(self, adapter_ids: Tensor) -> Tensor:
        """Ids [B] of equal shares of the tokens -> [rows], in the order of the sorted rows."""
        order = torch.sort(self._index.reshape(-1))[1]  # the very call that transformers sorts by
        return adapter_ids[order // self._index.shape[1] // (self.tokens // len(adapter_ids))]


@dataclass
class _Piece:
    """The rows of one expert and its factors."""

    rows: slice
    vector: int  # position among the vectors
    basis: Tensor  # [r, D]
    projection: Tensor  # [u, r, r] or [r, r]
    offset: Tensor | None  # [r]
    adapter_ids: Tensor | None  # [rows]
    backend: str

    def update(self, y: Tensor, vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(the updated y[rows], t [rows, r]): as ops.run_update has it, in plain operations for transforms."""
        factors = self.basis, vectors[self.vector], self.projection, self.offset, None, self.adapter_ids
        if modes.differentiated_by_torch():
            return reference.updated(y[self.rows], *factors)
        return run_update(BACKENDS[self.backend], y[self.rows], *factors)


def _update_pieces(y: Tensor, pieces: list[_Piece], vectors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(y with every piece updated, the t of each): y itself, in place; where a piece may not be, a fresh tensor."""
    fresh = modes.seen_by_a_mode() or torch.compiler.is_compiling() or modes.differentiated_by_torch()
    parts, ts, begun = [], [], 0  # the updated pieces and what lies between them
    for piece in pieces:
        part, t = piece.update(y, vectors)
        ts.append(t)
        parts += [y[begun : piece.rows.start], part]
        begun = piece.rows.stop
    return (torch.cat([*parts, y[begun:]]) if fresh else y), ts


def _piece(
    layer: TinyLoRALayer, start: int, end: int, y: Tensor, vectors: dict[Tensor, int], routing: _Routing
) -> _Piece:
    accumulate = accumulation_dtype(y.dtype)
    v: Tensor = layer.v
    projection, ids = layer.projection, None
    if layer.bank is not None and (selection := layer.bank.selection()) is not None:
        # transformers flattens the tokens [b, T] before it routes them
        _, v, projection, ids, _ = selection.of(layer, y.device, (routing.tokens,), flattened=True)
        ids = routing.per_row(ids)[start:end].contiguous()
    basis, projection = layer.basis.to(accumulate), projection.to(accumulate)
    offset = bias_offset(basis, bias_of(layer.base))
    backend = choose(y.device.type, y.dtype, basis.shape[0], layer.backend)
    return _Piece(slice(start, end), vectors.setdefault(v, len(vectors)), basis, projection, offset, ids, backend)


class _ExpertsUpdate(torch.autograd.Function):
    """y[rows of e] <- y + ((y U_e - c_e) M_e^T) U_e^T for every expert e, in place, with gradients into y and all v."""

    @staticmethod
    def forward(ctx, y: Tensor, pieces: list[_Piece], *vectors: Tensor) -> Tensor:
        out, ts = _update_pieces(y, pieces, vectors)
        if out is y:
            ctx.mark_dirty(y)
        ctx.pieces = pieces
        ctx.save_for_backward(*ts, *vectors)
        return out

    @staticmethod
    def backward(ctx, g: Tensor):
        refuse_second_derivatives("adapted experts")
        g, plain = g.contiguous(), modes.is_taken_apart(g)
        saved = ctx.saved_tensors  # read once: checkpointing unpacks them at every reading
        ts, vectors = saved[: len(ctx.pieces)], saved[len(ctx.pieces) :]
        wanted = zip(vectors, ctx.needs_input_grad[2:], strict=True)
        gradients = [torch.zeros_like(v) if needed else None for v, needed in wanted]
        g0 = g.clone() if ctx.needs_input_grad[0] else None
        for piece, t in zip(ctx.pieces, ts, strict=True):
            dv = gradients[piece.vector]
            backend = reference if plain else BACKENDS[piece.backend]
            part, d = backend.update_backward(
                g[piece.rows], piece.basis, vectors[piece.vector], piece.projection, None if dv is None else t,
                piece.adapter_ids, g0 is not None,
            )  # fmt: skip
            if g0 is not None:
                g0[piece.rows] = part
            if dv is not None:
                gradients[piece.vector] = dv + d
        return g0, None, *gradients


class _WithUpdates:
    """The frozen experts as transformers' forward reads them, but for what follows either product."""

    has_post_expert_norm = True  # the place after the second product

    def __init__(self, adapted: AdaptedExperts, routing: _Routing):
        self._adapted, self._routing = adapted, routing
        self.updated: list[str] = []

    def __getattr__(self, name: str):
        return getattr(self._adapted.base, name)

    def _apply_gate(self, y: Tensor) -> Tensor:
        return self._adapted.base._apply_gate(self._update("gate_up_proj", y))

    def act_fn(self, y: Tensor) -> Tensor:
        """Called here only where there is no gate: a gate calls the frozen module's own."""
        return self._adapted.base.act_fn(self._update("up_proj", y))

    def post_expert_norm(self, y: Tensor) -> Tensor:
        y = self._update("down_proj", y)
        return self._adapted.base.post_expert_norm(y) if self._adapted.base.has_post_expert_norm else y

    def _update(self, stack: str, y: Tensor) -> Tensor:
        self.updated.append(stack)
        return self._adapted.updated(stack, y, self._routing)
