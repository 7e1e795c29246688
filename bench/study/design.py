"""What is run: every method, objective, learning rate and seed of a study."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from demo.recipes import adapter_config
from demo.training import Settings

from .methods import FULL, LORA, LORA_XS, TINYLORA, Method

OBJECTIVES = ("grpo", "sft-own", "sft-foreign")


@dataclass(frozen=True)
class Arm:
    """One method under one objective, at all its learning rates and all seeds."""

    method: Method
    objective: str
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Design:
    """A study of one model.

    Attributes:
        settings: of every run; a step of GRPO is prompts x samples replies, of SFT as many demonstrations.
        validation: training problems on which the best learning rate of an arm is chosen.
        held_out: test problems, at most; they are scored once a run and choose nothing.
        together: runs that share a batch, at most.
    """

    model: str
    task: str
    settings: Settings
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    validation: int
    held_out: int
    together: int


def tinylora(numbers: int, modules: int) -> Method:
    """So many numbers spread over so many modules, as the demo does."""
    config = adapter_config(numbers, modules)
    return Method(TINYLORA, u=config.trainable_dim, n_tie=config.n_tie)


def tied(u: int, n_tie: int, **others) -> Method:
    return Method(TINYLORA, u=u, n_tie=n_tie, **others)


TIED_RATES = (0.001, 0.003, 0.01, 0.03)
UNTIED_RATES = (*TIED_RATES, 0.1)  # each number moves few modules
FEW_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)  # fewer than 13 numbers have to go further
LORA_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FULL_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


def rates_of(method: Method) -> tuple[float, ...]:
    """The sweep of a method on the tiny decoder."""
    if method.kind == LORA:
        return LORA_RATES
    if method.kind == FULL:
        return FULL_RATES
    if method.kind == TINYLORA and method.u == 1:
        return FEW_RATES
    return TIED_RATES if method.n_tie >= 7 else UNTIED_RATES


# The tiny decoder's 21 modules offer rank 2 at most 84 directions, four each: beyond, numbers repeat one another.
TINY_CURVE = (
    *(tinylora(numbers, 21) for numbers in (1, 4, 13, 49)),
    tied(4, 1),  # 84
    tied(16, 1, rank=4),  # 336
    *(Method(LORA_XS, rank=rank) for rank in (1, 2, 4)),  # 21, 84, 336
    *(Method(LORA, rank=rank) for rank in (1, 8)),
    Method(FULL),
)
RANKS = tuple(tied(13, 21, rank=rank) for rank in (1, 2, 4, 8))
EQUAL_SIZE = (tied(42, 21), tied(14, 7), tied(6, 3), tied(2, 1))  # 42 numbers in 1, 3, 7, 21 groups
TYING = (tied(2, 3), tied(2, 3, tying="structured"))  # 14 numbers in 7 groups of 3
STORAGES = ("float32", "bfloat16", "float16")
STORAGE = tuple(replace(tinylora(n, 21), storage=storage) for n in (4, 13, 49) for storage in STORAGES)


def arms(curve: Iterable[tuple[Method, tuple[float, ...]]], objectives: Iterable[str]) -> tuple[Arm, ...]:
    """Every method, at its rates, under every objective."""
    return tuple(Arm(method, objective, rates) for objective in objectives for method, rates in curve)


def swept(methods: Iterable[Method]) -> list[tuple[Method, tuple[float, ...]]]:
    return [(method, rates_of(method)) for method in methods]


TINY_ABLATIONS = dict.fromkeys(m for m in (*RANKS, *EQUAL_SIZE, *TYING, *STORAGE) if m not in TINY_CURVE)
TINY = Design(
    model="tiny", task="digit-sums", settings=Settings(steps=40, prompts=4, samples=8, lr=0.0, temperature=1.0),
    seeds=(0, 1, 2), arms=arms(swept(TINY_CURVE), OBJECTIVES) + arms(swept(TINY_ABLATIONS), ["grpo"]),
    validation=200, held_out=500, together=12,
)  # fmt: skip
TINY_QUICK = replace(
    TINY, settings=replace(TINY.settings, steps=30, samples=4), seeds=(0, 1), validation=100, held_out=200,
    arms=arms(
        (
            *((tinylora(numbers, 21), (0.003, 0.01)) for numbers in (1, 13)), (tied(4, 1), (0.003, 0.01)),
            (Method(LORA_XS, rank=2), (0.003, 0.01)), (Method(LORA, rank=1), (3e-3,)), (Method(FULL), (3e-4,)),
        ),
        OBJECTIVES,
    ),
)  # fmt: skip

REAL_RATES = (0.003, 0.01, 0.03)
REAL_CURVE = {
    tinylora(1, 210): REAL_RATES, tinylora(13, 210): REAL_RATES,
    tied(1, 1): REAL_RATES, tied(4, 1): REAL_RATES,  # 210, 840
    Method(LORA, rank=1): (1e-3, 3e-3), Method(FULL): (1e-5, 3e-5),
}  # fmt: skip
# Fine-tuning, as dear as GRPO and with less to say, at three of the six sizes.
REAL_SFT = {method: REAL_CURVE[method] for method in (tinylora(13, 210), tied(4, 1), Method(LORA, rank=1))}
REAL = Design(
    model="smollm2", task="addition", settings=Settings(steps=16, prompts=4, samples=8, lr=0.0, temperature=0.7),
    seeds=(0, 1), arms=arms(REAL_CURVE.items(), ["grpo"]) + arms(REAL_SFT.items(), ["sft-own", "sft-foreign"]),
    validation=50, held_out=200, together=4,
)  # fmt: skip
REAL_QUICK = replace(
    REAL, settings=replace(REAL.settings, steps=8), seeds=(0,), validation=50, held_out=100,
    arms=arms(((tied(4, 1), (0.003, 0.01)),), ("grpo", "sft-foreign")),
)  # fmt: skip


# The scaling study: decoders of these widths, trained here on one corpus by one recipe, of the same 21 modules.
WIDTHS = (64, 96, 128, 192, 256, 384, 512)  # 0.16, 0.35, 0.6, 1.4, 2.4, 5.4 and 9.6 million parameters
# One vector for all modules, so that all sizes of one model fit one bank, and LoRA for what many numbers can do.
SCALING_CURVE = {
    **{tied(u, 21): (0.01, 0.03, 0.1) for u in (1, 2, 4)},
    **{tied(u, 21): (0.003, 0.01, 0.03) for u in (8, 13, 26)},
    **{tied(u, 21): (0.001, 0.003, 0.01) for u in (49, 84)},
    Method(LORA, rank=1): (0.003, 0.01),
}  # fmt: skip


def scaling(model: str) -> Design:
    """The plan of one model of the scaling study: "tiny-<width>", or what has a plan of its own."""
    if not model.startswith("tiny"):
        return design(model, quick=False)
    arms_ = arms(SCALING_CURVE.items(), ("grpo", "sft-own"))
    return replace(TINY, model=model, seeds=(0, 1, 2, 3), arms=arms_, together=24)


def design(model: str, quick: bool, task: str | None = None) -> Design:
    """The study of the tiny decoder, of SmolLM2, or, on SmolLM2's plan, of a local transformers directory.

    Another task than the model's own has no demonstrations in a foreign style: those arms are left out.
    """
    if model == "tiny":
        plan = TINY_QUICK if quick else TINY
    else:
        plan = replace(REAL_QUICK if quick else REAL, model=model)
    if task is None:
        return plan
    return replace(plan, task=task, arms=tuple(arm for arm in plan.arms if arm.objective != "sft-foreign"))


def only(plan: Design, labels: Iterable[str] | None, objectives: Iterable[str] | None = None) -> Design:
    """The arms of the methods with these labels under these objectives, where the whole plan would take too long.

    None: all of them.
    """
    known = {arm.method.label for arm in plan.arms}
    labels, objectives = set(labels or known), set(objectives or OBJECTIVES)
    if unknown := labels - known:
        raise ValueError(f"methods: expected some of {', '.join(sorted(known))}, found {', '.join(sorted(unknown))}")
    return replace(plan, arms=tuple(a for a in plan.arms if a.method.label in labels and a.objective in objectives))
