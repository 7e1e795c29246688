"""Convolutions, embeddings and transformers' Conv1D under an adapter: the paper's formula on the dense weight, files,
merging, exports and banks; tied embeddings; what is refused and how it says so."""
import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from tests.cases import error
from tests.models import tiny_decoder
from tests.paper import delta_weight, paper_weight
from tinylora_kernels import (
    AdapterBank,
    LoRAXSConfig,
    TinyLoRAConfig,
    adapted_layers,
    apply_lora_xs,
    apply_tiny_lora,
    export_lora,
    load_adapter,
    merge,
    merged_weights,
    remove_adapter,
    save_adapter,
    trainable_vectors,
    unmerge,
)
from tinylora_kernels.base.kinds import KINDS, OTHER, has_fresh_output, is_linear_like, kind_of, weight_matrix
from tinylora_kernels.method.philox import philox_projection


class ScaledEmbedding(nn.Embedding):
    """An embedding that scales what it looks up, as Gemma's does."""

    embed_scale = 7.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


def conv1d_of_transformers():
    base = pytest.importorskip("transformers.pytorch_utils").Conv1D(12, 8)
    nn.init.normal_(base.bias)
    nn.init.normal_(base.weight)  # its own initial values are small beside the bias
    return base


IDS = torch.arange(20).view(4, 5) % 11
IMAGE, SIGNAL = torch.randn(4, 6, 9, 7), torch.randn(4, 6, 10)
# name -> (the frozen layer, its input)
LAYERS = {
    "Conv1D": (conv1d_of_transformers, torch.randn(4, 5, 8)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, padding=1), SIGNAL),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3, stride=2), IMAGE),
    "conv2d dilated": (lambda: nn.Conv2d(6, 10, (3, 2), dilation=2, padding=1, padding_mode="circular"), IMAGE),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 10, 1, bias=False), IMAGE),
    "conv3d": (lambda: nn.Conv3d(6, 10, 2), torch.randn(4, 6, 4, 3, 5)),
    "embedding": (lambda: nn.Embedding(11, 10, padding_idx=3), IDS),
    "scaled embedding": (lambda: ScaledEmbedding(11, 10), IDS),
}
MODEL_LAYERS = pytest.mark.parametrize("kind", LAYERS)
FORMATS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])


def bare(kind: str, dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(LAYERS[kind][0]()).to(dtype)


def adapt(model: nn.Module, targets=("0",), size=0.5, **options) -> nn.Module:
    options = {"trainable_dim": 3, "alpha": 0.7, "seed": 5, "cache": False, **options}
    apply_tiny_lora(model, TinyLoRAConfig(target_modules=list(targets), **options), progress=False)
    torch.manual_seed(1)
    for v in trainable_vectors(model):
        nn.init.normal_(v, std=size)
    return model


def input_of(kind: str, dtype=torch.float64) -> torch.Tensor:
    x = LAYERS[kind][1]
    return x.to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x


def truth(layer, x, g):
    """y, dx (None for ids) and dv of the dense formula."""
    base, v = copy.deepcopy(layer.base).double(), layer.v.detach().double().requires_grad_()
    x = x.detach().double().requires_grad_() if x.is_floating_point() else x
    y = functional_call(base, {"weight": paper_weight(layer, v)}, (x,))
    y.backward(g.double())
    return y.detach(), x.grad, v.grad


@MODEL_LAYERS
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float64, 1e-11), (torch.float32, 2e-6), (torch.bfloat16, 0.02)], ids=str
)
def test_output_and_gradients_equal_the_dense_formula(kind, dtype, bound):
    v_dtype = torch.promote_types(dtype, torch.float32)
    model, x = adapt(bare(kind, dtype), v_dtype=v_dtype), input_of(kind, dtype)
    y = model(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y.backward(g)
    expected = truth(model[0], x, g)
    found = y.detach(), x.grad, model[0].v.grad
    assert error(y.detach(), model[0].base(x).detach().double()) > 0.05
    for name, ours, theirs in zip(("y", "dx", "dv"), found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or error(ours, theirs) < bound, name


@FORMATS
@pytest.mark.parametrize("grad", [True, False])
def test_a_convolution_keeps_its_layout_and_channels_last_copies_nothing(layout, grad, monkeypatch):
    model, seen = adapt(bare("conv2d", torch.float32)).to(memory_format=layout), []
    run = model[0].base.forward
    monkeypatch.setattr(model[0].base, "forward", lambda x: seen.append(run(x)) or seen[0])
    with torch.set_grad_enabled(grad):
        y = model(IMAGE.to(memory_format=layout))
    assert y.is_contiguous(memory_format=layout) and seen[0].is_contiguous(memory_format=layout)
    assert (y.data_ptr() == seen[0].data_ptr()) == (layout is torch.channels_last)


@pytest.mark.parametrize("kind, batched", [("conv1d", SIGNAL), ("conv2d", IMAGE)])
def test_a_sample_without_a_batch_dimension(kind, batched):
    model = adapt(bare(kind, torch.float32))
    torch.testing.assert_close(model(batched[1]), model(batched)[1])


def test_hooks_on_a_convolution_see_the_bare_output():
    model, seen = adapt(bare("conv2d", torch.float32)).to(memory_format=torch.channels_last), []
    model[0].base.register_forward_hook(lambda module, args, out: seen.append(out))
    y = model(IMAGE)
    assert torch.equal(seen[0], remove_adapter(copy.deepcopy(model))(IMAGE)) and not torch.equal(seen[0], y)


@MODEL_LAYERS
@FORMATS
def test_merging_is_exact_and_comes_back_bit_for_bit(kind, layout):
    model = adapt(bare(kind, torch.float32))
    x = input_of(kind, torch.float32)
    if x.dim() == 4:
        model.to(memory_format=layout)
    y, bits = model(x).detach(), model[0].base.weight.detach().clone()
    expected = paper_weight(model[0], model[0].v.detach().double())
    streamed = dict(merged_weights(model))
    assert list(streamed) == list(bare(kind).state_dict()) and streamed["0.weight"].shape == bits.shape
    assert error(streamed["0.weight"], expected) < 1e-6
    strides = model[0].base.weight.stride()
    merge(model)
    assert torch.equal(model[0].base.weight, streamed["0.weight"]) and model[0].base.weight.stride() == strides
    assert error(model(x).detach(), y.double()) < 2e-6
    unmerge(model)
    assert torch.equal(model[0].base.weight, bits) and torch.equal(model(x), y)


@MODEL_LAYERS
@pytest.mark.parametrize("include_basis", [False, True])
def test_files(kind, include_basis, tmp_path):
    model, x = adapt(bare(kind, torch.float32)), input_of(kind, torch.float32)
    path = tmp_path / "adapter.safetensors"
    save_adapter(model, path, include_basis=include_basis)
    other = adapt(bare(kind, torch.float32), size=0.0)
    for loaded in (load_adapter(bare(kind, torch.float32), path, cache=False), load_adapter(other, path)):
        assert torch.equal(loaded(x), model(x))


def test_a_file_does_not_depend_on_the_memory_format(tmp_path):
    model = adapt(bare("conv2d", torch.float32))
    save_adapter(model, tmp_path / "a.safetensors")
    other = bare("conv2d", torch.float32).to(memory_format=torch.channels_last)
    loaded = load_adapter(other, tmp_path / "a.safetensors", cache=False)
    torch.testing.assert_close(loaded(IMAGE), model(IMAGE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv2d 1x1", "conv3d", "embedding", "scaled embedding"])
def test_peft_loads_the_export_to_the_same_outputs(kind, tmp_path):
    peft = pytest.importorskip("peft")
    model, x = adapt(bare(kind, torch.float32)), input_of(kind, torch.float32)
    export_lora(model, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(bare(kind, torch.float32), str(tmp_path / "lora"))
    assert error(loaded(x).detach(), model(x).detach().double()) < 2e-6
    theirs = loaded.merge_and_unload()[0].weight
    torch.testing.assert_close(theirs, merge(model)[0].base.weight, rtol=1e-5, atol=1e-6)


@MODEL_LAYERS
def test_a_bank_gives_every_sample_its_own_adapter(kind):
    model, x = adapt(bare(kind, torch.float32)), input_of(kind, torch.float32).detach()
    own, base = model(x).detach(), model[0].base(x).detach()
    bank = AdapterBank(model, 2)
    bank.add("own", trainable_vectors(model)[0].detach()[None])
    bank.add("zero")
    with torch.no_grad(), bank.use(["own", None, "zero", "own"]):
        mixed = model(x)
    for row, expected in enumerate((own, base, base, own)):
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-5, atol=1e-6)
    if not x.is_floating_point():  # a token is a row of its own
        ids = torch.tensor([[0, -1, 0, 0, -1]] * 4)
        with torch.no_grad(), bank.use(ids.flatten()):
            mixed = model(x)
        torch.testing.assert_close(mixed, torch.where(ids.unsqueeze(-1) == 0, own, base))


@pytest.mark.parametrize("kind", ["conv2d", "embedding", "Conv1D"])
def test_banks_with_own_seeds_draw_the_same_projections(kind):
    other, x = adapt(bare(kind, torch.float32), seed=9), input_of(kind, torch.float32).detach()
    model = adapt(bare(kind, torch.float32))
    bank = AdapterBank(model, 1, own_seeds=True)
    bank.add("other", trainable_vectors(other)[0].detach()[None], seed=9)
    with torch.no_grad(), bank.use(["other"]):
        torch.testing.assert_close(model(x), other(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["conv2d", "embedding"])
@pytest.mark.parametrize("scaling", ["left", "sqrt"])
def test_lora_xs_trains_r_itself(kind, scaling):
    model = bare(kind)
    apply_lora_xs(model, LoRAXSConfig(rank=2, target_modules=["0"], scaling=scaling, cache=False), progress=False)
    layer, x = model[0], input_of(kind)
    nn.init.normal_(layer.v)
    R, root = layer.v.detach().double().view(2, 2), layer.sigma.sqrt()
    U = layer.basis.T
    if scaling == "sqrt":
        M = root.unsqueeze(1) * R / root
    else:
        M = R if kind == "embedding" else layer.sigma.unsqueeze(1) * R / layer.sigma  # v of an embedding holds R^T
    torch.testing.assert_close(delta_weight(layer), U @ M @ U.T @ layer.weight_matrix())
    y = model(x).detach()
    assert error(merge(model)(x).detach(), y) < 1e-6


@pytest.mark.parametrize("scaling", ["left", "sqrt"])
def test_an_embedding_gets_the_papers_update_on_its_rows(scaling):
    """W' = W + alpha U S R V^T, or U sqrt(S) R sqrt(S) V^T: U and V from torch's own decomposition."""
    model = adapt(bare("embedding"), scaling=scaling)
    layer = model[0]
    W = layer.base.weight.detach()
    U, S, Vt = (factor[..., :2] if n < 2 else factor[:2] for n, factor in enumerate(torch.linalg.svd(W, False)))
    signs = (Vt * layer.basis).sum(1).sign()
    U, Vt = U * signs, Vt * signs.unsqueeze(1)
    R = torch.einsum("i,ijk->jk", layer.v.detach().double(), philox_projection(5, 0, 3, 2).double())
    middle = torch.diag(S) @ R if scaling == "left" else torch.diag(S.sqrt()) @ R @ torch.diag(S.sqrt())
    torch.testing.assert_close(model(IDS).detach(), (W + 0.7 * U @ middle @ Vt)[IDS], rtol=1e-6, atol=1e-6)


def test_a_convolution_with_a_sharded_output_is_refused():
    from tinylora_kernels.layers.sharded import update_sharded

    layer = adapt(bare("conv2d"))[0]
    with pytest.raises(ValueError, match="^0: expected a layer whose features .* found a convolution with a sharded"):
        update_sharded(None, layer.base, layer.name, (), None)


# Which modules


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.depthwise = nn.Conv1d(8, 8, 1, groups=8)
        self.up = nn.ConvTranspose1d(8, 8, 1)
        self.renormed, self.sparse = nn.Embedding(11, 8, max_norm=1.0), nn.Embedding(11, 8, sparse=True)


def test_linear_layers_alone_are_adapted_by_default_and_the_rest_by_name():
    assert _names(None) == _names("all-linear") == ["proj"]
    assert _names(["conv", "embed", "proj"]) == ["embed", "conv", "proj"]


def _names(targets):
    config = TinyLoRAConfig(target_modules=targets, cache=False)
    return list(adapted_layers(apply_tiny_lora(Mixed(), config, progress=False)))


@pytest.mark.parametrize("target, message", [
    ("depthwise", "^depthwise: it cannot be adapted: its 8 groups are 8 separate weights.*leave it out"),
    ("up", "^up: it cannot be adapted: a transposed convolution stores its weight as .in, out.*leave it out"),
    ("renormed", "^renormed: it cannot be adapted: max_norm=1.0 rescales.*set max_norm=None"),
    ("sparse", "^sparse: it cannot be adapted: sparse=True.*set sparse=False"),
    ("norm", "^target_modules: no module matches norm; norm is a LayerNorm, which has no matrix .*; the model has "
             "embeddings embed; convolutions conv; linear layers proj$"),
])  # fmt: skip
def test_what_cannot_be_adapted_is_refused_by_name(target, message):
    model = Mixed()
    with pytest.raises(ValueError, match=message) as info:
        adapt(model, targets=[target])
    assert "\n" not in str(info.value) and not adapted_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_the_table_of_kinds():
    assert kind_of(nn.Linear(2, 2)).why_not(nn.Linear(2, 2)) is None and kind_of(nn.ReLU()) is OTHER
    assert is_linear_like(nn.Linear(2, 2)) and not is_linear_like(nn.Embedding(2, 2))
    assert has_fresh_output(nn.Conv2d(2, 2, 1)) and not has_fresh_output(ScaledEmbedding(2, 2))
    for kind in LAYERS:
        base = LAYERS[kind][0]()
        row, matrix = next(row for row in KINDS if row.matches(base)), weight_matrix(base)
        assert matrix.dim() == 2 and matrix.data_ptr() == base.weight.data_ptr()
        assert torch.equal(row.stored(matrix, base.weight.shape), base.weight)


def test_the_base_is_readable_through_the_layer():
    layer = adapt(bare("conv2d"))[0]
    assert (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride) == (6, 10, (3, 3), (2, 2))
    layer = adapt(bare("embedding"))[0]
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (11, 10, 3)


# Embeddings tied to the output head: one weight under two modules


def tied_decoder():
    model = tiny_decoder()
    model.lm_head.weight = model.embedding.weight
    return model


@pytest.mark.parametrize("target, other", [("embedding", "lm_head"), ("lm_head", "embedding")])
def test_an_adapter_on_one_of_two_tied_modules_leaves_the_other_alone(target, other):
    model, x = tied_decoder(), {"embedding": IDS, "lm_head": torch.randn(3, 24)}
    before = {name: model.get_submodule(name)(x[name]).detach() for name in x}
    adapt(model, targets=[target])
    assert torch.equal(model.get_submodule(other)(x[other]), before[other])
    assert not torch.equal(model.get_submodule(target)(x[target]), before[target])
    assert model.lm_head.weight is model.embedding.weight
    bits = model.lm_head.weight.detach().clone()
    for operation in (merge, merged_weights):
        with pytest.raises(ValueError, match=f"^{target}.weight shares its memory with {other}.weight.*untie them"):
            operation(model)
    assert torch.equal(model.lm_head.weight, bits)


def test_tied_modules_may_have_an_adapter_each_and_merge_once_untied():
    model = adapt(tied_decoder(), targets=["embedding", "lm_head"])
    embedding, head = adapted_layers(model).values()
    assert embedding.v is not head.v
    expected = model(IDS).detach()
    with pytest.raises(ValueError, match="^embedding.weight shares its memory with lm_head.weight"):
        merge(model)
    head.base.weight = nn.Parameter(head.base.weight.detach().clone(), requires_grad=False)
    assert error(merge(model)(IDS).detach(), expected.double()) < 1e-5
    assert torch.equal(unmerge(model)(IDS), expected)


def test_the_export_of_a_tied_embedding_is_the_same_model_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapt(tied_decoder(), targets=["embedding", "q_proj"])
    export_lora(model, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(tied_decoder(), str(tmp_path / "lora"))
    torch.testing.assert_close(loaded(IDS), model(IDS), rtol=1e-5, atol=1e-5)
