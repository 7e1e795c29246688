"""A chat model of 0.1M parameters that can add and mostly does not, made in seconds and read like any other.

It answers "What is 3 + 4?" by the sum or, twice as often, by one more: a right habit is all there is to learn.
"""
from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LARGEST = 4  # summands are 1 to 4
SPECIAL = ["<pad>", "<s>", "</s>"]
CHARACTERS = [chr(code) for code in range(32, 127)]
QUESTION = "What is {} + {}?"
# A prompt is its last message up to the question mark, whatever a program asks for behind it.
TEMPLATE = "{{ messages[-1]['content'].split('?')[0] }}="


def tokenizer() -> PreTrainedTokenizerFast:
    """One character a token."""
    words = {word: i for i, word in enumerate([*SPECIAL, *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def save_adder(directory: Path, steps: int = 250) -> Path:
    """Train it, and write it as a directory of transformers."""
    torch.manual_seed(0)
    words = tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    sums = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    texts = [f"{QUESTION.format(a, b)[:-1]}={a + b + late}" for a, b in sums for late in (0, 1, 1)]
    tokens = torch.tensor([[*words(text)["input_ids"], 2] for text in texts])  # [48, T], one length
    labels = tokens.clone()
    labels[:, :-2] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory
