"""A decoder of 0.6 million parameters that adds digits modulo 10, for a demo that takes half a minute.

The problem "345_____=" asks for (3 + 4 + 5) mod 10 in a field of eight digits. A careful writer answers with the
running sums, "72#2.": 7, 2, then "#", the result and ".". A hasty one jumps to "#" early. Both appear in the corpus the
checkpoint was trained on (pretrain_tiny.py), so the model can be careful but usually is not, and about half of its
answers are right: what reinforcement learning has to find is a habit, not an ability, and few numbers suffice for that.

The module takes the keyword arguments of a transformers causal language model and needs none of transformers.
"""
from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 128  # of the decoder that is meant where no other is asked for
CHECKPOINT = Path(__file__).with_name("tiny.safetensors")

# One character a token. "_" fills the prompt's field and pads; "#" announces the result; "." ends.
# "+", ":" and the letters are the notation of the corpus's verbose writers.
ALPHABET = "0123456789_=#.+:abcdefgh"
PAD, EQUALS, RESULT, END = (ALPHABET.index(c) for c in "_=#.")
MAX_DIGITS = 8
PROMPT_TOKENS = MAX_DIGITS + 1
MAX_REPLY_TOKENS = 40


def checkpoint(width: int = WIDTH) -> Path:
    """Where the trained decoder of that width lies; not all are in the repository (pretrain_tiny.py trains them)."""
    return CHECKPOINT if width == WIDTH else CHECKPOINT.with_name(f"tiny-{width}.safetensors")


def encode(text: str) -> list[int]:
    """Characters to token ids; ValueError names a character the model does not know."""
    unknown = set(text) - set(ALPHABET)
    if unknown:
        raise ValueError(f"tiny model: expected only the characters {ALPHABET!r}, found {sorted(unknown)}")
    return [ALPHABET.index(c) for c in text]


def decode(ids: list[int]) -> str:
    return "".join(ALPHABET[i] for i in ids)


class Output(NamedTuple):
    logits: Tensor  # [B, T or logits_to_keep, 24]


class KeyValueCache:
    """Keys and values of the positions seen so far, with the methods of transformers' DynamicCache used here."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys and values [B, heads, positions, head dim]

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append [B, heads, T, head dim] to a layer; returns everything it holds."""
        if layer in self.layers:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (keys, values), strict=True))
        self.layers[layer] = keys, values
        return keys, values

    def batch_select_indices(self, rows: Tensor) -> None:
        self.layers = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.layers.items()}


class DecoderLayer(nn.Module):
    """Pre-norm attention and a gated MLP."""

    def __init__(self, index: int, dim: int, heads: int, hidden: int):
        super().__init__()
        self.index, self.heads = index, heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(dim, dim, bias=False))
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cache: KeyValueCache, visible: Tensor) -> Tensor:  # x [B, T, dim]
        y = self.attention_norm(x)
        q, k, v = (self._split(proj(y)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        k, v = cache.update(k, v, self.index)  # [B, heads, S, head dim]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, T, head dim]


class TinyDecoder(nn.Module):
    """Decoder with learned positions; 21 projections of dim to 2.75 dim features, heads of 32."""

    def __init__(self, dim: int = WIDTH, layers: int = 3):
        super().__init__()
        heads, hidden = dim // 32, 11 * dim // 4
        self.tokens = nn.Embedding(len(ALPHABET), dim)
        self.positions = nn.Embedding(PROMPT_TOKENS + MAX_REPLY_TOKENS, dim)
        self.layers = nn.ModuleList(DecoderLayer(i, dim, heads, hidden) for i in range(layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.lm_head = nn.Linear(dim, len(ALPHABET), bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # embeddings and head small; projections 0.7 / sqrt(fan in)
                small = not name.startswith("layers.")
                nn.init.normal_(parameter, std=0.04 if small else 0.7 / math.sqrt(parameter.shape[1]))

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        logits_to_keep: int = 0,
    ) -> Output:
        """As in transformers: input_ids [B, T]; attention_mask [B, past + T], or [B, 1, T, past + T] to be added to the
        scores; logits_to_keep 0 keeps all.
        """
        cache = KeyValueCache() if past_key_values is None else past_key_values
        new, past = input_ids.shape[1], cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + new).unsqueeze(0)
        visible = torch.ones(new, past + new, dtype=torch.bool).tril(past)  # [T, S]
        if attention_mask is not None and attention_mask.dim() == 4:
            visible = attention_mask
        elif attention_mask is not None:
            visible = visible & attention_mask.bool()[:, None, None, :]  # [B, 1, T, S]
        x = self.tokens(input_ids) + self.positions(position_ids)
        for layer in self.layers:
            x = layer(x, cache, visible)
        return Output(self.lm_head(self.norm(x[:, -logits_to_keep:])))


def load_checkpoint(path: Path = CHECKPOINT) -> TinyDecoder:
    """The trained decoder, float32; the file holds its weights in float16."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: the tiny decoder is in the sdist and in a checkout, not in a wheel, and of its widths only some; "
            f"put the file there, or train it: python -m demo.pretrain_tiny --width WIDTH"
        )
    weights = load_file(path)
    model = TinyDecoder(dim=weights["tokens.weight"].shape[1])
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval()
