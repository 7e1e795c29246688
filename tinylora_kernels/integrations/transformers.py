"""Whole adapted transformers models on disk: the base under its own names, the adapter in a file beside it.

    save_pretrained(model, "out")                     # any transformers user can load the base from "out"
    model = from_pretrained("out")                    # base and adapter

The model's own save_pretrained would write the weights of adapted layers under other names ("q_proj.base.weight"),
which from_pretrained does not find again and replaces by random ones with a warning.
"""
from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
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
_UPLOAD = "_upload_modified_files"  # of transformers' PushToHubMixin


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
            An adapter that an earlier save left in the directory is removed then: it is of other weights.
        kwargs: for the model's own save_pretrained (max_shard_size, push_to_hub, ...). The adapter is uploaded too.

    Raises:
        ValueError: no adapter; merged=False for a model that is merged; merged=True where merging is impossible;
            push_to_hub with a transformers that uploads otherwise than this package knows.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model: it has no adapter; use its own save_pretrained")
    model, path = cast(PreTrainedModel, inside(model)), Path(directory) / ADAPTER_FILE
    if merged:
        weights = dict(merged_weights(model))
        finish = functools.partial(path.unlink, missing_ok=True)
    else:
        expect_unmerged(layers, "model", "call unmerge(model) first, or save it with merged=True")
        weights = base_state_dict(model)
        # Not save_adapter: what trains beside the vectors is in the base's own files.
        finish = functools.partial(write_atomically, path, encode(describe_model(model)))
    with _done_before_upload(model, finish) if kwargs.get("push_to_hub") else contextlib.nullcontext():
        model.save_pretrained(directory, state_dict=weights, **kwargs)
    finish()


@contextlib.contextmanager
def _done_before_upload(model: PreTrainedModel, finish: Callable[[], None]) -> Iterator[None]:
    """transformers uploads what has changed in the directory since its save began, as the save's last act: the adapter
    has to come between.
    """
    upload = getattr(model, _UPLOAD, None)
    if upload is None:
        raise ValueError(
            "push_to_hub: this version of transformers uploads in another way, and would leave the adapter out; save "
            "without it and upload the directory with huggingface_hub.upload_folder"
        )

    def finish_and_upload(*args, **kwargs):
        finish()
        return upload(*args, **kwargs)

    model.__dict__[_UPLOAD] = finish_and_upload
    try:
        yield
    finally:
        del model.__dict__[_UPLOAD]


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
