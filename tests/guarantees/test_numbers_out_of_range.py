"""A number that no arithmetic can use is refused where it comes in, by name; what fits is taken and is right."""
from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from tests.guarantees.dense import BASES, adapted, dense_output, example, relative
from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import (
    AdapterBank,
    AdapterError,
    GRPOTrainer,
    LoRAXSConfig,
    SFTTrainer,
    TinyLoRAConfig,
    apply_lora_xs,
    apply_tiny_lora,
    merge,
    merge_fidelity,
    merged_weights,
    save_adapter,
    token_log_probs,
    trainable_vectors,
)
from tinylora_kernels.factors.svd import Factors
from tinylora_kernels.rl import PopulationAdam

NAN, INF = math.nan, math.inf
DTYPES = {torch.bfloat16: 3e38, torch.float32: 3e38, torch.float64: 1.7e308}  # weights whose sigma is out of range


def linear(weight: torch.Tensor) -> nn.Module:
    layer = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return nn.ModuleDict({"layer": layer})


def uniform(size: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    weight = 2 * torch.rand(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)) - 1
    return (weight * scale).to(dtype)


def config(**options) -> TinyLoRAConfig:
    return TinyLoRAConfig(**({"target_modules": ["layer"], "trainable_dim": 3, "cache": False} | options))


def adapt(weight: torch.Tensor, **options) -> nn.Module:
    return apply_tiny_lora(linear(weight), config(**options), progress=False)


def refused(match: str, call, *arguments, **options) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [8, 300])  # in full, and by the solver
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_whose_singular_values_no_dtype_holds(size, dtype):
    weight = uniform(size, DTYPES[dtype], dtype)
    refused("^layer: its singular values, .* are outside the range of float", adapt, weight)


@pytest.mark.parametrize("size", [8, 300])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-41), (torch.float32, 1e-44), (torch.float64, 1e-311)])
def test_weights_whose_singular_values_lose_their_digits(size, dtype, scale):
    refused("^layer: its singular values, .* are outside the range of float", adapt, uniform(size, scale, dtype))


@pytest.mark.parametrize("size", [8, 300])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e36), (torch.float32, 1e-36), (torch.bfloat16, 1e36), (torch.float16, 6e4), (torch.float16, 1e-6),
     (torch.float64, 1e305), (torch.float64, 1e-305)],
)  # fmt: skip
def test_weights_near_the_ends_are_right(size, dtype, scale):
    weight = uniform(size, scale, dtype)
    layer, one = adapt(weight)["layer"], adapt(weight.double() / scale)["layer"]
    assert relative(layer.basis, one.basis) < 1e-5
    assert relative(layer.sigma.double() / scale, one.sigma) < 1e-6
    assert relative(layer.projection, one.projection) < 1e-5


NO_NUMBERS = [NAN, INF, -INF, 10**400, 10**5000, True, "1", None, [1], 1j]


@pytest.mark.parametrize("alpha", NO_NUMBERS, ids=range(len(NO_NUMBERS)))
def test_alphas_that_are_no_numbers(alpha):
    refused("^alpha: expected a finite number, found .{1,60}$", config, alpha=alpha)
    refused("^alpha: expected a finite number", LoRAXSConfig, alpha=alpha)


@pytest.mark.parametrize("alpha", [1e39, -1e39, 1e308, 2**1000])
@pytest.mark.parametrize("scaling", ["left", "sqrt"])
@pytest.mark.parametrize("base", BASES)
def test_alphas_too_large_for_a_layer(alpha, scaling, base):
    refused("^layer: its projection, .*expected finite numbers in float32", adapted, base, alpha=alpha, scaling=scaling)


@pytest.mark.parametrize("alpha", [2**64, -(2**80), 1e30, 1e-30, 0])
@pytest.mark.parametrize("base", ["linear", "embedding"])
def test_large_and_small_alphas_are_right(alpha, base):
    layer = adapted(base, alpha=alpha)
    with torch.no_grad():
        layer.v.mul_(2.0**-64 if abs(alpha) >= 1 else 1)
    x = example(layer)
    assert relative(layer(x), dense_output(layer, x)) < 1e-5


def test_lora_xs_too():
    model = nn.ModuleDict({"layer": nn.Linear(16, 12)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    too_large = LoRAXSConfig(target_modules=["layer"], alpha=1e39, cache=False)
    refused("^layer: its projection", apply_lora_xs, model, too_large)
    assert type(model["layer"]) is nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


GIVEN = {
    "basis NaN": (torch.full((2, 12), NAN), [2.0, 1.0]), "basis infinite": (torch.full((2, 12), INF), [2.0, 1.0]),
    "sigma 0": (torch.eye(12)[:2], [2.0, 0.0]), "sigma NaN": (torch.eye(12)[:2], [2.0, NAN]),
    "sigma infinite": (torch.eye(12)[:2], [INF, 1.0]), "sigma too far apart": (torch.eye(12)[:2], [1e30, 1e-30]),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_factors_that_are_given(name):
    basis, sigma = GIVEN[name]
    model = nn.ModuleDict({"layer": nn.Linear(16, 12)})
    factors = {"layer": Factors(basis, torch.tensor(sigma), False, 0.0)}
    refused("^layer: its (basis|projection)", apply_tiny_lora, model, config(), factors=factors)
    assert type(model["layer"]) is nn.Linear
    layer = adapted("linear")
    kept = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    if "sigma" in name:
        refused("^layer: its projection", layer.set_factors, torch.eye(16)[:2], torch.tensor(sigma))
        assert all(torch.equal(tensor, kept[name]) for name, tensor in layer.named_buffers())


@pytest.fixture
def model():
    options = {"target_modules": TARGETS, "n_tie": 100, "trainable_dim": 3}
    return apply_tiny_lora(tiny_decoder(), config(**options), progress=False)


@pytest.mark.parametrize("own_seeds", [False, True])
@pytest.mark.parametrize(
    ("dtype", "number"),
    [(torch.float16, 70000.0), (torch.float16, -65520.0), (torch.bfloat16, 3.4e38), (torch.float32, 1e39),
     (torch.float32, NAN), (torch.float16, INF), (torch.float64, -INF), (torch.bfloat16, NAN)],
)  # fmt: skip
def test_vectors_of_a_bank(model, dtype, number, own_seeds, tmp_path):
    bank = AdapterBank(model, 2, dtype=dtype, own_seeds=own_seeds)
    kept = torch.tensor([[0.25, 0.5, -1.0]])
    bank.add("kept", kept)
    bad = kept.double().index_fill(1, torch.tensor([1]), number)
    refused("^adapter 'x': its vectors: expected finite numbers in", bank.add, "x", bad)
    refused("^adapter 'kept': its vectors: expected finite numbers in", bank.set, "kept", bad.tolist())
    assert bank.names() == ["kept"] and torch.equal(bank.vectors("kept").float(), kept)
    assert bank.add("y", kept) == 1  # no slot was lost


@pytest.mark.parametrize(("dtype", "number"), [(torch.half, 65504.0), (torch.bfloat16, 3e38), (torch.float64, 1e300)])
def test_the_largest_numbers_of_a_bank_are_taken(model, dtype, number):
    bank = AdapterBank(model, 1, dtype=dtype)
    bank.add("x", torch.full((1, 3), number, dtype=torch.float64))
    assert torch.isfinite(bank.vectors("x")).all() and bank.vectors("x").max() == torch.tensor(number, dtype=dtype)


def test_a_bank_of_own_seeds_whose_update_overflows_is_as_it_was(model):
    bank = AdapterBank(model, 1, own_seeds=True)
    refused("^adapter 'x': its update: expected finite", bank.add, "x", torch.full((1, 3), 3e38), seed=5)
    assert not len(bank) and bank.own_projections.seeds == [0]
    assert bank.add("x", torch.full((1, 3), 0.5), seed=6) == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
def test_banks_of_dtypes_that_hold_no_such_numbers(model, dtype):
    refused("^dtype: expected one of", AdapterBank, model, 1, dtype=dtype)
    bank = AdapterBank(model, 1)
    refused("expected real numbers, found complex64", bank.add, "x", torch.ones(1, 3, dtype=torch.complex64))


@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_state_dicts(model, number):
    (v,) = trainable_vectors(model)
    state = copy.deepcopy(model.state_dict())
    key = next(key for key in state if key.endswith(".v"))
    for tensor in (state[key], state[key].clone()):  # labelled and not
        tensor[1] = number
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match=f"{key}: expected finite numbers, found NaN"):
            warnings.simplefilter("ignore")
            model.load_state_dict({**state, key: tensor})
        assert torch.equal(v, torch.zeros(3))


@pytest.mark.parametrize(("v_dtype", "number"), [(torch.half, 70000.0), (torch.bfloat16, 3.4e38), (torch.float32, NAN)])
def test_files_of_adapters(v_dtype, number, tmp_path):
    model = adapt(torch.randn(8, 8), v_dtype=v_dtype)
    save_adapter(model, tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    with torch.no_grad():
        trainable_vectors(model)[0].fill_(number)
    with pytest.raises(AdapterError, match="^model: its trained vectors v: expected finite .*; nothing was written"):
        save_adapter(model, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == before


@pytest.mark.parametrize(("dtype", "number"), [(torch.float16, 1e6), (torch.bfloat16, INF), (torch.float32, NAN)])
@pytest.mark.parametrize("base", ["linear", "conv2d", "embedding"])
def test_merged_weights_that_overflow(base, dtype, number):
    model = nn.ModuleDict({"bare": nn.Linear(3, 3), "layer": adapted(base, dtype)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model["layer"].v.fill_(number)
    refused("^layer: its merged weight: expected finite numbers in", merge, model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if not n.endswith(".v"))
    refused("^layer: its merged weight: expected finite", lambda: list(merged_weights(model)))
    refused("^layer: its weight: expected finite numbers in", merge_fidelity, model)
    with torch.no_grad():
        model["layer"].v.fill_(0.01)
    merge(model)


BAD_RATES = [NAN, INF, -1.0, "x", None]


@pytest.mark.parametrize("bad", BAD_RATES, ids=repr)
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "betas"])
def test_numbers_of_optimizers(model, name, bad):
    value = (0.9, bad) if name == "betas" else bad
    bank = AdapterBank(model, 1, trainable=True, names=["x"])
    for trainer in (GRPOTrainer, SFTTrainer):
        refused(f"^{name}: expected a finite number", trainer, model, **{name: value})
    refused(f"^{name}: expected a finite number", PopulationAdam, bank, **{name: value})
    if name == "lr":
        refused("^lr: expected a finite number", PopulationAdam, bank, lr={"x": bad})


@pytest.mark.parametrize(
    ("option", "value"),
    [("kl_coeff", NAN), ("kl_coeff", INF), ("kl_coeff", -0.1), ("clip_eps", NAN), ("clip_eps_high", NAN),
     ("tis_cap", NAN), ("tis_cap", -INF), ("max_grad_norm", NAN), ("max_grad_norm", 0.0)],
)  # fmt: skip
def test_numbers_of_losses(model, option, value):
    refused(f"^{option}: expected", GRPOTrainer, model, **{option: value})


@pytest.mark.parametrize("number", [NAN, INF])
def test_states_of_trainers(model, number):
    trainer = SFTTrainer(model)
    tokens = torch.arange(8).view(2, 4)
    trainer.training_step(token_log_probs(model(tokens)[:, :-1], tokens[:, 1:]))
    state = trainer.state_dict()
    for change in (
        lambda s: s["state"][0]["exp_avg"].fill_(number),
        lambda s: s["state"][0]["exp_avg_sq"].fill_(number),
        lambda s: s["param_groups"][0].update(lr=number),
        lambda s: s["param_groups"][0].update(eps=number),
    ):
        bad = copy.deepcopy(state)
        change(bad["optimizer"])
        refused("^trainer state: ", trainer.load_state_dict, bad)
    trainer.load_state_dict(state)
