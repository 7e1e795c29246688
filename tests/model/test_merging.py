"""Merging: the merged model is the adapted model, names are the original's, and every bit comes back."""
import copy
import pickle
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn

from tests.models import TARGETS, tiny_decoder
from tests.paper import delta_weight
from tinylora_kernels import TinyLoRAConfig, TinyLoRALayer, adapted_layers, apply_tiny_lora, refresh_factors
from tinylora_kernels.bank.bank import AdapterBank
from tinylora_kernels.model.adapted import adapter_disabled
from tinylora_kernels.model.fidelity import merge_fidelity
from tinylora_kernels.model.merging import merge, merged_weights, unmerge
from tinylora_kernels.rl import GRPOTrainer, SFTTrainer

merge_module = sys.modules[merge.__module__]  # the package's own attribute "merge" is the function
TOKENS = torch.arange(12).view(2, 6)


def adapt(model, size=0.3, targets=TARGETS, **options):
    options = {"trainable_dim": 3, "n_tie": 4, "target_modules": targets, "cache": False, **options}
    apply_tiny_lora(model, TinyLoRAConfig(**options), progress=False)
    torch.manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=size)
    return model


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_merged_forward_equals_adapted_forward(dtype, tolerance, bias):
    model = adapt(tiny_decoder(bias=bias).to(dtype))
    base = tiny_decoder(bias=bias).to(dtype)(TOKENS)
    adapted = model(TOKENS)
    merged = merge(model)(TOKENS)
    torch.testing.assert_close(merged, adapted, rtol=tolerance, atol=tolerance)
    assert (merged - base).abs().max() > 0.01
    assert torch.equal(unmerge(model)(TOKENS), adapted)


def test_merged_bf16_forward_is_within_the_rounding_of_the_weights():
    exact = adapt(tiny_decoder().to(torch.bfloat16).double())
    model = adapt(tiny_decoder().to(torch.bfloat16))
    truth = exact(TOKENS)
    adapted_error = (model(TOKENS).double() - truth).norm()
    merged_error = (merge(model)(TOKENS).double() - truth).norm()
    # one more rounding, that of W', beside the one of every activation
    assert merged_error < 2 * adapted_error
    assert adapted_error < 0.02 * truth.norm()


def test_names_and_values_are_those_of_the_original_state_dict():
    original = tiny_decoder(bias=True)
    model = adapt(tiny_decoder(bias=True))
    before = bits(model)
    layers = adapted_layers(model)
    streamed = list(merged_weights(model))
    assert [name for name, _ in streamed] == list(original.state_dict())
    for name, tensor in streamed:
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            assert torch.equal(tensor, original.state_dict()[name])
        else:
            expected = layer.weight_matrix().double() + delta_weight(layer).double()
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-6)
    assert_same_bits(model, before)


def test_the_stream_loads_into_a_bare_model_bit_for_bit():
    model = adapt(tiny_decoder(bias=True).to(torch.bfloat16))
    bare = tiny_decoder(seed=9, bias=True).to(torch.bfloat16)
    bare.load_state_dict(dict(merged_weights(model)))
    assert torch.equal(bare(TOKENS), merge(model)(TOKENS))
    for (name, merged), (_, own) in zip(merged_weights(model), bare.state_dict().items(), strict=True):
        assert torch.equal(merged, own), name  # streamed from the merged model as well


def test_only_adapted():
    model = adapt(tiny_decoder(bias=True))
    names = [name for name, _ in merged_weights(model, only_adapted=True)]
    assert names == [name + ".weight" for name in adapted_layers(model)]


def test_no_second_copy_of_the_model():
    model = adapt(tiny_decoder())
    owned = {tensor.data_ptr() for tensor in model.state_dict().values()}
    made = []
    for _, tensor in merged_weights(model):
        if tensor.data_ptr() not in owned:
            made.append(weakref.ref(tensor))
        assert sum(reference() is not None for reference in made) <= 1
    assert len(made) == len(adapted_layers(model))


def test_a_layer_reached_by_two_names_is_streamed_under_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(6, 6)
            self.second = self.first

    model = adapt(Twice(), targets=["first"])
    streamed = dict(merged_weights(model))
    assert list(streamed) == list(Twice().state_dict())
    assert torch.equal(streamed["first.weight"], streamed["second.weight"])
    merge(model)
    assert torch.equal(model.second.base.weight, streamed["second.weight"])


def test_hundred_cycles_in_bf16_restore_every_bit():
    model = adapt(tiny_decoder(bias=True).to(torch.bfloat16))
    before = bits(model)
    vectors = [p for p in model.parameters() if p.requires_grad]
    for cycle in range(100):
        for p in vectors:
            nn.init.normal_(p, std=0.001 * 1.1**cycle)
        merge(model)
        assert not torch.equal(model.layers[0].q_proj.base.weight, before["layers.0.q_proj.base.weight"])
        unmerge(model)
    after = bits(model)
    for name, tensor in before.items():
        if not name.endswith(".v"):
            assert torch.equal(tensor, after[name]), name


def test_subnormals_nan_payloads_and_signed_zeros_come_back():
    model = nn.Sequential(nn.Linear(8, 8, bias=False, dtype=torch.bfloat16))
    adapt(model, targets=["0"])
    with torch.no_grad():
        patterns = torch.tensor([-0.0, 1e-40, float("nan"), float("inf")], dtype=torch.bfloat16)
        model[0].base.weight[0, :4] = patterns
    before = model[0].base.weight.detach().view(torch.int16).clone()
    unmerge(merge(model))
    assert torch.equal(model[0].base.weight.view(torch.int16), before)


def test_saved_bits_can_live_elsewhere():
    model = adapt(tiny_decoder())
    before = bits(model)
    merge(model, save_to="cpu")
    assert all(layer.saved_weight.device.type == "cpu" for layer in adapted_layers(model).values())
    assert_same_bits(unmerge(model), before)
    assert all(layer.saved_weight is None for layer in adapted_layers(model).values())


def test_merging_twice_and_unmerging_what_is_not_merged():
    model = adapt(tiny_decoder())
    with pytest.raises(ValueError, match="^unmerge: the model is not merged"):
        unmerge(model)
    merge(model)
    merged = bits(model)
    with pytest.raises(ValueError, match=r"^merge: layers.0.q_proj and 13 more modules are merged; call"):
        merge(model)
    assert_same_bits(model, merged)
    unmerge(model)
    with pytest.raises(ValueError, match="^unmerge: the model is not merged"):
        unmerge(model)


@pytest.mark.parametrize("operation", [merge, merged_weights, merge_fidelity])
def test_bare_model(operation):
    with pytest.raises(ValueError, match="^model: it has no adapter"):
        operation(tiny_decoder())


def test_unmerge_after_a_change_of_dtype():
    model = merge(adapt(tiny_decoder())).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"was merged as float32 \[24, 24\] and is bfloat16"):
        unmerge(model)


def test_a_copy_of_a_merged_model_can_be_unmerged():
    model = adapt(tiny_decoder())
    before = bits(model)
    merge(model)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(unmerge(duplicate), before)
        assert duplicate(TOKENS).requires_grad
    assert not model(TOKENS).requires_grad  # the original is merged still


def test_a_bank_of_adapters_is_refused():
    model = adapt(tiny_decoder())
    bank = AdapterBank(model, 2)
    before = bits(model)
    with pytest.raises(ValueError, match="^merge: the model has an AdapterBank.*close it first"):
        merge(model)
    assert_same_bits(model, before)
    bank.close()
    unmerge(merge(model))


def test_a_merge_that_fails_half_way_undoes_itself(monkeypatch):
    model = adapt(tiny_decoder())
    before, count = bits(model), 0
    original = merge_module.merged_weight

    def fails_at_the_fifth(layer):
        nonlocal count
        count += 1
        if count == 5:
            raise MemoryError("no memory left")
        return original(layer)

    monkeypatch.setattr(merge_module, "merged_weight", fails_at_the_fifth)
    with pytest.raises(MemoryError):
        merge(model)
    assert_same_bits(model, before)
    assert all(layer.is_on() for layer in adapted_layers(model).values())
    with pytest.raises(ValueError, match="not merged"):
        unmerge(model)


@torch.no_grad()
def test_nobody_takes_a_merged_base_for_the_bare_one():
    model = merge(adapt(tiny_decoder()))
    before = bits(model)
    with pytest.raises(ValueError, match="^AdapterBank: layers.0.q_proj and 13 more modules are merged; call unmerge"):
        AdapterBank(model, 2)
    with pytest.raises(ValueError, match="^adapter_disabled: .* merged; call unmerge"), adapter_disabled(model):
        pass
    assert_same_bits(model, before)
    bare = adapt(tiny_decoder(), size=0)(TOKENS)
    with adapter_disabled(unmerge(model)):
        assert torch.equal(model(TOKENS), bare)
        merge(model)
        with pytest.raises(RuntimeError, match=r"^layers.0.q_proj: expected the bare base in a block of adapter_disab"):
            model(TOKENS)
        unmerge(model)
        assert torch.equal(model(TOKENS), bare)


@torch.no_grad()
def test_an_adapter_that_was_off_before_a_merge_is_off_after_it():
    model = adapt(tiny_decoder())
    layers = adapted_layers(model).values()
    adapted, bare = model(TOKENS), adapt(tiny_decoder(), size=0)(TOKENS)
    for layer in layers:
        layer.enabled = False
    assert torch.equal(model(TOKENS), bare)
    torch.testing.assert_close(merge(model)(TOKENS), adapted)
    assert torch.equal(unmerge(model)(TOKENS), bare)


@torch.no_grad()
def test_a_model_that_was_loaded_in_inference_mode_merges():
    with torch.inference_mode():
        base = tiny_decoder()
    model = adapt(base)
    before, adapted = bits(model), model(TOKENS)
    torch.testing.assert_close(merge(model)(TOKENS), adapted, rtol=1e-5, atol=1e-5)
    assert_same_bits(unmerge(model), before)


@pytest.mark.parametrize(
    "write", [lambda w: w.mul_(0.5), lambda w: w.data.mul_(2), lambda w: w.data.copy_(torch.randn_like(w))]
)
@torch.no_grad()
def test_a_weight_that_was_written_since_the_merge_is_not_written_over(write):
    model = adapt(tiny_decoder())
    before = bits(model)
    weight = merge(model).layers[1].q_proj.weight
    merged, kept = bits(model), weight.clone()
    write(weight)
    written = bits(model)
    with pytest.raises(ValueError, match=r"^unmerge: layers.1.q_proj.weight was written since it was merged"):
        unmerge(model)
    assert_same_bits(model, written)
    weight.copy_(kept)
    assert_same_bits(model, merged)
    assert_same_bits(unmerge(model), before)


def expand_a_weight(model):
    model.layers[0].q_proj.base.weight = nn.Parameter(torch.randn(1, 24).expand(24, 24), requires_grad=False)


@pytest.mark.parametrize(
    "change, options, words",
    [
        (expand_a_weight, {}, r"layers.0.q_proj: expected a weight of its own numbers .* make it contiguous"),
        (lambda model: None, {"save_to": "meta"}, "save_to: expected a device that keeps the bits .* found 'meta'"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_merge_that_could_not_be_undone_is_refused_before_anything_has_changed(change, options, words):
    model = tiny_decoder()
    model = adapt(model, frozen_rank=1)
    change(model)
    refresh_factors(model, progress=False)
    before, adapted = bits(model), model(TOKENS)
    with pytest.raises(ValueError, match=f"^{words}"):
        merge(model, **options)
    assert_same_bits(model, before)
    assert torch.equal(model(TOKENS), adapted)
    with pytest.raises(ValueError, match="not merged"):
        unmerge(model)


def test_training_a_merged_model_is_refused():
    model = merge(adapt(tiny_decoder()))
    logits = model(TOKENS)
    with pytest.raises(ValueError, match=r"log_probs: no gradient flows.*not merged"):
        SFTTrainer(model).training_step(logits=logits, labels=TOKENS)
    with pytest.raises(ValueError, match=r"log_probs: no gradient flows.*not merged"):
        GRPOTrainer(model, group_size=2).training_step(logits.log_softmax(-1)[:, :, 0], None, [1.0, 0.0])


def test_backward_through_a_graph_from_before_the_merge_is_an_error():
    model = adapt(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), targets=["0", "1"])
    y = model(torch.randn(3, 6))
    merge(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_tied_embedding_is_refused_by_name():
    model = tiny_decoder()
    model.lm_head.weight = model.embedding.weight
    adapt(model, targets=["lm_head", "q_proj"])
    before = bits(model)
    for operation in (merge, merged_weights, merge_fidelity):
        with pytest.raises(ValueError, match=r"^lm_head.weight shares its memory with embedding.weight"):
            operation(model)
    assert_same_bits(model, before)


def test_two_adapted_modules_on_one_weight_are_refused():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    adapt(model, targets=["0", "1"])
    with pytest.raises(ValueError, match=r"^0.weight shares its memory with 1.weight"):
        merge(model)


def test_neighbours_in_one_allocation_are_not_tied():
    flat = torch.randn(2 * 36)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[0].weight = nn.Parameter(flat[:36].view(6, 6))
    model[1].weight = nn.Parameter(flat[36:].view(6, 6))
    adapt(model, targets=["0", "1"])
    before = flat.clone()
    merge(model)
    assert not torch.equal(flat[:36], before[:36]) and not torch.equal(flat[36:], before[36:])
    unmerge(model)
    assert torch.equal(flat, before)


class Int8Linear(nn.Module):
    """A weight-only quantised layer: integers and one scale per row."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.weight * self.scale).T


def test_quantised_base_is_refused_with_the_way_out():
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(6, 6, bias=False)), targets=["0"])
    model[0].base = Int8Linear(torch.randn(6, 6))
    for operation in (merge, merged_weights, merge_fidelity):
        with pytest.raises(ValueError, match=r"^0: expected a dense floating weight.*int8.*export_lora"):
            operation(model)


def test_conv1d_keeps_its_orientation():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    for shape in ((6, 6), (10, 6), (1, 6)):  # out, in; a square one hides a wrong transpose
        model = nn.Sequential(conv1d(*shape))
        nn.init.normal_(model[0].weight)
        original = model[0].weight.detach().clone()
        adapt(model, targets=["0"], frozen_rank=1)
        x = torch.randn(3, shape[1])
        adapted = model(x)
        streamed = dict(merged_weights(model))
        merge(model)
        assert torch.equal(streamed["0.weight"], model[0].base.weight)
        assert streamed["0.weight"].shape == original.shape and streamed["0.weight"].is_contiguous()
        torch.testing.assert_close(model(x), adapted)
        unmerge(model)
        assert torch.equal(model[0].base.weight, original)


def test_fidelity_is_what_its_definition_says():
    model = adapt(tiny_decoder().to(torch.bfloat16), size=0.01)
    report = merge_fidelity_quietly(model)
    dot = energy = error = 0.0
    for row, (name, layer) in zip(report.rows, adapted_layers(model).items(), strict=True):
        weight, delta = layer.weight_matrix().double(), delta_weight(layer).double()
        kept = (weight + delta).to(torch.bfloat16).double() - weight
        assert row.name == name and row.dtype == torch.bfloat16
        assert row.norm == pytest.approx(float(delta.norm()), rel=1e-4)
        assert row.survived == pytest.approx(float((kept * delta).sum() / delta.square().sum()), rel=1e-2)
        assert row.error == pytest.approx(float((kept - delta).norm() / delta.norm()), rel=1e-2)
        assert row.changed == pytest.approx(float((kept != 0).double().mean()), abs=0.01)
        dot, energy = dot + row.survived * row.norm**2, energy + row.norm**2
        error += (row.error * row.norm) ** 2
    assert report.survived == pytest.approx(dot / energy)
    assert report.error == pytest.approx((error / energy) ** 0.5)


def merge_fidelity_quietly(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return merge_fidelity(*arguments, **options)


def test_fidelity_of_updates_large_and_small():
    large = merge_fidelity_quietly(adapt(tiny_decoder().to(torch.bfloat16), size=3.0))
    assert large.survived > 0.99 and large.error < 0.05
    with pytest.warns(UserWarning, match=r"^merging would swallow \d+% of the update; export_lora"):
        small = merge_fidelity(adapt(tiny_decoder().to(torch.bfloat16), size=1e-5))
    assert small.survived < 0.1 and small.error > 0.9


def test_fidelity_of_nothing_and_of_full_precision():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zero = merge_fidelity(adapt(tiny_decoder().to(torch.bfloat16), size=0.0))
        exact = merge_fidelity(adapt(tiny_decoder(), size=0.01))
    assert zero.survived == 1.0 and zero.error == 0.0 and zero.rows[0].changed == 0.0
    assert exact.survived == pytest.approx(1.0, abs=1e-3) and exact.error < 1e-2


def test_fidelity_for_an_engine_of_lower_precision():
    model = adapt(tiny_decoder(), size=1e-4)
    report = merge_fidelity_quietly(model, dtype=torch.bfloat16)
    assert report.rows[0].dtype == torch.bfloat16
    assert report.survived < 0.9 < merge_fidelity(model).survived


def test_fidelity_does_not_depend_on_being_merged():
    model = adapt(tiny_decoder().to(torch.bfloat16), size=0.01)
    before = merge_fidelity_quietly(model)
    assert merge_fidelity_quietly(merge(model)) == before


def test_fidelity_prints_a_table():
    few = str(merge_fidelity_quietly(adapt(tiny_decoder().to(torch.bfloat16), size=0.01)))
    lines = few.splitlines()
    assert lines[0].split() == ["module", "cast", "to", "||dW||", "survived", "error", "changed"]
    assert len(lines) == 1 + 14 + 1 and "layers.1.down_proj" in few
    assert lines[-1].startswith("all modules: ") and "of the update survives the cast" in lines[-1]
    many = str(merge_fidelity_quietly(adapt(tiny_decoder(blocks=7).to(torch.bfloat16), size=0.01)))
    assert len(many.splitlines()) == 1 + 7 + 1 and "layers.q_proj" in many
    assert max(map(len, many.splitlines())) <= 100


def test_v_stays_what_it_was_while_merged():
    model = adapt(tiny_decoder())
    vectors = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    merge(model)
    unmerge(model)
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(vectors, after, strict=True))
    assert isinstance(model.layers[0].q_proj, TinyLoRALayer)
