"""State dicts: vectors that fit by shape, and belong to another function."""
from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import (
    LoRAXSConfig,
    TinyLoRAConfig,
    adapted_layers,
    apply_lora_xs,
    apply_tiny_lora,
    trainable_vectors,
)

TOKENS = torch.arange(12).view(2, 6)
OPTIONS = {"trainable_dim": 4, "frozen_rank": 2, "n_tie": 4, "target_modules": TARGETS, "seed": 3, "cache": False}


def adapt(base_seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    model = apply_tiny_lora(tiny_decoder(base_seed).to(dtype), TinyLoRAConfig(**OPTIONS | options), progress=False)
    with torch.no_grad():
        for number, v in enumerate(trainable_vectors(model)):
            v.copy_(torch.linspace(-1, 2, v.numel()) + number)
    return model


def vectors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".v")}


def load(model: nn.Module, vectors: dict[str, torch.Tensor]) -> None:
    missing, unexpected = model.load_state_dict(vectors, strict=False)
    assert not unexpected and not any(name.endswith(".v") for name in missing)


OTHERS = {
    "seed": {"seed": 4},
    "alpha": {"alpha": 2.0},
    "scaling": {"scaling": "sqrt"},
    "frozen_rank": {"frozen_rank": 3},
    "v_dtype": {"v_dtype": torch.bfloat16},
    "another base": {"base_seed": 1},
    "tying": {"tying": "structured"},  # as many groups, of other modules
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_fits_by_shape_alone_is_refused(other):
    """The same numbers under another seed, scale, rank, base or tie are another function: they were accepted."""
    theirs, ours = vectors_of(adapt()), adapt(**OTHERS[other])
    before, output = [v.clone() for v in trainable_vectors(ours)], ours(TOKENS)
    shapes = {name: tuple(v.shape) for name, v in theirs.items()}
    if {name: tuple(v.shape) for name, v in vectors_of(ours).items()} != shapes:
        assert other == "tying"  # torch itself finds that
        theirs = dict(zip(vectors_of(ours), theirs.values(), strict=False))
    with pytest.raises(RuntimeError) as raised:
        ours.load_state_dict(theirs, strict=False)
    message = str(raised.value)
    assert ".v: " in message and "nothing was loaded into it" in message
    expected = {"another base": "trained on another base", "tying": " is .* there and .* in this model"}
    if other in OPTIONS or other in ("alpha", "scaling", "v_dtype"):
        assert f"{other} is " in message
    elif other == "another base":
        assert expected[other] in message
    assert all(torch.equal(a, b) for a, b in zip(before, trainable_vectors(ours), strict=True))
    assert torch.equal(ours(TOKENS), output)


def test_lora_xs_and_tiny_lora_of_as_many_numbers():
    config = LoRAXSConfig(rank=2, n_tie=4, target_modules=TARGETS, cache=False)
    lora_xs = apply_lora_xs(tiny_decoder(), config, progress=False)
    with pytest.raises(RuntimeError, match="method is LoRAXSConfig there and TinyLoRAConfig in this model"):
        load(adapt(), vectors_of(lora_xs))


WAYS = {
    "as it is": lambda state: state,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "in bfloat16's base": lambda state: state,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("assign", [False, True])
def test_the_same_function_is_loaded_whatever_carried_it(way, assign, tmp_path):
    dtype = torch.bfloat16 if way == "in bfloat16's base" else torch.float32
    theirs, ours = adapt(dtype=dtype), adapt(dtype=dtype)
    with torch.no_grad():
        for v in trainable_vectors(ours):
            v.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.load_state_dict(WAYS[way](theirs.state_dict()), assign=assign)
    assert torch.equal(ours(TOKENS), theirs(TOKENS))


@pytest.mark.parametrize("weights_only", [True, False])
def test_through_torch_save(weights_only, tmp_path):
    theirs = adapt()
    torch.save(theirs.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=weights_only)
    ours = adapt()
    ours.load_state_dict(state)
    assert torch.equal(ours(TOKENS), theirs(TOKENS))
    other = adapt(seed=5)
    with pytest.raises(RuntimeError, match="seed is 3 there and 5 in this model"):
        other.load_state_dict(state)


def test_a_state_dict_that_says_nothing_is_loaded_with_a_word(recwarn):
    """Files of plain tensors, as safetensors, cannot say what v belongs to."""
    from tinylora_kernels.layers import layer

    layer._warn_of_unlabelled_numbers.cache_clear()
    theirs, ours = adapt(), adapt()
    load(ours, {name: v.clone() for name, v in vectors_of(theirs).items()})
    (warning,) = [w for w in recwarn if "do not say what they were trained with" in str(w.message)]
    assert "load_adapter" in str(warning.message)
    assert torch.equal(ours(TOKENS), theirs(TOKENS))


def test_training_goes_on_after_a_state_dict_was_taken():
    """The label is on the copy that a state dict holds, and costs the parameter nothing."""
    model = adapt()
    for _ in range(2):
        model.state_dict()
        model(TOKENS).sum().backward()
    assert all(v.grad is not None and not hasattr(v, "tinylora") for v in trainable_vectors(model))
    assert len({id(layer.owner) for layer in adapted_layers(model).values()}) == len(trainable_vectors(model))
