"""A standard LoRA adapter directory: what PEFT, vLLM and other servers load beside the frozen base, nothing merged.

    W' - W = (U M) (U^T W) = lora_B @ lora_A * lora_alpha / rank,   lora_alpha = rank

The two factors are exact whatever the SVD's residual; rows and columns beyond r are zeros. Layers that are not linear
go out as PEFT's own LoRA stores them, which few servers load: a convolution's lora_A is a convolution of the same
kernel and its lora_B one of size 1; an embedding has lora_embedding_A [rank, rows] and lora_embedding_B [out, rank].
"""
from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Sequence

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..base.attributes import weight_of
from ..base.experts import ExpertSlice, is_experts
from ..base.kinds import CONV1D, CONVOLUTION, EMBEDDING, LINEAR, kind_of
from ..base.names import inside
from ..common.atomic import others_in, write_directory
from ..common.finite import whole_number
from ..common.words import dtype_name, one_line
from ..layers.layer import TinyLoRALayer
from ..model.adapted import adapted_layers
from ..model.merging import delta_factors
from ..model.targets import shortest_targets
from .adapter import load_adapter, warn_of_what_is_left_out
from .beside import MERGED_INSTEAD, expect_beside
from .format import read

FILES = ("adapter_config.json", "adapter_model.safetensors")
# Names that PEFT (0.21, with transformers 5) takes for the experts of a stack, in models that have such stacks
READ_AS_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_lora(
    model: nn.Module, directory: str | os.PathLike[str], rank: int = 8, dtype: torch.dtype = torch.float32
) -> None:
    """Write the update of an adapted model, merged or not, as a LoRA adapter directory.

    Args:
        directory: created whole (written beside, then renamed), or replaced whole if it holds an earlier export; where
            it has to stay (the working directory, a mount point) its two files are replaced one after the other.
        rank: of the exported factors, at least the adapter's r; zero-padded.  vLLM's kernels start at 8.
        dtype: of the exported factors: torch.float32, bfloat16 or float16.

    Raises:
        ValueError: no adapter, a rank below r, another dtype, an update that is not finite, adapted experts, a layer
            beside which PEFT would compute another update (docs/layers.md), or a directory with other files in it.
            Nothing has been written then.
        RuntimeError: a weight that is not the one adapted to.  Nothing has been written then.
        OSError: the directory cannot be written.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model: it has no adapter to export; call apply_tiny_lora(model, config) first")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype}")
    needed = max(layer.basis.shape[0] for layer in layers.values())
    rank = _checked_rank(rank, needed)
    expert = next((name for name, layer in layers.items() if isinstance(layer.base, ExpertSlice)), None)
    if expert is not None:
        raise ValueError(
            f"{expert}: LoRA directories have no agreed form for the experts of a stack; {MERGED_INSTEAD}"
        )
    expect_beside(model, layers)
    misread = sorted({name.rpartition(".")[2] for name in layers} & READ_AS_EXPERTS)
    if misread and any(map(is_experts, model.modules())):
        warnings.warn(
            f"export_lora: PEFT takes {', '.join(misread)} of a {type(inside(model)).__name__} for its stacks of "
            "experts, so it will load the directory without these modules and with fresh adapters on the experts. "
            "Other readers take the names as they are; for PEFT, leave these modules out of target_modules",
            stacklevel=2,
        )
    target = os.path.realpath(os.fsdecode(directory))
    _refuse_foreign_directory(target)

    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        lora_a, lora_b = lora_factors(layer, rank, dtype)
        if not (bool(torch.isfinite(lora_a).all()) and bool(torch.isfinite(lora_b).all())):
            raise ValueError(f"{name}: its update is not finite in {dtype_name(dtype)}")
        tensors |= {f"base_model.model.{name}.{key}": tensor for key, tensor in _as_peft(layer, lora_a, lora_b).items()}
    config = json.dumps(_peft_config(model, layers, rank), indent=2, sort_keys=True) + "\n"
    write_directory(target, dict(zip(FILES, (config.encode(), save(tensors, metadata={"format": "pt"})), strict=True)))
    warn_of_what_is_left_out(model, target)


@torch.no_grad()
def lora_factors(layer: TinyLoRALayer, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """lora_A [rank, in] and lora_B [out, rank] on the CPU with lora_B @ lora_A = W' - W."""
    left, right = delta_factors(layer)
    # B is of the size of v, A of the singular values: balanced by a power of two, exactly, so that neither leaves the
    # normal range of float16
    size_left, size_right = float(left.abs().max()), float(right.abs().max())
    if 0 < size_left < math.inf and 0 < size_right < math.inf:
        scale = 2.0 ** round(math.log2(size_right / size_left) / 2)
        left, right = left * scale, right / scale
    lora_a = torch.zeros(rank, right.shape[1], dtype=dtype, device="cpu")
    lora_b = torch.zeros(left.shape[0], rank, dtype=dtype, device="cpu")
    lora_a[: right.shape[0]] = right.cpu()
    lora_b[:, : left.shape[1]] = left.cpu()
    return lora_a, lora_b


def _as_peft(layer: TinyLoRALayer, lora_a: Tensor, lora_b: Tensor) -> dict[str, Tensor]:
    """lora_A [rank, in] and lora_B [out, rank] under the names and in the shapes that PEFT's layer for the base has."""
    kind = kind_of(layer.base)
    if kind is EMBEDDING:
        return {"lora_embedding_A": lora_a, "lora_embedding_B": lora_b}
    if kind is CONVOLUTION:
        shape = weight_of(layer.base).shape  # [out, in, k...]
        lora_a = lora_a.view(len(lora_a), *shape[1:])
        lora_b = lora_b.view(*lora_b.shape, *[1] * (len(shape) - 2))
    return {"lora_A.weight": lora_a, "lora_B.weight": lora_b}


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m tinylora_kernels export ADAPTER DIRECTORY --model MODEL``."""
    parser = argparse.ArgumentParser(
        prog="python -m tinylora_kernels export", description="Turn an adapter file into a LoRA adapter directory."
    )
    parser.add_argument("adapter", help="a file of save_adapter")
    parser.add_argument("directory", help="the LoRA directory to write")
    parser.add_argument("--model", required=True, help="the base model: a directory or name that transformers loads")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args(argv)
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        print("export: loading the base model needs transformers; pip install transformers", file=sys.stderr)
        return 1
    try:
        # before a base of many gigabytes is loaded
        _checked_rank(arguments.rank, read(arguments.adapter).config.rank)
        _refuse_foreign_directory(os.path.realpath(arguments.directory))
        try:
            model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
        except Exception as error:  # of transformers, safetensors, torch, or of the model's own code
            raise ValueError(f"{arguments.model}: transformers cannot load this base: {one_line(error)}") from None
        load_adapter(model, arguments.adapter)
        export_lora(model, arguments.directory, arguments.rank, DTYPES[arguments.dtype])
    except (ValueError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{arguments.directory}: rank {arguments.rank}, {len(adapted_layers(model))} modules, {arguments.dtype}")
    return 0


def task_type(model: nn.Module) -> str | None:
    """PEFT's word for what a model does, which says which of PEFT's and transformers' classes take it; None: any."""
    model = inside(model)
    if not callable(getattr(model, "generate", None)) or getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else "CAUSAL_LM"


def _peft_config(model: nn.Module, layers: dict[str, TinyLoRALayer], rank: int) -> dict[str, object]:
    model = inside(model)
    config = getattr(model, "config", None)
    kinds = [kind_of(layer.base) for layer in layers.values()]
    return {
        "peft_type": "LORA",
        "task_type": task_type(model),
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        # transformers' Conv1D stores its weight as [in, out]
        "fan_in_fan_out": CONV1D in kinds and LINEAR not in kinds,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": shortest_targets(model),
        "use_dora": False,
        "use_rslora": False,
    }


def _checked_rank(rank: int, needed: int) -> int:
    number = whole_number("rank", rank)
    if number < needed:
        raise ValueError(f"rank: expected at least the adapter's rank {needed}, found {rank}")
    return number


def _refuse_foreign_directory(target: str) -> None:
    if not os.path.lexists(target):
        return
    if not os.path.isdir(target):
        raise ValueError(f"directory: {target} is a file")
    if others := others_in(target, FILES):
        raise ValueError(f"directory: {target} holds other files ({', '.join(others[:3])}); choose a new one")
