"""LoRA-XS on the same layer and ops, against W + alpha U S R V^T written out in float64."""
import pytest
import torch
from torch import nn

from tests.guarantees.dense import relative
from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import (
    TinyLoRAConfig,
    adapted_layers,
    apply_tiny_lora,
    count_trainable_params,
    trainable_vectors,
)
from tinylora_kernels.method.config import LoRAXSConfig
from tinylora_kernels.method.projection import NORMAL_DEVIATION
from tinylora_kernels.model.attach import apply_lora_xs
from tinylora_kernels.model.merging import merge, unmerge
from tinylora_kernels.ops.reference import contract
from tinylora_kernels.rl import SFTTrainer

TOKENS = torch.arange(12).view(2, 6)


def adapt(model, **options):
    options = {"rank": 2, "target_modules": TARGETS, "cache": False, **options}
    return apply_lora_xs(model, LoRAXSConfig(**options), progress=False)


def randomise(model, size=0.2):
    torch.manual_seed(3)
    for v in trainable_vectors(model):
        nn.init.normal_(v, std=size)
    return model


@pytest.mark.parametrize("scaling", ["left", "sqrt"])
@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_forward_and_gradients_equal_the_textbook(rank, scaling):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30)).double()
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    randomise(adapt(model, rank=rank, target_modules=["0"], alpha=1.7, scaling=scaling))
    layer = model[0]
    x = torch.randn(5, 20, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 30, dtype=torch.float64)
    model(x).backward(g)
    ours_dx, x.grad = x.grad, None

    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    U, S, V = U[:, :rank], S[:rank], V[:rank]
    signs = torch.sign((layer.basis.double() * U.T).sum(1))  # [r], the sign of a singular vector is a convention
    U, V = U * signs, V * signs.unsqueeze(1)
    R = layer.v.detach().double().view(rank, rank).requires_grad_()
    # "left": U S R V^T.  "sqrt": U sqrt(S) R sqrt(S) V^T
    inner = S.diag() @ R if scaling == "left" else S.sqrt().diag() @ R @ S.sqrt().diag()
    y = x @ (weight + 1.7 * U @ inner @ V).T + bias
    y.backward(g)
    torch.testing.assert_close(model(x).detach(), y.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_dx, x.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.v.grad.double(), R.grad.flatten(), rtol=1e-4, atol=1e-4)


def test_counts():
    assert count_trainable_params(adapt(tiny_decoder(), rank=3))["trainable"] == 14 * 9
    assert count_trainable_params(adapt(tiny_decoder(), rank=2, n_tie=5))["trainable"] == 3 * 4
    structured = adapt(tiny_decoder(), rank=2, n_tie=2, tying="structured")
    assert count_trainable_params(structured)["groups"] == 7
    by_hand = adapt(tiny_decoder(), target_modules=["layers.0.q_proj", "layers.1.q_proj"],
                    tying={"layers.0.q_proj": "a", "layers.1.q_proj": "a"})  # fmt: skip
    assert count_trainable_params(by_hand)["trainable"] == 4


def test_zeros_start_at_the_base_and_normal_close_to_it():
    base = tiny_decoder()(TOKENS)
    assert torch.equal(adapt(tiny_decoder())(TOKENS), base)
    first, second = adapt(tiny_decoder(), rank=8, init="normal"), adapt(tiny_decoder(), rank=8, init="normal")
    drawn = torch.cat([v.detach() for v in trainable_vectors(first)])
    assert torch.equal(drawn, torch.cat([v.detach() for v in trainable_vectors(second)]))
    assert float(drawn.std()) == pytest.approx(NORMAL_DEVIATION, rel=0.1)
    assert len(drawn.unique()) == len(drawn) == 14 * 64
    other = torch.cat([v.detach() for v in trainable_vectors(adapt(tiny_decoder(), rank=8, init="normal", seed=1))])
    assert not torch.equal(drawn, other)
    torch.testing.assert_close(first(TOKENS), base, rtol=1e-3, atol=1e-3)


def test_tiny_lora_reaches_a_subspace_of_it():
    tiny = apply_tiny_lora(
        tiny_decoder(), TinyLoRAConfig(trainable_dim=3, target_modules=TARGETS, cache=False), progress=False
    )
    randomise(tiny)
    xs = adapt(tiny_decoder())
    for ours, theirs in zip(adapted_layers(xs).values(), adapted_layers(tiny).values(), strict=True):
        # P'_i = S P_i S^-1 carries the ratios already: v = R means dividing them out
        with torch.no_grad():
            ours.v.copy_((contract(theirs.v, theirs.projection) / ours.projection).flatten())
    torch.testing.assert_close(xs(TOKENS), tiny(TOKENS), rtol=1e-5, atol=1e-5)


def test_merge_and_train():
    model = adapt(tiny_decoder())
    trainer = SFTTrainer(model, lr=0.3)
    losses = [trainer.training_step(logits=model(TOKENS), labels=TOKENS)["loss"] for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    adapted = model(TOKENS)
    assert relative(merge(model)(TOKENS), adapted) < 3e-6  # trained as far as logits of 40
    assert torch.equal(unmerge(model)(TOKENS), adapted)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "^rank: expected an integer >= 1"),
        ({"rank": True}, "^rank"),
        ({"n_tie": 0}, "^n_tie"),
        ({"tying": "diagonal"}, "^tying"),
        ({"alpha": float("nan")}, "^alpha"),
        ({"scaling": "right"}, "^scaling"),
        ({"seed": -1}, "^seed"),
        ({"init": "uniform"}, "^init: expected one of zeros, normal"),
        ({"v_dtype": torch.int8}, "^v_dtype"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LoRAXSConfig(**options)


def test_a_rank_too_large_leaves_the_model_bare():
    model = tiny_decoder()
    with pytest.raises(ValueError, match="rank"):
        adapt(model, rank=25)
    assert not adapted_layers(model) and all(p.requires_grad for p in model.parameters())
