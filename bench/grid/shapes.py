"""Linear layers of real models: the only place where benchmark shapes are written down."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

RANK = 2
TOKENS = (1, 8, 128, 512, 2048)
DTYPES = (torch.float32, torch.bfloat16)
NUMBERS = (1, 13)
KINDS = ("q", "k", "o", "gate", "down")


class Decoder(NamedTuple):
    """Widths of a decoder block; qkv_bias as in Qwen2."""

    hidden: int
    key_value: int
    intermediate: int
    qkv_bias: bool


MODELS = {
    "SmolLM2-135M": Decoder(576, 192, 1536, False),
    "Qwen2.5-0.5B": Decoder(896, 128, 4864, True),
    "Qwen2.5-1.5B": Decoder(1536, 256, 8960, True),
    "Llama-3.2-3B": Decoder(3072, 1024, 8192, False),
    "Qwen2.5-7B": Decoder(3584, 512, 18944, True),
}


@dataclass(frozen=True)
class Shape:
    """A linear layer [out_features, in_features] and where it comes from."""

    model: str
    kind: str
    out_features: int
    in_features: int
    bias: bool

    def __str__(self) -> str:
        return f"{self.model} {self.kind} {self.out_features}x{self.in_features}"


@dataclass(frozen=True)
class Case:
    """A layer under `tokens` rows of activations in `dtype`, with `numbers` trained numbers."""

    shape: Shape
    tokens: int
    dtype: torch.dtype
    numbers: int

    @property
    def dtype_name(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]

    def __str__(self) -> str:
        return f"{self.shape}, {self.tokens} tokens, {self.dtype_name}, u={self.numbers}"


def layer(model: str, kind: str) -> Shape:
    d = MODELS[model]
    out_features, in_features = {
        "q": (d.hidden, d.hidden),
        "k": (d.key_value, d.hidden),
        "o": (d.hidden, d.hidden),
        "gate": (d.intermediate, d.hidden),
        "down": (d.hidden, d.intermediate),
    }[kind]
    return Shape(model, kind, out_features, in_features, d.qkv_bias and kind in ("q", "k"))


def full_grid() -> Iterator[Case]:
    """Every case once, ordered so that a run cut short has still seen every model, kind, token count and dtype.

    u only changes the contraction, a few hundred multiply-adds. So the first half of the grid takes each layer, token
    count and dtype once, with u = 1 and u = 13 in a checkerboard; the second half has the other colour. Within a half
    8 and 128 tokens come first, 2048, the dear one, last.
    """
    kinds = ("gate", "q", "down", "k", "o")
    for colour in (0, 1):
        for token_counts in ((8, 128), (1, 512), (2048,)):
            for k, kind in enumerate(kinds):
                for m, model in enumerate(MODELS):
                    for dtype in DTYPES:
                        for tokens in token_counts:
                            index = k + m + DTYPES.index(dtype) + TOKENS.index(tokens) + colour
                            yield Case(layer(model, kind), tokens, dtype, NUMBERS[index % 2])


def quick_grid() -> Iterator[Case]:
    """A dozen cases in which every family is seen: narrow and wide layers, few and many tokens, both dtypes."""
    for model, kind, numbers in (("SmolLM2-135M", "q", 1), ("Qwen2.5-0.5B", "gate", 13), ("Qwen2.5-1.5B", "o", 1)):
        for dtype in DTYPES:
            for tokens in (1, 512):
                yield Case(layer(model, kind), tokens, dtype, numbers)
