"""A key-value cache with room for the tokens to come: transformers' own copies all that it holds for every new one, a
tenth of the time that short replies take on a CPU.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 8  # times the tokens that are appended, and as many more


class RoomyLayer(DynamicLayer):
    """Keys and values are views of buffers with free places behind them; with autograd on, transformers' own."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: dict[str, Tensor] = {}  # [B, H, S + room, D]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, T, D]; all so far [B, H, S + T, D]."""
        if torch.is_grad_enabled() or self.get_seq_length() == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        length, total = held.shape[-2], held.shape[-2] + new.shape[-2]
        buffer = self._buffers.get(name)
        # what is held lies elsewhere once it was selected from or repeated
        fits = buffer is not None and held.data_ptr() == buffer.data_ptr() and len(held) == len(buffer)
        if buffer is None or not fits or total > buffer.shape[-2]:
            room = ROOM * (new.shape[-2] + 1)
            buffer = self._buffers[name] = held.new_empty(*held.shape[:2], total + room, held.shape[-1])
            buffer[..., :length, :] = held
        buffer[..., length:total, :] = new
        return buffer[..., :total, :]


def roomy_cache(config: PretrainedConfig) -> DynamicCache:
    """Every layer keeps all tokens: those of a tree are not in the order in which a sliding window would forget them.

    Raises:
        ValueError: a layer of the model remembers anything but keys and values.
    """
    cache = DynamicCache(config=config)
    if other := {type(layer).__name__ for layer in cache.layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        raise ValueError(f"MODEL: expected layers of attention only, found a cache of {', '.join(sorted(other))}")
    cache.layers = [RoomyLayer() for _ in cache.layers]
    cache.layer_class_to_replicate = RoomyLayer if cache.layer_class_to_replicate else None
    return cache


def local_window(config: PretrainedConfig) -> int | None:
    """Tokens that the model's layers with a sliding window see; None: all layers see all."""
    layers = DynamicCache(config=config).layers
    return min((layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)), default=None)
