"""Sampling and scoring completions, each token computed once.

Prompts of a batch mostly begin alike (a system prompt, the question's wording), the samples of one prompt share all of
it, and often much of what they answer. Both the sampler and the scorer walk the trees that these sequences form
(trees.py). For 4 prompts of 45 tokens with 8 samples of 12 each that is about 280 tokens in place of 1,800.

Prompts may run different adapters of a bank: then the common beginning is computed once for each adapter.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinylora_kernels.bank.bank import AdapterBank
from tinylora_kernels.rl import token_log_probs

from .models import LanguageModel
from .trees import ROOT, Forest

ROW = 512  # tokens of a row of trees, about: each pays for the masked others


@dataclass
class Completions:
    """Sampled replies; the samples of one prompt are consecutive rows."""

    tokens: Tensor  # [P * n, T] ids, the end token included, padding after it
    mask: Tensor  # [P * n, T] True for the reply's tokens
    samples: int  # n

    def select_prompts(self, prompts: Tensor) -> Completions:
        """The rows of the given prompts [K], and no more columns than they need."""
        rows = (prompts.unsqueeze(1) * self.samples + torch.arange(self.samples)).flatten()
        mask = self.mask[rows]
        width = max(1, int(mask.any(dim=0).sum()))
        return Completions(self.tokens[rows][:, :width], mask[:, :width], self.samples)


@dataclass(frozen=True)
class Assignment:
    """The adapter of a bank that each prompt, and each of its replies, runs."""

    bank: AdapterBank
    ids: Tensor  # [P] as in AdapterBank.use


class Replies:
    """Prompts and their replies to come as trees, several to a row; a row has one adapter.

    Attributes:
        forest: whose rows they are.
        rows, ends: [P * n] of each reply, its row and the node of its prompt's last token there.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        samples: int,
        length: int,
        adapters: Assignment | None = None,
    ):
        """samples: n; length: of a reply, in tokens, about."""
        bank, ids = (adapters.bank, adapters.ids) if adapters else (None, torch.zeros(len(prompts)).long())
        shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)  # leave each prompt a token
        self.rows = [0] * (len(prompts) * samples)
        of_rows: list[int] = []  # the adapter
        for adapter in ids.unique().tolist():
            own = (ids == adapter).nonzero().squeeze(1).tolist()
            tokens = sum(len(prompts[i]) - shared + samples * length for i in own)
            units = len(own) if tokens <= len(own) * ROW else len(own) * samples  # that are not torn apart
            count = min(units, -(-tokens // ROW))
            for k, reply in enumerate(i * samples + sample for i in own for sample in range(samples)):
                self.rows[reply] = len(of_rows) + k * units // (len(own) * samples) * count // units
            of_rows += [adapter] * count
        self.forest = Forest(model, torch.tensor(of_rows), bank, prompts[0][:shared])
        self.ends = [
            self.forest.trees[row].path(ROOT, prompts[reply // samples], reply=False)[-1]
            for reply, row in enumerate(self.rows)
        ]


class Wanted:
    """Nodes whose scores are wanted of a pass, each once, and where they are in what it returns."""

    def __init__(self, rows: int):
        self.nodes: list[list[int]] = [[] for _ in range(rows)]
        self._known: dict[tuple[int, int], int] = {}
        self._most = 0

    def add(self, row: int, node: int) -> None:
        if (row, node) not in self._known:
            self._known[row, node] = len(self.nodes[row])
            self.nodes[row].append(node)
            self._most = max(self._most, len(self.nodes[row]))

    def index(self, row: int, node: int) -> int:
        """In the scores [B, K, V] seen as [B * K, V]."""
        return (row + 1) * self._most - len(self.nodes[row]) + self._known[row, node]


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    max_new_tokens: int,
    generator: torch.Generator | None = None,
    *,
    uniform: Tensor | None = None,
    adapters: Assignment | None = None,
) -> Completions:
    """One reply for each prompt and each temperature; 0 is greedy.

    Args:
        prompts: P lists of token ids.
        temperatures: n of them: [0.7] * 8 samples eight replies, [0, 0.7] one greedy and one sampled.
        max_new_tokens: replies end at the model's end token or here.
        generator: of the samples.
        uniform: [P * n, max_new_tokens] float64 in [0, 1), in place of a generator: what a reply is then does not
            depend on the other replies of the batch.
        adapters: of the prompts.
    """
    samples, total = len(temperatures), len(prompts) * len(temperatures)
    replies = Replies(model, prompts, samples, max_new_tokens, adapters)
    trees, row, node = replies.forest.trees, replies.rows, replies.ends
    if uniform is None:
        uniform = torch.rand(total, max_new_tokens, generator=generator, dtype=torch.float64)
    temperature = torch.tensor(temperatures).repeat(len(prompts))  # [B]
    tokens = torch.full((total, max_new_tokens), model.pad_id)
    mask = torch.zeros(total, max_new_tokens, dtype=torch.bool)
    open_ = list(range(total))
    for step in range(max_new_tokens):
        wanted = Wanted(len(trees))
        for reply in open_:
            wanted.add(row[reply], node[reply])
        scores = replies.forest.run(wanted.nodes).flatten(0, 1)  # [B * K, V]
        places = torch.tensor([wanted.index(row[reply], node[reply]) for reply in open_])
        chosen = draw(scores, places, temperature[open_], uniform[open_, step])
        tokens[open_, step] = chosen
        mask[open_, step] = True
        going_on = []
        for reply, token in zip(open_, chosen.tolist(), strict=True):
            if token != model.end_id:
                node[reply] = trees[row[reply]].child(node[reply], token)
                going_on.append(reply)
        open_ = going_on
        if not open_:
            break
    return Completions(tokens, mask, samples).select_prompts(torch.arange(len(prompts)))


def draw(scores: Tensor, places: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """A token for each reply [B], on the CPU.

    Args:
        scores: [N, V].
        places: [B] which of them each reply's are.
        temperature: [B], 0 takes the best.
        uniform: [B] float64 in [0, 1). Sampling inverts the cumulative distribution: one random number a reply, where
            torch.multinomial draws V.
    """
    chosen = torch.empty(len(places), dtype=torch.long)
    for value in temperature.unique().tolist():
        own = temperature == value
        distinct, which = places[own].unique(return_inverse=True)
        z = scores[distinct.to(scores.device)]  # [M, V]
        if value == 0:
            chosen[own] = z.argmax(dim=1).cpu()[which]
        else:
            probabilities = (z.float() / value).softmax(dim=1)
            number, which = uniform[own].to(scores.device), which.to(scores.device)
            chosen[own] = invert(probabilities, number, which).cpu()
    return chosen


def invert(probabilities: Tensor, number: Tensor, which: Tensor) -> Tensor:
    """The first token whose cumulative probability in row which[b] exceeds number[b] in [0, 1): [B].

    By blocks and then within one: sums in float64 over all of V take as long as a layer.

    Args:
        probabilities: [M, V].
        number, which: [B].
    """
    size = 256
    padded = nn.functional.pad(probabilities, (0, -probabilities.shape[1] % size))
    blocks = padded.unflatten(1, (-1, size))  # [M, n, 256]
    ends = blocks.sum(dim=2, dtype=torch.float64).cumsum(dim=1)[which]  # [B, n]
    threshold = number.unsqueeze(1) * ends[:, -1:]  # [B, 1] in [0, total)
    block = torch.searchsorted(ends, threshold, right=True).clamp_(max=ends.shape[1] - 1)  # [B, 1]
    before = nn.functional.pad(ends, (1, 0)).gather(1, block)
    inside = blocks[which, block.squeeze(1)].double().cumsum(dim=1)  # [B, 256]
    place = torch.searchsorted(inside, threshold - before, right=True).squeeze(1)
    # rounding can leave a threshold behind its block's last token that has any probability
    last = torch.searchsorted(inside, inside[:, -1:].contiguous()).squeeze(1)
    return block.squeeze(1) * size + torch.minimum(place, last)


def completion_log_probs(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    completions: Completions,
    temperature: float,
    adapters: Assignment | None = None,
) -> Tensor:
    """log p of each reply token at the sampling temperature, [P * n, T], with grad; padding holds that of any token."""
    lengths = completions.mask.sum(dim=1).tolist()
    replies = Replies(model, prompts, completions.samples, sum(lengths) // len(lengths), adapters)
    trees = replies.forest.trees
    wanted = Wanted(len(trees))
    steps: list[list[tuple[int, int, int]]] = []  # of each reply: the row, the node that comes before, the token
    for reply, tokens in enumerate(completions.tokens.tolist()):
        row, node = replies.rows[reply], replies.ends[reply]
        tokens = tokens[: lengths[reply]]
        nodes = [node, *trees[row].path(node, tokens[:-1])]
        steps.append([(row, node, token) for node, token in zip(nodes, tokens, strict=True)])
        for node in nodes:
            wanted.add(row, node)
    scores = replies.forest.run(wanted.nodes)  # [B, K, V]
    # a node's first token is looked up where the scores are; where it goes on in several ways, the others in copies
    first = torch.zeros(scores.shape[:2], dtype=torch.long)  # [B, K]
    flat = first.view(-1)
    found: dict[tuple[int, int], int] = {}  # by node and token, where its log p will be
    others: list[tuple[int, int]] = []
    where = torch.zeros(completions.tokens.shape, dtype=torch.long)
    taken: set[int] = set()
    for reply, path in enumerate(steps):
        for column, (row, node, token) in enumerate(path):
            place = wanted.index(row, node)
            if (place, token) not in found:
                if place in taken:
                    found[place, token] = len(flat) + len(others)
                    others.append((place, token))
                else:
                    found[place, token] = place
                    taken.add(place)
                    flat[place] = token
            where[reply, column] = found[place, token]
    log_probs = token_log_probs(scores, first.to(scores.device), temperature).flatten()
    if others:
        places, tokens_of_others = torch.tensor(others).to(scores.device).unbind(1)
        copies = scores.flatten(0, 1)[places].unsqueeze(1)  # [M, 1, V]
        rest = token_log_probs(copies, tokens_of_others.unsqueeze(1), temperature).flatten()
        log_probs = torch.cat([log_probs, rest])
    return log_probs[where.to(scores.device)]
