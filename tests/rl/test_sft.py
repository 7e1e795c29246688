"""SFT against cross_entropy and transformers' label convention."""
import pytest
import torch
from torch import nn

from tests.models import tiny_decoder
from tinylora_kernels import TinyLoRAConfig, adapted_layers, apply_tiny_lora, trainable_vectors
from tinylora_kernels.rl import SFTTrainer, token_log_probs


class Tiny(nn.Module):
    """Scores for the next token from the current one alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 7, dtype=torch.float64)

    def forward(self, tokens):
        return self.table(tokens)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def expected_step(tokens, labels):
    model = Tiny()
    loss = nn.functional.cross_entropy(
        model(tokens)[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1), ignore_index=-100
    )
    loss.backward()
    return float(loss.detach()), model.table.weight.grad


@pytest.fixture
def batch():
    torch.manual_seed(1)
    tokens = torch.randint(0, 7, (3, 6))
    labels = tokens.clone()
    labels[0, :3] = -100
    labels[2, 4:] = -100
    return tokens, labels


def test_labels_equal_cross_entropy(batch):
    tokens, labels = batch
    loss, gradient = expected_step(tokens, labels)
    model = Tiny()
    before = model.table.weight.detach().clone()
    metrics = SFTTrainer(model, optimizer=sgd).training_step(logits=model(tokens), labels=labels)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-12)
    assert metrics["tokens"] == int((labels[:, 1:] != -100).sum())
    assert metrics["perplexity"] == pytest.approx(torch.tensor(loss, dtype=torch.float64).exp().item())
    torch.testing.assert_close(before - model.table.weight.detach(), gradient)


def test_masked_log_probs_equal_labels(batch):
    tokens, labels = batch
    loss, gradient = expected_step(tokens, labels)
    model = Tiny()
    before = model.table.weight.detach().clone()
    log_probs = token_log_probs(model(tokens)[:, :-1], tokens[:, 1:])
    metrics = SFTTrainer(model, optimizer=sgd).training_step(log_probs=log_probs, mask=labels[:, 1:] != -100)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(before - model.table.weight.detach(), gradient)


def test_sequence_sums_are_averaged_over_sequences(batch):
    tokens, _ = batch
    model = Tiny()
    sums = token_log_probs(model(tokens)[:, :-1], tokens[:, 1:]).sum(dim=1)
    metrics = SFTTrainer(model).training_step(log_probs=sums)
    assert metrics["loss"] == pytest.approx(-float(sums.detach().mean()), rel=1e-12)
    assert metrics["tokens"] == 3


def test_learns_a_sequence():
    tokens = torch.tensor([[0, 3, 1, 5, 2, 6, 4]])
    model = Tiny()
    trainer = SFTTrainer(model, lr=0.3)
    losses = [trainer.training_step(logits=model(tokens), labels=tokens)["loss"] for _ in range(40)]
    assert losses[-1] < 0.05 < losses[0]
    assert trainer.steps == 40


@pytest.mark.parametrize(
    "step, message",
    [
        (lambda lp, z, y: {}, "^training_step: expected either"),
        (lambda lp, z, y: {"log_probs": lp, "logits": z, "labels": y}, "^training_step: expected either"),
        (lambda lp, z, y: {"logits": z}, "^training_step: expected either"),
        (lambda lp, z, y: {"log_probs": lp, "labels": y}, "^training_step: expected either"),
        (lambda lp, z, y: {"logits": z, "labels": y, "mask": y > 0}, "^mask: it goes with log_probs"),
        (lambda lp, z, y: {"logits": z, "labels": y[:, 1:]}, "^labels: expected the first two dimensions"),
        (lambda lp, z, y: {"logits": z[:, :1], "labels": y[:, :1]}, "^logits: a sequence of one token"),
        (lambda lp, z, y: {"logits": z, "labels": y + 7}, "^tokens: expected values in"),
        (lambda lp, z, y: {"log_probs": lp.detach()}, "^log_probs: no gradient flows"),
        (lambda lp, z, y: {"log_probs": lp * float("inf")}, "^log_probs: 15 of 15 values are not finite"),
    ],
)
def test_bad_input_changes_nothing(batch, step, message):
    tokens, _ = batch
    model = Tiny()
    trainer = SFTTrainer(model, lr=0.1)
    logits = model(tokens)
    log_probs = token_log_probs(logits[:, :-1], tokens[:, 1:])
    before = model.table.weight.detach().clone()
    with pytest.raises(ValueError, match=message) as error:
        trainer.training_step(**step(log_probs, logits, tokens))
    assert "\n" not in str(error.value)
    assert torch.equal(model.table.weight, before) and model.table.weight.grad is None and trainer.steps == 0


def test_an_optimizer_that_computes_the_loss_itself_is_refused_when_it_comes():
    with pytest.raises(ValueError, match=r"^optimizer: LBFGS computes the loss several times a step, by step"):
        SFTTrainer(Tiny(), optimizer=torch.optim.LBFGS)


@pytest.mark.parametrize("which", ["first", "all"])
def test_a_vector_that_was_replaced_does_not_stand_still_in_silence(which, batch):
    tokens = batch[0]
    model = apply_tiny_lora(tiny_decoder(), TinyLoRAConfig(n_tie=7, cache=False), progress=False)
    trainer = SFTTrainer(model)
    owners = [layer for layer in adapted_layers(model).values() if layer.owner is layer]
    for layer in owners[:1] if which == "first" else owners:
        layer.v = nn.Parameter(layer.v.detach() + 0.1)
    before = [v.detach().clone() for v in trainable_vectors(model)]
    with pytest.raises(ValueError, match=r"^layers.0.q_proj.v: expected the parameter that this trainer was made with"):
        trainer.training_step(logits=model(tokens), labels=tokens)
    assert all(torch.equal(v, was) for v, was in zip(trainable_vectors(model), before, strict=True))
    SFTTrainer(model).training_step(logits=model(tokens), labels=tokens)
