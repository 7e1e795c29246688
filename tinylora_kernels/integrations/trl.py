"""An adapted model as the PeftModel that trainers know, so that a rollout engine never gets the frozen base.

    trainer = GRPOTrainer(model=as_peft_model(apply_tiny_lora(base, config)), reward_funcs=..., args=..., ...)

TRL sends its rollout engine the weights of a model as they are, unless it is a PeftModel: then it calls
merge_adapter(), walks named_parameters() and calls unmerge_adapter(). Between the two this wrapper shows the merged
weights under the names of the original model, each one made when it is asked for: no weight is written to, none is kept
twice.
"""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..files.adapter import load_adapter, save_adapter
from ..layers.layer import TinyLoRALayer
from ..model.adapted import adapted_layers, adapter_disabled, original_names
from ..model.attach import remove_adapter
from ..model.merging import merge, merged_weights
from ..model.targets import output_head
from .peft_adapters import is_from_peft, load_peft_vectors, to_peft

ADAPTER_FILE = "adapter_model.safetensors"  # the name by which transformers' Trainer finds the adapter of a checkpoint
DEFAULT = "default"


def as_peft_model(model: PreTrainedModel) -> PeftModel:
    """Wrap an adapted model for TRL's GRPOTrainer and SFTTrainer, or transformers' Trainer.

    Args:
        model: a transformers model adapted by apply_tiny_lora or apply_lora_xs; it is wrapped, not copied.

    Returns:
        A PeftModel over the same layers and vectors. Checkpoints hold the adapter file alone, a KL reference is the
        adapter as it was on entering the trainer, rollout engines get merged weights. ``get_base_model()`` gives the
        adapted model back.

    Raises:
        ValueError: no adapter, or an adapted output head: TRL multiplies by lm_head.weight itself and would pass it by.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model: it has no adapter; call apply_tiny_lora(model, config) first")
    head = output_head(model)
    if isinstance(head, TinyLoRALayer):
        raise ValueError(
            f"model: {head.name} is adapted, and TRL computes log-probabilities from its weight without calling it; "
            "leave it out of target_modules"
        )
    return AdaptedModel(model)


class AdaptedModel(PeftModel):
    """A PeftModel whose adapter is ours. ``base_model`` is the adapted model itself; see as_peft_model."""

    prefix = "tinylora_"  # TRL skips parameters with this in their name; none has it

    def __init__(self, model: PreTrainedModel):
        nn.Module.__init__(self)  # PeftModel's own would inject an adapter of PEFT's
        self.base_model = model
        self.active_adapter = DEFAULT
        self.special_peft_forward_args: set[str] = set()
        self._is_prompt_learning = False
        self._adapters_disabled = False
        self._showing_merged = False
        # Without a peft_type: what would collect PEFT's own tensors here, and find none, gets an error instead.
        self._configs = {DEFAULT: PeftConfig(base_model_name_or_path=getattr(model, "name_or_path", None))}
        self.peft_type = None
        self._vectors: dict[str, dict[str, nn.Parameter]] = {}  # of the adapters that are not active, by layer

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """PEFT's view of the adapters: their names. What they are is in each layer's own config."""
        return self._configs

    @property
    def active_adapters(self) -> list[str]:
        return [self.active_adapter]

    def get_base_model(self) -> PreTrainedModel:
        """The adapted model."""
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)

    # What a rollout engine is shown

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Show merged weights in named_parameters() and state_dict() until unmerge_adapter().

        Raises:
            ValueError: a base is quantised, or its weight is shared with another module; see merged_weights.
        """
        merged_weights(self.base_model, only_adapted=True)
        self._showing_merged = True

    def unmerge_adapter(self) -> None:
        """Show the parameters themselves again. No weight was changed, so none is restored."""
        self._showing_merged = False

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        if not self._showing_merged:
            yield from super().named_parameters(prefix, recurse, remove_duplicate)
            return
        names = self.base_model.named_parameters(remove_duplicate=remove_duplicate)
        shown = set(map(original_names(self.base_model), (name for name, _ in names)))
        for name, tensor in merged_weights(self.base_model):
            if name in shown:
                yield f"{prefix}.{name}".lstrip("."), nn.Parameter(tensor, requires_grad=False)

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        if self._showing_merged:
            return dict(merged_weights(self.base_model))
        return super().state_dict(*args, **kwargs)

    # Adapters by name: TRL takes a copy of the first one, "ref", as the reference of its KL term

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig | None = None, **kwargs) -> None:
        """Keep a frozen copy of the active vectors under this name."""
        if adapter_name in self._configs:
            raise ValueError(f"adapter_name: expected a new name, found {adapter_name!r} among the adapters")
        self._configs[adapter_name] = peft_config or self._configs[DEFAULT]
        self._vectors[adapter_name] = {
            name: nn.Parameter(owner.v.detach().clone(), requires_grad=False) for name, owner in self._owners().items()
        }

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Put another adapter's vectors in place; those of the adapter that was active keep their identity."""
        if adapter_name not in self._configs:
            raise ValueError(f"adapter_name: expected one of {', '.join(self._configs)}, found {adapter_name!r}")
        if adapter_name == self.active_adapter:
            return
        owners = self._owners()
        self._vectors[self.active_adapter] = {name: owner.v for name, owner in owners.items()}
        for name, v in self._vectors.pop(adapter_name).items():
            owners[name]._parameters["v"] = v
        self.active_adapter = adapter_name

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The bare base model for the duration."""
        self._adapters_disabled = True
        try:
            with adapter_disabled(self.base_model):
                yield
        finally:
            self._adapters_disabled = False

    # Checkpoints

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args, is_main_process: bool = True, **kwargs
    ) -> None:
        """Write the adapter file of save_adapter into the directory, or PEFT's files for a model of from_peft."""
        if not is_main_process:
            return
        os.makedirs(save_directory, exist_ok=True)
        if is_from_peft(self.base_model):
            to_peft(self.base_model, save_directory)
        else:
            save_adapter(self.base_model, Path(save_directory) / ADAPTER_FILE)

    def load_adapter(self, model_id: str | os.PathLike[str], adapter_name: str = DEFAULT, *args, **kwargs) -> None:
        """Read the adapter file of a checkpoint into the vectors of this adapter."""
        active = self.active_adapter
        self.set_adapter(adapter_name)
        try:
            if is_from_peft(self.base_model):
                load_peft_vectors(self.base_model, model_id)
            else:
                load_adapter(self.base_model, Path(model_id) / ADAPTER_FILE, progress=False)
        finally:
            self.set_adapter(active)

    # Leaving

    def unload(self) -> nn.Module:
        """The bare base model, without the adapter."""
        return remove_adapter(self.base_model)

    def merge_and_unload(self, *args, **kwargs) -> nn.Module:
        """The base model with the update written into its weights for good."""
        return remove_adapter(merge(self.base_model))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return trained, sum(p.numel() for p in self.parameters())

    def _owners(self) -> dict[str, TinyLoRALayer]:
        """Layer name -> layer, for the layers that hold a vector."""
        return {name: layer for name, layer in adapted_layers(self.base_model).items() if layer.owner is layer}

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        with torch.no_grad():
            for vectors in self._vectors.values():
                for v in vectors.values():
                    v.data = v.data.to(fn(v.data).device)  # the vectors keep their dtype, as in the layers
        return self
