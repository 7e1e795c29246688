"""Sequences that begin alike as trees of tokens, each token computed once by the model.

A row of the batch holds the trees of several prompts. What a token sees is a mask: the tokens on its way to the root,
wherever in the row they lie, and its position is its depth. The key-value cache is only ever appended to: a reply that
branches off copies nothing, and one that has ended takes no part in what follows. With autograd on, the cache carries
the graph, and a token that several sequences share gets the sum of their gradients.
"""
from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tinylora_kernels.bank.bank import AdapterBank

from .models import LanguageModel

ROOT = -1


class Tree:
    """The tokens of one row: node i continues node parents[i] by tokens[i]; parents come first."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._children: dict[tuple[int, int, bool], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def child(self, parent: int, token: int, reply: bool = True) -> int:
        """The node that continues parent (or ROOT) by this token.

        What replies is another node than what goes on as a longer prompt does: replies then grow by new nodes only.
        """
        found = self._children.setdefault((parent, token, reply), len(self))
        if found == len(self):
            self.tokens.append(token)
            self.parents.append(parent)
        return found

    def path(self, parent: int, tokens: Sequence[int], reply: bool = True) -> list[int]:
        """The nodes of a sequence that goes on from parent."""
        nodes = []
        for token in tokens:
            parent = self.child(parent, token, reply)
            nodes.append(parent)
        return nodes


class Forest:
    """Rows of trees run through a model.

    Args:
        model: whose module takes an attention mask [B, 1, T, S] that is added to the scores.
        adapters: [B] of each row, as in AdapterBank.use; all alike where there is no bank.
        bank: whose adapters they are.
        beginning: tokens that all sequences of all rows begin with: computed once for each adapter.
    """

    def __init__(
        self, model: LanguageModel, adapters: Tensor, bank: AdapterBank | None = None, beginning: Sequence[int] = ()
    ):
        self.model, self.bank = model, bank
        self.cache = model.new_cache()
        self.adapters, row = adapters.unique(return_inverse=True)
        self.trees = [Tree() for _ in self.adapters]
        self._columns: list[list[int]] = [[] for _ in self.adapters]  # of each node in its row
        self._depths: list[list[int]] = [[] for _ in self.adapters]
        self._sees = np.zeros((len(self.adapters), 0, 0), dtype=bool)  # [B, S, S] by column: itself and its ancestors
        if beginning:
            for tree in self.trees:
                tree.path(ROOT, beginning, reply=False)
            self.run([[] for _ in self.trees])
        if row.tolist() != list(range(len(self.trees))):
            self._select_rows(row)
        self.adapters = adapters

    def _select_rows(self, row: Tensor) -> None:
        """A row for each of these: all hold one path from the root so far."""
        if self.trees[0].tokens:
            self.cache.batch_select_indices(row.to(self.model.device))
        beginning = self.trees[0].tokens
        self.trees = [Tree() for _ in row]
        for tree in self.trees:
            tree.path(ROOT, beginning, reply=False)
        self._columns = [list(self._columns[0]) for _ in row]
        self._depths = [list(self._depths[0]) for _ in row]
        self._sees = self._sees[row.numpy()]

    def run(self, wanted: Sequence[Sequence[int]]) -> Tensor:
        """Compute the nodes that are new.

        Args:
            wanted: for each row those of them whose scores are asked for.

        Returns:
            [B, K, V], K as many as the row that wants most; the scores of a row's n wanted nodes are its last n, in
            the order of wanted.
        """
        width = max(len(tree) - len(done) for tree, done in zip(self.trees, self._columns, strict=True))
        width += self.bank is not None and width == len(self.trees)  # a square could be either way around
        past = self._sees.shape[1]
        size = len(self.trees), width
        tokens, positions = torch.full(size, self.model.pad_id), torch.zeros(size, dtype=torch.long)
        sees = np.zeros((len(self.trees), past + width, past + width), dtype=bool)
        sees[:, :past, :past] = self._sees
        sees[:, range(past, past + width), range(past, past + width)] = True  # padding too: a softmax needs something
        for row, (tree, columns, depths) in enumerate(zip(self.trees, self._columns, self._depths, strict=True)):
            new = range(len(columns), len(tree))
            last = {node: width - len(wanted[row]) + i for i, node in enumerate(wanted[row])}
            free = iter(range(width - len(new), width))
            for node in new:
                column = last[node] if node in last else next(free)
                columns.append(past + column)
                parent = tree.parents[node]
                if parent != ROOT:
                    sees[row, past + column] |= sees[row, columns[parent]]
                depths.append(0 if parent == ROOT else depths[parent] + 1)
                tokens[row, column], positions[row, column] = tree.tokens[node], depths[node]
        self._sees = sees
        if self.model.window is not None and max(map(max, self._depths)) >= self.model.window:
            raise ValueError(f"{self.model.name}: its attention sees {self.model.window} tokens, sequences are longer")
        keep = max(1, max(map(len, wanted)))
        return self._forward(tokens, positions, torch.from_numpy(sees[:, past:]), keep)

    def _forward(self, tokens: Tensor, positions: Tensor, sees: Tensor, keep: int) -> Tensor:
        device, dtype = self.model.device, self.model.dtype
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
        with contextlib.nullcontext() if self.bank is None else self.bank.use(self.adapters):
            output = self.model.module(
                input_ids=tokens.to(device),
                attention_mask=mask.unsqueeze(1).to(device),
                position_ids=positions.to(device),
                past_key_values=self.cache,
                logits_to_keep=keep,
            )
        return output.logits
