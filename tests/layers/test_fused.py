"""Fused projections adapted part by part: the same function as separate layers, in one update; one SVD by default."""
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.cases import error
from tests.files.test_adapter import forge
from tests.paper import paper_weight
from tinylora_kernels import (
    AdapterBank,
    AdapterError,
    TinyLoRAConfig,
    adapted_layers,
    apply_tiny_lora,
    count_trainable_params,
    export_lora,
    inspect_adapter,
    load_adapter,
    merge,
    merged_weights,
    save_adapter,
    trainable_vectors,
    unmerge,
)
from tinylora_kernels.factors.svd import Factors
from tinylora_kernels.files.format import read
from tinylora_kernels.linear import node, plan
from tinylora_kernels.method.parts import block_basis, block_projection, compact_basis, padded_rank

SIZES = (16, 8, 8)
X = torch.randn(2, 5, 12)


class Separate(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        for name, size in zip(("q_proj", "k_proj", "v_proj"), SIZES, strict=True):
            setattr(self, name, nn.Linear(12, size, dtype=dtype))
        self.o_proj = nn.Linear(32, 12, dtype=dtype)

    def forward(self, x):
        return self.o_proj(torch.tanh(torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)))


class Fused(nn.Module):
    """The same function with one projection for the three."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        parts = Separate(dtype)
        self.qkv_proj, self.o_proj = nn.Linear(12, 32, dtype=dtype), parts.o_proj
        with torch.no_grad():
            for name in ("weight", "bias"):
                separate = [getattr(parts.get_submodule(part), name) for part in ("q_proj", "k_proj", "v_proj")]
                getattr(self.qkv_proj, name).copy_(torch.cat(separate))

    def forward(self, x):
        return self.o_proj(torch.tanh(self.qkv_proj(x)))


def adapt(model, targets=("qkv_proj",), size=0.5, fused=None, **options):
    options = {"trainable_dim": 3, "alpha": 0.7, "seed": 5, "cache": False, **options}
    config = TinyLoRAConfig(target_modules=list(targets), fused=fused, **options)
    apply_tiny_lora(model, config, progress=False)
    torch.manual_seed(1)
    for v in trainable_vectors(model):
        nn.init.normal_(v, std=size)
    return model


def by_parts(model=None, **options):
    return adapt(model or Fused(), fused={"qkv_proj": SIZES}, **options)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-11), (torch.float32, 5e-6)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_parts_are_what_separate_projections_with_one_v_would_be(dtype, bound, rank):
    """Same P, same U, same outputs and gradients: a part takes the place of a module in the numbering of P."""
    options = {"frozen_rank": rank, "v_dtype": dtype}
    fused = by_parts(Fused(dtype), targets=["qkv_proj", "o_proj"], n_tie=1, **options)
    tying = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}
    separate = adapt(Separate(dtype), targets=list(tying), tying=tying, **options)
    assert fused.qkv_proj.basis.shape[0] == padded_rank(3 * rank)
    assert torch.equal(fused.o_proj.projection, separate.o_proj.projection)
    outputs = []
    for model in (fused, separate):
        x = X.to(dtype, copy=True).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        outputs.append([y.detach(), x.grad, *(v.grad for v in trainable_vectors(model))])
    for ours, theirs in zip(*outputs, strict=True):
        assert error(ours, theirs.double()) < bound


@pytest.mark.parametrize("fused", [None, {"qkv_proj": SIZES}, {"qkv_proj": 4}], ids=str)
def test_output_and_gradients_equal_the_dense_formula(fused):
    model = adapt(Fused(torch.float64), fused=fused, v_dtype=torch.float64)
    layer, x = model.qkv_proj, X.double().requires_grad_()
    g = torch.randn(2, 5, 32, dtype=torch.float64)
    layer(x).backward(g)
    v, twin = layer.v.detach().clone().requires_grad_(), X.double().requires_grad_()
    dense = functional_call(layer.base, {"weight": paper_weight(layer, v)}, (twin,))
    dense.backward(g)
    for ours, theirs in ((layer(x), dense), (x.grad, twin.grad), (layer.v.grad, v.grad)):
        assert error(ours.detach(), theirs.detach()) < 1e-11


def test_one_svd_or_one_for_each_part_are_different_adapters_of_one_module():
    whole, parts = adapt(Fused()), by_parts()
    for model in (whole, parts):
        stats = count_trainable_params(model)
        assert (stats["modules"], stats["groups"], stats["trainable"]) == (1, 1, 3)
    assert whole.qkv_proj.basis.shape == (2, 32) and parts.qkv_proj.basis.shape == (8, 32)
    assert not torch.allclose(whole(X), parts(X))
    assert torch.equal(by_parts(size=0.0)(X), Fused()(X))


def test_rows_of_zeros_fill_the_rank_up_to_a_specialised_one():
    assert [padded_rank(rank) for rank in (1, 2, 3, 4, 6, 8, 9, 12)] == [1, 2, 4, 4, 8, 8, 9, 12]
    basis = torch.randn(2, 32)
    blocks = block_basis(basis, SIZES)
    assert torch.equal(compact_basis(blocks, 2, SIZES), basis) and not blocks[6:].any()
    assert torch.equal(blocks[2:4, 16:24], basis[:, 16:24]) and blocks.count_nonzero() == basis.numel()
    P = block_projection([torch.full((3, 2, 2), float(part + 1)) for part in range(3)])
    assert P.shape == (3, 8, 8) and P.count_nonzero() == 3 * 3 * 4


def test_merging_is_exact_and_comes_back_bit_for_bit():
    model = by_parts()
    y, bits = model(X).detach(), model.qkv_proj.base.weight.detach().clone()
    expected = paper_weight(model.qkv_proj, model.qkv_proj.v.detach().double())
    assert error(dict(merged_weights(model))["qkv_proj.weight"], expected) < 1e-6
    assert error(merge(model)(X).detach(), y.double()) < 1e-5
    assert torch.equal(unmerge(model).qkv_proj.base.weight, bits) and torch.equal(model(X), y)


def test_peft_loads_the_export_to_the_same_outputs(tmp_path):
    peft = pytest.importorskip("peft")
    model = by_parts(targets=["qkv_proj", "o_proj"])
    export_lora(model, tmp_path / "lora", rank=8)
    loaded = peft.PeftModel.from_pretrained(Fused(), str(tmp_path / "lora"))
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="^rank: expected at least the adapter's rank 8, found 4"):
        export_lora(model, tmp_path / "small", rank=4)


@pytest.mark.parametrize("include_basis", [False, True])
def test_files(include_basis, tmp_path):
    model, path = by_parts(targets=["qkv_proj", "o_proj"]), tmp_path / "adapter.safetensors"
    save_adapter(model, path, include_basis=include_basis)
    module = inspect_adapter(path).modules[0]
    if include_basis:
        assert module.basis.shape == (2, 32) and module.sigma.shape == (3, 2)
    other = by_parts(targets=["qkv_proj", "o_proj"], size=0.0)
    for loaded in (load_adapter(Fused(), path, cache=False, progress=False), load_adapter(other, path)):
        assert torch.equal(loaded(X), model(X)) and torch.equal(loaded.qkv_proj.projection, model.qkv_proj.projection)
    whole = adapt(Fused(), targets=["qkv_proj", "o_proj"])
    with pytest.raises(AdapterError, match="config: fused is {'qkv_proj': .16, 8, 8.} there and None in this model"):
        load_adapter(whole, path)


def test_files_of_adapters_without_parts_do_not_know_the_field(tmp_path):
    save_adapter(adapt(Fused()), tmp_path / "a.safetensors")
    assert b"fused" not in (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.parametrize("fused", [3, [], {"qkv_proj": True}, {"qkv_proj": [16, "a"]}, {"qkv_proj": 10**9},
                                   {"qkv_proj": [16, 17]}, {"qkv_proj": 5}])  # fmt: skip
def test_a_hostile_file_is_one_error(fused, tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(by_parts(), path)
    forge(path, lambda metadata, header, payload: metadata["config"].update(fused=fused))
    with pytest.raises(AdapterError, match="fused") as info:
        read(path)
    assert "\n" not in str(info.value)


def test_a_bank_over_parts():
    model = by_parts()
    own, base = model(X).detach(), Fused()(X).detach()
    bank = AdapterBank(model, 2)
    bank.add("own", trainable_vectors(model)[0].detach()[None])
    with torch.no_grad(), bank.use([None, "own"]):
        mixed = model(X)
    torch.testing.assert_close(mixed, torch.stack([base[0], own[1]]))
    bank.close()
    with pytest.raises(ValueError, match="^own_seeds: .* found qkv_proj adapted part by part"):
        AdapterBank(model, 2, own_seeds=True)


@pytest.mark.parametrize("fused, message", [
    (["qkv_proj"], "^fused: expected a map"),
    ({"qkv_proj": 1}, "^fused: .*2 or more.*found 'qkv_proj': 1"),
    ({"qkv_proj": [32]}, "^fused: .*two or more.*found 'qkv_proj': .32"),
    ({"qkv_proj": (16, 0, 16)}, "^fused: .*found"),
    ({"qkv_proj": "abc"}, "^fused: .*found"),
    ({"": 2}, "^fused: .*found"),
    ({"qkv_proj": 5}, "^fused: qkv_proj has 32 output features, which cannot be 5 equal parts"),
    ({"qkv_proj": (16, 8)}, "^fused: qkv_proj has 32 output features, which cannot be parts of .16, 8., in all 24"),
    ({"qkv": 2}, "^fused: no adapted module matches qkv;"),
    ({"qkv_proj": (30, 1, 1)}, r"qkv_proj\[30:31\]: rank must be from 1 to .* = 1, got 2"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_one_line_and_leave_the_model_alone(fused, message):
    model = Fused()
    with pytest.raises(ValueError, match=message) as info:
        adapt(model, fused=fused)
    assert "\n" not in str(info.value) and not adapted_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_factors_from_elsewhere_must_be_those_of_the_parts():
    whole = Factors(torch.eye(2, 32), torch.ones(2), False, 0.0)
    with pytest.raises(ValueError, match=r"^qkv_proj: expected singular values \[3, 2\] of its parts, found \[2\]"):
        config = TinyLoRAConfig(target_modules=["qkv_proj"], fused={"qkv_proj": SIZES})
        apply_tiny_lora(Fused(), config, factors={"qkv_proj": whole})


def test_the_first_entry_that_names_a_module_decides():
    config = TinyLoRAConfig(fused={"0.attn.qkv_proj": 2, "qkv_proj": SIZES})
    assert config.parts("layers.0.attn.qkv_proj", 32) == (16, 16)
    assert config.parts("layers.1.attn.qkv_proj", 32) == SIZES
    assert config.parts("layers.1.attn.o_proj", 32) is None


def phi3():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=40, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config).eval(), {"qkv_proj": (32, 16, 16), "gate_up_proj": 2}


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval(), {"c_attn": 3}


@pytest.mark.parametrize("make", [phi3, gpt2])
def test_models_with_fused_projections(make, tmp_path):
    tokens = torch.arange(12).view(2, 6)
    base, fused = make()
    with torch.no_grad():  # larger weights than a fresh model's, so that the update matters
        for name in fused:
            for key, parameter in base.named_parameters():
                if key.endswith(f"{name}.weight"):
                    nn.init.normal_(parameter, std=0.2)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    before = base(tokens).logits.detach()
    model = adapt(base, list(fused), fused=fused, n_tie=2)
    y = model(tokens).logits.detach()
    dense = make()[0].double()
    dense.load_state_dict(weights)
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            dense.get_submodule(name).weight.copy_(paper_weight(layer, layer.v.detach().double()))
    assert error(y, before.double()) > 0.01 and error(y, dense(tokens).logits.detach()) < 1e-5
    save_adapter(model, tmp_path / "a.safetensors")
    bare = make()[0]
    bare.load_state_dict(weights)
    loaded = load_adapter(bare, tmp_path / "a.safetensors", cache=False, progress=False)
    assert torch.equal(loaded(tokens).logits, y)


NODES = ["C++", "Python"] if node.twin is not None else ["Python"]


@pytest.fixture(params=NODES)
def part_by_part(request, monkeypatch):
    """The way of a GPU, with the ops of the CPU."""
    monkeypatch.setattr(plan, "by_parts", lambda weight: True)
    if request.param == "Python":
        monkeypatch.setattr(node, "twin", None)
        monkeypatch.setattr(plan, "twin", None)
    return request.param


def trained(model, x, g):
    """Output, dx and dv of the second call: that of a plan."""
    for _ in range(2):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(g)
    return y.detach(), leaf.grad, trainable_vectors(model)[0].grad.clone()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_an_update_part_by_part_is_that_of_the_rank_of_all(part_by_part, dtype, bound, monkeypatch):
    x, g = torch.randn(2, 5, 12).to(dtype), torch.randn(2, 5, 32).to(dtype)
    model = by_parts(Fused(dtype)).qkv_proj
    found = trained(model, x, g)
    assert model._plan is not None and model._parts is not None and model._right is None
    monkeypatch.setattr(plan, "by_parts", lambda weight: False)
    for ours, whole in zip(found, trained(by_parts(Fused(dtype)).qkv_proj, x, g), strict=True):
        assert error(ours, whole.double()) < bound


def test_it_runs_update_parts_alone(part_by_part):
    model, x = by_parts().qkv_proj, X.clone()
    model(x)
    with torch.autograd.profiler.profile() as profile:
        model(x.requires_grad_()).sum().backward()
    calls = {event.key for event in profile.key_averages() if event.key.startswith("tinylora::update")}
    assert calls == {"tinylora::update_parts", "tinylora::update_parts_backward"}


@pytest.mark.skipif(len(NODES) < 2, reason=f"no node in C++: {node.why_no_twin}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_nodes_give_its_bits(dtype, monkeypatch):
    monkeypatch.setattr(plan, "by_parts", lambda weight: True)
    x, g = torch.randn(2, 5, 12).to(dtype), torch.randn(2, 5, 32).to(dtype)
    in_cpp = trained(by_parts(Fused(dtype)).qkv_proj, x, g)
    monkeypatch.setattr(node, "twin", None)
    monkeypatch.setattr(plan, "twin", None)
    for one, two in zip(in_cpp, trained(by_parts(Fused(dtype)).qkv_proj, x, g), strict=True):
        assert torch.equal(one, two)


def test_second_derivatives_part_by_part(part_by_part):
    model = by_parts(Fused(torch.float64), v_dtype=torch.float64).qkv_proj
    x, v = X.double()[0, :2].requires_grad_(), trainable_vectors(model)[0]
    model(x)

    def run(x, v):
        return functional_call(model, {"v": v}, (x,)).square()

    assert torch.autograd.gradcheck(lambda x: model(x), (x,)) and torch.autograd.gradgradcheck(run, (x, v.detach()))
    (dv,) = torch.autograd.grad(model(x).square().sum(), v, create_graph=True)
    (dx,) = torch.autograd.grad(dv.square().sum(), x)
    whole = by_parts(Fused(torch.float64), v_dtype=torch.float64).qkv_proj
    whole.base.register_forward_hook(lambda module, args, out: None)  # two nodes, of the rank of all
    (other,) = torch.autograd.grad(whole(x).square().sum(), whole.v, create_graph=True)
    assert error(dx, torch.autograd.grad(other.square().sum(), x)[0]) < 1e-11


@pytest.mark.parametrize("inference", [False, True])
def test_what_a_captured_graph_reads_of_the_parts_stays_where_it_is(part_by_part, inference):
    model, x = by_parts(), X.clone()
    with torch.inference_mode(inference):
        model(x)
    y = model(x.requires_grad_())
    layer = model.qkv_proj
    factors = layer._parts.factors
    U, S, _ = torch.linalg.svd(torch.randn(32, 12, generator=torch.Generator().manual_seed(3)).double())
    put_back, before = layer.keep(), [one.clone() for one in factors[:2]]
    layer.set_factors(U[:2].float(), S[:6].view(3, 2).float())
    found = layer._parts.factors
    assert [one.data_ptr() for one in found[:2]] == [one.data_ptr() for one in factors[:2]]
    assert torch.equal(found.basis, U[:2].float()) and not torch.equal(found.projection, before[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation: its basis"):
        y.sum().backward()
    put_back()
    assert all(torch.equal(one, other) for one, other in zip(factors[:2], before, strict=True))
    assert torch.equal(model(x), y)


def test_banks_checkpoints_other_factors_and_modes_part_by_part(part_by_part):
    model, x = by_parts(), X.clone()
    whole = by_parts()
    whole.qkv_proj.base.register_forward_hook(lambda module, args, out: None)
    for one in (model, whole):
        one.qkv_proj(x)
        U, S, _ = torch.linalg.svd(torch.randn(32, 12, generator=torch.Generator().manual_seed(3)).double())
        one.qkv_proj.set_factors(U[:2].float(), S[:6].view(3, 2).float())
    for _ in range(2):
        assert error(model(x), whole(x).double().detach()) < 2e-6
    with FlopCounterMode(display=False):  # a dispatch mode: nothing is written in place
        assert error(model(x), whole(x).double().detach()) < 2e-6
    leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    checkpoint(model, leaf, use_reentrant=False).sum().backward()
    whole(twin).sum().backward()
    assert error(leaf.grad, twin.grad.double()) < 2e-6
    banks = [AdapterBank(one, capacity=2, trainable=True) for one in (model, whole)]
    for bank, one in zip(banks, (model, whole), strict=True):
        bank.add("a"), bank.add("b")
        with torch.no_grad():
            for n, table in enumerate(bank.tables.values()):
                table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(n)))
        for _ in range(3):
            with bank.use(["b", None]):
                y = one(x)
        y.square().sum().backward()
        bank.out = y.detach(), [table.grad.clone() for table in bank.tables.values()]
    assert error(banks[0].out[0], banks[1].out[0].double()) < 2e-6
    for ours, theirs in zip(banks[0].out[1], banks[1].out[1], strict=True):
        assert error(ours, theirs.double()) < 2e-6
