"""Problems with a checkable answer: what the demo trains on and what it scores.

A task yields a held-out set and training problems that share no prompt with it. Answers are checked by a program, so a
reward needs no judge. ``task(name)`` knows the generators below and, where reasoning-gym is installed,
"reasoning_gym:<dataset>" for each of its datasets.
"""
from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import tiny

HELD_OUT = 200
STREAM = 1_000_000  # problems that a training stream of reasoning-gym may give
MOST_REFUSED = 1000  # problems in a row that are held out, before a task is found to have no others


@dataclass(frozen=True)
class Problem:
    prompt: str
    score: Callable[[str], float]  # reply -> reward in [0, 1]


@dataclass(frozen=True)
class Task:
    """A held-out set, an endless stream of training problems, and how long a reply may be."""

    name: str
    description: str
    held_out: list[Problem]
    training: Callable[[int], Iterator[Problem]]  # seed -> problems, none of them held out
    max_new_tokens: int


def last_number(text: str) -> int | None:
    """The last integer in a reply, thousands separators allowed; None without one."""
    found = re.findall(r"-?\d+", text.replace(",", ""))
    return int(found[-1]) if found else None


def number_problem(prompt: str, answer: int) -> Problem:
    """1 for a reply whose last number is the answer, else 0."""
    return Problem(prompt, lambda reply: float(last_number(reply) == answer))


def addition() -> Task:
    """a + b for a, b in 1..20. a + b and b + a are on the same side of the split."""
    pairs = [(a, b) for a in range(1, 21) for b in range(a, 21)]
    random.Random(0).shuffle(pairs)
    held_out: list[tuple[int, int]] = []
    training: list[tuple[int, int]] = []
    for a, b in pairs:
        both = {(a, b), (b, a)}
        (held_out if len(held_out) + len(both) <= HELD_OUT else training).extend(sorted(both))

    def problem(pair: tuple[int, int]) -> Problem:
        a, b = pair
        return number_problem(f"What is {a} + {b}? Answer with only the number.", a + b)

    return Task(
        "addition",
        f"What is a + b? for a, b in 1..20: {len(training)} pairs to train on, {len(held_out)} others to score",
        [problem(pair) for pair in held_out],
        lambda seed: _reshuffled([problem(pair) for pair in training], seed),
        max_new_tokens=12,
    )


def subtraction() -> Task:
    """a - b for 1 <= b < a <= 30."""

    def draw(rng: random.Random) -> Problem:
        a = rng.randint(2, 30)
        b = rng.randint(1, a - 1)
        return number_problem(f"What is {a} - {b}? Answer with only the number.", a - b)

    return drawn_task("subtraction", "What is a - b? for 1 <= b < a <= 30", draw, max_new_tokens=12)


def maximum() -> Task:
    """The larger of two numbers below 200."""

    def draw(rng: random.Random) -> Problem:
        a, b = rng.sample(range(1, 200), 2)
        return number_problem(f"Which number is larger, {a} or {b}? Answer with only the number.", max(a, b))

    return drawn_task("maximum", "Which number is larger, a or b? below 200", draw, max_new_tokens=12)


def stories() -> Task:
    """One-step addition in a sentence; the reply may reason, its last number counts."""

    def draw(rng: random.Random) -> Problem:
        who, what = rng.choice(["Tom", "Ann", "Max", "Eva"]), rng.choice(["apples", "books", "coins", "stones"])
        a, b = rng.randint(1, 20), rng.randint(1, 20)
        story = f"{who} has {a} {what} and gets {b} more. How many {what} does {who} have now?"
        return number_problem(f"{story} End with the number.", a + b)

    return drawn_task("stories", "one-step addition stories", draw, max_new_tokens=32)


def digit_sums() -> Task:
    """The tiny decoder's own: sums of 2 to 8 digits modulo 10."""

    def draw(rng: random.Random) -> Problem:
        digits = [rng.randrange(10) for _ in range(rng.randint(2, tiny.MAX_DIGITS))]
        prompt = "".join(map(str, digits)).ljust(tiny.MAX_DIGITS, "_") + "="
        ending = f"#{sum(digits) % 10}."
        return Problem(prompt, lambda reply: float(reply.endswith(ending)))

    return drawn_task(
        "digit-sums", "sums of 2 to 8 digits modulo 10", draw, max_new_tokens=tiny.MAX_REPLY_TOKENS, held_out=1000
    )


def reasoning_gym_task(dataset: str) -> Task:
    """Any dataset of reasoning-gym, with its own verifier on the reply's last line, or on its last number where that is
    what the answer is.

    Options of the dataset go in parentheses: "chain_sum(min_terms=2, max_terms=2, min_digits=1, max_digits=1)".
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(f"TASK: reasoning_gym:{dataset} needs the package: pip install reasoning-gym") from error
    name, options = dataset_call(dataset)

    def problems(seed: int, size: int) -> Iterator[Problem]:
        data = reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
        for entry in data:

            def score(reply: str, entry=entry) -> float:
                if re.fullmatch(r"-?\d+", str(entry["answer"])):
                    number = last_number(reply)
                    answer = "" if number is None else str(number)
                else:
                    lines = reply.strip().splitlines()
                    answer = lines[-1].strip() if lines else ""
                return float(data.score_answer(answer, entry))

            yield Problem(f"{entry['question']}\nAnswer with only the result.", score)

    try:
        held_out = list(problems(seed=0, size=HELD_OUT))
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"TASK: reasoning_gym has no dataset {dataset!r} ({error})") from error
    known = {problem.prompt for problem in held_out}

    def training(seed: int) -> Iterator[Problem]:
        refused = 0  # in a row
        # reasoning-gym draws problem i of seed s from s + i: streams of neighbouring seeds would be one, shifted.
        for problem in problems((seed + 1) * STREAM, STREAM):
            refused = refused + 1 if problem.prompt in known else 0
            if not refused:
                yield problem
            elif refused == MOST_REFUSED:
                raise ValueError(f"TASK: reasoning_gym:{dataset} has no problems left to train on, only held-out ones")

    return Task(f"reasoning_gym:{dataset}", f"{dataset} of reasoning-gym", held_out, training, max_new_tokens=48)


def dataset_call(text: str) -> tuple[str, dict]:
    """ "name" or "name(option=number, ...)" -> name and options."""
    try:
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Name):
            return call.id, {}
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise SyntaxError("not a call with keywords")
        return call.func.id, {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"TASK: expected reasoning_gym:<dataset> or reasoning_gym:<dataset>(option=value, ...), found {text!r}"
        ) from error


def drawn_task(
    name: str, description: str, draw: Callable[[random.Random], Problem], max_new_tokens: int, held_out: int = HELD_OUT
) -> Task:
    """A task whose problems are drawn; the held-out ones are distinct and never drawn for training."""
    rng = random.Random(0)
    distinct: dict[str, Problem] = {}
    while len(distinct) < held_out:
        problem = draw(rng)
        distinct[problem.prompt] = problem

    def training(seed: int) -> Iterator[Problem]:
        rng = random.Random(seed + 1)
        while True:
            problem = draw(rng)
            if problem.prompt not in distinct:
                yield problem

    return Task(name, f"{description}; {held_out} held out", list(distinct.values()), training, max_new_tokens)


def _reshuffled(problems: list[Problem], seed: int) -> Iterator[Problem]:
    """Every problem once an epoch, in a new order each time."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(problems, len(problems))


TASKS: dict[str, Callable[[], Task]] = {
    "addition": addition,
    "subtraction": subtraction,
    "maximum": maximum,
    "stories": stories,
    "digit-sums": digit_sums,
}


def task(name: str) -> Task:
    """The task of that name; ValueError lists the known ones."""
    if name.startswith("reasoning_gym:"):
        return reasoning_gym_task(name.removeprefix("reasoning_gym:"))
    if name not in TASKS:
        raise ValueError(f"TASK: expected one of {', '.join(TASKS)} or reasoning_gym:<dataset>, found {name!r}")
    return TASKS[name]()
