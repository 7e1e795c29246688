"""A key-value cache with room for the tokens to come: transformers' own copies all that it holds for every new one, a
tenth of the time that short replies take on a CPU.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 16  # tokens


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
            buffer = self._buffers[name] = held.new_empty(*held.shape[:2], total + ROOM, held.shape[-1])
            buffer[..., :length, :] = held
        buffer[..., length:total, :] = new
        return buffer[..., :total, :]


def roomy_cache(config: PretrainedConfig) -> DynamicCache:
    """Layers that keep all tokens have room; those with a sliding window are transformers'."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
