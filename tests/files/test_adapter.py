"""The adapter file: what it holds, that it comes back exactly, and that nothing wrong with it reaches a model."""
import copy
import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import tinylora_kernels.factors.modules as fused_module
import tinylora_kernels.files.format as format_module
from tests.models import TARGETS, tiny_decoder
from tests.paper import delta_weight
from tinylora_kernels import AdapterBank, TinyLoRAConfig, adapted_layers, apply_tiny_lora, trainable_vectors
from tinylora_kernels.factors.svd import Factors, truncated_svd
from tinylora_kernels.files.adapter import AdapterError, load_adapter, load_beside_others, save_adapter
from tinylora_kernels.files.inspect import inspect_adapter, main
from tinylora_kernels.method.config import LoRAXSConfig
from tinylora_kernels.model.attach import apply_lora_xs
from tinylora_kernels.model.merging import merge

TOKENS = torch.arange(12).view(2, 6)


def adapt(model, size=0.3, **options):
    options = {"trainable_dim": 3, "n_tie": 4, "target_modules": TARGETS, "cache": False, **options}
    apply_tiny_lora(model, TinyLoRAConfig(**options), progress=False)
    return randomise(model, size)


def randomise(model, size=0.3, seed=5):
    torch.manual_seed(seed)
    for v in trainable_vectors(model):
        nn.init.normal_(v, std=size)
    return model


def load(model, path):
    return load_adapter(model, path, cache=False, progress=False)


def snapshot(model):
    """Everything that an unsuccessful load must leave alone."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        {name: (t.clone(), t.requires_grad, id(t)) for name, t in tensors.items()},
    )


def assert_untouched(model, before):
    modules, tensors = snapshot(model)
    assert modules == before[0] and tensors.keys() == before[1].keys()
    for name, (tensor, requires_grad, identity) in tensors.items():
        assert torch.equal(tensor, before[1][name][0]), name
        assert (requires_grad, identity) == before[1][name][1:], name


def assert_refused(model, path, message=None):
    """One AdapterError of one line, and the model as it was, adapted or bare."""
    before = snapshot(model)
    with pytest.raises(AdapterError, match=message) as error:
        load(model, path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 and str(path) in str(error.value)
    assert_untouched(model, before)


@pytest.fixture
def saved(tmp_path):
    """A model and its file."""
    model = adapt(tiny_decoder(bias=True))
    save_adapter(model, tmp_path / "adapter.safetensors")
    return model, tmp_path / "adapter.safetensors"


def forge(path, change):
    """Rewrite a file with a changed metadata object and header, and a digest that fits."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = json.loads(header["__metadata__"]["tinylora"])
    payload = bytearray(data[8 + length :])
    metadata["sha256"] = format_module.NO_DIGEST
    text = change(metadata, header, payload)
    if isinstance(text, bytes):
        data = len(text).to_bytes(8, "little") + text + bytes(payload)
    else:
        if isinstance(header["__metadata__"]["tinylora"], str):
            header["__metadata__"]["tinylora"] = json.dumps(metadata) if text is None else text
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + bytes(payload)
    digest = hashlib.sha256(data).hexdigest().encode()
    path.write_bytes(data.replace(format_module.NO_DIGEST.encode(), digest, 1))


# What comes back


@pytest.mark.parametrize("include_basis", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tying": "structured", "n_tie": 2, "scaling": "sqrt", "alpha": 0.5, "seed": 2**64 - 1},
        {"target_modules": ["q_proj", "up_proj"], "n_tie": 1, "trainable_dim": 13, "frozen_rank": 4},
        {"target_modules": None},
        {"target_modules": "o_proj", "tying": {"layers.0.o_proj": "x", "layers.1.o_proj": ("y", 1)}},
        {"v_dtype": torch.float64},
        {"v_dtype": torch.bfloat16},
    ],
    ids=lambda options: ",".join(options) or "default",
)
def test_round_trip_into_a_bare_and_an_adapted_model(tmp_path, options, include_basis):
    model = adapt(tiny_decoder(bias=True), **options)
    path = tmp_path / "a.safetensors"
    save_adapter(model, path, include_basis=include_basis)
    with torch.no_grad():  # trained in float32 or more, and stored in v_dtype
        for v in trainable_vectors(model):
            v.copy_(v.to(options.get("v_dtype", v.dtype)))
    bare = load(tiny_decoder(bias=True), path)
    adapted = randomise(adapt(tiny_decoder(bias=True), **options), seed=6)
    vectors = trainable_vectors(adapted)
    load(adapted, path)
    for other in (bare, adapted):
        assert torch.equal(other(TOKENS), model(TOKENS))
        for ours, theirs in zip(trainable_vectors(model), trainable_vectors(other), strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and theirs.requires_grad
        trained = [p for p in other.parameters() if p.requires_grad]
        assert len(trained) == len(trainable_vectors(other))
    # an optimizer keeps its parameters
    assert all(a is b for a, b in zip(vectors, trainable_vectors(adapted), strict=True))
    assert not torch.equal(model(TOKENS), tiny_decoder(bias=True)(TOKENS))


@pytest.mark.parametrize("include_basis", [False, True])
def test_lora_xs_round_trip(tmp_path, include_basis):
    config = LoRAXSConfig(rank=3, n_tie=2, target_modules=TARGETS, cache=False)
    model = randomise(apply_lora_xs(tiny_decoder(), config, progress=False))
    save_adapter(model, tmp_path / "a.safetensors", include_basis)
    bare = load(tiny_decoder(), tmp_path / "a.safetensors")
    adapted = load(apply_lora_xs(tiny_decoder(), config, progress=False), tmp_path / "a.safetensors")
    assert torch.equal(bare(TOKENS), model(TOKENS)) and torch.equal(adapted(TOKENS), model(TOKENS))
    assert_refused(adapt(tiny_decoder()), tmp_path / "a.safetensors", "holds a LoRAXSConfig, the model was adapted")


def test_conv1d_and_float64_round_trip(tmp_path):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    def make():
        torch.manual_seed(0)
        return nn.Sequential(conv1d(12, 8), nn.Linear(12, 5)).double()

    for include_basis in (False, True):
        model = adapt(make(), target_modules=["0", "1"])
        save_adapter(model, tmp_path / "a.safetensors", include_basis)
        x = torch.randn(3, 8, dtype=torch.float64)
        assert torch.equal(load(make(), tmp_path / "a.safetensors")(x), model(x))


def test_the_same_weights_in_another_dtype_are_the_same_base(tmp_path):
    model = adapt(tiny_decoder().to(torch.bfloat16))
    save_adapter(model, tmp_path / "a.safetensors")
    wide = load(tiny_decoder().to(torch.bfloat16).float(), tmp_path / "a.safetensors")
    for ours, theirs in zip(adapted_layers(model).values(), adapted_layers(wide).values(), strict=True):
        torch.testing.assert_close(delta_weight(ours), delta_weight(theirs), rtol=1e-5, atol=1e-7)


def test_a_merged_model_saves_the_same_bytes_and_refuses_to_load(saved, tmp_path):
    model, path = saved
    save_adapter(merge(model), tmp_path / "merged.safetensors")
    assert (tmp_path / "merged.safetensors").read_bytes() == path.read_bytes()
    assert_refused(model, path, "model: .* merged; call unmerge")


def test_thirteen_numbers_are_52_bytes_and_210_modules_under_64_kilobytes(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=24, intermediate_size=40, num_hidden_layers=30, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = adapt(transformers.LlamaForCausalLM(config), trainable_dim=1, n_tie=17)
    assert len(adapted_layers(model)) == 210
    save_adapter(model, tmp_path / "a.safetensors")
    assert os.path.getsize(tmp_path / "a.safetensors") < 64 * 1024
    # any safetensors reader opens it, and finds v alone
    stored = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert list(stored) == ["v"] and stored["v"].nbytes == 52
    assert torch.equal(stored["v"].flatten(), torch.cat([v.detach() for v in trainable_vectors(model)]))


def test_stored_bases_open_in_any_safetensors_reader(tmp_path):
    model = adapt(tiny_decoder(), v_dtype=torch.bfloat16)
    save_adapter(model, tmp_path / "a.safetensors", include_basis=True)
    stored = safetensors.torch.load_file(tmp_path / "a.safetensors")
    for i, layer in enumerate(adapted_layers(model).values()):
        assert torch.equal(stored[f"basis.{i}"], layer.basis) and torch.equal(stored[f"sigma.{i}"], layer.sigma)


def test_equal_adapters_give_equal_bytes(saved, tmp_path):
    model, path = saved
    save_adapter(load(tiny_decoder(bias=True), path), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


CHILD = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
from tinylora_kernels import TinyLoRAConfig, adapted_layers, apply_tiny_lora, trainable_vectors
from tinylora_kernels import load_adapter, save_adapter
from tinylora_kernels.rl import SFTTrainer
from tests.paper import delta_weight
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(300, 500), torch.nn.ReLU(), torch.nn.Linear(500, 260), torch.nn.ReLU(), torch.nn.Linear(260, 40)
)
if sys.argv[2] == "train":
    apply_tiny_lora(model, TinyLoRAConfig(trainable_dim=2, n_tie=2, target_modules=["0", "2", "4"]))
    trainer, x = SFTTrainer(model, lr=0.01), torch.randn(16, 300)
    for _ in range(5):
        trainer.training_step(log_probs=model(x).log_softmax(-1)[:, 3])
    save_adapter(model, sys.argv[3])
else:
    load_adapter(model, sys.argv[3])
torch.save({name: delta_weight(layer) for name, layer in adapted_layers(model).items()}, sys.argv[4])
"""


def run_child(tmp_path, threads, action, cache):
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TINYLORA_CACHE": str(tmp_path / cache)}
    output = tmp_path / f"{action}-{threads}.pt"
    subprocess.run(
        [sys.executable, "-c", CHILD, str(threads), action, str(tmp_path / "a.safetensors"), str(output)],
        env=environment, check=True, timeout=300, cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
    )  # fmt: skip
    return torch.load(output)


def test_trained_in_one_process_loaded_in_another_with_other_threads_and_a_cold_cache(tmp_path):
    trained = run_child(tmp_path, 1, "train", "cache-a")
    loaded = run_child(tmp_path, 2, "load", "cache-b")
    assert (tmp_path / "cache-b").exists()
    for name, delta in trained.items():
        assert float(delta.norm()) > 0
        assert float((loaded[name] - delta).norm() / delta.norm()) < 1e-5


# Bases that the weight does not determine


def rotated(factors, angle=0.7):
    """Another basis of the same two-dimensional singular subspace."""
    cosine, sine = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
    turn = torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])
    return dataclasses.replace(factors, basis=turn @ factors.basis, degenerate=True)


def degenerate_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    with torch.no_grad():
        model[0].weight.copy_(2.0 * torch.linalg.qr(torch.randn(8, 8)).Q)  # every singular value is 2
    return model


@pytest.mark.filterwarnings("ignore:.*leading singular values coincide")
def test_an_arbitrary_basis_travels_in_the_file(tmp_path):
    config = TinyLoRAConfig(trainable_dim=3, target_modules=["0", "1"], cache=False)
    model = degenerate_model()
    factors = {name: truncated_svd(model[int(name)].weight, 2, cache=False) for name in ("0", "1")}
    assert factors["0"].degenerate and not factors["1"].degenerate
    factors["0"] = rotated(factors["0"])
    apply_tiny_lora(model, config, factors=factors)
    randomise(model)
    save_adapter(model, tmp_path / "a.safetensors")
    assert sorted(safetensors.torch.load_file(tmp_path / "a.safetensors")) == ["basis.0", "sigma.0", "v"]

    x = torch.randn(5, 8)
    other = apply_tiny_lora(degenerate_model(), config, progress=False)
    assert (other[0].basis - model[0].basis).abs().max() > 0.1
    for loaded in (load(degenerate_model(), tmp_path / "a.safetensors"), load(other, tmp_path / "a.safetensors")):
        assert torch.equal(loaded[0].basis, model[0].basis)
        torch.testing.assert_close(delta_weight(loaded[0]), delta_weight(model[0]), rtol=0, atol=0)
        assert torch.equal(loaded(x), model(x))


def test_stored_bases_need_no_decomposition(tmp_path, monkeypatch):
    model = adapt(tiny_decoder())
    save_adapter(model, tmp_path / "with.safetensors", include_basis=True)

    def none_allowed(*arguments, **options):
        raise AssertionError("a decomposition was asked for")

    monkeypatch.setattr(fused_module, "factorize_many", none_allowed)
    assert torch.equal(load(tiny_decoder(), tmp_path / "with.safetensors")(TOKENS), model(TOKENS))


def test_a_basis_that_came_out_different_is_refused(saved, monkeypatch):
    _, path = saved

    def other_signs(items, rank, **options):
        for name, weight in items:
            factors = truncated_svd(weight(), rank, name=name, cache=False)
            if name == "layers.1.k_proj":
                factors = Factors(factors.basis * torch.tensor([[1.0], [-1.0]]), factors.sigma, False, 0.0)
            yield name, factors

    monkeypatch.setattr(fused_module, "factorize_many", other_signs)
    message = r"singular vectors came out different for 1 of 14 modules, layers.1.k_proj; save it again with"
    assert_refused(tiny_decoder(bias=True), path, message)
    monkeypatch.undo()
    adapted = adapt(tiny_decoder(bias=True))
    adapted.layers[1].k_proj.basis[1] *= -1
    assert_refused(adapted, path, message)


# Models it does not fit


def test_another_base_is_refused_by_name(saved):
    _, path = saved
    for adapted in (False, True):
        model = tiny_decoder(bias=True)
        with torch.no_grad():
            model.layers[1].up_proj.weight[3, 5] += 1e-3
        model = adapt(model) if adapted else model
        assert_refused(model, path, r"other base weights: 1 of 14 differ, layers.1.up_proj$")
    assert_refused(tiny_decoder(seed=1, bias=True), path, "14 of 14 differ, layers.0.q_proj, .* and 11 more$")


def test_other_modules_are_refused(saved):
    _, path = saved
    assert_refused(tiny_decoder(blocks=1, bias=True), path, "this model lacks layers.1.q_proj, .* and 4 more$")
    assert_refused(tiny_decoder(blocks=3, bias=True), path, "knows nothing of layers.2.q_proj")
    assert_refused(adapt(tiny_decoder(bias=True), target_modules=["q_proj"]), path, "this model lacks")
    assert_refused(nn.Sequential(nn.Linear(4, 4)), path, "does not fit this model: target_modules: no module matches")
    assert_refused(tiny_decoder(width=32, bias=True), path, r"layers.0.q_proj: expected a weight of \[24, 24\]")
    with pytest.raises(AdapterError, match="layers.0.q_proj: its weight is on the meta device"):
        load(tiny_decoder(bias=True).to("meta"), path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seed": 1}, "config: seed is 0 there and 1 in this model"),
        ({"alpha": 2.0}, "config: alpha is 1.0 there and 2.0"),
        ({"scaling": "sqrt"}, "config: scaling is left there and sqrt"),
        ({"frozen_rank": 3}, "config: frozen_rank is 2 there and 3"),
        ({"trainable_dim": 4}, "config: trainable_dim is 3 there and 4"),
        ({"v_dtype": torch.float64}, "config: v_dtype is torch.float32 there and torch.float64"),
        ({"n_tie": 5}, "layers.0.gate_proj is module 4 in tie group 1 there, and module 4 in group 0 of this model"),
    ],
)
def test_another_config_is_refused(saved, options, message):
    _, path = saved
    assert_refused(adapt(tiny_decoder(bias=True), **options), path, message)


def test_another_wording_of_the_same_config_is_not(saved):
    model, path = saved
    other = adapt(tiny_decoder(bias=True), target_modules=None, init="uniform")
    assert torch.equal(load(other, path)(TOKENS), model(TOKENS))


NAMES = {  # modules, those of no rank, and the config's choice: "fc" is the end of "block.fc", "0" that of "2.0"
    "excluded": (("block.fc", "fc", "out"), (), dict(target_modules=["fc", "out"], exclude_modules=["block.fc"])),
    "an expression": (("block.fc", "fc", "out"), (), dict(target_modules="fc|out")),
    "by layers": (("fc", "layers.0.fc", "layers.1.fc"), (), dict(target_modules=["fc"], layers_to_transform=1)),
    "the outer one alone": (("fc", "fc2.fc"), (), dict(target_modules=["fc"], exclude_modules=["fc2.fc"])),
    "by default, one without rank": (("0", "1", "2.0"), ("2.0",), dict(target_modules=None)),
    "by rule": (("block.fc", "fc"), (), dict(target_modules=["fc"])),
}


def named(*names, without_rank=()):
    """Linear layers under these names, called in their order."""

    class Model(nn.Module):
        def forward(self, x):
            for name in names:
                x = torch.tanh(self.get_submodule(name)(x))
            return x

    torch.manual_seed(0)
    model = Model()
    for name in names:
        *above, own = name.split(".")
        parent = model
        for part in above:
            parent._modules.setdefault(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(own, nn.Linear(12, 12))
        if name in without_rank:
            nn.init.zeros_(parent._modules[own].weight)
    return model


@pytest.mark.filterwarnings("ignore:target_modules")
@pytest.mark.parametrize("kind", NAMES)
def test_a_name_that_is_the_end_of_another_ones(kind, tmp_path):
    names, without_rank, choice = NAMES[kind]
    model, x = adapt(named(*names, without_rank=without_rank), **choice), torch.randn(5, 12)
    save_adapter(model, tmp_path / "a.safetensors")
    loaded = load(named(*names, without_rank=without_rank), tmp_path / "a.safetensors")
    assert list(adapted_layers(loaded)) == list(adapted_layers(model))
    assert torch.equal(loaded(x), model(x))


# Files that are damaged


def test_every_flipped_bit_is_seen(saved):
    _, path = saved
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    edges = {*range(16), *range(8 + length - 8, len(data))}
    for position in range(len(data)):
        for bit in range(8) if position in edges else (position % 8,):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(AdapterError) as error:
                inspect_adapter(path)
            assert "\n" not in str(error.value)
    assert_refused(tiny_decoder(bias=True), path)


def test_every_truncation_and_extension_is_seen(saved):
    _, path = saved
    data = path.read_bytes()
    for size in [*range(0, 64), *range(64, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(AdapterError):
            inspect_adapter(path)
    assert_refused(tiny_decoder(bias=True), path)
    path.write_bytes(data + b"\0")
    assert_refused(tiny_decoder(bias=True), path)


def test_files_that_are_something_else(tmp_path):
    model = tiny_decoder()
    safetensors.torch.save_file({"v": torch.zeros(3)}, tmp_path / "plain.safetensors")
    assert_refused(model, tmp_path / "plain.safetensors", "not an adapter: its metadata has no entry 'tinylora'")
    (tmp_path / "text").write_text("hello, this is not it")
    assert_refused(model, tmp_path / "text", "not a safetensors file, or truncated: a header of")
    (tmp_path / "empty").write_bytes(b"")
    assert_refused(model, tmp_path / "empty", "not a safetensors file")
    with pytest.raises(FileNotFoundError):
        load(model, tmp_path / "missing")


# Files that mean harm: the digest is right, the contents are not


def metadata_with(**changes):
    return lambda metadata, header, payload: metadata.update(changes)


def config_with(**changes):
    return lambda metadata, header, payload: metadata["config"].update(changes)


def column_with(key, value, position=0):
    def change(metadata, header, payload):
        metadata[key][position] = value

    return change


def header_text(text):
    return lambda metadata, header, payload: text


def nan_payload(metadata, header, payload):
    payload[:4] = b"\x00\x00\xc0\x7f"


def repeated_key(metadata, header, payload):
    return json.dumps(metadata).replace('"version": 1', '"version": 1, "version": 1')


def repeated_tensor(metadata, header, payload):
    header["__metadata__"]["tinylora"] = json.dumps(metadata)
    return json.dumps(header).replace('"v":', '"v": {}, "v":').encode()


def second_tensor(metadata, header, payload):
    header["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(payload), len(payload) + 4]}
    payload.extend(bytes(4))


def header_with(key, value):
    return lambda metadata, header, payload: header.update({key: value})


HOSTILE = [
    ("format version 2; this release reads version 1", metadata_with(version=2)),
    ("format version True", metadata_with(version=True)),
    ("format version 'a", metadata_with(version="a" * 10**6)),
    ("unknown field 'surprise'", metadata_with(surprise=1)),
    ("'sketches' is missing", lambda metadata, header, payload: metadata.pop("sketches") and None),
    ("a key appears twice", repeated_key),
    ("header: not valid JSON .a key appears twice", repeated_tensor),
    ("metadata: nested too deeply", header_text("[" * 200_000)),
    ("header: nested too deeply", header_text(b'{"a":' * 100_000)),
    ("metadata: expected an object, found \\[\\]", header_text("[]")),
    ("header: not valid JSON", header_text(b"\xff\xfe{}")),
    ("header: expected an object", header_text(b"[]")),
    ("metadata: not valid JSON .Exceeds the limit", header_text('{"version": ' + "9" * 5000 + "}")),
    ("metadata: not valid JSON .NaN is not JSON", header_text('{"version": NaN}')),
    ("safetensors metadata: unknown field", header_with("__metadata__", {"tinylora": "{}", "more": "x"})),
    ("expected a string, found a dict", header_with("__metadata__", {"tinylora": {}})),
    ("tensor v: it holds NaN or infinity", nan_payload),
    ("unknown tensor 'extra'", second_tensor),
    ("tensor 'v': expected one of F64", header_with("v", {"dtype": "I8", "shape": [48], "data_offsets": [0, 48]})),
    ("tensor 'v': bad shape", header_with("v", {"dtype": "F32", "shape": [10**20, 3], "data_offsets": [0, 48]})),
    ("tensor 'v': expected bytes 0 to", header_with("v", {"dtype": "F32", "shape": [4, 3], "data_offsets": [8, 56]})),
    ("tensor 'v': unknown field 'x'", header_with("v", {"dtype": "F32", "shape": [], "data_offsets": [0, 4], "x": 1})),
    ("tensor 'v': expected an object", header_with("v", 3)),
    ("tensor 'w': expected bytes", header_with("w", {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]})),
    ("sha256 must be 64", metadata_with(sha256="0" * 63)),
    ("method must be one of tiny_lora, lora_xs", metadata_with(method="pickle")),
    ("config must be an object", metadata_with(config=[1])),
    ("config: unknown field 'backend'", config_with(backend="cuda")),
    ("config: frozen_rank: expected an integer", config_with(frozen_rank=1.5)),
    ("config: trainable_dim: expected an integer", config_with(trainable_dim=-1)),
    ("tensor v: expected", config_with(trainable_dim=10**5)),
    ("config: trainable_dim, frozen_rank: expected at most", config_with(trainable_dim=10**18)),
    ("rank 1000 above the smaller side", config_with(frozen_rank=1000)),
    ("config: alpha: expected a finite number", config_with(alpha=[1])),
    ("config: alpha: expected a finite number, found an integer of absurd length", config_with(alpha=10**400)),
    ("config: seed: expected an integer", config_with(seed=2**64)),
    ("config: v_dtype must be one of", config_with(v_dtype="int8")),
    ("config: scaling must be a string", config_with(scaling=None)),
    ("config: tying", config_with(tying="nothing")),
    ("config: target_modules holds something that is not a module name", config_with(target_modules=[1])),
    ("config: target_modules holds something that is not a module name", config_with(target_modules="x\n\x1b[2J")),
    ("config: target_modules must be null", config_with(target_modules=7)),
    ("groups must be a list with one entry", metadata_with(groups={})),
    ("names must be a list with one entry", metadata_with(names=[])),
    ("shapes must be a list with one entry", metadata_with(shapes=[[1, 1]] * 10**5)),
    ("is not a module name", column_with("names", "q_proj\x1b[2J\n")),
    ("is not a module name", column_with("names", ["x"])),
    ("is not a module name", column_with("names", "a" * 10**5)),
    ("a module name appears twice", column_with("names", "layers.0.k_proj")),
    ("it is for another model: this model lacks ../../../etc/passwd", column_with("names", "../../../etc/passwd")),
    ("has no shape", column_with("shapes", [24, -24])),
    ("has no shape .*a list of 3", column_with("shapes", [24, [24], 3])),
    ("expected a weight of", column_with("shapes", [2**30, 2**30])),
    ("is not numbered by appearance", column_with("groups", 10**12)),
    ("group True is not numbered", column_with("groups", True, 4)),
    ("tie groups do not follow from its config|in tie group 0 there", column_with("groups", 0, 5)),
    ("no fingerprint of 32", column_with("weights", "A" * 32)),
    ("has no sketch of 8 numbers", column_with("sketches", "AAAA")),
    ("has no sketch of 8 numbers", column_with("sketches", "\u00e9" * 44)),
    ("holds NaN or infinity$", column_with("sketches", "AADAfwAAwH8AAMB/AADAfwAAwH8AAMB/AADAfwAAwH8=")),
]


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize("message, change", HOSTILE, ids=[f"{i}-{m[:30]}" for i, (m, _) in enumerate(HOSTILE)])
def test_hostile_contents_are_refused(saved, message, change, adapted):
    _, path = saved
    forge(path, change)
    model = tiny_decoder(bias=True)
    assert_refused(adapt(model) if adapted else model, path, message)


def test_targets_that_select_nothing_make_a_short_message(saved):
    _, path = saved
    forge(path, config_with(target_modules=["nothing"] * 10**4))
    assert_refused(tiny_decoder(bias=True), path, "it does not fit this model: target_modules: no module matches")


NASTY = [None, True, -1, 0, 10**30, 1.5, 1e999, "", "map", "\ud800", [], [None], [[[]]], {}, {"a": 1}]


def test_any_value_anywhere_is_refused_or_understood(saved):
    """Every field, and every field of the config, replaced by every nasty value: AdapterError or a valid adapter."""
    _, path = saved
    intact = path.read_bytes()
    model = adapt(tiny_decoder(bias=True))
    refused = 0
    for where in (metadata_with, config_with):
        keys = format_module.METADATA_KEYS if where is metadata_with else format_module.encode_config(TinyLoRAConfig())
        for key in keys:
            for value in NASTY:
                path.write_bytes(intact)
                forge(path, where(**{key: value}))
                before = snapshot(model)
                try:
                    load(model, path)
                except AdapterError as error:
                    refused += 1
                    assert "\n" not in str(error)
                    assert_untouched(model, before)
    assert refused > 200


# Writing


def failing(error):
    def call(*arguments, **options):
        raise error

    return call


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_file(saved, monkeypatch, function):
    model, path = saved
    before = path.read_bytes()
    randomise(model, seed=6)
    monkeypatch.setattr(format_module.os, function, failing(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, path)
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    save_adapter(model, path)
    assert path.read_bytes() != before


KILLED = """
import os, sys, torch
import tinylora_kernels.common.atomic as format_module
from tinylora_kernels import inspect_adapter, save_adapter
from tests.files.test_adapter import adapt
from tests.models import tiny_decoder
format_module.os.replace = lambda *arguments: os._exit(9)  # the machine goes down before the rename
save_adapter(adapt(tiny_decoder()), sys.argv[1])
"""


def test_a_process_killed_while_saving_leaves_the_old_file(saved):
    model, path = saved
    before = path.read_bytes()
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    process = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=root, timeout=300)
    assert process.returncode == 9
    assert path.read_bytes() == before


def test_a_symbolic_link_is_followed(saved):
    model, path = saved
    link = path.parent / "latest"
    link.symlink_to(path.name)
    randomise(model, seed=6)
    save_adapter(model, link)
    assert link.is_symlink() and torch.equal(inspect_adapter(path).v[0], model.layers[0].q_proj.v)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(AdapterError, match="^model: it has no adapter to save"):
        save_adapter(tiny_decoder(), tmp_path / "a")
    model = adapt(tiny_decoder())
    with pytest.raises(AdapterError, match="^q_proj: it was adapted as module 7 and is module 0 here; save the whole"):
        save_adapter(model.layers[1], tmp_path / "a")
    model.layers[1].q_proj.config = None
    with pytest.raises(AdapterError, match="^model: its layers do not share one"):
        save_adapter(model, tmp_path / "a")
    model = adapt(tiny_decoder())
    with torch.no_grad():
        model.layers[0].q_proj.v[0] = float("nan")
    with pytest.raises(AdapterError, match="^model: its trained vectors v: .* found nan; nothing"):
        save_adapter(model, tmp_path / "a")
    assert not os.listdir(tmp_path)


PARTS = {
    "the first block": lambda model: model.layers[0], "the last block": lambda model: model.layers[1],
    "a layer": lambda model: model.layers[0].q_proj, "the blocks without the last": lambda model: model.layers[:1],
    "a copy of a part": lambda model: copy.deepcopy(model.layers[0]),
    "what is left after a block was cut off": lambda model: (model.layers.pop(1), model)[1],
}  # fmt: skip
WHOLES = {
    "the model": lambda model: model, "its blocks": lambda model: model.layers, "a copy": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)), "in another module": nn.Sequential,
}  # fmt: skip


@pytest.mark.parametrize("n_tie", [1, 7, 14])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_adapted_model_is_refused(part, n_tie, tmp_path):
    part = PARTS[part](adapt(tiny_decoder(), n_tie=n_tie))
    writers = [lambda: save_adapter(part, tmp_path / "a")]
    if all(layer.owner in adapted_layers(part).values() for layer in adapted_layers(part).values()):
        bank = AdapterBank(part, 1)
        bank.add("a")
        writers.append(lambda: bank.save("a", tmp_path / "a"))
    for save in writers:
        with pytest.raises(AdapterError, match="it was adapted as .*; save the whole model that was given to apply"):
            save()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("whole", WHOLES)
def test_the_whole_of_it_is_saved_however_it_is_held(whole, tmp_path):
    save_adapter(WHOLES[whole](adapt(tiny_decoder())), tmp_path / "a")
    assert len(inspect_adapter(tmp_path / "a").modules) == 14


def test_parts_that_were_adapted_apart_are_wholes(tmp_path):
    model = tiny_decoder()
    for block in model.layers:
        adapt(block)
        save_adapter(block, tmp_path / "a")
    with pytest.raises(AdapterError, match="save the whole model"):
        save_adapter(model, tmp_path / "a")


# Looking


def test_inspect(saved, capsys, monkeypatch):
    model, path = saved
    adapter = inspect_adapter(path)
    assert adapter.size == os.path.getsize(path) and adapter.config.n_tie == 4
    assert [module.name for module in adapter.modules] == list(adapted_layers(model))
    for columns in (60, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main([str(path)]) == 0
        output = capsys.readouterr().out
        assert max(map(len, output.splitlines())) <= columns
        assert "12 numbers = 4 groups x 3, float32, 48 bytes" in output
        assert [line for line in output.splitlines() if line.startswith("layers.q_proj") and line.split()[1] == "2"]
    assert main([str(path), "--all"]) == 0
    assert "layers.1.down_proj" in capsys.readouterr().out


def test_inspect_of_a_bad_file_is_one_line_and_a_status(tmp_path, capsys):
    (tmp_path / "bad").write_bytes(bytes(100))
    assert main([str(tmp_path / "bad")]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "not valid JSON" in captured.err
    assert main([str(tmp_path / "missing")]) == 1
    assert "No such file" in capsys.readouterr().err


def orthogonal() -> nn.Module:
    """Whose U nothing determines: files carry it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 16, bias=False))
    for layer in (model[0], model[2]):
        nn.init.orthogonal_(layer.weight)
    return model


def on_another_basis(path) -> None:
    """A file as another machine's SVD makes it."""
    config = TinyLoRAConfig(trainable_dim=3, cache=False, target_modules=["0", "2"])
    basis = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q[:2].float().contiguous()
    factors = {name: Factors(basis, torch.ones(2), True, 0.0) for name in ("0", "2")}
    model = apply_tiny_lora(orthogonal(), config, progress=False, factors=factors)
    save_adapter(model, path)


@torch.no_grad()
def test_a_file_changes_no_basis_under_a_bank(tmp_path):
    config = TinyLoRAConfig(trainable_dim=3, cache=False, target_modules=["0", "2"])
    model, x = apply_tiny_lora(orthogonal(), config, progress=False), torch.randn(2, 16)
    path = tmp_path / "other.safetensors"
    on_another_basis(path)
    bank = AdapterBank(model, 2)
    bank.add("a", torch.randn(2, 3))
    with bank.use(["a", None]):
        before = model(x)
    words = "other.safetensors: 0 has its own basis; {} shares the model's: load it into another model"
    with pytest.raises(AdapterError, match=words.format("the model's AdapterBank")):
        load_adapter(model, path)
    with pytest.raises(AdapterError, match=words.format("a bank")):
        bank.load("b", path)
    with bank.use(["a", None]):
        assert torch.equal(model(x), before)
    bank.close()
    load_adapter(model, path)
    with pytest.raises(AdapterError, match="another adapter shares the model's"):
        load_beside_others(apply_tiny_lora(orthogonal(), config, progress=False), path, "another adapter")


@torch.no_grad()
def test_files_with_a_basis_and_without_load_one_after_the_other(tmp_path):
    """One of a model that was cast after adapting carries U; one of the cast weights does not."""
    paths = [tmp_path / name for name in ("cast.safetensors", "of_the_cast.safetensors")]
    models = adapt(tiny_decoder()).bfloat16(), adapt(tiny_decoder().bfloat16())
    for model, path in zip(models, paths, strict=True):
        save_adapter(model, path)
    tokens = torch.arange(10)[None]
    loaded = tiny_decoder().bfloat16()
    for model, path in 2 * [*zip(models, paths, strict=True)]:
        load_adapter(loaded, path, cache=False, progress=False)
        assert torch.equal(loaded(tokens), model(tokens)), path.name
    bank = AdapterBank(load_adapter(loaded, paths[0]), 1)
    with pytest.raises(AdapterError, match="has the weight's basis; the model's AdapterBank shares one that a file br"):
        load_adapter(loaded, paths[1])
    bank.close()


def test_an_average_of_models_is_named_where_it_moved_the_frozen_weights(tmp_path):
    model = adapt(tiny_decoder())
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.999))
    for _ in range(3):
        average.update_parameters(model)
    with pytest.warns(UserWarning, match=r"a.safetensors: the frozen weights of layers.0.q_proj, .* other roundings"):
        save_adapter(average, tmp_path / "a.safetensors")
    for own, averaged in zip(trainable_vectors(model), trainable_vectors(average), strict=True):
        own.data.copy_(averaged.data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path / "b.safetensors")
        save_adapter(copy.deepcopy(model).bfloat16(), tmp_path / "c.safetensors")
    load(tiny_decoder(), tmp_path / "b.safetensors")
