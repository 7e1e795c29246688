"""Ambient state: autocast, default dtypes and devices, matmul precision, threads: what is stored depends on none."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.guarantees.dense import BASES, adapted, dense_output, example, relative
from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import (
    AdapterBank,
    TinyLoRAConfig,
    adapted_layers,
    apply_tiny_lora,
    export_lora,
    load_adapter,
    merge,
    merged_weights,
    refresh_factors,
    save_adapter,
    set_backend,
    trainable_vectors,
    unmerge,
)  # fmt: skip
from tinylora_kernels.linear import node, plan


@contextlib.contextmanager
def restored(get: Callable, put: Callable, value: object) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def _precision(get: str, put: str, value: object):
    owner = torch.backends.mkldnn.matmul
    return restored(lambda: owner.fp32_precision, lambda v: setattr(owner, "fp32_precision", v), value)


AMBIENT: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "default float64": lambda: restored(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default bfloat16": lambda: restored(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "matmul precision": lambda: restored(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "deterministic": lambda: restored(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "random state": lambda: torch.random.fork_rng(),
}


def config(**options) -> TinyLoRAConfig:
    options = {"trainable_dim": 3, "n_tie": 4, "target_modules": TARGETS, "init": "uniform", "cache": False} | options
    return TinyLoRAConfig(**options)


TOKENS = torch.arange(12).view(2, 6)


def adapt(**options) -> nn.Module:
    return apply_tiny_lora(tiny_decoder(bias=True), config(**options), progress=False)


def stored(model: nn.Module, directory) -> dict[str, Tensor | bytes]:
    """All that is kept of an adapted model, or written: by name."""
    found: dict[str, Tensor | bytes] = {}
    for name, layer in adapted_layers(model).items():
        found |= {f"{name}.{b}": getattr(layer, b).clone() for b in ("basis", "sigma", "projection")}
        found[f"{name}.right"] = layer.right_factor()
    found |= {f"v{i}": v.detach().clone() for i, v in enumerate(trainable_vectors(model))}
    found |= {f"merged.{name}": weight.clone() for name, weight in merged_weights(model)}
    merge(model)
    found |= {f"written.{name}": p.detach().clone() for name, p in model.named_parameters()}
    unmerge(model)
    found |= {f"restored.{name}": p.detach().clone() for name, p in model.named_parameters()}
    save_adapter(model, directory / "adapter.safetensors")
    export_lora(model, directory / "lora")
    found |= {path.name: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
    return found


@pytest.mark.parametrize("state", AMBIENT)
def test_what_is_stored_is_the_same_bit_for_bit(state, tmp_path):
    """Factors, projections, B^T, merged weights, files: merging inside autocast raised, or was rounded to 16 bits."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "inside").mkdir()
    plain = stored(adapt(), tmp_path / "plain")
    model = tiny_decoder(bias=True)
    with AMBIENT[state]():
        model = apply_tiny_lora(model, config(), progress=False)
        inside = stored(model, tmp_path / "inside")
    assert plain.keys() == inside.keys()
    for name, value in plain.items():
        same = torch.equal(value, inside[name]) if isinstance(value, Tensor) else value == inside[name]
        assert same, name
    assert all(v.requires_grad and not v.is_inference() for v in trainable_vectors(model))


@pytest.mark.parametrize("state", AMBIENT)
def test_loading_refreshing_and_banks_inside(state, tmp_path):
    trained = adapt()
    save_adapter(trained, tmp_path / "a.safetensors")
    expected = trained(TOKENS)
    bare, adapted_inside = tiny_decoder(bias=True), adapt()
    ids = torch.tensor([0, 0])
    with AMBIENT[state]():
        loaded = load_adapter(bare, tmp_path / "a.safetensors", progress=False)
        refresh_factors(adapted_inside)
        bank = AdapterBank(adapted_inside, 2)
        bank.load("a", tmp_path / "a.safetensors")
    assert torch.equal(loaded(TOKENS), expected)
    with bank.use(ids):
        torch.testing.assert_close(adapted_inside(TOKENS), expected, rtol=1e-6, atol=1e-6)
    loaded(TOKENS).sum().backward()
    assert all(v.grad is not None and v.grad.isfinite().all() for v in trainable_vectors(loaded))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("outside", [False, True], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("base", BASES)
def test_forward_and_backward_under_autocast(base, cast, outside, backend):
    """The product is autocast's; the update keeps fp32 sums, and so do gradients. The reference raised in backward."""
    layer = adapted(base)
    layer.backend = backend
    x = example(layer)
    leaf = x.clone().requires_grad_() if x.is_floating_point() else x
    with torch.autocast("cpu", cast):
        y = layer(leaf)
        bare = layer.base(x)
        loss = y.float().square().mean()
        if not outside:
            loss.backward()
    if outside:
        loss.backward()
    assert y.dtype is bare.dtype
    exact = layer.v.detach().double().requires_grad_()
    truth = dense_output(layer, x, exact)
    truth.square().mean().backward()
    tolerance = 0.03 if y.dtype is torch.bfloat16 else 0.005
    assert relative(y, truth) < tolerance and relative(layer.v.grad, exact.grad) < tolerance


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("base", BASES)
def test_the_precision_of_products_is_the_bases_business(base, backend, precision):
    """TF32 or bf16 products of the model's own are asked for; the update's r numbers stay in fp32."""
    layer = adapted(base)
    layer.backend = backend
    x = example(layer)
    with torch.no_grad():
        delta = (layer(x) - layer.base(x)).clone()
        with restored(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, precision):
            inside = layer(x) - layer.base(x)
    assert relative(inside, delta.double()) < 2e-6


def test_threads_change_no_bit():
    """Of ours (larger ones: tests/ops/test_native.py); torch's own products change with them on some CPUs."""
    frozen, model = tiny_decoder(), adapt()
    with torch.no_grad():
        bare, expected = frozen(TOKENS), model(TOKENS)
        for threads in (1, 2, 3, 8):
            with restored(torch.get_num_threads, torch.set_num_threads, threads):
                again = model(TOKENS)
                assert relative(again, expected) < 2e-6
                assert torch.equal(again, expected) or not torch.equal(frozen(TOKENS), bare)


def test_a_backend_that_was_set_serves_all_the_same(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = stored(adapt(), tmp_path / "a")
    try:
        set_backend("reference")
        inside = stored(adapt(), tmp_path / "b")
    finally:
        set_backend(None)
    for name, value in plain.items():
        assert torch.equal(value, inside[name]) if isinstance(value, Tensor) else value == inside[name], name


@pytest.mark.parametrize("where", ["node as it is", "node in Python"])
@pytest.mark.parametrize("base", BASES)
def test_a_base_that_was_made_in_inference_mode_is_adapted(base, where, monkeypatch):
    """Its weights have no count of writes. torch trains nothing through them, but what is added to their output."""
    if where == "node in Python":
        monkeypatch.setattr(node, "twin", None)
        monkeypatch.setattr(plan, "twin", None)
    with torch.inference_mode():
        module = BASES[base]().requires_grad_(False)
    model = apply_tiny_lora(nn.ModuleDict({"layer": module}), config(target_modules=["layer"]), progress=False)
    layer = model["layer"]
    assert layer.base.weight.is_inference() and not layer.v.is_inference()
    x, v = example(layer), layer.v.detach().double().requires_grad_()
    truth = dense_output(layer, x, v)
    (expected,) = torch.autograd.grad(truth.square().sum(), v)
    for _ in range(3):
        y = layer(x)
        (found,) = torch.autograd.grad(y.square().sum(), layer.v)
        assert relative(y, truth) < 1e-5 and relative(found, expected) < 1e-5
    with torch.no_grad():
        assert relative(layer(x), truth) < 1e-5


@pytest.mark.parametrize("where", ["node as it is", "node in Python"])
def test_the_gradient_of_an_input_goes_through_inference_weights(where, monkeypatch):
    if where == "node in Python":
        monkeypatch.setattr(node, "twin", None)
        monkeypatch.setattr(plan, "twin", None)
    with torch.inference_mode():
        module = BASES["linear with a bias"]().requires_grad_(False)
    layer = apply_tiny_lora(nn.ModuleDict({"layer": module}), config(target_modules=["layer"]), progress=False)["layer"]
    x = example(layer).requires_grad_()
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(dense_output(layer, exact).square().sum(), exact)
    assert relative(found, expected) < 1e-5
