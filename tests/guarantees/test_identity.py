"""What an adapter is made of is the model's own: its config, its factors and its vectors are nobody else's."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import (
    AdapterBank,
    LoRAXSConfig,
    TinyLoRAConfig,
    adapted_layers,
    load_adapter,
    refresh_factors,
    save_adapter,
    trainable_vectors,
)
from tinylora_kernels.model.attach import adapt as apply

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not save projection:UserWarning")
TOKENS = torch.arange(12).view(2, 6)


def config(kind: type = TinyLoRAConfig, **options):
    if kind is TinyLoRAConfig:
        options = {"trainable_dim": 3, "fused": {"up_proj": (20, 20)}} | options
    names = list(TARGETS)
    return kind(**{"n_tie": 4, "target_modules": names, "cache": False} | options)


def adapt(config, model: nn.Module | None = None, **options) -> nn.Module:
    model = apply(model or tiny_decoder(), config, progress=False, **options)
    with torch.no_grad():
        for number, v in enumerate(trainable_vectors(model)):
            v.copy_(torch.linspace(-1, 2, v.numel()) + number)
    return model


def vectors_of(model: nn.Module) -> Tensor:
    return torch.stack([v.detach().clone() for v in trainable_vectors(model)])


# The config: the caller's object is the next run's of a sweep


def set_to(field: str, value):
    return lambda config: setattr(config, field, value)


CHANGES = {
    "seed": set_to("seed", 1), "alpha": set_to("alpha", 4.0), "scaling": set_to("scaling", "sqrt"),
    "frozen_rank": set_to("frozen_rank", 3), "trainable_dim": set_to("trainable_dim", 5), "n_tie": set_to("n_tie", 2),
    "v_dtype": set_to("v_dtype", torch.bfloat16), "targets": set_to("target_modules", ["q_proj"]),
    "fused": set_to("fused", None), "tying": set_to("tying", "structured"), "nonsense": set_to("alpha", "much"),
    "list of targets": lambda config: config.target_modules.remove("q_proj"),
    "map of parts": lambda config: config.fused.update(up_proj=4),
    "map of groups": lambda config: config.tying.update({"layers.0.q_proj": 1}),
    "list of layers": lambda config: config.layers_to_transform.append(1),
}  # fmt: skip
KINDS = {TinyLoRAConfig: CHANGES, LoRAXSConfig: {
    "rank": set_to("rank", 3),
    **{name: CHANGES[name] for name in CHANGES if name not in ("frozen_rank", "trainable_dim") and "fuse" not in name
       and "parts" not in name},
}}  # fmt: skip


@pytest.mark.parametrize(("kind", "change"), [(kind, change) for kind, changes in KINDS.items() for change in changes])
def test_a_config_that_is_changed_after_adapting_changes_no_model(kind, change, tmp_path):
    options: dict = {}
    if change == "map of groups":
        names = [name for name, module in tiny_decoder().named_modules() if name.rpartition(".")[2] in TARGETS]
        options = {"tying": dict.fromkeys(names, 0)}
    if change == "list of layers":
        options = {"layers_to_transform": [0]}
    theirs = config(kind, **options)
    model = adapt(theirs)
    y, described = model(TOKENS), copy.deepcopy(next(iter(adapted_layers(model).values())).config)
    KINDS[kind][change](theirs)
    assert all(layer.config == described for layer in adapted_layers(model).values())
    # the file, and what is read from it by the model itself
    save_adapter(model, tmp_path / "file", include_basis=True)
    loaded = load_adapter(tiny_decoder(), tmp_path / "file", cache=False, progress=False)
    assert torch.equal(loaded(TOKENS), y)
    assert torch.equal(load_adapter(model, tmp_path / "file")(TOKENS), y)
    # a bank's file
    bank = AdapterBank(model, 1)
    bank.add("a", vectors_of(model))
    bank.save("a", tmp_path / "of_bank")
    bank.close()
    loaded = load_adapter(tiny_decoder(), tmp_path / "of_bank", cache=False, progress=False)
    torch.testing.assert_close(loaded(TOKENS), y)
    # factors of the same weights
    assert torch.equal(refresh_factors(model, progress=False)(TOKENS), y)


@pytest.mark.parametrize("change", ["seed", "alpha", "scaling"])
def test_one_config_for_two_models_labels_two_state_dicts(change):
    theirs = config()
    model = adapt(theirs)
    CHANGES[change](theirs)
    other = adapt(theirs)
    with pytest.raises(RuntimeError, match=rf"{change} is .* there and .* in this model; nothing was loaded into it"):
        other.load_state_dict(model.state_dict())


def test_what_was_written_into_a_config_is_checked_as_it_is_used():
    theirs = config()
    theirs.alpha = float("nan")
    with pytest.raises(ValueError, match="^alpha: expected a finite number, found nan$"):
        adapt(theirs)


# P' that came with an adapter of PEFT's: no field says what it is, and it is for no other factors


def peft_directory(path, save_projection: bool, **options):
    peft = pytest.importorskip("peft", minversion="0.21")
    options = {"r": 2, "u": 3, "weight_tying": 0.5, "save_projection": save_projection} | options
    theirs = peft.TinyLoraConfig(target_modules=["q_proj", "down_proj"], **options)
    model = peft.get_peft_model(tiny_decoder(), theirs)
    model.save_pretrained(path)
    return path


def from_peft(directory) -> nn.Module:
    from tinylora_kernels.integrations.peft import from_peft

    model = from_peft(directory, tiny_decoder())
    with torch.no_grad():
        for v in trainable_vectors(model):
            v.copy_(torch.linspace(-1, 2, v.numel()))
    return model


@pytest.mark.parametrize("save_projection", [True, False])
def test_a_state_dict_of_other_projections_of_pefts_is_refused(save_projection, tmp_path):
    ours, same, other = (
        from_peft(peft_directory(tmp_path / str(number), save_projection, projection_seed=seed))
        for number, seed in enumerate([1, 1, 2])
    )
    same.load_state_dict(ours.state_dict())
    assert torch.equal(same(TOKENS), ours(TOKENS))
    y = other(TOKENS)
    with pytest.raises(RuntimeError, match=r"v: it was trained with other projections P; nothing was loaded into it"):
        other.load_state_dict(ours.state_dict())
    assert torch.equal(other(TOKENS), y)


def test_one_projection_that_is_another_is_enough(tmp_path):
    """Also of a layer that does not hold its group's vector."""
    import safetensors.torch

    ours = from_peft(peft_directory(tmp_path, True))
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.layers.1.down_proj.tinylora_P"][0] *= 1.01
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match="it was trained with other projections P"):
        from_peft(tmp_path).load_state_dict(ours.state_dict())


def test_no_other_factors_are_put_beside_pefts_projections(tmp_path):
    """U's signs are PEFT's, and its singular values: with our own of the same weight it was another function."""
    model = from_peft(peft_directory(tmp_path, True))
    y, layer = model(TOKENS), next(iter(adapted_layers(model).values()))
    with pytest.raises(ValueError, match=rf"^{layer.name}: its P' belongs .* call remove_adapter\(model\)"):
        refresh_factors(model, progress=False)
    with pytest.raises(ValueError, match=f"^{layer.name}: its P' belongs to the factors"):
        layer.set_factors(-layer.basis, layer.sigma)
    assert torch.equal(model(TOKENS), y)
