"""Adapters of different seeds in one bank: their random P differ, so no projection is shared.

A frozen adapter is contracted as it comes in, M = sum_i v_i P'_i: 4 r r bytes a layer, whatever u is. Of one that is
trained, M follows v at every call, so P' stays: u times as much. The kernels take M itself either way, in the form of
LoRA-XS: a vector of r * r numbers, multiplied elementwise with a projection of ones.
"""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..base.kinds import kind_of
from ..common.finite import as_finite
from ..layers.layer import TinyLoRALayer
from ..method.config import TinyLoRAConfig

SEEDS_KEPT = 8  # projections of so many seeds are kept for the next adapter; Philox takes about 0.1 ms a layer


class OwnProjections:
    """P' or M of every adapter and layer of a bank, on the CPU.

    Args:
        layers: of the bank; all adapted with one TinyLoRAConfig.
        capacity: K.
        trainable: keep P' and derive M where it is asked for.

    Raises:
        ValueError: the layers come from something else than a TinyLoRAConfig, so no seed makes their P, or are adapted
            part by part.
    """

    def __init__(self, layers: Sequence[TinyLoRALayer], capacity: int, trainable: bool):
        config = layers[0].config
        if not isinstance(config, TinyLoRAConfig):
            found = "no config" if config is None else f"a {type(config).__name__}"
            raise ValueError(f"own_seeds: expected a model of apply_tiny_lora, with P from a seed, found {found}")
        fused = next((layer.name for layer in layers if layer.parts), None)
        if fused is not None:
            raise ValueError(
                f"own_seeds: expected one rank for all layers, found {fused} adapted part by part; adapt it without "
                "fused, or share the model's seed"
            )
        self.position = {layer: position for position, layer in enumerate(layers)}
        self._sigma = [_Known.of(layer.sigma) for layer in layers]  # that P' and M were made with
        self.trainable = trainable
        u, r = config.trainable_dim, config.frozen_rank
        shape = (len(layers), capacity, u, r * r) if trainable else (len(layers), capacity, r * r)
        dtype = layers[0].basis.dtype
        self._held = torch.zeros(shape, dtype=dtype, device="cpu")  # P' [L, K, u, r r], or M [L, K, r r]
        self.ones = torch.ones(r, r, dtype=dtype, device="cpu")
        self._config = config
        self.model_seed = config.seed
        self.seeds = [config.seed] * capacity  # of each slot
        self.of_seed = functools.lru_cache(SEEDS_KEPT)(self._of_seed)

    def _of_seed(self, seed: int) -> Tensor:
        """P' of every layer, [L, u, r * r] float64."""
        config = dataclasses.replace(self._config, seed=seed)
        projections = [
            config.projection(layer.projection_index, layer.sigma.cpu(), kind_of(layer.base).lookup)
            for layer in self.position
        ]
        return torch.stack(projections).flatten(2)

    def write(self, what: str, slot: int, vectors: Mapping[int, Tensor], seed: int) -> None:
        """Take in the adapter of a slot, which errors call `what`; vectors: tie group -> [u], as the bank stores them.

        Raises:
            ValueError: its update is not finite; nothing has changed then.
        """
        projections = self.of_seed(seed)  # [L, u, r r]
        if not self.trainable:
            by_layer = torch.stack([vectors[layer.group] for layer in self.position]).double()  # [L, u]
            # M = sum_i v_i P'_i
            projections = (by_layer.unsqueeze(1) @ projections).squeeze(1)
        self._held[:, slot] = as_finite(f"{what}: its update", projections, self._held.dtype)
        self.seeds[slot] = seed

    def has_other_factors(self) -> bool:
        """Whether a layer's sigma, of which P' is made, is another one than it was (refresh_factors)."""
        return not all(known.is_of(layer.sigma) for known, layer in zip(self._sigma, self.position, strict=True))

    def expect_factors(self, layer: TinyLoRALayer) -> None:
        """Raises in a block that was open when the factors of the layer were computed again."""
        if not self._sigma[self.position[layer]].is_of(layer.sigma):
            raise RuntimeError(f"{layer.name}: its factors were computed again while a block is open; close it first")

    def take_factors(self) -> None:
        """Every adapter was written with the sigma that the layers have now."""
        self._sigma = [_Known.of(layer.sigma) for layer in self.position]

    def mixing(self, slots: Tensor) -> Tensor:
        """M of the slots [S] for every layer, [L, S, r * r], a copy; of a frozen bank."""
        return self._held[:, slots]

    def live_mixing(self, layer: TinyLoRALayer, table: Tensor) -> Tensor:
        """M of every adapter for one layer, [K, r * r], with the graph to the bank's table [K, u]."""
        projections = self._held[self.position[layer]].to(table.device)  # [K, u, r r]
        return (table.to(projections.dtype).unsqueeze(1) @ projections).squeeze(1)


@dataclasses.dataclass
class _Known:
    """A tensor as it was. Every block of the bank asks: numbers are looked at only where it was moved or written."""

    tensor: Tensor
    version: int | None
    numbers: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> _Known:
        return cls(tensor, _version(tensor), tensor.detach().to("cpu", copy=True))

    def is_of(self, tensor: Tensor) -> bool:
        if tensor is self.tensor and self.version is not None and _version(tensor) == self.version:
            return True
        if not torch.equal(tensor.detach().cpu(), self.numbers):
            return False
        self.tensor, self.version = tensor, _version(tensor)
        return True


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
