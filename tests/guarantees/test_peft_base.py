"""The base under an accelerated PEFT layer: what it holds now is what runs, as in PEFT's own layers."""
import copy

import pytest
import torch
from torch import nn

from tests.cases import error
from tests.integrations.tiny import gpt2, llama

peft = pytest.importorskip("peft", minversion="0.21", reason="the layers are PEFT's")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="the models under test come from it")

from tinylora_kernels.integrations.peft import accelerate_peft, acceleration_report, deaccelerate_peft  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning")


def biased(model):
    """GPT-2 starts with biases of zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def tiny_lora(model, targets, **options):
    torch.manual_seed(1)
    config = peft.TinyLoraConfig(
        r=2, u=3, target_modules=targets, init_weights="uniform", init_v_bound=0.5, **options
    )  # fmt: skip
    return peft.get_peft_model(biased(model), config).eval()


def psoft(model, targets):
    config = peft.PsoftConfig(
        r=4, psoft_alpha=8, target_modules=targets, ab_svd_init="pissa_init", psoft_svd="full", psoft_orth=False,
        psoft_mag_a=False, psoft_mag_b=False, init_weights=False,
    )  # fmt: skip
    torch.manual_seed(1)
    return peft.get_peft_model(biased(model), config).eval()


MODELS = {
    "TinyLoRA": lambda: tiny_lora(llama(), ["q_proj", "v_proj"]),
    "TinyLoRA, two adapters": lambda: two(tiny_lora(llama(), ["q_proj", "v_proj"])),
    "TinyLoRA on Conv1D": lambda: tiny_lora(gpt2(), ["c_attn", "c_fc"], fan_in_fan_out=True),
    "PSOFT": lambda: psoft(llama(), ["q_proj", "v_proj"]),
}


def two(model):
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "other"])
    return model


def bases(model) -> list[nn.Module]:
    return [layer.base_layer for _, layer in model.named_modules() if hasattr(layer, "base_layer")]


def _new_bias(base):
    base.bias = nn.Parameter(torch.linspace(-2, 5, len(base.bias)), requires_grad=False)


def _loaded(base):
    base.load_state_dict({"bias": torch.linspace(-2, 5, len(base.bias))}, strict=False)


def _no_bias(base):
    base.bias = None


def _in_place(base):
    with torch.no_grad():
        base.bias.mul_(-3).add_(1)


def _optimised(base):
    base.bias.grad = torch.ones_like(base.bias)
    torch.optim.SGD([base.bias], lr=3.0).step()


def _written(base):
    base.weight.data.mul_(-1)  # the factors fit still: U^T W changes its sign


CHANGES = {
    "in place": _in_place,
    "through data": lambda base: base.bias.data.mul_(-3).add_(1),
    "through numpy": lambda base: base.bias.detach().numpy().__setitem__(slice(None), 4.0),
    "one number": lambda base: base.bias.data[3:4].add_(30),
    "large": lambda base: base.bias.data.fill_(20.0),
    "another parameter": _new_bias,
    "loaded": _loaded,
    "none": _no_bias,
    "by an optimizer": _optimised,
    "weights, through data": _written,
    "weights, other ones": lambda base: base.weight.data.add_(0.1 * torch.randn(base.weight.shape)),
    "weights, one row": lambda base: base.weight.data[0].mul_(7),
}


def outputs(model, training: bool = True) -> list[torch.Tensor]:
    """Of every adapted layer: its output and, in training, the gradients of its input and of its vectors."""
    found = []
    for _, layer in model.named_modules():
        if not hasattr(layer, "base_layer"):
            continue
        wide = layer.base_layer.weight.shape[0 if hasattr(layer.base_layer, "nf") else 1]
        x = torch.randn(3, 5, wide, generator=torch.Generator().manual_seed(7))
        if not training:
            with torch.no_grad():
                found.append(layer(x))
            continue
        y = layer(x.requires_grad_())
        trained = [p for name, p in model.named_parameters() if p.requires_grad and y.requires_grad]
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(8))
        gradients = torch.autograd.grad((y * weights).sum(), [x, *trained], allow_unused=True)
        found += [y.detach(), *(gradient for gradient in gradients if gradient is not None)]
    return found


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hooked", [False, True])
def test_the_base_is_what_it_is_now(make, change, training, hooked):
    model = accelerate_peft(make())
    if hooked:  # its output, bias included, goes through a hook first
        for base in bases(model):
            base.register_forward_hook(lambda module, args, output: None)
    before = outputs(model, training)
    torch.manual_seed(2)
    for base in bases(model):
        if change is not _no_bias or isinstance(base, nn.Linear):  # transformers' Conv1D needs one
            change(base)
    found = outputs(model, training)
    expected = outputs(deaccelerate_peft(model), training)
    if change is not _no_bias:
        assert error(found[0], before[0]) > 1e-3
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) < (1e-4 if hooked else 1e-5)  # beside a large bias, t = y U - c loses digits


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_a_changed_bias_leaves_the_layers_accelerated(make):
    model = accelerate_peft(make())
    for base in bases(model):
        _in_place(base)
    outputs(model)
    assert not any(acceleration_report(model).values())


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_copies_see_their_own_base(make):
    model = accelerate_peft(make())
    outputs(model)
    twin = copy.deepcopy(model)
    for base in bases(twin):
        base.bias.data.add_(3)
    assert error(outputs(model)[0], outputs(twin)[0]) > 1e-3
    found, expected = outputs(twin), outputs(deaccelerate_peft(twin))
    assert all(error(ours, theirs) < 1e-5 for ours, theirs in zip(found, expected, strict=True))
