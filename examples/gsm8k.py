"""GSM8K: 7,473 word problems to train on and 1,319 to be judged by, and who is right."""
from __future__ import annotations

import re

from datasets import Dataset, load_dataset

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def problems(source: str, split: str) -> Dataset:
    """Columns prompt (a chat) and answer (a number) of openai/gsm8k, by its name on a hub or a local clone of it."""

    def convert(row: dict) -> dict:
        chat = [{"role": "user", "content": f"{row['question']}\n{INSTRUCTION}"}]
        return {"prompt": chat, "answer": row["answer"].rpartition("####")[2].strip()}

    data = load_dataset(source, "main", split=split)
    return data.map(convert, remove_columns=data.column_names)


def is_right(reply: str, answer: str) -> float:
    """1 if the last number of the reply is the answer, else 0."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", reply)
    return float(bool(numbers) and number(numbers[-1]) == number(answer))


def number(text: str) -> float:
    return float(text.replace(",", ""))
