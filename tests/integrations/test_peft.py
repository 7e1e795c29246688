"""PEFT models on our ops: the same numbers, PEFT's own tensors and files, adapters mixed in a batch, a way back."""
import copy
import json
import pickle

import pytest
import torch
from torch import nn

from tests.cases import BUDGET, error
from tests.integrations.tiny import gpt2, llama, tokens

peft = pytest.importorskip("peft", minversion="0.21", reason="the PEFT integration needs peft >= 0.21")
transformers = pytest.importorskip("transformers", reason="the models under test come from transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from tinylora_kernels import TinyLoRAConfig, adapted_layers, apply_tiny_lora, trainable_vectors  # noqa: E402
from tinylora_kernels.integrations.peft import (  # noqa: E402
    accelerate_peft,
    acceleration_report,
    deaccelerate_peft,
    from_peft,
    to_peft,
)
from tinylora_kernels.integrations.peft_factors import FIT_TOLERANCE  # noqa: E402
from tinylora_kernels.method.config import LoRAXSConfig  # noqa: E402
from tinylora_kernels.model.attach import apply_lora_xs  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning", "ignore:Specified to not:UserWarning",
    "ignore:fan_in_fan_out is set:UserWarning", "ignore:Could not find a config file:UserWarning",
)  # fmt: skip
TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def config(**changes):
    settings = dict(
        r=2, u=3, weight_tying=0.5, target_modules=TARGETS, init_weights="uniform", init_v_bound=0.5,
    )  # fmt: skip
    return peft.TinyLoraConfig(**{**settings, **changes})


def tiny_lora(model=None, **changes):
    torch.manual_seed(1)
    return peft.get_peft_model(llama() if model is None else model, config(**changes)).eval()


def layers_of(model) -> dict[str, nn.Module]:
    kinds = (peft.tuners.tinylora.layer.TinyLoraLayer, peft.tuners.psoft.layer.PsoftLayer)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def outputs_and_gradients(model, x=None) -> list[torch.Tensor]:
    x = tokens() if x is None else x
    out = model(input_ids=x, labels=x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [out.logits.detach(), *torch.autograd.grad(out.loss, trained)]


def assert_close(found, expected, tolerance=1e-5):
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) < tolerance


CASES = {
    "linear": lambda: tiny_lora(),
    "embedding and untied": lambda: tiny_lora(target_modules=["embed_tokens", "o_proj"], weight_tying=0.0),
    "all tied, r=4": lambda: tiny_lora(weight_tying=1.0, r=4, u=1),
    "Conv1D": lambda: tiny_lora(gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "PSOFT as LoRA-XS": lambda: psoft(),
    "PSOFT orthogonal with magnitudes": lambda: psoft(psoft_orth=True, psoft_mag_a=True, psoft_mag_b=True),
}


def psoft(model=None, **changes):
    settings = dict(
        r=4, psoft_alpha=8, target_modules=TARGETS, ab_svd_init="pissa_init", psoft_svd="full", psoft_orth=False,
        psoft_mag_a=False, psoft_mag_b=False, init_weights=False,
    )  # fmt: skip
    torch.manual_seed(1)
    return peft.get_peft_model(llama() if model is None else model, peft.PsoftConfig(**{**settings, **changes})).eval()


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_those_of_peft(make):
    model = make()
    expected = outputs_and_gradients(model)
    assert accelerate_peft(model) is model and not any(acceleration_report(model).values())
    assert_close(outputs_and_gradients(model), expected)
    assert error(model(tokens()).logits.detach(), expected[0]) < 1e-5
    deaccelerate_peft(model)
    assert all(torch.equal(a, b) for a, b in zip(outputs_and_gradients(model), expected, strict=True))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_error_budget_of_a_layer(dtype, autocast):
    """Against float64 with PEFT's stored factors: at most twice the error of PEFT's own chain, in y, dx and dv."""
    torch.manual_seed(0)
    spectrum = torch.diag(torch.linspace(2, 0.5, 96))
    base = nn.Sequential(nn.Linear(96, 160))
    base[0].weight.data = torch.linalg.qr(torch.randn(160, 96))[0] @ spectrum @ torch.linalg.qr(torch.randn(96, 96))[0]
    model = peft.get_peft_model(
        base.to(dtype), config(u=5, weight_tying=0.0, target_modules=["0"]), autocast_adapter_dtype=autocast
    )
    draws = [(torch.randn(200, 96).to(dtype), torch.randn(200, 160).to(dtype)) for _ in range(12)]

    def run(model, dtype):
        """y, dx and dv of all draws: dv is five numbers, and one draw of PEFT's error is small by luck."""
        results = []
        for x, g in draws:
            inputs = x.to(dtype).requires_grad_()
            out = model(inputs)
            trained = [p for p in model.parameters() if p.requires_grad]
            results.append([out.detach(), *torch.autograd.grad(out, [inputs, *trained], g.to(dtype))])
        return [torch.stack(found) for found in zip(*results, strict=True)]

    truth = run(copy.deepcopy(model).double(), torch.float64)
    theirs = run(model, dtype)
    ours = run(accelerate_peft(model), dtype)
    for name, found, plain, exact in zip(("y", "dx", "dv"), ours, theirs, truth, strict=True):
        # Twice PEFT's error, or what its own rounding of A and B to the weight's dtype makes of the update
        allowed = max(BUDGET * error(plain, exact), torch.finfo(dtype).eps)
        assert error(found, exact) <= allowed, (name, error(found, exact), error(plain, exact))


def test_peft_names_files_and_parameters_are_untouched(tmp_path):
    model = tiny_lora()
    before = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    parameters = dict(model.named_parameters())
    model.save_pretrained(tmp_path / "before")
    accelerate_peft(model)
    model(tokens()).logits.sum().backward()
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    model.save_pretrained(tmp_path / "after")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "after")
    assert error(accelerate_peft(loaded)(tokens()).logits.detach(), model(tokens()).logits.detach()) < 1e-6


def test_undoing_leaves_no_trace():
    model = tiny_lora()

    def traces():
        return [
            (name, type(module), sorted(vars(module)), len(module._load_state_dict_post_hooks))
            for name, module in model.named_modules()
        ]

    before = traces()
    accelerate_peft(model)
    assert traces() != before
    deaccelerate_peft(model)
    assert traces() == before


def test_training_in_place_moves_the_same_vectors():
    models = [tiny_lora(), accelerate_peft(tiny_lora())]
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for step in range(5):
            optimizer.zero_grad()
            model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss.backward()
            optimizer.step()
    for theirs, ours in zip(*[[p for p in model.parameters() if p.requires_grad] for model in models], strict=True):
        assert error(ours.detach(), theirs.detach()) < 1e-4


def test_merging_disabling_and_switching_are_pefts():
    model = accelerate_peft(tiny_lora())
    model.add_adapter("other", config(init_v_bound=0.9))
    x = tokens()
    adapted = model(x).logits.detach()
    with model.disable_adapter():
        bare = model(x).logits.detach()
    assert error(bare, llama()(x).logits.detach()) < 1e-7 and error(adapted, bare) > 1e-3
    model.merge_adapter()
    assert error(model(x).logits.detach(), adapted) < 1e-5
    assert set(acceleration_report(model).values()) == {"merged: the base alone is running"}
    model.unmerge_adapter()
    model.set_adapter("other")
    switched = model(x).logits.detach()
    assert error(switched, adapted) > 1e-3
    assert error(deaccelerate_peft(model)(x).logits.detach(), switched) < 1e-5
    model.delete_adapter("default")
    accelerate_peft(model)
    merged = model.merge_and_unload()
    assert type(merged) is type(llama()) and error(merged(x).logits.detach(), switched) < 1e-5


@pytest.mark.parametrize("rank", [2, 3], ids=["same basis", "other basis"])
def test_several_active_adapters_add_up(rank):
    model = tiny_lora()
    model.add_adapter("other", config(r=rank, u=2, projection_seed=7))
    model.base_model.set_adapter(["default", "other"])
    expected = outputs_and_gradients(model)
    assert_close(outputs_and_gradients(accelerate_peft(model)), expected)


def three_adapters(**changes):
    model = accelerate_peft(tiny_lora(**changes))
    model.add_adapter("seeded", config(projection_seed=7, u=2, **changes))
    model.add_adapter("wide", config(r=3, target_modules=["q_proj", "o_proj"]))
    return accelerate_peft(model)  # the o_proj layers are new


def test_adapter_names_select_an_adapter_for_each_sample():
    model, x = three_adapters(), tokens(rows=4)
    names = ["seeded", "__base__", "wide", "default"]
    mixed = model(input_ids=x, adapter_names=names).logits.detach()
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(x[row : row + 1]).logits.detach()
        else:
            model.set_adapter(name)
            alone = model(x[row : row + 1]).logits.detach()
        assert error(mixed[row : row + 1], alone) < 1e-5
    # The names hold for one call only.
    model.set_adapter("default")
    assert error(model(x).logits[3:].detach(), mixed[3:]) < 1e-5


def test_peft_alone_ignores_adapter_names():
    """The defect that acceleration removes; when PEFT removes it too, this says so."""
    model, x = deaccelerate_peft(three_adapters()), tokens(rows=2)
    model.set_adapter("default")
    with_names = model(input_ids=x, adapter_names=["__base__", "seeded"]).logits
    assert torch.equal(with_names, model(x).logits)


def test_gradients_of_a_mixed_batch_go_to_each_adapter():
    model, x = three_adapters(), tokens(rows=2)
    model.train()
    vectors = {name: model.base_model.tinylora_v[name] for name in ("default", "seeded")}
    for parameters in vectors.values():
        for v in parameters.values():
            v.requires_grad_(True)
    mixed = model(input_ids=x, adapter_names=["seeded", "default"]).logits.square()
    found = torch.autograd.grad(mixed.sum(), [v for name in vectors for v in vectors[name].values()])
    expected = []
    for name, row in (("default", 1), ("seeded", 0)):
        model.set_adapter(name)
        alone = model(x[row : row + 1]).logits.square().sum()
        expected += torch.autograd.grad(alone, list(vectors[name].values()))
    assert_close(found, expected)


def test_adapter_names_in_generate_and_beam_search():
    model, x = three_adapters(), tokens(rows=2, length=5)
    names = ["seeded", "default"]
    for settings in ({"num_beams": 1}, {"num_beams": 3, "num_return_sequences": 2}):
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **settings}
        mixed = model.generate(input_ids=x, attention_mask=torch.ones_like(x), adapter_names=names, **settings)
        per_sample = len(mixed) // 2
        for row, name in enumerate(names):
            model.set_adapter(name)
            one = x[row : row + 1]
            alone = model.generate(input_ids=one, attention_mask=torch.ones_like(one), **settings)
            assert torch.equal(mixed[row * per_sample : (row + 1) * per_sample], alone)


def test_adapter_names_that_cannot_be_honoured_are_errors():
    model, x = three_adapters(), tokens(rows=2)
    with pytest.raises(ValueError, match="no adapter named 'typo'; known are __base__, default"):
        model(input_ids=x, adapter_names=["typo", "default"])
    with pytest.raises(ValueError, match="expected one for each row of input_ids .*, found 3"):
        model(input_ids=x, adapter_names=["default"] * 3)
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(input_ids=x, adapter_names=["default", "seeded"])
    model.eval()
    model.add_adapter("dropped", config(tinylora_dropout=0.1))
    with pytest.raises(ValueError, match="dropout 0.1"):
        model(input_ids=x, adapter_names=["default", "dropped"])
    assert torch.isfinite(model(x).logits).all()  # no names are left behind


def test_a_layer_with_dropout_keeps_pefts_path_and_says_so():
    model = tiny_lora(tinylora_dropout=0.2).train()
    with pytest.warns(UserWarning, match="6 of 6 layers stay on PEFT's own path: .*: dropout 0.2"):
        accelerate_peft(model)
    assert all("dropout 0.2" in reason for reason in acceleration_report(model).values())
    torch.manual_seed(3)
    found = outputs_and_gradients(model)
    torch.manual_seed(3)
    assert_close(found, outputs_and_gradients(deaccelerate_peft(model)), 1e-30)


def test_a_layer_whose_bias_is_trained_keeps_pefts_path_as_long_as_it_is():
    model = tiny_lora(bias="all")
    expected = outputs_and_gradients(model)
    with pytest.warns(UserWarning, match="4 of 6 layers .*its base is trained"):  # down_proj has no bias
        accelerate_peft(model)
    assert_close(outputs_and_gradients(model), expected)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("tinylora_v" in name)
    assert not any(acceleration_report(accelerate_peft(model)).values())
    next(p for n, p in model.named_parameters() if n.endswith("q_proj.base_layer.bias")).requires_grad_(True)
    found = outputs_and_gradients(model)
    assert_close(found, outputs_and_gradients(deaccelerate_peft(model)))


class Scaled(nn.Linear):
    """A base whose output is not its weight times the input."""

    def forward(self, x):
        return 2 * super().forward(x)


def replace_q_proj(model):
    for block in model.model.layers:
        block.self_attn.q_proj.__class__ = Scaled
    return model


def test_a_base_of_unknown_kind_is_left_alone():
    model = tiny_lora(replace_q_proj(llama()))
    expected = outputs_and_gradients(model)
    with pytest.warns(UserWarning, match="2 of 6 layers .*expected nn.Linear or transformers' Conv1D .*Scaled"):
        accelerate_peft(model)
    assert sum(reason is None for reason in acceleration_report(model).values()) == 4
    assert_close(outputs_and_gradients(model), expected)
    with pytest.raises(ValueError, match="q_proj runs on PEFT's own path"):
        model(input_ids=tokens(), adapter_names=["default"] * 3)


def test_factors_of_another_weight_are_left_alone():
    model = tiny_lora()
    name, layer = next(iter(layers_of(model).items()))
    layer.base_layer.weight.data.normal_()
    expected = outputs_and_gradients(model)
    with pytest.warns(UserWarning, match="1 of 6 .*do not belong to this weight"):
        accelerate_peft(model)
    assert_close(outputs_and_gradients(model), expected)


def test_models_without_layers_for_us_or_merged_are_refused():
    with pytest.raises(ValueError, match="expected PEFT TinyLoRA or PSOFT layers, found none"):
        accelerate_peft(llama())
    model = tiny_lora()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged; call unmerge_adapter"):
        accelerate_peft(model)


def test_adapters_written_after_acceleration_are_noticed(tmp_path):
    source = tiny_lora(projection_seed=99, u=4)
    source.save_pretrained(tmp_path)
    model, x = accelerate_peft(tiny_lora(u=4)), tokens()
    assert error(model(x).logits.detach(), source(x).logits.detach()) > 1e-3
    model.load_adapter(tmp_path, "default")  # PEFT copies into the tensors that are there
    assert error(model(x).logits.detach(), source(x).logits.detach()) < 1e-6


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("twin_of", COPIES.values(), ids=COPIES)
def test_copies_stay_accelerated_and_independent(twin_of):
    model = accelerate_peft(tiny_lora())
    expected = model(tokens()).logits.detach()
    twin = twin_of(model)
    assert not any(acceleration_report(twin).values())
    assert torch.equal(twin(tokens()).logits, expected)
    with torch.no_grad():
        next(p for p in twin.parameters() if p.requires_grad).add_(1.0)
    assert torch.equal(model(tokens()).logits, expected) and not torch.equal(twin(tokens()).logits, expected)
    deaccelerate_peft(twin)
    assert not any(layer._load_state_dict_post_hooks for layer in layers_of(twin).values())
    assert all(layer._load_state_dict_post_hooks for layer in layers_of(model).values())


def test_adapters_injected_into_a_transformers_model():
    """PSOFT only: PEFT refuses to inject TinyLoRA, whose vectors live in its PeftModel."""
    model = psoft().get_base_model()
    assert not isinstance(model, peft.PeftModel)
    expected = outputs_and_gradients(model)
    assert_close(outputs_and_gradients(accelerate_peft(model)), expected)


def test_compiling_an_accelerated_model_gives_one_graph():
    model, x = accelerate_peft(tiny_lora(llama(num_hidden_layers=1))), tokens()
    expected = outputs_and_gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    out = compiled(input_ids=x, labels=x)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert_close([out.logits.detach(), *torch.autograd.grad(out.loss, trained)], expected)


def test_an_adapter_loaded_after_compiling_is_the_one_that_runs(tmp_path):
    source = tiny_lora(llama(num_hidden_layers=1), projection_seed=99)
    source.save_pretrained(tmp_path)
    model, x = accelerate_peft(tiny_lora(llama(num_hidden_layers=1))), tokens()
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    with torch.no_grad():
        before = compiled(x).logits
        model.load_adapter(tmp_path, "default")
        after, expected = compiled(x).logits, source(x).logits
    assert error(after, expected) < 1e-6 and error(before, expected) > 1e-3


def test_weights_loaded_under_an_accelerated_adapter_are_noticed():
    """PEFT adds B R A whatever the weight becomes; so does a layer whose factors no longer fit, on PEFT's path."""
    model = accelerate_peft(tiny_lora())
    other = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()
             if name.endswith("q_proj.base_layer.weight")}  # fmt: skip
    model.load_state_dict(other, strict=False)
    assert sum(reason is not None for reason in acceleration_report(model).values()) == 2
    found = outputs_and_gradients(model)
    assert_close(found, outputs_and_gradients(deaccelerate_peft(model)))


# Conversion


class Tripling(nn.Linear):
    def forward(self, x):
        return super().forward(3 * x)


@pytest.mark.parametrize("change, message", [
    (lambda a, b: setattr(b, "fc", a.fc), "a.fc and b.fc are one layer, of which PEFT would adapt a.fc alone; load it"),
    (lambda a, b: setattr(b.fc, "__class__", Tripling), "b.fc: the forward of Tripling is not that of nn.Linear, and"),
])  # fmt: skip
def test_a_base_whose_layers_peft_adapts_otherwise_is_refused(change, message, tmp_path):
    def bare():
        torch.manual_seed(0)
        a, b = (nn.Sequential() for _ in range(2))
        a.fc, b.fc = nn.Linear(12, 12), nn.Linear(12, 12)
        change(a, b)
        return nn.ModuleDict({"a": a, "b": b})

    peft.get_peft_model(bare(), config(target_modules=["fc"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{message}"):
        from_peft(tmp_path, bare())


@pytest.mark.parametrize("weight_tying", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("save_projection", [True, False])
def test_adapters_come_from_peft_and_go_back(tmp_path, weight_tying, save_projection):
    theirs = tiny_lora(weight_tying=weight_tying, save_projection=save_projection, projection_seed=5)
    theirs.save_pretrained(tmp_path / "theirs")
    has_projection = any("tinylora_P" in key for key in load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    assert has_projection == save_projection

    ours = from_peft(tmp_path / "theirs", llama())
    expected = outputs_and_gradients(theirs)
    assert_close(outputs_and_gradients(ours), expected)
    keys = {layer._tinylora_v_key["default"] for layer in layers_of(theirs).values()}
    assert len(trainable_vectors(ours)) == len(keys)

    to_peft(ours, tmp_path / "back")
    back = peft.PeftModel.from_pretrained(llama(), tmp_path / "back", is_trainable=True).eval()
    assert_close(outputs_and_gradients(back), expected)
    assert {layer._tinylora_v_key["default"] for layer in layers_of(back).values()} == keys


@pytest.mark.parametrize("scaling", ["left", "sqrt"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_our_adapters_go_to_peft(tmp_path, make, scaling):
    targets = TARGETS if make is llama else ["c_attn", "c_fc", "attn.c_proj"]
    ours = dict(target_modules=targets, trainable_dim=3, n_tie=3, alpha=0.5, scaling=scaling, cache=False)
    model = apply_tiny_lora(make(), TinyLoRAConfig(**ours))
    for v in trainable_vectors(model):
        v.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    to_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path, is_trainable=True).eval()
    assert_close(outputs_and_gradients(theirs), outputs_and_gradients(model))
    assert_close(outputs_and_gradients(accelerate_peft(theirs)), outputs_and_gradients(model))
    again = from_peft(tmp_path, make())
    assert_close(outputs_and_gradients(again), outputs_and_gradients(model))
    assert [layer.group for layer in adapted_layers(again).values()] == [0, 0, 0, 1, 1, 1]


def test_lora_xs_goes_to_peft_as_r_squared_numbers(tmp_path):
    model = apply_lora_xs(llama(), LoRAXSConfig(rank=3, target_modules=TARGETS, cache=False))
    for v in trainable_vectors(model):
        v.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    to_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).eval()
    assert theirs.peft_config["default"].u == 9
    assert_close(outputs_and_gradients(theirs), outputs_and_gradients(model))


def test_groups_that_peft_cannot_express_are_untied_with_a_warning(tmp_path):
    model = apply_tiny_lora(llama(), TinyLoRAConfig(target_modules=TARGETS, n_tie=4, init="uniform", cache=False))
    with pytest.warns(UserWarning, match="every module gets a copy of its v"):
        to_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert error(theirs(tokens()).logits.detach(), model(tokens()).logits.detach()) < 1e-5
    assert len(theirs.base_model.tinylora_v["default"]) == 6


def test_directories_that_do_not_fit_are_errors(tmp_path):
    with pytest.raises(ValueError, match="expected adapter_config.json, found no such file"):
        from_peft(tmp_path, llama())
    tiny_lora().save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj: its factors do not belong to this weight"):
        from_peft(tmp_path / "a", llama(seed=1))
    with pytest.raises(ValueError, match="no module model.layers.1"):
        from_peft(tmp_path / "a", llama(num_hidden_layers=1))
    tiny_lora(target_modules=["embed_tokens"]).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="embed_tokens is a Embedding.*accelerate_peft"):
        from_peft(tmp_path / "b", llama())
    peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "c")
    with pytest.raises(ValueError, match="expected peft_type TINYLORA, found LORA"):
        from_peft(tmp_path / "c", llama())
    with pytest.raises(ValueError, match="it has no adapter"):
        to_peft(llama(), tmp_path / "d")


def drop(ending):
    def change(config, tensors):
        del tensors[next(key for key in sorted(tensors) if key.endswith(ending))]

    return change


def set_field(**fields):
    return lambda config, tensors: config.update(fields)


def set_tensor(key, value):
    return lambda config, tensors: tensors.update({key: value(tensors) if callable(value) else value})


def drop_a_module(config, tensors):
    for key in [key for key in tensors if "layers.1.self_attn.v_proj" in key]:
        del tensors[key]


V, HEAD = "base_model.tinylora_v.", "base_model.model.lm_head"
Q = "base_model.model.model.layers.0.self_attn.q_proj.tinylora_"
# what is done to a directory of six modules in three groups -> the words of the refusal
DAMAGED = {
    "no A": (drop("_A"), "not whole, .*mlp.down_proj.tinylora_A is missing"),
    "no B": (drop("_B"), "not whole, .*mlp.down_proj.tinylora_B is missing"),
    "no P": (drop("_P"), "not whole, .*mlp.down_proj.tinylora_P is missing"),
    "no P at all": (lambda c, t: [t.pop(k) for k in list(t) if k.endswith("_P")], "not whole, .*tinylora_P is missing"),
    "no v": (drop("v.1"), "not whole, .*tinylora_v.1 is missing"),
    "one v more": (set_tensor(V + "3", torch.zeros(3)), "not whole, .*tinylora_v.3 belongs to nothing"),
    "another tying": (set_field(weight_tying=0.0), "not whole, .*tinylora_v.3 is missing"),
    "less tying": (set_field(weight_tying=1.0), "not whole, .*tinylora_v.1 belongs to nothing"),
    "no module": (drop_a_module, "not whole: target_modules names model.layers.1.self_attn.v_proj, which has no ten"),
    "another r": (set_field(r=3), r"q_proj.tinylora_A: expected \[3, 32\], found \[2, 32\]"),
    "another u": (set_field(u=2), r"tinylora_P: expected \[2, 2, 2\], found \[3, 2, 2\]"),
    "a short v": (set_tensor(V + "0", torch.zeros(2)), r"tinylora_v.0: expected \[3\], found \[2\]"),
    "a wide A": (set_tensor(Q + "A", lambda t: t[Q + "A"].repeat(1, 2)), r"q_proj.tinylora_A: expected \[2, 32\], fou"),
    "nothing": (lambda c, t: t.clear(), "expected tinylora_A and tinylora_B of some module, found none"),
    "no r": (lambda c, t: c.pop("r"), "adapter_config.json: r: expected an integer >= 1, found None"),
    "u in words": (set_field(u="3"), "adapter_config.json: u: expected an integer >= 1, found '3'"),
    "no tying": (lambda c, t: c.pop("weight_tying"), "weight_tying: expected a number from 0 to 1, found None"),
    "tying of 2": (set_field(weight_tying=2), "weight_tying: expected a number from 0 to 1, found 2"),
    "a trained head": (set_tensor(HEAD + ".weight", torch.zeros(2)), "lm_head.weight has no place .*modules_to_save"),
    "a head of another": (set_tensor(HEAD + ".base_layer.weight", torch.zeros(2)), "base_layer.weight is not this mod"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_directory_that_is_not_whole_is_refused(damage, tmp_path):
    change, message = DAMAGED[damage]
    tiny_lora().save_pretrained(tmp_path)
    tensors, settings = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    change(settings, tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    model = llama()
    with pytest.raises(ValueError, match=message) as error:
        from_peft(tmp_path, model)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert not adapted_layers(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"{}"], ids=range(6))
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_file_that_cannot_be_read_is_named(file, contents, tmp_path):
    tiny_lora().save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(contents)
    with pytest.raises(ValueError, match=f"{tmp_path}") as error:
        from_peft(tmp_path, llama())
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_head_comes_with_the_weight_that_peft_saves_of_it(tied, tmp_path):
    def base():
        return llama(tie_word_embeddings=tied)

    theirs = tiny_lora(base(), target_modules=["q_proj", "lm_head"])
    theirs.save_pretrained(tmp_path)
    assert HEAD + ".base_layer.weight" in load_file(tmp_path / WEIGHTS)
    x = tokens()
    with torch.no_grad():
        assert error(from_peft(tmp_path, base())(x).logits, theirs(x).logits) < 1e-5
        other = base()
        other.lm_head.weight.mul_(1.5)
    with pytest.raises(ValueError, match="lm_head.base_layer.weight is not this model's; load the base"):
        from_peft(tmp_path, other)


def test_bfloat16_factors_fit_their_weight():
    """What the tolerance allows for: PEFT rounds A and B to bfloat16."""
    model = tiny_lora(llama().bfloat16())
    assert not any(acceleration_report(accelerate_peft(model)).values())
    assert FIT_TOLERANCE[torch.float32] < 2.0**-9 < FIT_TOLERANCE[torch.bfloat16]
