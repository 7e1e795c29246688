"""vLLM's rules for a LoRA adapter directory, checked without vLLM: what its loader refuses at the first request.

From vLLM's own source (vllm/lora/peft_helper.py, lora_model.py, utils.py and vllm/config/lora.py; the versions read are
in docs/integrations.md):

    files        adapter_config.json and adapter_model.safetensors (.bin and .pt too) in one directory
    config       r, lora_alpha and target_modules are required; modules_to_save and DoRA are refused, bias is "none"
    rank         r <= max_lora_rank, which is one of MAX_RANKS and 16 by default; older engines start at 8
    keys         [base_model.model.]<module>.lora_A.weight and .lora_B.weight, a pair for each module
    modules      <module> is a name of the served model, its last component that of a linear layer
    scale        lora_alpha / r, with use_rslora lora_alpha / sqrt(r)
"""
from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...base.names import left_in
from ...common.words import one_line

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
SMALLEST_RANK_OF_OLDER_ENGINES = 8
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = ("adapter_model.bin", "adapter_model.pt")  # what vLLM looks for then, in this order
SUFFIXES = (".lora_A.weight", ".lora_B.weight")


def vllm_problems(
    directory: str | os.PathLike[str], *, max_lora_rank: int = 16, served_modules: Collection[str] | None = None
) -> list[str]:
    """What vLLM would refuse about an adapter directory, one line each; empty if it would load.

    Args:
        directory: as export_lora writes it.
        max_lora_rank: of the engine that will serve it (--max-lora-rank).
        served_modules: last components of the served model's linear layers ("q_proj", ...), where they are known.

    Raises:
        ValueError: max_lora_rank is none that vLLM accepts.
    """
    if max_lora_rank not in MAX_RANKS:
        raise ValueError(f"max_lora_rank: expected one of {', '.join(map(str, MAX_RANKS))}, found {max_lora_rank}")
    directory = Path(directory)
    weights = next((name for name in (WEIGHTS, *PICKLED) if (directory / name).is_file()), WEIGHTS)
    missing = [name for name in (CONFIG, weights) if not (directory / name).is_file()]
    if missing:
        return [f"{directory}: no {name}" for name in missing]
    try:
        config = json.loads((directory / CONFIG).read_text())
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG}: expected an object, found a {type(config).__name__}")
        shapes = _shapes(directory / weights)
    except (ValueError, SafetensorError) as error:
        return [f"{directory}: cannot be read ({one_line(error)})"]
    problems = _tensor_problems(shapes, config.get("r"), served_modules)
    return _config_problems(config, max_lora_rank) + (problems if shapes else [f"{weights}: no LoRA tensors"])


def _config_problems(config: dict, max_lora_rank: int) -> list[str]:
    problems = [f"{CONFIG}: no {name}" for name in ("r", "lora_alpha", "target_modules") if config.get(name) is None]
    if config.get("modules_to_save"):
        problems.append(f"{CONFIG}: modules_to_save must be null, found {config['modules_to_save']}")
    if config.get("use_dora"):
        problems.append(f"{CONFIG}: use_dora must be false")
    if config.get("bias", "none") != "none":
        problems.append(f"{CONFIG}: bias must be 'none', found {config['bias']!r}")
    rank = config.get("r") or 0
    if rank > max_lora_rank:
        problems.append(f"{CONFIG}: r is {rank}, the engine's max_lora_rank {max_lora_rank}")
    if 0 < rank < SMALLEST_RANK_OF_OLDER_ENGINES:
        problems.append(f"{CONFIG}: r is {rank}, and older engines have no kernel below 8; export with rank=8")
    return problems


def _tensor_problems(
    shapes: dict[str, list[int]], rank: int | None, served_modules: Collection[str] | None
) -> list[str]:
    problems: list[str] = []
    modules: dict[str, dict[str, list[int]]] = {}  # name -> suffix -> shape
    for key, shape in shapes.items():
        suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), None)
        if suffix is None:
            problems.append(f"{key}: expected a name that ends in .lora_A.weight or .lora_B.weight")
        else:
            name = key.removesuffix(suffix).removeprefix("base_model.model.")
            modules.setdefault(name, {})[suffix] = shape
    for name, pair in modules.items():
        problems += [f"{name}: no {suffix[1:]}" for suffix in SUFFIXES if suffix not in pair]
        inner = {pair[suffix][axis] for suffix, axis in zip(SUFFIXES, (0, 1), strict=True) if suffix in pair}
        if rank is not None and inner != {rank}:
            problems.append(f"{name}: its factors have rank {sorted(inner)}, the config says {rank}")
        if wrapper := left_in(name):
            problems.append(f"{name}: {wrapper} is the name of a wrapper, not of the model")
        if served_modules is not None and name.rpartition(".")[2] not in served_modules:
            problems.append(f"{name}: the served model has no linear layer of that name")
    return problems


def _shapes(path: Path) -> dict[str, list[int]]:
    if path.name in PICKLED:
        try:
            tensors = torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # of a damaged pickle: any
            raise ValueError(f"{path.name}: {one_line(error)}") from None
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError(f"{path.name}: expected a map of names to tensors")
        return {key: list(tensor.shape) for key, tensor in tensors.items()}
    with safe_open(path, framework="pt") as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}
