"""Every writer and every stream gives the bare model's names, whatever stands around the model or around its blocks."""
import copy
import json
import tempfile

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim.swa_utils import AveragedModel

from tests.cases import error
from tests.integrations.tiny import llama, tokens
from tests.models import tiny_decoder
from tinylora_kernels import (
    AdapterBank,
    TinyLoRAConfig,
    adapted_layers,
    apply_tiny_lora,
    export_lora,
    inspect_adapter,
    load_adapter,
    merge_fidelity,
    merged_weights,
    remove_adapter,
    save_adapter,
    trainable_vectors,
)
from tinylora_kernels.base import names
from tinylora_kernels.integrations.vllm import vllm_problems
from tinylora_kernels.model.adapted import base_state_dict

peft = pytest.importorskip("peft", minversion="0.21", reason="one of the wrappers is PEFT's")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="the models under test come from it")

from tinylora_kernels.integrations.peft import from_peft, to_peft  # noqa: E402
from tinylora_kernels.integrations.transformers import from_pretrained, save_pretrained  # noqa: E402
from tinylora_kernels.integrations.trl import as_peft_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel.*", "ignore:.*gradient_checkpointing.*")
CONFIG = TinyLoRAConfig(target_modules=["q_proj", "down_proj"], trainable_dim=2, cache=False)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """DDP and FSDP need a process group, of this process alone."""
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def of_blocks(wrap):
    def wrapped(model):
        for i, block in enumerate(model.model.layers):
            model.model.layers[i] = wrap(block)
        return model

    return wrapped


def of_targets(wrap):
    def wrapped(model):
        for block in model.model.layers:
            block.self_attn.q_proj = wrap(block.self_attn.q_proj)
        return model

    return wrapped


def fsdp2(model):
    for block in model.model.layers:
        fully_shard(block, ignored_params=set(trainable_vectors(model)))
    return model


def eager(module):
    """torch.compile's wrapper; nothing is generated, and names are what this is about."""
    return torch.compile(module, backend="eager")


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def prefix_tuned(model):
    """PEFT's own wrapper around an adapted model, with parameters of its own beside it."""
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def prepared(model):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def regions(model):
    from accelerate.utils import compile_regions

    return compile_regions(model, backend="eager")


WRAPPERS = {
    "nothing": lambda model: model,
    "torch.compile": eager,
    "module.compile": lambda model: model.compile(backend="eager") or model,
    "DDP": ddp,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "as_peft_model": as_peft_model,
    "PEFT": prefix_tuned,
    "accelerate": prepared,
    "accelerate's regions": regions,
    "blocks compiled": of_blocks(eager),
    "blocks checkpointed": of_blocks(checkpoint_wrapper),
    "blocks checkpointed and compiled": of_blocks(lambda block: eager(checkpoint_wrapper(block))),
    "targets compiled": of_targets(eager),
    "FSDP": lambda model: FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")),
    "DDP of blocks compiled": lambda model: ddp(of_blocks(eager)(model)),
    "torch.compile of DDP": lambda model: eager(ddp(model)),
    "torch.compile of as_peft_model": lambda model: eager(as_peft_model(model)),
    "DDP of as_peft_model": lambda model: ddp(as_peft_model(model)),
    "all of it": lambda model: eager(ddp(as_peft_model(of_blocks(checkpoint_wrapper)(of_targets(eager)(model))))),
}


def bare():
    return llama(attention_bias=False, num_hidden_layers=1)


def adapted():
    model = apply_tiny_lora(bare(), CONFIG, progress=False)
    for i, v in enumerate(trainable_vectors(model)):
        v.data.copy_(torch.tensor([0.3, -0.2]) + 0.1 * i)
    return model


@pytest.fixture(params=WRAPPERS.values(), ids=list(WRAPPERS))
def wrapped(request):
    return request.param(adapted())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def test_layers_vectors_and_reports(wrapped):
    model = adapted()
    assert list(adapted_layers(wrapped)) == list(adapted_layers(model))
    assert [v.tolist() for v in trainable_vectors(wrapped)] == [v.tolist() for v in trainable_vectors(model)]
    assert [row.name for row in merge_fidelity(wrapped).rows] == [row.name for row in merge_fidelity(model).rows]


def test_an_adapter_file(tmp_path, wrapped):
    save_adapter(adapted(), tmp_path / "bare")
    save_adapter(wrapped, tmp_path / "wrapped")
    assert (tmp_path / "wrapped").read_bytes() == (tmp_path / "bare").read_bytes()
    assert [module.name for module in inspect_adapter(tmp_path / "wrapped").modules] == list(adapted_layers(adapted()))
    for v in trainable_vectors(wrapped):
        v.data.zero_()
    load_adapter(wrapped, tmp_path / "bare", progress=False)
    loaded = load_adapter(bare(), tmp_path / "wrapped", cache=False, progress=False)
    assert torch.equal(logits(loaded), logits(adapted()))
    assert [v.tolist() for v in trainable_vectors(wrapped)] == [v.tolist() for v in trainable_vectors(adapted())]


def test_streams(wrapped):
    model = adapted()
    for only_adapted in (False, True):
        expected, found = dict(merged_weights(model, only_adapted)), dict(merged_weights(wrapped, only_adapted))
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert list(base_state_dict(wrapped)) == list(bare().state_dict())


def test_an_exported_lora_directory(tmp_path, wrapped):
    export_lora(adapted(), tmp_path / "bare")
    export_lora(wrapped, tmp_path / "wrapped")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "bare" / name).read_bytes()
    assert vllm_problems(tmp_path / "wrapped") == []
    loaded = peft.PeftModel.from_pretrained(bare(), tmp_path / "wrapped").eval()
    assert error(logits(loaded), logits(adapted())) < 1e-5


def test_whole_models(tmp_path, wrapped):
    save_pretrained(wrapped, tmp_path / "merged", merged=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    loaded, report = load(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert error(logits(loaded), logits(adapted())) < 1e-5
    save_pretrained(wrapped, tmp_path / "both")
    assert torch.equal(logits(from_pretrained(tmp_path / "both", cache=False)), logits(adapted()))


def test_pefts_own_format(tmp_path, wrapped):
    to_peft(wrapped, tmp_path)
    loaded = peft.PeftModel.from_pretrained(bare(), tmp_path).eval()
    assert error(logits(loaded), logits(adapted())) < 1e-5
    assert error(logits(from_peft(tmp_path, eager(bare()))), logits(adapted())) < 1e-5


def test_a_bank(tmp_path, wrapped):
    save_adapter(adapted(), tmp_path / "bare")
    bank = AdapterBank(wrapped, 2)
    bank.load("one", tmp_path / "bare")
    bank.save("one", tmp_path / "banked")
    bank.close()
    assert (tmp_path / "banked").read_bytes() == (tmp_path / "bare").read_bytes()


def test_fsdp2_shards(tmp_path):
    """Sharded weights are gathered; their names were never others."""
    save_adapter(adapted(), tmp_path / "bare")
    for wrap in (fsdp2, lambda model: eager(fsdp2(model)), lambda model: as_peft_model(of_blocks(eager)(fsdp2(model)))):
        model = wrap(adapted())
        save_adapter(model, tmp_path / "sharded")
        assert (tmp_path / "sharded").read_bytes() == (tmp_path / "bare").read_bytes()
        with pytest.raises(ValueError, match="^model.layers.0.self_attn.q_proj: expected a dense floating weight"):
            merged_weights(model)


# Adapting what is wrapped already

BEFORE = {name: WRAPPERS[name] for name in (
    "torch.compile", "module.compile", "DataParallel", "AveragedModel", "accelerate",
    "accelerate's regions", "blocks compiled", "blocks checkpointed", "blocks checkpointed and compiled",
    "targets compiled",
)}  # fmt: skip


@pytest.mark.parametrize("wrap", BEFORE.values(), ids=list(BEFORE))
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], None], ids=["named, called before", "by default, fresh"])
def test_adapting_through_a_wrapper(tmp_path, wrap, targets):
    torch._dynamo.reset()
    config = TinyLoRAConfig(target_modules=targets, trainable_dim=2, cache=False)
    plain, wrapped = apply_tiny_lora(bare(), config, progress=False), wrap(bare())
    if targets:
        logits(wrapped)
    apply_tiny_lora(wrapped, config, progress=False)
    assert [layer.name for layer in adapted_layers(wrapped).values()] == list(adapted_layers(plain))
    for ours, theirs in zip(trainable_vectors(wrapped), trainable_vectors(plain), strict=True):
        ours.data.fill_(1.0)
        theirs.data.fill_(1.0)
    assert error(logits(wrapped).float(), logits(plain)) < (1e-2 if wrap is prepared else 1e-6)
    assert error(logits(bare()), logits(plain)) > 1e-2
    save_adapter(wrapped, tmp_path / "wrapped")
    load_adapter(wrap(bare()), tmp_path / "wrapped", cache=False, progress=False)
    remove_adapter(wrapped)
    assert error(logits(wrapped).float(), logits(bare())) < (1e-2 if wrap is prepared else 1e-6)
    assert [key for key in wrapped.state_dict() if ".base." in key or key.endswith(".v")] == []


@pytest.mark.parametrize(
    "wrap", [ddp, WRAPPERS["FSDP"], lambda m: eager(ddp(m)), of_blocks(ddp)], ids=["DDP", "FSDP", "compiled", "blocks"]
)
def test_an_engine_that_has_taken_the_parameters_is_refused(wrap):
    """DDP averages the gradients of what it saw: vectors that come later would differ from rank to rank, in silence."""
    model = wrap(bare())
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="Parallel has taken its parameters already .*; adapt the model first"):
        apply_tiny_lora(model, CONFIG, progress=False)
    assert list(model.state_dict()) == before


# The walk itself


def test_modules_and_tensors_of_a_wrapped_model_are_those_of_the_bare_one():
    plain = tiny_decoder()
    plain.again = plain.layers[0]  # one module under two names
    twin = copy.deepcopy(plain)
    twin.layers[0] = twin.again = eager(checkpoint_wrapper(twin.layers[0]))
    twin.layers[1].q_proj = eager(twin.layers[1].q_proj)
    model = eager(nn.DataParallel(twin))
    for duplicates in (True, False):
        expected = [(name, type(module)) for name, module in plain.named_modules(remove_duplicate=duplicates)]
        assert [(n, type(m)) for n, m in names.named_modules(model, remove_duplicate=duplicates)] == expected
    assert [names.bare_name(model, key) for key in model.state_dict()] == list(plain.state_dict())
    for name, module in plain.named_modules():
        assert type(names.submodule(model, name)) is type(module)
    with pytest.raises(AttributeError, match="layers.7.q_proj: ModuleList has no module 7"):
        names.submodule(model, "layers.7.q_proj")
    assert names.bare_name(AveragedModel(plain), "n_averaged") is None


def test_a_model_may_call_its_own_modules_as_wrappers_do():
    """A wrapper is known by its class: names alone say nothing."""
    model = nn.ModuleDict({"module": nn.ModuleDict({"base_model": nn.Linear(8, 8)}), "base": nn.Linear(8, 8)})
    apply_tiny_lora(model, TinyLoRAConfig(cache=False), progress=False)
    assert list(adapted_layers(eager(model))) == ["module.base_model", "base"]
    expected = ["module.base_model.weight", "module.base_model.bias", "base.weight", "base.bias"]
    assert [name for name, _ in merged_weights(eager(model))] == expected


@pytest.mark.parametrize(
    "name",
    [
        "_orig_mod.model.layers.0.q_proj", "module.model.layers.0.q_proj", "base_model.model.layers.0.q_proj",
        "model.layers.0._orig_mod.q_proj", "model.layers.0._checkpoint_wrapped_module.q_proj",
        "_fsdp_wrapped_module.model.layers.0.q_proj",
    ],
)
def test_vllm_problems_knows_the_names_of_wrappers(tmp_path, name):
    config = {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    factors = {f"base_model.model.{name}.lora_{f}.weight": torch.zeros(8, 8) for f in "AB"}
    save_file(factors, str(tmp_path / "adapter_model.safetensors"))
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == list(factors)
    (problem,) = vllm_problems(tmp_path)
    assert problem.startswith(f"{name}: ") and "is the name of a wrapper, not of the model" in problem
