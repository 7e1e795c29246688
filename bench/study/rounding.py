"""How much of an update survives being merged into rounded weights, against the size of v."""
from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from bench.grid import environment, table
from demo.experiment import random_direction
from demo.models import PROJECTIONS, load_model
from tinylora_kernels import merge_fidelity, trainable_vectors
from tinylora_kernels.model.targets import target_names

from .design import tinylora
from .methods import adapt

NUMBERS = 13
SIZES = [10.0 ** (exponent / 2) for exponent in range(-10, 1)]  # |v|, 1e-5 to 1
DTYPES = (torch.bfloat16, torch.float16)
SEEDS = (0, 1, 2)  # of P and of the direction of v
COLUMNS = ["model", "dtype", "numbers", "size", "seed", "survived", "error", "changed", *environment.describe()]


def run(name: str, path: Path) -> list[dict]:
    """Rows for every size, dtype and seed of one model; rows that are in the file stay."""
    held = [row for row in table.read(path) if row["model"] == name]
    wanted = len(SIZES) * len(DTYPES) * len(SEEDS)
    if len(held) == wanted:
        return held
    if held:
        raise ValueError(f"{path}: expected {wanted} rows of {name} or none, found {len(held)}; remove them")
    rows = []
    base = load_model(name).module
    with tqdm(total=wanted, unit="merge", desc=f"rounding the update of {name}", dynamic_ncols=True) as bar:
        for dtype, seed in itertools.product(DTYPES, SEEDS):
            module = copy.deepcopy(base).to(dtype)  # weights that are in this dtype before the update
            adapt(module, tinylora(NUMBERS, len(target_names(module, PROJECTIONS))), seed)
            vectors = trainable_vectors(module)
            for size in SIZES:
                torch.nn.utils.vector_to_parameters(random_direction(NUMBERS, seed) * size, vectors)
                rows.append(measured(name, module, dtype, size, seed))
                bar.update()
    table.append(path, COLUMNS, rows)
    return rows


def measured(name: str, module: torch.nn.Module, dtype: torch.dtype, size: float, seed: int) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that much is lost is what this measures
        report = merge_fidelity(module)
    changed = sum(row.changed for row in report.rows) / len(report.rows)
    return environment.describe() | {
        "model": name, "dtype": str(dtype).removeprefix("torch."), "numbers": NUMBERS, "size": size, "seed": seed,
        "survived": report.survived, "error": report.error, "changed": changed,
    }  # fmt: skip
