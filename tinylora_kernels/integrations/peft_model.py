"""An adapted model in the shape of a PeftModel: PEFT's attributes and methods, each right for our adapter or an error.

As PEFT has it, a tuner stands between the PeftModel and the model: ``base_model.model`` is the model.
"""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.peft_model import TunerLayerStatus, TunerModelStatus
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base.attributes import weight_of
from ..base.names import inside
from ..base.weights import is_sharded
from ..common.atomic import write_atomically
from ..common.interrupts import finish, followed_by
from ..common.words import listed
from ..files.adapter import describe_model, load_adapter, load_beside_others, warn_of_what_is_left_out
from ..files.export import task_type
from ..files.format import encode
from ..layers.layer import TinyLoRALayer
from ..model.adapted import adapted_layers, adapter_disabled, expect_unmerged, is_merged, original_names
from ..model.attach import remove_adapter, unwrap
from ..model.merging import merge, merged_weights
from ..model.targets import shortest_targets
from .peft_adapters import is_from_peft, load_peft_vectors, to_peft

ADAPTER_FILE = "adapter_model.safetensors"  # the name by which transformers' Trainer finds the adapter of a checkpoint
DEFAULT = "default"


@dataclass
class AdaptedConfig(PeftConfig):
    """PEFT's view of an adapter. What it is stands in each layer's own config.

    Without a peft_type: what would collect PEFT's own tensors here, and find none, gets an error instead.
    """

    target_modules: list[str] | str | None = None


class AdaptedTuner(nn.Module):
    """Where PEFT has a BaseTuner: the adapters by name, and what is done to all of them.

    An adapter is a set of vectors, those of the active one being in the layers. PEFT's own BaseTuner would look for
    layers of PEFT's, find none, and do nothing in silence.
    """

    prefix = "tinylora_"  # TRL skips parameters with this in their name; none has it

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.active_adapter = DEFAULT
        name = getattr(inside(model), "name_or_path", None)
        config = AdaptedConfig(
            base_model_name_or_path=name, task_type=cast(Any, task_type(model)), target_modules=shortest_targets(model)
        )
        self.peft_config: dict[str, PeftConfig] = {DEFAULT: config}
        self.showing_merged = False
        self._vectors: dict[str, dict[str, nn.Parameter]] = {}  # of the adapters that are not active, by layer

    @property
    def active_adapters(self) -> list[str]:
        return [self.active_adapter]

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    # Adapters by name: TRL takes a copy of the first one, "ref", as the reference of its KL term

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig | None = None, **kwargs) -> None:
        """Keep a frozen copy of the active vectors under this name.

        Raises:
            ValueError: the name is taken, or peft_config is another than the active adapter's.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name: expected a new name, found {adapter_name!r} among the adapters")
        own = self.peft_config[self.active_adapter]
        if peft_config is not None and peft_config != own:
            raise ValueError(
                f"peft_config: expected None or that of {self.active_adapter!r}, found a {type(peft_config).__name__}; "
                "all adapters of an adapted model are of the config it was adapted with"
            )
        copies = {name: owner.v.detach().clone() for name, owner in self._owners().items()}
        vectors = {name: nn.Parameter(v, requires_grad=False) for name, v in copies.items()}

        def add() -> None:
            self._vectors[adapter_name] = vectors
            self.peft_config[adapter_name] = own

        finish(add)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Put another adapter's vectors in place; those of the adapter that was active keep their identity.

        As in PEFT the active adapter is the one that trains, unless inference_mode.
        """
        name = self._one(adapter_name)
        owners = self._owners()
        vectors = {adapter: self.vectors(adapter) for adapter in self.peft_config}

        def change() -> None:
            for layer, v in vectors[name].items():
                owners[layer].v = v
            self._vectors = {adapter: own for adapter, own in vectors.items() if adapter != name}
            self.active_adapter = name
            for adapter in self.peft_config:
                self.set_requires_grad(adapter, adapter == name and not inference_mode)

        finish(change)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter that is not active."""
        name = self._one(adapter_name)
        if name == self.active_adapter:
            raise ValueError(f"adapter_name: {name!r} is active; set_adapter another one first, or unload()")
        finish(lambda: (self._vectors.pop(name, None), self.peft_config.pop(name, None)))

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train the vectors of these adapters, or not."""
        for name in self.known(adapter_names):
            for v in self.vectors(name).values():
                v.requires_grad_(requires_grad)

    def vectors(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """Layer name -> v, of an adapter."""
        if adapter_name == self.active_adapter:
            return {name: owner.v for name, owner in self._owners().items()}
        return self._vectors[adapter_name]

    # On and off

    def enable_adapter_layers(self) -> None:
        """Switch the adapter on."""
        self._switch(True)

    def disable_adapter_layers(self) -> None:
        """Switch the adapter off: the bare base model, until enable_adapter_layers()."""
        self._switch(False)

    def _switch(self, enabled: bool) -> None:
        layers = adapted_layers(self.model)
        expect_unmerged(layers, "model")

        def switch() -> None:
            for layer in layers.values():
                layer.enabled = enabled

        finish(switch)

    # What a rollout engine is shown

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Show merged weights in named_parameters() and state_dict() until unmerge_adapter().

        Raises:
            ValueError: a base is quantised, or its weight is shared with another module (see merged_weights); an
                adapter that is not active; with safe_merge, merged weights that are not finite.
        """
        self._check_merge(adapter_names, safe_merge)
        self.showing_merged = True

    def unmerge_adapter(self) -> None:
        """Show the parameters themselves again. No weight was changed, so none is restored."""
        self.showing_merged = False

    def unload(self) -> nn.Module:
        """The bare base model, without the adapter."""
        return remove_adapter(self.model)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base model with the update written into its weights for good."""
        self._check_merge(adapter_names, safe_merge)
        return unwrap(merge(self.model))

    def _check_merge(self, adapter_names: Sequence[str] | None, safe_merge: bool) -> None:
        if adapter_names is not None and self.known(adapter_names) != [self.active_adapter]:
            raise ValueError(
                f"adapter_names: expected the active adapter {self.active_adapter!r}, found {list(adapter_names)}; "
                "set_adapter the one to merge first"
            )
        merged = merged_weights(self.model, only_adapted=True)  # the call alone refuses what cannot be merged
        if safe_merge:
            for _ in merged:  # and each in turn if it is not finite
                pass

    def inject_adapter(self, *args, **kwargs) -> None:
        """Not here: apply_tiny_lora or apply_lora_xs has put the adapter in."""
        raise ValueError("inject_adapter: expected apply_tiny_lora(model, config) before as_peft_model, nothing after")

    def known(self, names: str | Sequence[str]) -> list[str]:
        """The names as a list; an adapter that is not there is a ValueError."""
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"adapter_name: expected one of {', '.join(self.peft_config)}, found {name!r}")
        return names

    def _one(self, names: str | Sequence[str]) -> str:
        known = self.known(names)
        if len(known) != 1:
            raise ValueError(f"adapter_name: expected one adapter to be active at a time, found {known}")
        return known[0]

    def _owners(self) -> dict[str, TinyLoRALayer]:
        """Layer name -> layer, for the layers that hold a vector."""
        return {name: layer for name, layer in adapted_layers(self.model).items() if layer.owner is layer}

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        with torch.no_grad():
            for vectors in self._vectors.values():
                for v in vectors.values():
                    v.data = v.data.to(fn(v.data).device)  # the vectors keep their dtype, as in the layers
        return self


class AdaptedModel(PeftModel):
    """A PeftModel whose adapter is ours; see as_peft_model. What is not here, its tuner has."""

    base_model: AdaptedTuner

    def __init__(self, model: PreTrainedModel):
        nn.Module.__init__(self)  # PeftModel's own would inject an adapter of PEFT's
        self.base_model = AdaptedTuner(model)
        self.special_peft_forward_args: set[str] = set()
        self._is_prompt_learning = False
        self.peft_type = None

    @classmethod
    def from_pretrained(
        cls, model: PreTrainedModel, model_id: str | os.PathLike[str], adapter_name: str = DEFAULT,
        is_trainable: bool = False, **kwargs,
    ) -> AdaptedModel:  # fmt: skip
        """A directory of save_pretrained on a bare model: load_adapter and as_peft_model in one.

        Raises:
            AdapterError, OSError: as load_adapter; a name other than "default" is a ValueError.
        """
        if adapter_name != DEFAULT:
            raise ValueError(f"adapter_name: expected {DEFAULT!r} for the first adapter, found {adapter_name!r}")
        wrapped = cls(load_adapter(model, Path(model_id) / ADAPTER_FILE, progress=False))
        wrapped.set_requires_grad(DEFAULT, is_trainable)
        return wrapped

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """PEFT's view of the adapters. What they are is in each layer's own config."""
        return self.base_model.peft_config

    @property
    def active_adapter(self) -> str:
        return self.base_model.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def _adapters_disabled(self) -> bool:
        """Of the context that asks: another thread's rollout has its own."""
        return not self.has_active_enabled_adapter

    @property
    def has_active_enabled_adapter(self) -> bool:
        return any(map(_runs, self._layers().values()))

    def get_base_model(self) -> PreTrainedModel:
        """The adapted model."""
        return self.base_model.model

    def forward(self, *args, **kwargs):
        _refuse_names(kwargs)
        return self.get_base_model()(*args, **kwargs)

    def generate(self, *args, **kwargs):
        _refuse_names(kwargs)
        return self.get_base_model().generate(*args, **kwargs)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The bare base model for the duration."""
        with adapter_disabled(self.get_base_model()):
            yield

    # What of PEFT's is the tuner's

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig | None = None, **kwargs) -> None:
        """Keep a frozen copy of the active vectors under this name."""
        self.base_model.add_adapter(adapter_name, peft_config)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Put another adapter's vectors in place; those of the adapter that was active keep their identity."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter that is not active."""
        self.base_model.delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train the vectors of these adapters, or not."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    # What a rollout engine is shown

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        if not self.base_model.showing_merged:
            yield from super().named_parameters(prefix, recurse, remove_duplicate)
            return
        model = self.get_base_model()
        names = model.named_parameters(remove_duplicate=remove_duplicate)
        shown = set(map(original_names(model), (name for name, _ in names)))
        for name, tensor in merged_weights(model):
            if name in shown:
                yield f"{prefix}.{name}".lstrip("."), nn.Parameter(tensor, requires_grad=False)

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        if self.base_model.showing_merged:
            return dict(merged_weights(self.get_base_model()))
        return super().state_dict(*args, **kwargs)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained numbers, all numbers), as PEFT counts, merged weights on show or not."""
        return PeftModel.get_nb_trainable_parameters(cast(PeftModel, self.base_model))

    # Checkpoints

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        **kwargs,
    ) -> None:
        """Write the adapter file of save_adapter into the directory, or PEFT's files for a model of from_peft.

        Adapters other than "default" get a directory of their name in it, as in PEFT.

        Raises:
            ValueError: the path is a file, an adapter unknown, or safe_serialization False.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory: expected a directory, found the file {os.fspath(save_directory)}")
        if not safe_serialization:
            raise ValueError("safe_serialization: the adapter file is a safetensors file; leave it True")
        model = self.get_base_model()
        selected = self.base_model.known(list(self.peft_config) if selected_adapters is None else selected_adapters)
        sharded = any(is_sharded(weight_of(layer.base)) for layer in self._layers().values())
        if not is_main_process and not sharded:  # sharded weights are gathered for their fingerprints: all take part
            return
        for name in selected:
            directory = Path(save_directory, *([] if name == DEFAULT else [name]))
            if is_from_peft(model):
                directory.mkdir(parents=True, exist_ok=True)
                with self._active(name):
                    to_peft(model, directory)
                continue
            vectors = [v.detach().cpu() for v in self.base_model.vectors(name).values()]
            data = encode(describe_model(model, v=torch.stack(vectors)))
            if is_main_process:
                directory.mkdir(parents=True, exist_ok=True)
                write_atomically(directory / ADAPTER_FILE, data)
        if is_main_process and not is_from_peft(model):  # to_peft has said it
            warn_of_what_is_left_out(model, os.fspath(save_directory))

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str = DEFAULT, is_trainable: bool = False, *args, **kwargs
    ) -> Any:
        """Read the adapter file of a checkpoint into the vectors of this adapter, which is added if it is new.

        As in PEFT the model is in eval mode afterwards unless is_trainable.

        Returns:
            missing_keys and unexpected_keys, both empty: a file that does not fit is an error.
        """
        model, new = self.get_base_model(), adapter_name not in self.peft_config
        if new:
            self.add_adapter(adapter_name)
        try:
            with self._active(adapter_name):
                if is_from_peft(model):
                    load_peft_vectors(model, model_id)
                else:
                    path = Path(model_id) / ADAPTER_FILE
                    if len(self.peft_config) > 1:
                        load_beside_others(model, path, "another adapter of the model")
                    else:
                        load_adapter(model, path, progress=False)
        except BaseException:
            if new:
                self.delete_adapter(adapter_name)
            raise
        if new and is_trainable:
            self.set_requires_grad(adapter_name)
        if not is_trainable:
            self.eval()
        return nn.modules.module._IncompatibleKeys([], [])

    @contextlib.contextmanager
    def _active(self, adapter_name: str) -> Iterator[None]:
        """The adapter's vectors in the layers for the duration, and nobody's requires_grad changed."""
        before = self.active_adapter
        required = {id(v): (v, v.requires_grad) for name in self.peft_config for v in self._vectors_of(name)}

        def put_back() -> None:
            self.set_adapter(before)
            for v, was in required.values():
                v.requires_grad_(was)

        with followed_by(put_back):
            self.set_adapter(adapter_name)
            yield

    def _vectors_of(self, adapter_name: str) -> list[nn.Parameter]:
        return list(self.base_model.vectors(adapter_name).values())

    def _layers(self) -> dict[str, TinyLoRALayer]:
        return adapted_layers(self.base_model.model)

    # What PEFT tells of itself

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """PEFT's status of each adapted layer."""
        adapters, merged = self._status_of_adapters(), self.base_model.showing_merged
        return [
            TunerLayerStatus(
                name=f"model.{name}", module_type=type(layer).__name__, enabled=_runs(layer),
                active_adapters=self.active_adapters,
                merged_adapters=self.active_adapters if merged or is_merged(layer) else [],
                quantization_backend=None, **adapters,
            )
            for name, layer in self._layers().items()
        ]  # fmt: skip

    def get_model_status(self) -> TunerModelStatus:
        """PEFT's status of the whole."""
        layers = self.get_layer_status()
        enabled, merged = {layer.enabled for layer in layers}, {tuple(layer.merged_adapters) for layer in layers}
        trained, total = self.get_nb_trainable_parameters()
        return TunerModelStatus(
            base_model_type=type(inside(self)).__name__, adapter_model_type=type(self.base_model).__name__,
            peft_types=dict.fromkeys(self.peft_config, type(next(iter(self._layers().values())).config).__name__),
            trainable_params=trained, total_params=total, num_adapter_layers=len(layers),
            enabled=enabled.pop() if len(enabled) == 1 else "irregular", active_adapters=self.active_adapters,
            merged_adapters=list(merged.pop()) if len(merged) == 1 else "irregular", quantization_backend=None,
            **self._status_of_adapters(),
        )  # fmt: skip

    def _status_of_adapters(self) -> dict[str, Any]:
        trained, devices = {}, {}
        for name in self.peft_config:
            vectors = self._vectors_of(name)
            required = {v.requires_grad for v in vectors}
            trained[name] = required.pop() if len(required) == 1 else "irregular"
            devices[name] = sorted({v.device.type for v in vectors})
        return {"requires_grad": trained, "available_adapters": sorted(trained), "devices": devices}

    def _get_peft_specific_model_tags(self) -> list[str]:
        """Of the model card."""
        return ["tinylora"]

    # What there is none of

    def get_prompt(self, *args, **kwargs):
        """Of prompt learning alone."""
        raise ValueError("get_prompt: an adapted model has no prompt; it is trained by its vectors")

    get_prompt_embedding_to_save = get_prompt


def _runs(layer: TinyLoRALayer) -> bool:
    return layer.is_on() or is_merged(layer)


def _refuse_names(arguments: dict[str, Any]) -> None:
    names = arguments.get("adapter_names")
    if names is not None:
        raise ValueError(
            f"adapter_names: expected none, found {listed(list(names), 3)}; rows of different adapters are run by "
            "AdapterBank(model, capacity) and `with bank.use(names)`"
        )
