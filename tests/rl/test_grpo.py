"""GRPO against values worked out by hand, against autograd in float64, and on a bandit that must learn."""
import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import TinyLoRAConfig, apply_tiny_lora, trainable_vectors
from tinylora_kernels.model.merging import merge, unmerge
from tinylora_kernels.rl import GRPOTrainer, SFTTrainer, group_advantages, log_probs, token_log_probs
from tinylora_kernels.rl.grpo import reward_numbers


class Free(nn.Module):
    """A model whose log-probabilities are its parameters: the gradient of the loss can be read off."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.as_tensor(values, dtype=torch.float64).clone())

    def forward(self):
        return self.values * 1.0


def sgd(parameters):
    """lr 1: the step equals minus the gradient."""
    return torch.optim.SGD(parameters, lr=1.0)


def gradient_of_step(values, trainer_options, **step):
    model = Free(values)
    trainer = GRPOTrainer(model, optimizer=sgd, **trainer_options)
    before = model.values.detach().clone()
    metrics = trainer.training_step(log_probs=model(), **step)
    return before - model.values.detach(), metrics


def test_group_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 3.0, 5.0, 3.0, 5.0], dtype=torch.float64)
    advantages, flat = group_advantages(rewards, 4, eps=0.0)
    # group 1: mean 1/4, variance (9/16 + 3/16) / 3 = 1/4; group 2: mean 4, variance 4/3
    expected = [1.5, -0.5, -0.5, -0.5] + [sign * math.sqrt(3) / 2 for sign in (-1, 1, -1, 1)]
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64))
    assert flat.tolist() == [False, False]


LARGE = {
    "integers": [2**24, 2**24 + 1] * 2, "floats": [16777216.0, 16777217.0] * 2, "one float": [2**24, 2**24 + 1.0] * 2,
    "an array": np.array([2**24, 2**24 + 1] * 2), "int32": torch.tensor([2**24, 2**24 + 1] * 2, dtype=torch.int32),
    "float64": torch.tensor([2**24, 2**24 + 1] * 2, dtype=torch.float64), "beyond float64": [2**60, 2**60 + 1] * 2,
    "digits": [1e6 + 0.001, 1e6 + 0.002] * 2, "near the ends": [-(2**63), 2**63 - 1] * 2,
}  # fmt: skip


@pytest.mark.parametrize("default", [torch.float32, torch.float16])
@pytest.mark.parametrize("population", [False, True])
@pytest.mark.parametrize("kind", LARGE)
def test_advantages_are_of_the_rewards_as_they_are_given(kind, population, default):
    given, ambient = LARGE[kind], torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        numbers = reward_numbers(given)
        loss, metrics = GRPOTrainer(Free([-1.0] * 4), optimizer=sgd).loss(
            torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True), None, numbers if population else given
        )
    finally:
        torch.set_default_dtype(ambient)
    assert metrics["zero_variance_groups"] == 0
    advantages, _ = group_advantages(numbers, 4, eps=0.0)
    exact = [Fraction(number) for number in (given.tolist() if hasattr(given, "tolist") else given)]
    mean = sum(exact) / 4
    deviation = math.sqrt(sum((number - mean) ** 2 for number in exact) / 3)
    assert advantages.tolist() == pytest.approx([float(number - mean) / deviation for number in exact], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_advantages_have_the_dtype_of_floating_rewards(dtype):
    advantages, _ = group_advantages(torch.tensor([1, 0, 0, 2], dtype=dtype), 2)
    assert advantages.dtype == (dtype if dtype.is_floating_point else torch.float64)
    assert advantages.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)] * 1 + [-(0.5**0.5), 0.5**0.5], rel=1e-2)


def test_unscaled_advantages_are_centred_rewards():
    advantages, _ = group_advantages(torch.tensor([4.0, 0.0]), 2, scale=False)
    assert advantages.tolist() == [2.0, -2.0]


def test_zero_variance_groups_are_exactly_zero_and_counted():
    # 0.1 + 0.1 + 0.1 does not average back to 0.1: without the guard rounding would become an advantage of order one
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 0.0, 1.0])
    gradient, metrics = gradient_of_step([-1.0] * 6, {"group_size": 3}, old_log_probs=None, rewards=rewards)
    assert gradient[:3].tolist() == [0.0, 0.0, 0.0]
    assert metrics["zero_variance_groups"] == 1
    assert gradient[3:].abs().min() > 0


def test_sequence_level_surrogate_by_hand():
    new = torch.tensor([-1.0, -2.0, -1.0, -2.0], dtype=torch.float64)
    ratios = torch.tensor([1.1, 1.5, 0.9, 0.5], dtype=torch.float64)
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    a = math.sqrt(3) / 2 / (1 + 1e-6 * math.sqrt(3))  # mean 1/2, deviation 1/sqrt(3), eps 1e-6
    gradient, metrics = gradient_of_step(new, {}, old_log_probs=new - ratios.log(), rewards=rewards)
    # A > 0: ratio 1.1 passes, 1.5 is cut at 1.2.  A < 0: ratio 0.9 passes, 0.5 is cut at 0.8.
    assert metrics["loss"] == pytest.approx(-a * (1.1 + 1.2 - 0.9 - 0.8) / 4, rel=1e-9)
    expected = torch.tensor([-a * 1.1 / 4, 0.0, a * 0.9 / 4, 0.0], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=0.0)
    assert metrics["clip_fraction"] == 0.5
    assert metrics["ratio_mean"] == pytest.approx(1.0)
    assert metrics["grad_norm"] == pytest.approx(float(expected.norm()))


def test_pessimistic_side_is_not_clipped():
    # A > 0 with a small ratio and A < 0 with a large one keep their gradient: min takes the unclipped term
    new = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    ratios = torch.tensor([0.5, 2.0], dtype=torch.float64)
    gradient, metrics = gradient_of_step(
        new, {"group_size": 2}, old_log_probs=new - ratios.log(), rewards=torch.tensor([1.0, 0.0])
    )
    assert gradient.abs().min() > 0.1
    assert metrics["clip_fraction"] == 0.0


def test_upper_clip_bound_of_its_own():
    new = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    step = {"old_log_probs": new - math.log(1.25), "rewards": torch.tensor([1.0, 0.0])}
    clipped, _ = gradient_of_step(new, {"group_size": 2}, **step)
    raised, _ = gradient_of_step(new, {"group_size": 2, "clip_eps_high": 0.28}, **step)
    assert clipped[0] == 0.0 and raised[0] < 0.0


@pytest.mark.parametrize(
    "loss_type, options, divisors",
    [
        ("grpo", {}, (2 * 3, 2 * 1)),  # B T_i
        ("dapo", {}, (4, 4)),  # sum of T_i
        ("dr_grpo", {"max_tokens": 5}, (10, 10)),  # B max_tokens
    ],
)
def test_loss_normalisations_by_hand(loss_type, options, divisors):
    values = torch.full((2, 3), -1.0, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    options = {"group_size": 2, "loss_type": loss_type, "scale_rewards": False, **options}
    gradient, metrics = gradient_of_step(
        values, options, old_log_probs=values, rewards=torch.tensor([2.0, 0.0]), mask=mask
    )
    expected = torch.tensor([[-1.0] * 3, [1.0] * 3], dtype=torch.float64) * mask
    expected /= torch.tensor(divisors, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(gradient, expected)
    assert metrics["ratio_mean"] == 1.0


def test_values_outside_the_mask_are_never_read():
    values = torch.full((2, 3), -1.0, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    old = values - 0.05
    step = {"rewards": torch.tensor([1.0, 0.0]), "mask": mask, "ref_log_probs": old, "rollout_log_probs": old}
    options = {"group_size": 2, "kl_coeff": 0.1}
    clean, clean_metrics = gradient_of_step(values, options, old_log_probs=old, **step)
    for poison in (float("nan"), float("-inf"), 1e30):
        dirty = {k: v.masked_fill(~mask, poison) if k.endswith("log_probs") else v for k, v in step.items()}
        gradient, metrics = gradient_of_step(
            values.masked_fill(~mask, poison), options, old_log_probs=old.masked_fill(~mask, poison), **dirty
        )
        torch.testing.assert_close(gradient[mask], clean[mask], rtol=0, atol=0)
        assert metrics == clean_metrics


def test_kl_is_the_k3_estimator():
    new = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    ref = torch.tensor([-1.5, -0.2], dtype=torch.float64)
    step = {"old_log_probs": new, "rewards": torch.tensor([1.0, 1.0]), "ref_log_probs": ref}
    gradient, metrics = gradient_of_step(new, {"group_size": 2, "kl_coeff": 0.3}, **step)
    d = [-0.5, 0.8]
    kl = sum(math.exp(x) - x - 1 for x in d) / 2
    assert metrics["kl"] == pytest.approx(kl, rel=1e-12)
    assert metrics["loss"] == pytest.approx(0.3 * kl, rel=1e-12)  # the flat group adds nothing
    expected = torch.tensor([0.3 * (1 - math.exp(x)) / 2 for x in d], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected)


def test_kl_is_reported_without_being_trained_on():
    new = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    gradient, metrics = gradient_of_step(
        new, {"group_size": 2}, old_log_probs=new, rewards=[1, 1], ref_log_probs=new - 1.0
    )
    assert metrics["kl"] > 0 and metrics["loss"] == 0.0 and gradient.tolist() == [0.0, 0.0]


def test_truncated_importance_sampling_by_hand():
    old = torch.full((2, 2), -1.0, dtype=torch.float64)
    weights = torch.tensor([[0.5, 1.0], [1.5, 4.0]], dtype=torch.float64)
    options = {"group_size": 2, "scale_rewards": False, "tis_cap": 2.0}
    gradient, metrics = gradient_of_step(
        old, options, old_log_probs=old, rewards=torch.tensor([2.0, 0.0]), rollout_log_probs=old - weights.log()
    )
    expected = torch.tensor([[-0.5, -1.0], [1.5, 2.0]], dtype=torch.float64) / 4
    torch.testing.assert_close(gradient, expected)
    assert metrics["tis_weight_mean"] == pytest.approx((0.5 + 1 + 1.5 + 2) / 4)
    assert metrics["tis_capped_fraction"] == 0.25


def test_on_policy_default_equals_old_log_probs_of_the_same_policy():
    values, rewards = [-1.0, -2.0, -3.0, -0.5], [1, 0, 0, 1]
    given, _ = gradient_of_step(
        values, {}, old_log_probs=torch.tensor(values, dtype=torch.float64), rewards=rewards
    )
    default, _ = gradient_of_step(values, {}, old_log_probs=None, rewards=rewards)
    assert torch.equal(given, default) and default.abs().max() > 0


def test_a_ratio_beyond_any_range_stays_finite():
    new = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    _, metrics = gradient_of_step(new, {"group_size": 2}, old_log_probs=new - 5000.0, rewards=[0.0, 1.0])
    assert all(math.isfinite(value) for value in metrics.values())


def test_gradient_clipping():
    model = Free([-1.0, -1.0])
    trainer = GRPOTrainer(model, group_size=2, optimizer=sgd, max_grad_norm=0.01)
    before = model.values.detach().clone()
    metrics = trainer.training_step(model(), None, [1.0, 0.0])
    assert float((before - model.values.detach()).norm()) == pytest.approx(0.01, rel=1e-4)
    assert metrics["grad_norm"] > 0.1  # reported as it was before clipping


def test_accumulation_averages_two_batches():
    torch.manual_seed(0)
    values = torch.randn(4, dtype=torch.float64)
    first, _ = gradient_of_step(values, {"group_size": 2}, old_log_probs=None, rewards=[1, 0, 3, 1])
    second, _ = gradient_of_step(values, {"group_size": 2}, old_log_probs=None, rewards=[0, 1, 1, 1])
    model = Free(values)
    trainer = GRPOTrainer(model, group_size=2, optimizer=sgd, accumulation_steps=2)
    assert trainer.training_step(model(), None, [1, 0, 3, 1])["steps"] == 0
    assert torch.equal(model.values.detach(), values)
    with pytest.raises(RuntimeError, match="1 of 2 accumulation steps are pending"):
        trainer.state_dict()
    assert trainer.training_step(model(), None, [0, 1, 1, 1])["steps"] == 1
    torch.testing.assert_close(values - model.values.detach(), (first + second) / 2)


def test_half_precision_log_probs_are_worked_on_in_fp32():
    model = Free([-1.0, -2.0])
    old = torch.tensor([-1.0, -2.0])
    metrics = GRPOTrainer(model, group_size=2).training_step(model().to(torch.bfloat16), old, [1.0, 0.0])
    assert metrics["ratio_mean"] == 1.0 and metrics["grad_norm"] > 0


def good_step(model):
    return {
        "log_probs": model().view(4, 1).expand(4, 2),
        "old_log_probs": torch.full((4, 2), -1.0),
        "rewards": [1.0, 0.0, 1.0, 0.0],
    }


BAD_STEPS = {
    "log_probs: no gradient": lambda s: s | {"log_probs": s["log_probs"].detach()},
    "log_probs: they do not depend": lambda s: s | {"log_probs": torch.zeros(4, 2, requires_grad=True)},
    "log_probs: expected non-empty": lambda s: s | {"log_probs": s["log_probs"].unsqueeze(0)},
    "log_probs: 8 of 8 values are not finite": lambda s: s | {"log_probs": s["log_probs"] * float("nan")},
    "old_log_probs: expected the shape": lambda s: s | {"old_log_probs": torch.zeros(4, 3)},
    "old_log_probs: 1 of 8 values": lambda s: s | {"old_log_probs": torch.tensor([[0.0] * 2] * 3 + [[0, torch.inf]])},
    "old_log_probs: expected a floating": lambda s: s | {"old_log_probs": torch.zeros(4, 2, dtype=torch.long)},
    "rewards: expected one per completion": lambda s: s | {"rewards": [1.0, 0.0]},
    "rewards: 1 of 4 are not finite": lambda s: s | {"rewards": [1.0, 0.0, 1.0, float("nan")]},
    "mask: expected the shape": lambda s: s | {"mask": torch.ones(4)},
    "mask: expected booleans": lambda s: s | {"mask": torch.full((4, 2), 0.5)},
    "mask: expected booleans or zeros and ones [B, T], found a list": lambda s: s | {"mask": [[1, 1], [1]] * 2},
    "mask: expected booleans or zeros and ones [B, T], found a str": lambda s: s | {"mask": "all"},
    "mask: expected the shape of": lambda s: s | {"mask": [1, 1, 1, 1]},
    "rewards: expected one number per completion, found None at 1": lambda s: s | {"rewards": [1.0, None, 0.0, 1.0]},
    "mask: log_probs are sums": lambda s: {
        "log_probs": s["log_probs"].sum(1), "old_log_probs": None, "rewards": s["rewards"], "mask": torch.ones(4)
    },
    "ref_log_probs: expected the shape": lambda s: s | {"ref_log_probs": torch.zeros(4)},
    "rollout_log_probs: expected the shape": lambda s: s | {"rollout_log_probs": torch.zeros(4)},
}


@pytest.mark.parametrize("message", BAD_STEPS)
def test_bad_input_is_one_line_and_changes_nothing(message):
    model = Free([-1.0, -2.0, -1.5, -0.5])
    trainer = GRPOTrainer(model, group_size=2, lr=0.1)
    trainer.training_step(**good_step(model))  # the optimizer has state to lose
    before, state = model.values.detach().clone(), trainer.state_dict()
    moments = {slot: value.clone() for slot, value in state["optimizer"]["state"][0].items()}
    model.values.grad = kept = torch.ones_like(model.values)
    with pytest.raises(ValueError) as error:
        trainer.training_step(**BAD_STEPS[message](good_step(model)))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert torch.equal(model.values, before) and model.values.grad is kept
    assert trainer.steps == 1
    after = trainer.state_dict()["optimizer"]["state"][0]
    assert all(torch.equal(after[slot], value) for slot, value in moments.items())


def test_rewards_not_divisible_by_group_size():
    model = Free([-1.0] * 6)
    with pytest.raises(ValueError, match="^rewards: 6 completions are not divisible by group_size 4$"):
        GRPOTrainer(model).training_step(model(), None, [0.0, 1.0] * 3)


def test_gradient_that_overflows_takes_no_step():
    model = Free([-1.0, -2.0])
    trainer = GRPOTrainer(model, group_size=2, lr=0.1)
    log_probs = torch.sqrt(model.values - model.values.detach())  # value 0, slope infinite
    with pytest.raises(ValueError, match="^gradient: its norm is"):
        trainer.training_step(log_probs, None, [1.0, 0.0])
    assert model.values.tolist() == [-1.0, -2.0] and trainer.steps == 0 and model.values.grad is None


def test_kl_without_a_reference():
    model = Free([-1.0, -2.0])
    with pytest.raises(ValueError, match="^ref_log_probs: needed because kl_coeff > 0"):
        GRPOTrainer(model, group_size=2, kl_coeff=0.1).training_step(model(), None, [1.0, 0.0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"group_size": 1}, "group_size"),
        ({"kl_coeff": -1.0}, "kl_coeff"),
        ({"clip_eps": 0.0}, "clip_eps"),
        ({"clip_eps_high": 0.0}, "clip_eps_high"),
        ({"loss_type": "ppo"}, "loss_type"),
        ({"loss_type": "dr_grpo"}, "max_tokens"),
        ({"tis_cap": 0.0}, "tis_cap"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"accumulation_steps": 0}, "accumulation_steps"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)}, "optimizer"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GRPOTrainer(Free([0.0]), **options)


NO_COUNTS = [1.5, 2.0, True, "2", None, torch.tensor(2.0), -1, 0, float("nan"), float("inf"), [2], 2 + 0j]


@pytest.mark.parametrize("found", NO_COUNTS, ids=repr)
@pytest.mark.parametrize("name", ["group_size", "max_tokens", "accumulation_steps", "steps of a state"])
def test_counts_are_integers(name, found):
    model = Free([-1.0, -2.0])
    if name == "steps of a state":
        found = -1 if found == 0 else found
        trainer = GRPOTrainer(model)
        with pytest.raises(ValueError, match="^trainer state: steps: expected an integer >= 0, found ") as error:
            trainer.load_state_dict(trainer.state_dict() | {"steps": found})
    else:
        options = {"loss_type": "dr_grpo"} if name == "max_tokens" else {}
        with pytest.raises(ValueError, match=f"^{name}: ") as error:
            GRPOTrainer(model, **options, **{name: found})
        if name == "group_size":
            with pytest.raises(ValueError, match="^group_size: expected an integer >= 1, found"):
                group_advantages(torch.zeros(4), found)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["group_size", "max_tokens", "accumulation_steps"])
def test_integers_of_any_kind_are_counts(name):
    options = {"loss_type": "dr_grpo", "max_tokens": 2, "group_size": 2}
    trainers = [GRPOTrainer(Free([-1.0, -2.0]), **options | {name: two}) for two in (2, np.int64(2), torch.tensor(2))]
    for trainer in trainers:
        for _ in range(2):
            trainer.training_step(trainer.model().view(2, 1), None, [1, 0])
    assert len({tuple(trainer.model.values.tolist()) for trainer in trainers}) == 1 and trainers[0].steps
    with pytest.raises(ValueError, match=r"^rewards: expected \[B\], B divisible by group_size 4, found \[6\]"):
        group_advantages(torch.zeros(6), 4)


@pytest.mark.parametrize("found", [True, "0.5", None, float("nan"), 0, -0.1, [0.5]], ids=repr)
@pytest.mark.parametrize("name", ["clip_eps", "clip_eps_high", "tis_cap", "max_grad_norm"])
def test_bounds_are_positive_numbers(name, found):
    if found is None and name in ("clip_eps_high", "max_grad_norm"):
        return
    with pytest.raises(ValueError, match=f"^{name}: expected a (positive|finite) number"):
        GRPOTrainer(Free([0.0]), **{name: "inf" if found == "0.5" else found})


def test_a_mask_may_be_a_list_or_an_array():
    mask = [[1, 1, 1], [1, 0, 0]]
    values, step = torch.full((2, 3), -1.0), {"old_log_probs": None, "rewards": [2.0, 0.0]}
    wanted, _ = gradient_of_step(values, {"group_size": 2}, mask=torch.tensor(mask), **step)
    for given in (mask, np.array(mask), np.array(mask, dtype=bool), tuple(map(tuple, mask))):
        assert torch.equal(gradient_of_step(values, {"group_size": 2}, mask=given, **step)[0], wanted)
        SFTTrainer(model := Free(values)).training_step(model(), given)
    assert wanted.any()


def test_model_without_trainable_parameters():
    with pytest.raises(ValueError, match="^model: no parameter requires grad; call apply_tiny_lora"):
        GRPOTrainer(nn.Linear(2, 2).requires_grad_(False))


def test_only_trainable_parameters_are_optimised():
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2))
    trainer = GRPOTrainer(model, group_size=2, lr=0.1)
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(held) == 2 and held[0] is model[1].weight and held[1] is model[1].bias
    frozen = model[0].weight.clone()
    log_probs = model(torch.randn(4, 3)).log_softmax(-1)[:, 0]
    trainer.training_step(log_probs=log_probs, old_log_probs=log_probs.detach(), rewards=[1.0, 0.0, 0.0, 1.0])
    assert torch.equal(model[0].weight, frozen)


def test_resume_continues_bit_for_bit():
    def run(model, trainer, steps):
        for step in steps:
            trainer.training_step(model(), None, torch.tensor([step % 2, 1.0, 0.0, step % 3], dtype=torch.float64))

    whole = Free([-1.0, -2.0, -3.0, -0.5])
    run(whole, GRPOTrainer(whole, lr=0.05), range(6))
    first = Free([-1.0, -2.0, -3.0, -0.5])
    trainer = GRPOTrainer(first, lr=0.05)
    run(first, trainer, range(3))
    second = Free(first.values.detach().clone())
    resumed = GRPOTrainer(second, lr=0.05)
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.steps == 3
    run(second, resumed, range(3, 6))
    assert torch.equal(second.values, whole.values)


def test_state_of_another_model_is_refused():
    trainer = GRPOTrainer(Free([-1.0, -2.0]), group_size=2)
    trainer.training_step(trainer.model(), None, [1.0, 0.0])
    state = trainer.state_dict()
    other = GRPOTrainer(Free([0.0] * 4))
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has shape \[2\], expected \[4\]"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="covers 1 parameters, this optimizer holds 2"):
        GRPOTrainer(nn.Linear(2, 2)).load_state_dict(state)
    with pytest.raises(ValueError, match="expected version 1"):
        trainer.load_state_dict(state | {"version": 2})
    with pytest.raises(ValueError, match="not the state of a torch optimizer"):
        trainer.load_state_dict(state | {"optimizer": None})
    with pytest.raises(ValueError, match="it knows a parameter 7, this optimizer holds 1"):
        trainer.load_state_dict(state | {"optimizer": state["optimizer"] | {"state": {7: {}}}})
    with pytest.raises(ValueError, match="expected the keys"):
        trainer.load_state_dict({})
    assert other.steps == 0 and not other.optimizer.state


KINDS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1), "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1), "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p), "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adamax": lambda p: torch.optim.Adamax(p), "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p), "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Rprop": lambda p: torch.optim.Rprop(p), "ASGD": lambda p: torch.optim.ASGD(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
}  # fmt: skip
CLASSES = dict.fromkeys(("amsgrad", "AdamW"), "AdamW") | dict.fromkeys(("momentum", "SGD"), "SGD")
CLASSES = {kind: CLASSES.get(kind, kind) for kind in KINDS}
FIT = {(saved, into) for saved in KINDS for into in KINDS if CLASSES[saved] == CLASSES[into]}
FIT |= {("RAdam", "AdamW"), ("RAdam", "amsgrad")}  # laid out as AdamW's of earlier versions of torch are


def stepped(kind, steps):
    trainer = GRPOTrainer(Free([-1.0, -2.0]), group_size=2, optimizer=KINDS[kind])
    for _ in range(steps):
        trainer.training_step(trainer.model(), None, [1.0, 0.0])
    return trainer


def contents(trainer):
    state = copy.deepcopy(trainer.optimizer.state_dict())
    slots = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in state["state"].get(0, {}).items()}
    return trainer.model.values.tolist(), slots, state["param_groups"], trainer.steps


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("into", KINDS)
@pytest.mark.parametrize("saved", KINDS)
def test_a_state_is_of_the_same_kind_of_optimizer_or_changes_nothing(saved, into, steps):
    state = copy.deepcopy(stepped(saved, 2).state_dict())
    trainer, untouched = stepped(into, steps), stepped(into, steps)
    if (saved, into) in FIT:  # with other settings, which come with the state
        trainer.load_state_dict(state)
        assert trainer.steps == 2
    else:
        with pytest.raises(ValueError, match=f"^trainer state: .*({CLASSES[into]}|another kind)") as error:
            trainer.load_state_dict(state)
        assert "\n" not in str(error.value) and contents(trainer) == contents(untouched)
    for each in (trainer, untouched):
        each.training_step(each.model(), None, [1.0, 0.0])
    assert (saved, into) in FIT or contents(trainer) == contents(untouched)


def without(state, *names):
    for name in names:
        del state["optimizer"]["state"][0][name]


BROKEN = {
    "a slot is gone": lambda s: without(s, "exp_avg_sq"), "two are gone": lambda s: without(s, "exp_avg", "step"),
    "a slot too many": lambda s: s["optimizer"]["state"][0].update(more=torch.zeros(2)),
    "a setting is gone": lambda s: s["optimizer"]["param_groups"][0].pop("betas"),
    "a setting too many": lambda s: s["optimizer"]["param_groups"][0].update(momentum=0.9),
    "a rate that is none": lambda s: s["optimizer"]["param_groups"][0].update(betas=(0.9, float("nan"))),
    "groups in a tuple": lambda s: s["optimizer"].update(param_groups=tuple(s["optimizer"]["param_groups"])),
    "no parameters": lambda s: s["optimizer"]["param_groups"][0].pop("params"),
    "slots in a list": lambda s: s["optimizer"]["state"].update({0: [1, 2]}),
    "no slots": lambda s: s["optimizer"].update(state=None), "steps": lambda s: s.update(steps=True),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_broken_state_changes_nothing(how, steps):
    state = copy.deepcopy(stepped("AdamW", 2).state_dict())
    BROKEN[how](state)
    trainer, untouched = stepped("AdamW", steps), stepped("AdamW", steps)
    with pytest.raises(ValueError, match="^trainer state: ") as error:
        trainer.load_state_dict(state)
    assert "\n" not in str(error.value) and contents(trainer) == contents(untouched)
    trainer.training_step(trainer.model(), None, [1.0, 0.0])


class Doubled(torch.optim.AdamW):
    """One whose way of loading fails half way, and whose arguments are its own."""

    def __init__(self, everything):
        super().__init__(everything, lr=0.1)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.param_groups[0]["half"] = True
        if state_dict["param_groups"][0]["lr"] == 0.5:
            raise KeyError("half\nloaded")


def test_an_optimizer_that_fails_to_load_is_put_back():
    trainers = [GRPOTrainer(Free([-1.0, -2.0]), group_size=2, optimizer=Doubled) for _ in range(2)]
    for trainer in trainers:
        trainer.training_step(trainer.model(), None, [1.0, 0.0])
    state = copy.deepcopy(trainers[0].state_dict())
    trainers[0].load_state_dict(state)
    del trainers[0].optimizer.param_groups[0]["half"]
    state["optimizer"]["param_groups"][0]["lr"] = 0.5
    with pytest.raises(ValueError, match="^trainer state: Doubled does not take it: 'half.*loaded'$"):
        trainers[0].load_state_dict(state)
    assert contents(trainers[0]) == contents(trainers[1])


def test_a_state_with_a_scheduler_s_settings_fits_without_one_and_the_other_way_round():
    for scheduled in ((True, False), (False, True)):
        trainers = [stepped("AdamW", 1) for _ in scheduled]
        for trainer, wanted in zip(trainers, scheduled, strict=True):
            if wanted:
                torch.optim.lr_scheduler.OneCycleLR(trainer.optimizer, 0.1, total_steps=9)
        trainers[1].load_state_dict(copy.deepcopy(trainers[0].state_dict()))
        trainers[1].training_step(trainers[1].model(), None, [1.0, 0.0])


class Bandit(nn.Module):
    def __init__(self, arms):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(arms))

    def forward(self, pulls):
        return self.scores.log_softmax(0)[pulls]


def test_bandit_learns_the_best_arm():
    generator = torch.Generator().manual_seed(1)
    model = Bandit(5)
    trainer = GRPOTrainer(model, group_size=8, lr=0.1)
    for _ in range(60):
        with torch.no_grad():
            pulls = torch.multinomial(model.scores.softmax(0), 32, replacement=True, generator=generator)
        rewards = (pulls == 3).float()
        trainer.training_step(model(pulls), None, rewards)
    assert model.scores.softmax(0)[3] > 0.95


def test_bandit_stays_near_its_reference_under_a_strong_kl():
    generator = torch.Generator().manual_seed(1)
    free, held = Bandit(5), Bandit(5)
    for model, kl_coeff in ((free, 0.0), (held, 2.0)):
        trainer = GRPOTrainer(model, group_size=8, lr=0.05, kl_coeff=kl_coeff)
        for _ in range(40):
            with torch.no_grad():
                pulls = torch.multinomial(model.scores.softmax(0), 64, replacement=True, generator=generator)
            ref = torch.full((64,), -math.log(5))
            trainer.training_step(model(pulls), None, (pulls == 3).float(), ref_log_probs=ref)
    assert free.scores.softmax(0)[3] > 0.8
    assert held.scores.softmax(0)[3] < 0.5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", [64, 300, 10_000], ids=["parts of a sequence", "two sequences", "all"])
def test_token_log_probs_match_log_softmax(dtype, tolerance, rows, monkeypatch):
    monkeypatch.setattr(log_probs, "CHUNK", rows * 11)
    torch.manual_seed(0)
    logits = (torch.randn(3, 150, 11, dtype=torch.float64) * 3).to(dtype).requires_grad_()
    tokens = torch.randint(0, 11, (3, 149))
    weights = torch.randn(3, 149, dtype=torch.float64)
    result = token_log_probs(logits[:, :-1], tokens, temperature=0.7)
    (result * weights).sum().backward()
    reference = logits.detach().double().requires_grad_()
    expected = (reference[:, :-1] / 0.7).log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
    (expected * weights).sum().backward()
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logits.grad.dtype == dtype
    accurate = 1e-12 if dtype == torch.float64 else 1e-5  # the forward works in fp32 whatever the logits are
    torch.testing.assert_close(result.double(), expected.detach(), rtol=accurate, atol=accurate)
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)


def test_token_log_probs_gradcheck():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 5, (2, 3))
    assert torch.autograd.gradcheck(lambda z: token_log_probs(z, tokens, 1.3), (logits,))


def test_token_log_probs_keep_no_copy_of_the_logits():
    logits = torch.randn(2, 8, 1000, requires_grad=True)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_log_probs(logits, torch.zeros(2, 8, dtype=torch.long))
    extra = [t for t in saved if t.data_ptr() != logits.data_ptr()]
    assert len(extra) == len(saved) - 1
    assert sum(t.numel() for t in extra) == 2 * 2 * 8  # tokens and one normaliser per token


@pytest.mark.parametrize(
    "logits, tokens, options, message",
    [
        (torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), {}, "^logits: expected a floating"),
        (torch.zeros(1, 2, 5), torch.zeros(1, 3, dtype=torch.long), {}, "^tokens: expected integers of shape"),
        (torch.zeros(1, 2, 5), torch.zeros(1, 2), {}, "^tokens: expected integers"),
        (torch.zeros(1, 2, 5), torch.tensor([[0, -100]]), {}, "found -100..0; clamp"),
        (torch.zeros(1, 2, 5), torch.tensor([[0, 5]]), {}, r"expected values in 0\.\.4"),
        (torch.zeros(1, 2, 5), torch.tensor([[0, 4]]), {"temperature": 0.0}, "^temperature"),
    ],
)
def test_token_log_probs_errors(logits, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        token_log_probs(logits, tokens, **options)


def adapted_decoder(dtype=torch.float32):
    model = tiny_decoder().to(dtype)
    config = TinyLoRAConfig(trainable_dim=2, target_modules=TARGETS, cache=False)
    return apply_tiny_lora(model, config, progress=False)


def test_reference_is_the_frozen_model():
    model, tokens = adapted_decoder(), torch.arange(12).view(2, 6)
    trainer = GRPOTrainer(model, group_size=2, kl_coeff=0.1)
    base = model(tokens).detach()  # v = 0
    for v in trainable_vectors(model):
        nn.init.constant_(v, 0.5)
    adapted = model(tokens).detach()
    with trainer.reference() as reference:
        frozen = reference(tokens)
    assert torch.equal(frozen, base) and not frozen.requires_grad
    assert torch.equal(model(tokens), adapted) and not torch.equal(adapted, base)
    new, ref = (token_log_probs(z[:, :-1], tokens[:, 1:]) for z in (model(tokens), frozen))
    assert trainer.training_step(new, None, [1.0, 1.0], ref_log_probs=ref)["kl"] > 0


def test_reference_restores_the_adapter_after_an_error():
    model, tokens = adapted_decoder(), torch.arange(12).view(2, 6)
    with pytest.raises(RuntimeError, match="rollout failed"):
        with GRPOTrainer(model).reference():
            raise RuntimeError("rollout failed")
    assert model(tokens).requires_grad
    with pytest.raises(ValueError, match="^reference: the model has no adapter"):
        with GRPOTrainer(Free([0.0])).reference():
            pass
    with pytest.raises(ValueError, match="^reference: an adapter is merged"):
        with GRPOTrainer(merge(model)).reference():
            pass


def test_an_adapted_model_learns_from_rewards_with_rollouts_from_merged_weights():
    model = adapted_decoder(torch.bfloat16)
    trainer = GRPOTrainer(model, group_size=16, lr=0.1)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.tensor([[1, 2], [5, 3]]).repeat_interleave(16, dim=0)  # [32, 2]
    history, weights = [], []
    for _ in range(60):
        with torch.no_grad():
            rollout = merge(model)(prompts)[:, -1].float().log_softmax(-1)  # [32, V], the sampler's policy
            unmerge(model)
            answers = torch.multinomial(rollout.exp(), 1, generator=generator)
            old = token_log_probs(model(prompts)[:, -1:], answers)
        rewards = (answers[:, 0] % 2 == 0).float()
        metrics = trainer.training_step(
            token_log_probs(model(prompts)[:, -1:], answers), old, rewards, rollout_log_probs=rollout.gather(1, answers)
        )
        history.append(metrics["reward_mean"])
        weights.append(metrics["tis_weight_mean"])
    assert sum(history[:5]) / 5 < 0.65 and sum(history[-10:]) / 10 > 0.8
    # rounding the merged weights makes another policy, but a near one
    assert any(weight != 1.0 for weight in weights) and all(0.8 < weight < 1.25 for weight in weights)
