"""Small models with the module names of real ones."""
import torch
from torch import nn

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]


class Block(nn.Module):
    """The seven projections of a decoder block around a made-up mixing: every one of them matters to the output."""

    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=bias))
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=bias), nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x):
        x = x + self.o_proj(torch.sigmoid(self.q_proj(x) * self.k_proj(x)) * self.v_proj(x))
        return x + self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class TinyDecoder(nn.Module):
    def __init__(self, blocks: int = 2, width: int = 24, inner: int = 40, vocabulary: int = 17, bias: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, inner, bias) for _ in range(blocks))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, tokens):  # [B, T] -> [B, T, vocabulary]
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def tiny_decoder(seed: int = 0, **kwargs) -> TinyDecoder:
    torch.manual_seed(seed)
    return TinyDecoder(**kwargs)
