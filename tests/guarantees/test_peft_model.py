"""What as_peft_model returns is a PeftModel: each public attribute and method of PEFT's is right, or a clear error.

Right is what PEFT's own model of the same adapter does, and for numbers the adapted model itself.
"""
import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from tests.cases import error
from tests.integrations.tiny import VOCABULARY, gpt2, llama, tokens
from tinylora_kernels import TinyLoRAConfig, adapted_layers, apply_tiny_lora, load_adapter, merge, trainable_vectors

peft = pytest.importorskip("peft", minversion="0.21", reason="the contract is that of peft >= 0.21")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="the models under test come from it")

from peft.tuners.tuners_utils import BaseTuner  # noqa: E402

from tinylora_kernels.integrations.peft import from_peft, to_peft  # noqa: E402
from tinylora_kernels.integrations.peft_model import ADAPTER_FILE, AdaptedTuner  # noqa: E402
from tinylora_kernels.integrations.trl import as_peft_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "t5": ["q", "wo"], "bert": ["query", "dense"]}


def adapt(model, fill: float = 0.3):
    targets = TARGETS[model.config.model_type]
    apply_tiny_lora(model, TinyLoRAConfig(target_modules=targets, trainable_dim=2, cache=False), progress=False)
    for v in trainable_vectors(model):
        v.data.fill_(fill)
    return model


@pytest.fixture
def inner():
    return adapt(llama())


@pytest.fixture
def model(inner):
    return as_peft_model(inner)


@pytest.fixture
def twin(inner, tmp_path):
    """The same adapter in PEFT's own hands."""
    to_peft(inner, tmp_path / "twin")
    return peft.PeftModel.from_pretrained(llama(), tmp_path / "twin", is_trainable=True).eval()


def logits(model, x=None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens() if x is None else x).logits


def bare() -> torch.Tensor:
    return logits(llama())


# The walk: a check for each public name, and no name without one


def check_active(model, twin):
    assert model.active_adapter == twin.active_adapter == "default"
    assert model.active_adapters == twin.active_adapters == ["default"]
    assert model.active_peft_config is model.peft_config["default"] and model.has_active_enabled_adapter


def check_config(model, twin):
    ours, theirs = model.peft_config["default"], twin.peft_config["default"]
    assert list(model.peft_config) == list(twin.peft_config) and isinstance(ours, peft.PeftConfig)
    assert set(ours.target_modules) == set(theirs.target_modules) and ours.task_type == "CAUSAL_LM"
    assert ours.is_prompt_learning is False and ours.to_dict()["peft_type"] is None
    with pytest.raises(AttributeError):
        model.peft_config = {}


def check_structure(model, twin):
    assert type(model.get_base_model()) is type(twin.get_base_model()) is transformers.LlamaForCausalLM
    assert model.base_model.model is model.get_base_model() and twin.base_model.model is twin.get_base_model()
    assert model.base_model.model._get_name() == twin.base_model.model._get_name() == "LlamaForCausalLM"
    assert model.model is model.get_base_model()  # read through the tuner, as in PEFT
    assert model.base_model_torch_dtype is torch.float32 and model.config is model.get_base_model().config
    assert all(name.startswith("base_model.model.") for name, _ in model.named_parameters())


def check_generate(model, twin):
    x = tokens(rows=2, length=5)
    settings = dict(attention_mask=torch.ones_like(x), max_new_tokens=6, do_sample=False, pad_token_id=0)
    found = model.generate(input_ids=x, **settings)
    assert torch.equal(found, model.get_base_model().generate(input_ids=x, **settings))
    assert torch.equal(found, twin.generate(input_ids=x, **settings))
    inputs = model.prepare_inputs_for_generation(x, attention_mask=torch.ones_like(x))
    assert torch.equal(inputs["input_ids"], x)


def check_disable(model, twin):
    adapted = logits(model)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(logits(model), bare())
        assert torch.equal(logits(model), bare()) and not model.has_active_enabled_adapter
    assert torch.equal(logits(model), adapted) and error(adapted, bare()) > 1e-3
    model.disable_adapter_layers()
    assert torch.equal(logits(model), bare()) and {s.enabled for s in model.get_layer_status()} == {False}
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), adapted)
    with pytest.raises(RuntimeError, match="stop"), model.disable_adapter():
        raise RuntimeError("stop")
    assert torch.equal(logits(model), adapted)
    merge(model.get_base_model())
    with pytest.raises(ValueError, match="^model: .* merged; call unmerge"):
        model.disable_adapter_layers()


def check_adapters_by_name(model, twin):
    first = [v.detach().clone() for v in trainable_vectors(model)]
    parameters = trainable_vectors(model)
    model.add_adapter("ref", model.peft_config["default"])
    assert [p.requires_grad for p in trainable_vectors(model)] == [True] * len(first)
    for v in trainable_vectors(model):
        v.data.fill_(-0.5)
    changed = logits(model)
    model.set_adapter("ref")
    assert model.active_adapter == "ref" and all(map(torch.equal, trainable_vectors(model), first))
    assert all(v.requires_grad for v in trainable_vectors(model)) and not any(p.requires_grad for p in parameters)
    model.set_adapter("ref", inference_mode=True)
    assert not any(v.requires_grad for v in trainable_vectors(model))
    model.base_model.set_adapter(["default"])
    assert all(a is b for a, b in zip(trainable_vectors(model), parameters, strict=True))
    assert torch.equal(logits(model), changed) and all(p.requires_grad for p in parameters)
    model.set_requires_grad(["default", "ref"], False)
    assert not any(p.requires_grad for p in model.parameters())
    model.delete_adapter("ref")
    assert list(model.peft_config) == ["default"]
    for call, message in {
        lambda: model.add_adapter("default"): "expected a new name, found 'default'",
        lambda: model.add_adapter("b", peft.LoraConfig()): "expected None or that of 'default', found a LoraConfig",
        lambda: model.set_adapter("ref"): "expected one of default, found 'ref'",
        lambda: model.base_model.set_adapter([]): "expected one adapter to be active at a time, found",
        lambda: model.delete_adapter("ref"): "expected one of default, found 'ref'",
        lambda: model.delete_adapter("default"): "'default' is active; set_adapter another one first",
        lambda: model.set_requires_grad("ref"): "expected one of default, found 'ref'",
        lambda: model.base_model.inject_adapter(model, "b"): "inject_adapter: expected apply_tiny_lora",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def check_merging(model, twin):
    before = {name: p.detach().clone() for name, p in model.get_base_model().named_parameters()}
    adapted = logits(model)
    model.merge_adapter()
    dense = llama()
    dense.load_state_dict(model.state_dict())
    assert error(logits(dense), adapted) < 1e-5
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in dense.named_parameters()]
    assert {tuple(s.merged_adapters) for s in model.get_layer_status()} == {("default",)}
    assert model.get_nb_trainable_parameters()[0] == sum(v.numel() for v in trainable_vectors(model))
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["default"], safe_merge=True)
    model.base_model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.get_base_model().named_parameters())
    model.add_adapter("ref")
    for merging in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="expected the active adapter 'default', found"):
            merging(adapter_names=["ref"])
    v = trainable_vectors(model)[0]
    v.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="q_proj: its merged weight: expected finite numbers"):
        model.merge_and_unload(safe_merge=True)
    v.data.fill_(0.3)
    merged = model.merge_and_unload(progressbar=False, adapter_names=["default"])
    assert type(merged) is transformers.LlamaForCausalLM and not adapted_layers(merged)
    assert error(logits(merged), logits(twin.merge_and_unload())) < 1e-5


def check_unloading(model, twin):
    assert type(model.unload()) is type(twin.unload()) and torch.equal(logits(model.unload()), bare())


def check_counts(model, twin):
    trained = sum(v.numel() for v in trainable_vectors(model))
    frozen = sum(p.numel() for p in llama().parameters())
    assert model.get_nb_trainable_parameters() == (trained, frozen + trained)
    assert twin.get_nb_trainable_parameters()[0] == trained
    assert model.print_trainable_parameters() is None


def check_status(model, twin):
    ours, theirs = model.get_layer_status(), twin.get_layer_status()
    assert [s.name for s in ours] == [s.name for s in theirs]
    for own, other in zip(ours, theirs, strict=True):
        for field in ("enabled", "active_adapters", "merged_adapters", "available_adapters", "quantization_backend"):
            assert getattr(own, field) == getattr(other, field)
        assert own.requires_grad == {"default": True} and own.devices == {"default": ["cpu"]}
    ours, theirs = model.get_model_status(), twin.get_model_status()
    for field in ("num_adapter_layers", "enabled", "active_adapters", "merged_adapters", "available_adapters",
                  "trainable_params", "base_model_type"):  # fmt: skip
        assert getattr(ours, field) == getattr(theirs, field)
    assert ours.total_params == model.get_nb_trainable_parameters()[1]
    assert ours.peft_types == {"default": "TinyLoRAConfig"}
    for function in (peft.get_layer_status, peft.get_model_status):  # they look for PEFT's own layers
        with pytest.raises((TypeError, ValueError)):
            function(model)


def check_files(model, twin, directory):
    model.save_pretrained(directory / "own")
    assert [path.name for path in (directory / "own").iterdir()] == [ADAPTER_FILE]
    again = type(model).from_pretrained(llama(), directory / "own")
    assert torch.equal(logits(again), logits(model)) and not any(p.requires_grad for p in again.parameters())
    trained = type(model).from_pretrained(llama(), directory / "own", is_trainable=True)
    assert all(v.requires_grad for v in trainable_vectors(trained))
    model.save_pretrained(directory / "other", is_main_process=False)
    assert not (directory / "other").exists()
    # every adapter in a directory of its name, as in PEFT
    model.add_adapter("ref")
    for v in trainable_vectors(model):
        v.data.fill_(-0.1)
    saved = logits(model)
    model.save_pretrained(directory / "both", state_dict={}, save_embedding_layers=False)
    assert torch.equal(logits(load_adapter(llama(), directory / "both" / ADAPTER_FILE, cache=False)), saved)
    loaded = as_peft_model(adapt(llama(), fill=0.0)).train()
    result = loaded.load_adapter(directory / "both", "default", is_trainable=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], []) and loaded.training
    assert torch.equal(logits(loaded.eval()), saved) and all(v.requires_grad for v in trainable_vectors(loaded))
    loaded.train().load_adapter(directory / "both" / "ref", "ref")
    assert loaded.active_adapter == "default" and not loaded.training  # as PEFT leaves it, unless is_trainable
    assert loaded.get_layer_status()[0].requires_grad == {"default": True, "ref": False}
    loaded.set_adapter("ref")
    assert torch.equal(logits(loaded), logits(again))
    model.save_pretrained(directory / "one", selected_adapters=["ref"])
    assert [path.name for path in (directory / "one").iterdir()] == ["ref"]
    (directory / "file").touch()
    for call, message in {
        lambda: model.save_pretrained(directory / "file"): "expected a directory, found the file",
        lambda: model.save_pretrained(directory / "x", selected_adapters=["b"]): "expected one of default, ref, found",
        lambda: model.save_pretrained(directory / "x", safe_serialization=False): "is a safetensors file",
        lambda: type(model).from_pretrained(llama(), directory / "own", "b"): "expected 'default' for the first",
        lambda: model.load_adapter(directory / "nowhere", "new"): "nowhere",
    }.items():
        with pytest.raises((ValueError, OSError), match=message):
            call()
    assert not (directory / "x").exists() and list(model.peft_config) == ["default", "ref"]
    model.create_or_update_model_card(str(directory / "own"))
    card = (directory / "own" / "README.md").read_text()
    assert "library_name: peft" in card and "- tinylora\n" in card


def check_hub(model, twin):
    """Uploading is transformers' own, of what save_pretrained writes."""
    assert type(model).push_to_hub is transformers.utils.PushToHubMixin.push_to_hub


def check_checkpointing(model, twin):
    for each in (model, twin):
        assert each.prepare_model_for_gradient_checkpointing(each.get_base_model()) is None
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    found = [v.grad.clone() for v in trainable_vectors(model)]
    model.gradient_checkpointing_disable()
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(torch.allclose(a, v.grad) for a, v in zip(found, trainable_vectors(model), strict=True))


def check_prompts(model, twin):
    for call in (lambda: model.get_prompt(1), lambda: model.get_prompt_embedding_to_save("default")):
        with pytest.raises(ValueError, match="has no prompt"):
            call()
    assert not hasattr(model, "prompt_encoder") and not hasattr(twin, "prompt_encoder")


def check_forward_arguments(model, twin):
    for call in (model.forward, model, model.generate):
        with pytest.raises(ValueError, match="adapter_names: expected none, found default; rows of .* AdapterBank"):
            call(input_ids=tokens(rows=1), adapter_names=["default"])
    assert error(logits(model), logits(twin)) < 1e-5
    assert torch.equal(model(input_ids=tokens(), adapter_names=None).logits, logits(model))


def check_modules_to_save(model, twin):
    assert model.modules_to_save is None and twin.modules_to_save is None


def check_lora_conversion(model, twin):
    assert model.supports_lora_conversion() is False
    with pytest.raises((TypeError, ValueError)):
        peft.convert_to_lora(model, rank=2)


CHECKS = {
    check_active: ["active_adapters", "active_peft_config", "has_active_enabled_adapter"],
    check_config: ["peft_config"],
    check_structure: ["get_base_model", "base_model_torch_dtype", "get_model_config", "uses_shared_state"],
    check_generate: ["generate", "prepare_inputs_for_generation"],
    check_disable: ["disable_adapter", "disable_adapter_layers", "enable_adapter_layers"],
    check_adapters_by_name: ["add_adapter", "set_adapter", "delete_adapter", "set_requires_grad", "inject_adapter"],
    check_merging: ["merge_adapter", "unmerge_adapter", "merge_and_unload"],
    check_unloading: ["unload"],
    check_counts: ["get_nb_trainable_parameters", "print_trainable_parameters"],
    check_status: ["get_layer_status", "get_model_status"],
    check_files: ["save_pretrained", "from_pretrained", "load_adapter", "create_or_update_model_card"],
    check_hub: ["push_to_hub"],
    check_checkpointing: ["prepare_model_for_gradient_checkpointing"],
    check_prompts: ["get_prompt", "get_prompt_embedding_to_save"],
    check_forward_arguments: [],
    check_modules_to_save: ["modules_to_save"],
    check_lora_conversion: ["supports_lora_conversion"],
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_each_name_is_right_or_a_clear_error(check, model, twin, tmp_path):
    check(model, twin, *([tmp_path] if check is check_files else []))


def test_no_public_name_of_pefts_is_left_out():
    known = {name for names in CHECKS.values() for name in names}
    public = {
        name for cls in (peft.PeftModelForCausalLM, BaseTuner) for name in dir(cls)
        if name not in dir(nn.Module) and not name.startswith("_")
    }  # fmt: skip
    assert public == known


def test_what_the_tuner_does_not_have_is_the_models_and_never_peft_tuners_own():
    """BaseTuner's methods look for PEFT's layers, find none, and do nothing in silence."""
    assert not issubclass(AdaptedTuner, BaseTuner)
    inherited = [name for name in dir(AdaptedTuner) if getattr(BaseTuner, name, 0) is getattr(AdaptedTuner, name)]
    assert not [name for name in inherited if name not in dir(nn.Module)]
    assert inspect.signature(AdaptedTuner.merge_adapter).parameters.keys() == (
        inspect.signature(BaseTuner.merge_adapter).parameters.keys()
    )


# Losses that look at what a PeftModel wraps


def t5(seed=0):
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0,
        dropout_rate=0.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def bert(seed=0):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("make", [llama, gpt2, t5, bert])
def test_label_smoothing_is_that_of_the_model_itself(tmp_path, make, smoothing):
    """Of causal models the labels are shifted, of the others they are not; transformers goes by the wrapped class."""
    model, x = adapt(make()), tokens()
    labels = torch.tensor([0, 2, 1]) if make is bert else x
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=smoothing, use_cpu=True, report_to=[], disable_tqdm=True
    )
    losses = []
    for shape in (model, as_peft_model(model)):
        trainer = transformers.Trainer(model=shape, args=arguments)
        inputs = {"input_ids": x, "labels": labels} | ({"decoder_input_ids": x} if make is t5 else {})
        losses.append(float(trainer.compute_loss(shape, inputs).detach()))
    assert losses[0] == losses[1]
    if make in (llama, gpt2):
        # (1 - s) NLL + s mean over the vocabulary of - log p, of the next token
        log_p = logits(model).double()[:, :-1].log_softmax(-1)
        nll = -log_p.gather(-1, x[:, 1:, None]).mean()
        assert losses[1] == pytest.approx(float((1 - smoothing) * nll - smoothing * log_p.mean()), rel=1e-5)


# Copies, other kinds of model, and what may not be wrapped


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(model, copied):
    model.add_adapter("ref")
    twin = copied(model)
    assert torch.equal(logits(twin), logits(model)) and list(twin.peft_config) == ["default", "ref"]
    for v in trainable_vectors(twin):
        v.data.zero_()
    assert torch.equal(logits(twin), bare()) and error(logits(model), bare()) > 1e-3


def test_a_model_of_from_peft_writes_every_adapter_in_pefts_format(twin, tmp_path):
    twin.save_pretrained(tmp_path / "peft")
    model = as_peft_model(from_peft(tmp_path / "peft", llama()))
    model.add_adapter("ref")
    for v in trainable_vectors(model):
        v.data.fill_(-0.1)
    model.save_pretrained(tmp_path / "both")
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "both")
    loaded.load_adapter(tmp_path / "both" / "ref", "ref")
    assert error(logits(loaded), logits(model)) < 1e-5
    loaded.set_adapter("ref")
    model.set_adapter("ref")
    assert error(logits(loaded), logits(model)) < 1e-5


@pytest.mark.parametrize(
    "wrap", [as_peft_model, lambda m: torch.compile(m, backend="eager"), nn.DataParallel],
    ids=["twice", "compiled", "DataParallel"],
)  # fmt: skip
def test_what_stands_around_the_model_stands_around_the_peft_model_instead(inner, wrap):
    """transformers asks base_model.model for its class, and would get the wrapper's."""
    with pytest.raises(ValueError, match=r"expected the model itself, found it in a .*; put that around as_peft_model"):
        as_peft_model(wrap(inner))
