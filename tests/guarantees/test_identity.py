"""What an adapter is made of is the model's own: its config, its factors and its vectors are nobody else's."""
from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import (
    AdapterBank,
    LoRAXSConfig,
    TinyLoRAConfig,
    adapted_layers,
    export_lora,
    inspect_adapter,
    load_adapter,
    merge,
    refresh_factors,
    remove_adapter,
    save_adapter,
    trainable_vectors,
    unmerge,
)
from tinylora_kernels.factors.modules import factorize_modules
from tinylora_kernels.factors.svd import Factors
from tinylora_kernels.model.attach import adapt as apply
from tinylora_kernels.model.targets import base_module, fused_parts, selected_names

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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through", ["adapting", "a file", "a copy", "skipping"])
def test_the_config_of_a_model_cannot_be_written_into(kind, through, tmp_path):
    theirs = config(kind)
    if through == "skipping":  # one that cannot carry the rank: the model's config is another object again
        theirs.target_modules, theirs.fused, bare = None, None, tiny_decoder()
        nn.init.zeros_(bare.layers[0].q_proj.weight)
        with pytest.warns(UserWarning, match="cannot carry rank"):
            model = apply(bare, theirs, progress=False)
    else:
        model = adapt(theirs)
    if through == "a file":
        save_adapter(model, tmp_path / "file")
        model = load_adapter(tiny_decoder(), tmp_path / "file", cache=False, progress=False)
    model = copy.deepcopy(model) if through == "a copy" else model
    own = next(iter(adapted_layers(model).values())).config
    before = copy.deepcopy(own)
    for field in dataclasses.fields(own):
        with pytest.raises(AttributeError, match=f"^{field.name}: this config says what an adapted model computes"):
            setattr(own, field.name, 99)
    assert own == before and dataclasses.replace(own, seed=99).seed == 99
    theirs.seed = 99  # the caller's may be: it is the next model's
    save_adapter(model, tmp_path / "file")
    assert inspect_adapter(tmp_path / "file").config.seed == 0


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


# Factors that somebody brings


def factors_of(model: nn.Module, config) -> dict:
    bases = {name: base_module(model, name) for name in selected_names(model, config)[0]}
    return factorize_modules(bases, config.rank, fused_parts(config, bases), cache=False, progress=False)


def near(model: nn.Module, share: float) -> nn.Module:
    """Weights of the same shapes, and almost the same: those of a fine-tuned model."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("proj.weight"):
                tensor.add_(share * tensor.std() * torch.randn_like(tensor))
    return model


OTHERS = {
    "other weights": lambda: tiny_decoder(1), "near ones": lambda: near(tiny_decoder(), 0.01),
    "in 16 bits": lambda: tiny_decoder().bfloat16().float(),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_another_weight_are_refused(kind, other):
    theirs, model = factors_of(OTHERS[other](), config(kind)), tiny_decoder()
    y = model(TOKENS)
    with pytest.raises(ValueError, match=r"^layers\.0\.q_proj: factors: expected those of its weight, .* found others"):
        adapt(config(kind), model, factors=theirs)
    assert not adapted_layers(model) and torch.equal(model(TOKENS), y)
    assert all(parameter.requires_grad for parameter in model.parameters())


CHANGED = {
    "swapped layers": lambda f: f | {"layers.0.q_proj": f["layers.1.q_proj"], "layers.1.q_proj": f["layers.0.q_proj"]},
    "the second and third triplet": lambda f: f | {"layers.1.k_proj": _last(f, "layers.1.k_proj")},
    "another rank": lambda f: {name: Factors(g.basis[:1], g.sigma[..., :1], False, 0.0) for name, g in f.items()},
    "one part of another": lambda f: f | {"layers.1.up_proj": _turned(f["layers.1.up_proj"])},
}  # fmt: skip


def _last(factors: dict, name: str) -> Factors:
    more = factors_of(tiny_decoder(), config(frozen_rank=3))[name]
    return Factors(more.basis[1:].contiguous(), more.sigma[1:], False, more.residual)


def _turned(factors: Factors) -> Factors:
    return Factors(factors.basis.roll(20, 1), factors.sigma, False, factors.residual)


@pytest.mark.parametrize("change", CHANGED)
def test_factors_in_the_wrong_place_are_refused(change):
    model, theirs = tiny_decoder(), config()
    factors = CHANGED[change](factors_of(model, theirs))
    with pytest.raises(ValueError, match=r"^layers\.\d\.\w+(\[\d+:\d+\])?: factors: expected "):
        adapt(theirs, model, factors=factors)
    assert not adapted_layers(model)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_copied(kind, tmp_path):
    """One dict for two models: what is written into the factors of one is in no other, nor in the dict."""
    factors = factors_of(tiny_decoder(), config(kind))
    before = copy.deepcopy(factors)
    one, two = (adapt(config(kind), factors=factors) for _ in range(2))
    plain = adapt(config(kind))
    y = plain(TOKENS)
    assert torch.equal(one(TOKENS), y) and torch.equal(two(TOKENS), y)
    with torch.no_grad():
        for name, parameter in two.named_parameters():
            if name.endswith("proj.base.weight"):
                parameter.copy_(torch.randn_like(parameter))
    refresh_factors(two, progress=False)
    for name, layer in adapted_layers(two).items():
        layer.v.data.fill_(7.0)
        layer.basis.neg_()
        layer.sigma.zero_()
        layer.projection.zero_()
        assert torch.equal(factors[name].basis, before[name].basis)
        assert torch.equal(factors[name].sigma, before[name].sigma)
    assert torch.equal(one(TOKENS), y)


def test_what_a_layer_is_built_of_stays_the_callers():
    from tinylora_kernels.layers.layer import TinyLoRALayer

    basis, sigma, projection = torch.linalg.qr(torch.randn(8, 2)).Q.T, torch.tensor([2.0, 1.0]), torch.randn(3, 2, 2)
    layer = TinyLoRALayer(nn.Linear(8, 8), basis, sigma, projection, nn.Parameter(torch.zeros(3)), config=config())
    own = {tensor.untyped_storage().data_ptr() for tensor in layer.buffers()}
    assert own.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in (basis, sigma, projection))


def test_vectors_of_a_peft_adapter_are_copied(tmp_path):
    model = from_peft(peft_directory(tmp_path, True))
    given = next(iter(adapted_layers(model).values())).config
    own = {v.untyped_storage().data_ptr() for v in trainable_vectors(model)}
    assert own.isdisjoint(v.untyped_storage().data_ptr() for v in given.vectors)


# Two adapters in one model, as a vision tower and a language model adapted apart


def apart(one=None, two=None) -> nn.Module:
    """Each of two blocks adapted by itself: both count their modules and groups from 0."""
    model = tiny_decoder().requires_grad_(False)
    for block, changes in zip(model.layers, (one or {}, two or {"seed": 7}), strict=True):
        adapt(config(**{"target_modules": ["q_proj", "v_proj"], "fused": None} | changes), block)
    with torch.no_grad():
        for number, v in enumerate(trainable_vectors(model)):
            v.copy_(torch.linspace(-1, 2, v.numel()) * (number + 1))
    return model


@pytest.mark.parametrize("n_tie", [1, 2, 100])
def test_two_adapters_go_to_peft_with_a_vector_each(n_tie, tmp_path):
    peft = pytest.importorskip("peft", minversion="0.21")
    from tinylora_kernels.integrations.peft import to_peft
    from tinylora_kernels.integrations.peft_adapters import load_peft_vectors

    model = apart({"n_tie": n_tie}, {"n_tie": n_tie, "seed": 7, "alpha": 2.0})
    to_peft(model, tmp_path / "peft")
    y = model(TOKENS)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(tiny_decoder(), tmp_path / "peft")(TOKENS), y)
    with torch.no_grad():
        for v in trainable_vectors(model):
            v.zero_()
    load_peft_vectors(model, tmp_path / "peft")
    assert torch.equal(model(TOKENS), y)


def test_groups_that_peft_cannot_express_come_back(tmp_path):
    pytest.importorskip("peft", minversion="0.21")
    from tinylora_kernels.integrations.peft import to_peft
    from tinylora_kernels.integrations.peft_adapters import load_peft_vectors

    names = [f"layers.{n}.{name}" for n in (0, 1) for name in ("q_proj", "v_proj")]
    tying = dict(zip(names, [0, 0, 1, 0], strict=True))
    model = adapt(config(target_modules=["q_proj", "v_proj"], tying=tying, fused=None))
    y = model(TOKENS)
    with pytest.warns(UserWarning, match="every module gets a copy of its v"):
        to_peft(model, tmp_path / "peft")
    with torch.no_grad():
        for v in trainable_vectors(model):
            v.zero_()
    load_peft_vectors(model, tmp_path / "peft")
    assert torch.equal(model(TOKENS), y)


@pytest.mark.parametrize("field", [{"frozen_rank": 3}, {"trainable_dim": 4}])
def test_two_adapters_that_no_config_of_pefts_has(field, tmp_path):
    pytest.importorskip("peft", minversion="0.21")
    from tinylora_kernels.integrations.peft import to_peft

    with pytest.raises(ValueError, match="^model: PEFT has one (rank|u) for all modules, found "):
        to_peft(apart(two=field), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def _of_bank(model, path):
    AdapterBank(model, 2)


def _of_file(model, path):
    save_adapter(model, path)


def _of_own_seeds(model, path):
    AdapterBank(model, 2, own_seeds=True)


@pytest.mark.parametrize("use", [_of_bank, _of_own_seeds, _of_file])
@pytest.mark.parametrize("two", [{}, {"seed": 7}, {"n_tie": 1}])
def test_what_takes_one_adapter_refuses_two(use, two, tmp_path):
    model = apart(two=two)
    y = model(TOKENS)
    with pytest.raises(ValueError, match="expected a model of one adapter, found|save the whole model|do not share"):
        use(model, tmp_path / "file")
    assert all(layer.bank is None for layer in adapted_layers(model).values()) and torch.equal(model(TOKENS), y)
    use(model.layers[1], tmp_path / "file")  # a part is one adapter


def test_what_goes_layer_by_layer_takes_two(tmp_path):
    """Merging, state dicts, exports and refreshed factors are of each layer's own config and vector."""
    peft = pytest.importorskip("peft", minversion="0.21")
    model = apart(two={"frozen_rank": 3, "alpha": 2.0, "n_tie": 1})
    y = model(TOKENS)
    assert torch.equal(refresh_factors(model, progress=False)(TOKENS), y)
    other = apart(two={"frozen_rank": 3, "alpha": 2.0, "n_tie": 1})
    with torch.no_grad():
        for v in trainable_vectors(other):
            v.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS), y)
    export_lora(model, tmp_path / "lora")
    torch.testing.assert_close(peft.PeftModel.from_pretrained(tiny_decoder(), tmp_path / "lora")(TOKENS), y)
    torch.testing.assert_close(merge(model)(TOKENS), y)


# The vector of a tie group is one float32 parameter


STATES = {
    "bfloat16": lambda t: t.bfloat16(), "float16": lambda t: t.half(), "float64": lambda t: t.double(),
    "a parameter": lambda t: nn.Parameter(t.bfloat16()), "as it is": lambda t: t.clone(),
}  # fmt: skip


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.filterwarnings("ignore:a state dict brought vectors")
def test_a_state_dict_does_not_change_what_v_trains_in(state, assign):
    theirs = adapt(config()).state_dict()
    model = adapt(config())
    given = {name: STATES[state](tensor) if name.endswith(".v") else tensor for name, tensor in theirs.items()}
    dtypes = {name: tensor.dtype for name, tensor in given.items()}
    model.load_state_dict(given, assign=assign)
    assert {name: tensor.dtype for name, tensor in given.items()} == dtypes  # the caller's dict is the caller's
    vectors = trainable_vectors(model)
    assert all(v.dtype is torch.float32 and v.requires_grad and v.is_leaf for v in vectors)
    before = vectors_of(model)
    optimizer = torch.optim.SGD(vectors, lr=1e-4)
    for _ in range(2000):
        for v in vectors:
            v.grad = torch.ones_like(v)
        optimizer.step()
    torch.testing.assert_close(vectors_of(model), before - 0.2, rtol=0, atol=1e-3)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_vector_that_is_set_is_that_of_the_group(at):
    model = adapt(config(target_modules=["q_proj", "v_proj"], fused=None, n_tie=4))
    layers, y = list(adapted_layers(model).values()), model(TOKENS)
    with pytest.raises(TypeError, match="cannot assign .* as parameter 'v'"):  # torch's own
        layers[at].v = torch.full((3,), 5.0)
    assert torch.equal(model(TOKENS), y) and all("v" not in layer.__dict__ for layer in layers)
    layers[at].v = v = nn.Parameter(torch.full((3,), 5.0))
    assert all(layer.v is v for layer in layers) and [id(v)] == [id(own) for own in trainable_vectors(model)]
    assert [name for name, _ in model.named_parameters() if name.endswith(".v")] == ["layers.0.q_proj.v"]
    y = model(TOKENS)
    torch.testing.assert_close(merge(model)(TOKENS), y)
    twin = copy.deepcopy(unmerge(model))
    list(adapted_layers(twin).values())[at].v = nn.Parameter(torch.zeros(3))
    assert torch.equal(twin(TOKENS), tiny_decoder()(TOKENS)) and torch.equal(model(TOKENS), y)


# The bare model comes back as it was


@pytest.mark.parametrize("save_to", [None, "cpu"])
def test_a_merged_adapter_is_not_removed_with_the_weights_it_hides(save_to):
    model, bare = adapt(config()), tiny_decoder()
    merged = merge(model, save_to)(TOKENS)
    with pytest.raises(ValueError, match=r"^remove_adapter: layers\.0\.q_proj .* merged; call unmerge\(model\)"):
        remove_adapter(model)
    assert torch.equal(model(TOKENS), merged)
    assert torch.equal(remove_adapter(unmerge(model))(TOKENS), bare(TOKENS))


def test_an_adapter_of_a_bank_is_not_removed():
    model = adapt(config())
    bank = AdapterBank(model, 1)
    bank.add("a", vectors_of(model))
    with pytest.raises(ValueError, match=r"^remove_adapter: layers\.0\.q_proj has an AdapterBank.*close it first"):
        remove_adapter(model)
    with bank.use(["a", "a"]):
        assert not torch.equal(model(TOKENS), tiny_decoder()(TOKENS))
    bank.close()
    assert torch.equal(remove_adapter(model)(TOKENS), tiny_decoder()(TOKENS))
