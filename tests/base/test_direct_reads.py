"""Layers whose weight is read past them: found in the source of the module around them, and said."""
import warnings

import pytest
import torch
from torch import nn

from tinylora_kernels import TinyLoRAConfig, apply_tiny_lora
from tinylora_kernels.base.direct_reads import read_directly, weights_read_by


class Head(nn.Module):
    """Calls one layer and reads the other's weight; its other mentions of weights are no uses."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)
        nn.init.zeros_(self.called.weight)

    def forward(self, x):
        x = self.called(x.to(self.called.weight.dtype))  # not self.called.weight itself
        return x @ self.read.weight.T


class Derived(Head):
    pass


def test_reads_are_told_from_mentions():
    assert weights_read_by(Head) == weights_read_by(Derived) == {"read"}
    assert read_directly(nn.ModuleDict({"a": Derived()}), ["a.called", "a.read"]) == {
        "a.read": "Derived reads self.read.weight"
    }


class Reads(nn.Module):
    """The forms that transformers has: DeBERTa's, EoMT's, SAM's, DETR's; what is tied or asked for is no use."""

    def __init__(self):
        super().__init__()
        self.optional, self.indexed, self.asked, self.tied = (nn.Linear(8, 8) for _ in range(4))
        self.listed, self.looped = (nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))
        self.model = nn.ModuleDict({"below": nn.Linear(8, 8), "tied": nn.Linear(8, 8)})

    def forward(self, x):
        w = self.optional.weight if x is not None else None
        w = w + self.indexed.weight[None, :] + self.listed[1].weight
        for i in range(2):
            w = w + self.looped[i].weight
        return nn.functional.linear(x, self.model.below.weight + w, None if self.asked.weight is None else None)

    def tie(self):
        self.tied.weight = self.model.tied.weight


@pytest.mark.parametrize("around", ["", "a.b."])
def test_every_form_of_a_read_is_one(around):
    model = Reads()
    for name in reversed(around.split(".")[:-1]):
        model = nn.ModuleDict({name: model})
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    read = ("optional", "indexed", "listed.1", "looped.0", "looped.1", "model.below")
    assert sorted(read_directly(model, every)) == sorted(around + name for name in read)


def test_torchs_own_transformer_layers_are_known():
    assert {"linear1", "linear2"} <= weights_read_by(nn.TransformerEncoderLayer)
    assert "out_proj" in weights_read_by(nn.MultiheadAttention)


def test_mamba_is_known_and_llama_is_not():
    transformers = pytest.importorskip("transformers")
    mixer = transformers.models.mamba.modeling_mamba.MambaMixer
    assert "dt_proj" in weights_read_by(mixer) and "in_proj" not in weights_read_by(mixer)
    for name in ("LlamaAttention", "LlamaMLP", "LlamaDecoderLayer"):
        assert not weights_read_by(getattr(transformers.models.llama.modeling_llama, name))


def test_the_warning_names_the_reader_and_its_way_out_works():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval()
    config = TinyLoRAConfig(target_modules=["linear1"], cache=False)
    with pytest.warns(UserWarning, match="TransformerEncoderLayer reads self.linear1.weight itself"):
        apply_tiny_lora(model, config)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        before = model(x)
        model.linear1.v.fill_(0.5)
        assert torch.equal(model(x), before), "torch's fast path no longer reads the weight: the warning can go"
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert not torch.allclose(model(x), before, atol=1e-3)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_ordinary_models_are_adapted_without_a_word():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_tiny_lora(model, TinyLoRAConfig(cache=False))
