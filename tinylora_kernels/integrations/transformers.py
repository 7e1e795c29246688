"""Whole adapted transformers models on disk: the base under its own names, the adapter in a file beside it.

    save_pretrained(model, "out")                     # any transformers user can load the base from "out"
    model = from_pretrained("out")                    # base and adapter

The model's own save_pretrained would write the weights of adapted layers under other names ("q_proj.base.weight"),
which from_pretrained does not find again and replaces by random ones with a warning.
"""
from __future__ import annotations

import os
from pathlib import Path
from typing import cast

from transformers import AutoModelForCausalLM, PreTrainedModel

from ..base.names import inside
from ..common.atomic import write_atomically
from ..files.adapter import describe_model, load_adapter
from ..files.format import encode
from ..model.adapted import adapted_layers, base_state_dict, expect_unmerged
from ..model.merging import merged_weights

ADAPTER_FILE = "tinylora_adapter.safetensors"


def save_pretrained(
    model: PreTrainedModel, directory: str | os.PathLike[str], *, merged: bool = False, **kwargs
) -> None:
    """Write an adapted transformers model so that transformers' own from_pretrained loads it.

    Args:
        model: a PreTrainedModel adapted by apply_tiny_lora or apply_lora_xs, or what stands around one (torch.compile,
            DDP, as_peft_model); it is not changed.
        directory: as for the model's own save_pretrained.
        merged: False: the base model's weights, and the adapter in "tinylora_adapter.safetensors". True: the weights
            with the update applied and no adapter; a cast to bfloat16 may swallow it, merge_fidelity(model) says.
        kwargs: for the model's own save_pretrained (max_shard_size, ...).

    Raises:
        ValueError: no adapter; merged=False for a model that is merged; merged=True where merging is impossible.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model: it has no adapter; use its own save_pretrained")
    model = cast(PreTrainedModel, inside(model))
    if merged:
        model.save_pretrained(directory, state_dict=dict(merged_weights(model)), **kwargs)
        return
    expect_unmerged(layers, "model", "call unmerge(model) first, or save it with merged=True")
    model.save_pretrained(directory, state_dict=base_state_dict(model), **kwargs)
    # Not save_adapter: what trains beside the vectors is in the base's own files.
    write_atomically(Path(directory) / ADAPTER_FILE, encode(describe_model(model)))


def from_pretrained(
    directory: str | os.PathLike[str],
    model_class: type[AutoModelForCausalLM] | type[PreTrainedModel] = AutoModelForCausalLM,
    *,
    cache: bool = True,
    **kwargs,
) -> PreTrainedModel:
    """Load a base model and its adapter from a directory of save_pretrained.

    Args:
        directory: local, with "tinylora_adapter.safetensors" beside the model's own files.
        model_class: what loads the base: an Auto class or a model class.
        cache: keep truncated SVDs on disk.
        kwargs: for model_class.from_pretrained (dtype, device_map, ...). A dtype other than the saved one changes the
            weights, and the adapter then refuses to load.

    Raises:
        AdapterError, OSError: the adapter is missing, damaged, or for other weights.
    """
    path = Path(directory) / ADAPTER_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; write it with tinylora_kernels' save_pretrained")
    model: PreTrainedModel = model_class.from_pretrained(directory, **{"dtype": "auto", **kwargs})
    return load_adapter(model, path, cache=cache, progress=False)
