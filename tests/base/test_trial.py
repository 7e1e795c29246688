"""Subclasses of linear layers and convolutions: those whose updated weight is not an updated output are refused."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.guarantees.dense import relative
from tinylora_kernels import TinyLoRAConfig, adapted_layers, apply_tiny_lora, merge, trainable_vectors
from tinylora_kernels.base.kinds import kind_of
from tinylora_kernels.base.trial import why_not_linear


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(3 * x)


class Dropping(nn.Linear):
    """With a buffer, a child, noise, and a count: whoever tries it leaves traces."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(1))
        self.dropout, self.seen = nn.Dropout(0.5), []

    def forward(self, x):
        self.calls += 1
        self.seen.append(torch.rand(1))
        return self.dropout(super().forward(x))


class InputRounded(nn.Linear):
    def forward(self, x):
        return super().forward((x * 8).round() / 8)


class CausalConv1d(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class OwnForward(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight, self.bias)


class WeightRounded(nn.Linear):
    def forward(self, x):
        return F.linear(x, (self.weight * 16).round() / 16, self.bias)


class BiasLeftToTheCaller(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight)


class BiasReturned(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight), self.bias


class WeightNormed(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


class Activated(nn.Linear):
    def forward(self, x):
        return F.gelu(super().forward(x))


class Standardised(nn.Conv2d):
    def forward(self, x):
        flat = self.weight.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
        return self._conv_forward(x, flat.view_as(self.weight), self.bias)


class StandardisedBelow(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, F.normalize(weight.flatten(1), dim=1).view_as(weight), bias)


class WantsMore(nn.Linear):
    def forward(self, x, scale):
        return scale * super().forward(x)


TAKEN = {cls.__name__: cls for cls in (Scaled, Dropping, InputRounded, OwnForward, CausalConv1d, WantsMore)}
REFUSED = {cls.__name__: cls for cls in (
    WeightRounded, BiasLeftToTheCaller, BiasReturned, WeightNormed, Activated, Standardised, StandardisedBelow,
)}  # fmt: skip


def make(cls: type[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return cls(*((24, 16) if issubclass(cls, nn.Linear) else (24, 16, 3))).to(dtype)


def example(layer: nn.Module) -> torch.Tensor:
    shape = (2, 5, 24) if isinstance(layer, nn.Linear) else (2, 24, *[7] * len(layer.kernel_size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def adapt(layer: nn.Module) -> nn.Module:
    config = TinyLoRAConfig(trainable_dim=3, target_modules=["layer"], cache=False)
    model = apply_tiny_lora(nn.ModuleDict({"layer": layer}), config, progress=False)
    for v in trainable_vectors(model):
        nn.init.normal_(v)
    return model


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


@DTYPES
@pytest.mark.parametrize("name", TAKEN)
def test_what_multiplies_by_its_weight_is_adapted(name, dtype):
    assert kind_of(layer := make(TAKEN[name], dtype)).why_not(layer) is None


@DTYPES
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_other_things_with_its_weight_is_refused(name, dtype):
    """The merged model was up to a fifth off the adapted one, and nobody said so."""
    layer = make(REFUSED[name], dtype)
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=rf"layer: it cannot be adapted: .*{name}.*exclude_modules") as raised:
        adapt(layer)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(state[key], tensor) for key, tensor in layer.state_dict().items())


@pytest.mark.parametrize("name", sorted(TAKEN.keys() - {"WantsMore"}))
def test_what_is_taken_is_merged_as_it_is_adapted(name):
    model = adapt(make(TAKEN[name]).eval())
    x = example(model["layer"].base)
    adapted, bare = model["layer"](x), model["layer"].base(x)
    assert relative(bare, adapted) > 0.05
    assert relative(merge(model)["layer"](x), adapted) < 1e-5


def test_a_trial_leaves_no_traces():
    layer, heard = make(Dropping), []
    for module in (layer, layer.dropout):
        module.register_forward_hook(lambda *_: heard.append(1))
        module.register_forward_pre_hook(lambda *_: heard.append(1))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert why_not_linear(layer) is None
    assert torch.equal(torch.rand(3), expected)
    assert not heard and not layer.seen and layer.calls.item() == 0 and layer.training and layer.dropout.training
    assert len(layer._forward_hooks) == len(layer.dropout._forward_pre_hooks) == 1
    assert layer.weight.grad is None and layer.weight._version == make(Dropping).weight._version


def test_plain_layers_and_the_meta_device_are_not_tried(monkeypatch):
    monkeypatch.setattr("tinylora_kernels.base.trial._deviation", lambda *_: pytest.fail("it was tried"))
    for layer in (nn.Linear(4, 6), nn.Conv2d(3, 4, 3), make(WeightRounded).to("meta")):
        assert why_not_linear(layer) is None


def test_autocast_and_default_devices_do_not_matter():
    layers = {name: make(cls) for name, cls in (TAKEN | REFUSED).items()}
    expected = {name: why_not_linear(layer) for name, layer in layers.items()}
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert {name: why_not_linear(layer) for name, layer in layers.items()} == expected


def _with_weight(change) -> nn.Module:
    layer = nn.Linear(24, 16)
    layer.weight = nn.Parameter(change(layer.weight.detach()), requires_grad=False)
    return layer


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: nn.LazyLinear(16), "LazyLinear has no shape yet"),
        (lambda: nn.LazyConv2d(16, 3), "LazyConv2d has no shape yet"),
        (lambda: _with_weight(torch.Tensor.to_sparse_csr), "found torch.sparse_csr"),
        (lambda: _with_weight(torch.Tensor.to_sparse), "found torch.sparse_coo"),
        (lambda: nn.Linear(24, 16, dtype=torch.complex64), "found torch.complex64"),
        (lambda: nn.Embedding(24, 16, dtype=torch.complex64), "found torch.complex64"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_weights_without_a_matrix_are_refused_by_name(make, says):
    """What torch said of them was many lines, of an op that nobody had called."""
    with pytest.raises(ValueError, match=f"^layer: it cannot be adapted: .*{says}") as raised:
        adapt(make())
    assert "\n" not in str(raised.value)


def test_classes_of_transformers():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from transformers.integrations.bitnet import AutoBitLinear
    from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
    from transformers.models.falcon.modeling_falcon import FalconLinear
    from transformers.models.perceiver.modeling_perceiver import Conv2dSamePadding

    assert transformers is not None
    torch.manual_seed(0)
    assert why_not_linear(FalconLinear(16, 24)) is None and why_not_linear(Conv2dSamePadding(6, 8, 3)) is None
    assert why_not_linear(AutoBitLinear(32, 48, bias=False)) is None
    assert "AutoBitLinear" in str(why_not_linear(AutoBitLinear(32, 48, bias=False, online_quant=True)))
    assert "WeightStandardizedConv2d" in str(why_not_linear(WeightStandardizedConv2d(6, 24, 3)))
class ScaledLookup(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


class Positions(nn.Embedding):
    """As OPT's: its rows follow from what it is called with, and not from ids."""

    def forward(self, mask, past=0):
        return super().forward((mask.cumsum(1) * mask - 1)[:, past:] + 2)


class NormedLookup(nn.Embedding):
    def forward(self, ids):
        return F.normalize(super().forward(ids), dim=-1)


class OneRowOfItsOwn(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.own = nn.Parameter(torch.randn(self.embedding_dim))

    def forward(self, ids):
        return torch.where((ids == self.num_embeddings - 1).unsqueeze(-1), self.own, super().forward(ids))


class TwoTables(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.more = nn.Embedding(3, self.embedding_dim)

    def forward(self, ids):
        last = self.num_embeddings - 1
        more = (ids > last).unsqueeze(-1)
        return torch.where(more, self.more((ids - last - 1).clamp(min=0)), super().forward(ids.clamp(max=last)))


class ReturnsTwo(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids), ids


@DTYPES
@pytest.mark.parametrize("rows", [5, 3000])
@pytest.mark.parametrize("cls, right", [
    (nn.Embedding, True), (ScaledLookup, True), (Positions, True), (NormedLookup, False), (OneRowOfItsOwn, False),
    (TwoTables, False), (ReturnsTwo, False),
])  # fmt: skip
def test_lookups_are_tried_row_by_row(cls, right, rows, dtype):
    torch.manual_seed(0)
    layer = cls(rows, 16).to(dtype)
    reason = kind_of(layer).why_not(layer)
    if right:
        assert reason is None
    else:
        assert cls.__name__ in reason and reason.endswith("leave it out by exclude_modules")
        with pytest.raises(ValueError, match=f"^layer: it cannot be adapted: .*{cls.__name__}"):
            adapt(layer)


class Grouped(nn.Linear):
    """As DeepSeek-V4's: [..., groups, in] -> [..., groups, out / groups]."""

    def forward(self, x):
        weight = self.weight.view(4, -1, self.in_features)
        return torch.einsum("...gi,goi->...go", x, weight)


class Two(nn.Module):
    def __init__(self, cls):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.odd = nn.Linear(24, 24), cls(24, 16)


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("cls", [Grouped, WantsMore, WeightRounded, BiasReturned, Activated])
def test_the_default_leaves_out_what_it_does_not_know(cls, targets):
    model, cfg = Two(cls), TinyLoRAConfig(target_modules=targets, cache=False)
    words = rf"^target_modules: odd cannot be adapted \(.*{cls.__name__}.*\) and stay"
    with pytest.warns(UserWarning, match=words) as said:
        apply_tiny_lora(model, cfg, progress=False)
    assert list(adapted_layers(model)) == ["body"] and "\n" not in str(said[0].message)


def test_a_layer_that_was_named_says_at_its_call_that_it_is_another():
    model = apply_tiny_lora(Two(Grouped), TinyLoRAConfig(target_modules=["odd"], cache=False), progress=False)
    with pytest.raises(ValueError, match=r"^odd: expected .* 16 features of Grouped, .* found one \[3, 4, 4\]"):
        model.odd(torch.randn(3, 4, 24))


def test_a_model_of_nothing_that_is_known_says_why():
    with pytest.raises(ValueError, match="every linear layer; 0 cannot be adapted .the forward of Activ"):
        apply_tiny_lora(nn.Sequential(Activated(24, 16)), TinyLoRAConfig(cache=False), progress=False)
