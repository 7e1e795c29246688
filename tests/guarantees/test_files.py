"""Files are whole at every moment, keep their owners, can be read again, and cost no more than they are long."""
from __future__ import annotations

import base64
import errno
import hashlib
import json
import math
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load as load_tensors
from torch import nn

from tests.guarantees.dense import BASES
from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import (
    AdapterBank,
    AdapterError,
    TinyLoRAConfig,
    adapted_layers,
    apply_tiny_lora,
    export_lora,
    inspect_adapter,
    load_adapter,
    remove_adapter,
    save_adapter,
)
from tinylora_kernels.common import atomic
from tinylora_kernels.factors.svd import Factors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_hanging(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path_factory.mktemp("cache")))

    def hangs(*_):
        raise TimeoutError("it hangs")

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(300)
    yield
    signal.alarm(0)


def adapt(model: nn.Module, seed: int = 0, factors=None, **options) -> nn.Module:
    options = {"target_modules": TARGETS, "trainable_dim": 2, "n_tie": 100, "cache": False} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal singular values
        model = apply_tiny_lora(model, TinyLoRAConfig(**options), progress=False, factors=factors)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.v.copy_(torch.randn(layer.v.shape, generator=generator))
    return model


def forge(path, change) -> None:
    """Change a file's (metadata, header, payload) and give it a right digest."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, payload = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    metadata = json.loads(header["__metadata__"]["tinylora"])
    change(metadata, header, payload)
    metadata["sha256"] = "0" * 64
    header["__metadata__"]["tinylora"] = json.dumps(metadata)
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(payload)
    path.write_bytes(data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1))


# What a file carries belongs to the weight


def numbers(header, payload, name) -> torch.Tensor:
    """A tensor of the payload, to be written to."""
    entry = header[name]
    start, end = entry["data_offsets"]
    dtype = {"F32": torch.float32, "F64": torch.float64}[entry["dtype"]]
    return torch.frombuffer(memoryview(payload)[start:end], dtype=dtype).view(entry["shape"])


SIGMAS = {
    "swapped": lambda b, s: s.copy_(s.flip(-1)),
    "one off by a thousandth": lambda b, s: s[..., 0].mul_(1.001),
    "doubled": lambda b, s: s.mul_(2),
    "equal": lambda b, s: s.copy_(s[..., :1].expand_as(s)),
    "tiny": lambda b, s: s.mul_(1e-30),
    "of another basis": lambda b, s: b.copy_(torch.linalg.qr(torch.randn_like(b).T).Q.T),
    "of vectors that lean": lambda b, s: b[1].add_(0.1 * b[0]),
}
LAYERS = {"fused": lambda: nn.Linear(24, 16), "float64": lambda: nn.Linear(24, 16, dtype=torch.float64), **BASES}


@pytest.mark.parametrize("change", SIGMAS)
@pytest.mark.parametrize("kind", LAYERS)
def test_stored_singular_values_are_those_of_the_weight(kind, change, tmp_path):
    torch.manual_seed(0)
    model = adapt(nn.ModuleDict({"layer": LAYERS[kind]()}), target_modules=["layer"],
                  fused={"layer": (10, 6)} if kind == "fused" else None)  # fmt: skip
    path = tmp_path / "file"
    save_adapter(model, path, include_basis=True)
    expected = model["layer"].projection.clone()
    load_adapter(model, path, progress=False)
    bare = remove_adapter(model)
    load_adapter(bare, path, cache=False, progress=False)
    assert torch.allclose(bare["layer"].projection, expected)
    model = bare

    def changed(metadata, header, payload):
        basis = numbers(header, payload, "basis.0")
        SIGMAS[change](basis, numbers(header, payload, "sigma.0"))
        if "of" in change.split():  # the sketch follows: only the weight can tell
            from tinylora_kernels.factors.svd import basis_sketch

            raw = basis_sketch(basis).contiguous().view(torch.uint8).numpy().tobytes()
            metadata["sketches"] = [base64.b64encode(raw).decode()]

    forge(path, changed)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    for _ in ("adapted", "bare"):
        with pytest.raises(AdapterError, match="layer: its stored singular values are not those of its stored basis"):
            load_adapter(model, path, cache=False, progress=False)
        assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
        if adapted_layers(model):
            remove_adapter(model)
            before = [tensor.clone() for tensor in model.state_dict().values()]


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
def test_an_approximate_basis_travels(spread, tmp_path):
    """U of a few steps of a randomised method, and sigma_i = ||W^T u_i||: an adapter as good as any."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(60, 50)})
    with torch.no_grad():
        u, s, v = torch.linalg.svd(model["layer"].weight, full_matrices=False)
        s[1:] *= spread
        model["layer"].weight.copy_((u * s) @ v)
        left, sigma, _ = torch.svd_lowrank(model["layer"].weight, q=2, niter=1)
    adapt(model, target_modules=["layer"], factors={"layer": Factors(left.T.contiguous(), sigma, False, 0.22)})
    save_adapter(model, tmp_path / "file", include_basis=True)
    x = torch.randn(3, 60)
    expected = model["layer"](x)
    assert torch.equal(load_adapter(remove_adapter(model), tmp_path / "file", progress=False)["layer"](x), expected)


# What is written can be read


@pytest.mark.parametrize("name", ["a" * 513, "ä" * 700, "w" * 4096, "with space", "日本語", "quote\"'\\", "{0}%s"])
def test_names_that_are_saved_and_loaded(name, tmp_path):
    model = adapt(nn.ModuleDict({name: nn.Linear(8, 8)}), target_modules=None)
    with torch.no_grad():
        expected = model[name](torch.ones(1, 8))
        save_adapter(model, tmp_path / "file")
        for _ in range(2):  # U from the weight, and from the cache
            loaded = load_adapter(remove_adapter(model), tmp_path / "file", progress=False)
            assert torch.equal(loaded[name](torch.ones(1, 8)), expected)


UNREADABLE = ["line\nbreak", "re\rturn", "tab\t", "bell\a", "\x1b[2J", "w" * 4097, "lone\ud800", "\u2028"]


@pytest.mark.parametrize("name", UNREADABLE, ids=range(len(UNREADABLE)))
@pytest.mark.parametrize("through", ["save_adapter", "bank"])
def test_names_that_could_not_be_loaded_are_not_written(name, through, tmp_path):
    model = adapt(nn.ModuleDict({name: nn.Linear(8, 8)}), target_modules=None)
    (tmp_path / "file").write_bytes(b"earlier")
    with pytest.raises(AdapterError, match="is not a module name; .*nothing was written$") as error:
        if through == "bank":
            bank = AdapterBank(model, 1)
            bank.add("x")
            bank.save("x", tmp_path / "file")
        else:
            save_adapter(model, tmp_path / "file")
    assert "\n" not in str(error.value) and (tmp_path / "file").read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["file"]


# Work


@pytest.fixture
def small(tmp_path):
    model = adapt(nn.ModuleDict({"l0": nn.Linear(8, 8)}), target_modules=["l0"])
    save_adapter(model, tmp_path / "file")
    return remove_adapter(model), tmp_path / "file"


def modules(count, name="a{}".format):
    def change(metadata, header, payload):
        metadata["names"] = [name(i) for i in range(count)]
        metadata["sketches"] *= count
        metadata["shapes"], metadata["groups"], metadata["weights"] = [[8, 8]] * count, [0] * count, ["0" * 32] * count

    return change


def with_config(count=1, name="a{}".format, **fields):
    def change(metadata, header, payload):
        modules(count, name)(metadata, header, payload)
        metadata["config"].update(fields)

    return change


LARGE = {
    "modules": modules(8000),
    "modules and parts that name none": with_config(4000, fused={f"b{i}": 2 for i in range(40000)}),
    "modules and parts that name the last": with_config(
        4000, name=lambda i: f"{i}.a.b", fused={**{f"c{i}": 2 for i in range(40000)}, "b": 2, "a.b": 2}
    ),
    "targets": with_config(target_modules=[f"x{i}" for i in range(100_000)]),
    "targets that match": with_config(name=lambda i: "l0", target_modules=[f"x{i}" for i in range(100_000)] + ["l0"]),
    "names of many components": with_config(400, lambda i: f"{i}" + ".a" * 2000, fused={f"b{i}": 2 for i in range(9)}),
    "parts": with_config(1000, fused={"nothing": [1] * 200_000}),
    "tensors": lambda metadata, header, payload: header.update(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [len(payload)] * 2} for i in range(15000)}
    ),
    "keys": lambda metadata, header, payload: metadata.update({f"k{i}": i for i in range(60000)}),
    "brackets": lambda metadata, header, payload: metadata.update(version=[[[[]]]] * 80000),
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_megabyte_with_a_right_digest_is_read_in_seconds(kind, small):
    model, path = small
    forge(path, LARGE[kind])
    assert 3e5 < path.stat().st_size < 3e6
    start = time.thread_time()
    for call in (inspect_adapter, lambda path: load_adapter(model, path, cache=False, progress=False)):
        try:
            call(path)
        except AdapterError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
    assert time.thread_time() - start < 8  # some were 300
    assert type(model["l0"]) is nn.Linear


@pytest.mark.parametrize("damage", ["flipped", "no digest", "two digests"])
def test_nothing_is_parsed_before_the_digest(damage, small, monkeypatch):
    from tinylora_kernels.files import format as files_format

    _, path = small
    forge(path, LARGE["modules"])
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    elif damage == "no digest":
        data = data.replace(b"sha256", b"sha257")
    else:
        metadata = b'\\"sha256\\": \\"' + b"1" * 64 + b'\\", '
        data = bytes(data).replace(b'\\"names\\"', metadata + b'\\"names\\"')
        data = (int.from_bytes(data[:8], "little") + len(metadata)).to_bytes(8, "little") + data[8:]
    path.write_bytes(data)
    monkeypatch.setattr(files_format, "_json_object", lambda *_: pytest.fail("parsed"))
    monkeypatch.setattr(files_format, "MAX_FOREIGN_HEADER", 1000)
    with pytest.raises(AdapterError, match="the SHA-256 digest does not match|not an adapter: a header of"):
        inspect_adapter(path)


def numbered(u, r):
    """A file that asks for u matrices of r x r, by no more than the numbers and the sketch it has to hold."""

    def change(metadata, header, payload):
        metadata["config"].update(trainable_dim=u, frozen_rank=r)
        metadata["sketches"] = [base64.b64encode(bytes(16 * r)).decode()]
        metadata["shapes"] = [[64, 64]]
        payload[:] = bytes(4 * u)
        header["v"] = {"dtype": "F32", "shape": [1, u], "data_offsets": [0, 4 * u]}

    return change


ASKED = [(2000, 64, None), (10**6, 3, None), (1, 2049, None), (1, 2, 4096), (2, 1, 2000)]


@pytest.mark.parametrize(("u", "r", "parts"), ASKED)
def test_a_few_kilobytes_ask_for_no_gigabyte(u, r, parts, small):
    _, path = small

    def change(metadata, header, payload):
        numbered(u, r)(metadata, header, payload)
        if parts:
            metadata["config"]["fused"] = {"l0": parts}

    forge(path, change)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError, match="config: trainable_dim, frozen_rank: expected at most 4194304 numbers"):
            inspect_adapter(path)
        assert tracemalloc.get_traced_memory()[1] < 100 * path.stat().st_size + 2**22
    finally:
        tracemalloc.stop()
    if parts is None:
        with pytest.raises(ValueError, match="^trainable_dim, frozen_rank: expected at most 4194304 numbers"):
            TinyLoRAConfig(trainable_dim=u, frozen_rank=r)


def test_the_largest_projection_takes_little_beside_itself():
    from tinylora_kernels.method.philox import philox_projection

    tracemalloc.start()
    projection = philox_projection(3, 5, 256, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < projection.nbytes + 2**25
    assert torch.equal(projection[200:], philox_projection(3, 5, 300, 64)[200:256])


# What has a name


NO_FILES = {
    "FIFO": os.mkfifo,
    "link to a FIFO": lambda path: (os.mkfifo(f"{path}.pipe"), path.symlink_to(f"{path}.pipe")),
    "socket": lambda path: bind(path),
    "directory": os.mkdir,
}


def bind(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_neither_read_nor_replaced(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "thing"
    NO_FILES[kind](path)
    before = path.lstat(), path.stat().st_mode
    model = adapt(nn.ModuleDict({"l0": nn.Linear(8, 8)}), target_modules=["l0"])
    for call in (inspect_adapter, lambda path: load_adapter(model, path), lambda path: save_adapter(model, path)):
        with pytest.raises(OSError) as error:
            call(path)
        assert "\n" not in str(error.value)
    assert (path.lstat().st_ino, path.stat().st_mode) == (before[0].st_ino, before[1])
    if kind != "directory":
        with pytest.raises((OSError, ValueError)):
            export_lora(model, path)
        assert not stat.S_ISDIR(path.stat().st_mode)


@pytest.mark.parametrize("ending", ["/", "/.", "/..", "//"])
@pytest.mark.parametrize("there", [False, True])
def test_the_name_of_a_directory_is_no_files(ending, there, small):
    model, path = small
    adapt(model, target_modules=["l0"])
    if not there:
        path.unlink()
    with pytest.raises(OSError, match="Is a directory"):
        save_adapter(model, f"{path}{ending}")
    assert path.exists() == there


@pytest.mark.parametrize("form", [os.fsencode, os.fspath, Path], ids=["bytes", "str", "Path"])
def test_paths_of_every_form(form, tmp_path):
    model = adapt(nn.ModuleDict({"l0": nn.Linear(8, 8)}), target_modules=["l0"])
    file, folder = form(tmp_path / "file"), form(tmp_path / "lora")
    for _ in range(2):  # in a place that is free, and over what is there
        save_adapter(model, file)
        export_lora(model, folder)
    load_adapter(model, file)
    assert len(inspect_adapter(file).modules) == 1 and sorted(os.listdir(tmp_path)) == ["file", "lora"]
    pytest.importorskip("peft", minversion="0.21", reason="it writes PEFT's format")
    from tinylora_kernels.integrations.peft import from_peft, to_peft

    to_peft(model, form(tmp_path / "peft"))
    from_peft(form(tmp_path / "peft"), remove_adapter(model))


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o666, 0o444, 0o4711])
@pytest.mark.parametrize("link", [False, True])
def test_a_replaced_file_keeps_its_mode_owner_and_link(mode, link, tmp_path):
    path = tmp_path / "real"
    path.write_bytes(b"earlier")
    owner = (1234, 4321) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(path, *owner)
    path.chmod(mode)
    given = tmp_path / "given"
    given.symlink_to(path) if link else os.rename(path, given)
    model = adapt(nn.ModuleDict({"l0": nn.Linear(8, 8)}), target_modules=["l0"])
    bank = AdapterBank(model, 1)
    bank.add("x")
    for save in (lambda: save_adapter(model, given), lambda: bank.save("x", given)):
        save()
        status = given.stat()
        assert stat.S_IMODE(status.st_mode) == mode and (status.st_uid, status.st_gid) == owner
        assert given.is_symlink() == link
    assert inspect_adapter(given).v.numel() == 2


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o007])
def test_a_new_file_is_as_the_umask_says(umask, tmp_path):
    before = os.umask(umask)
    try:
        model = adapt(nn.ModuleDict({"l0": nn.Linear(8, 8)}), target_modules=["l0"])
        save_adapter(model, tmp_path / "file")
        export_lora(model, tmp_path / "lora")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "lora").stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "lora").iterdir()} == {0o666 & ~umask}


def test_missing_directories_are_made_for_a_directory_and_named_for_a_file(tmp_path):
    model = adapt(nn.ModuleDict({"l0": nn.Linear(8, 8)}), target_modules=["l0"])
    export_lora(model, tmp_path / "runs" / "7" / "lora")
    assert (tmp_path / "runs" / "7" / "lora" / "adapter_config.json").is_file()
    with pytest.raises(FileNotFoundError, match=r"runs/8: there is no such directory to write to; make it first"):
        save_adapter(model, tmp_path / "runs" / "8" / "adapter.safetensors")
    assert not (tmp_path / "runs" / "8").exists()


def test_an_owner_that_cannot_be_kept_costs_nothing_but_that(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    path.chmod(0o640)
    asked = []

    def forbidden(descriptor, owner, group):
        asked.append((owner, group))
        raise PermissionError(1, "Operation not permitted")

    real = os.stat(path)
    monkeypatch.setattr(atomic.os, "stat", lambda p, **_: os.stat_result((*real[:4], 77, 88, *real[6:])))
    monkeypatch.setattr(atomic.os, "fchown", forbidden)
    save_adapter(adapt(nn.ModuleDict({"l0": nn.Linear(8, 8)}), target_modules=["l0"]), path)
    monkeypatch.undo()
    assert asked == [(77, 88), (-1, 88)] and stat.S_IMODE(path.stat().st_mode) == 0o640
    inspect_adapter(path)


# Exports


def whole(directory) -> int:
    """The rank of a LoRA directory whose two files are of one export, read by a reader that stays in its directory."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        texts = []
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=handle), "rb") as file:
                texts.append(file.read())
    finally:
        os.close(handle)
    rank = json.loads(texts[0])["r"]
    tensors = load_tensors(texts[1])
    assert tensors and {len(t) for name, t in tensors.items() if "lora_A" in name} == {rank}
    return rank


@pytest.fixture
def decoder():
    return adapt(tiny_decoder())


@pytest.mark.parametrize("exchange", [True, False])
def test_an_export_over_an_earlier_one_is_there_at_every_moment(decoder, exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchanged", lambda a, b: False)
    target = tmp_path / "lora"
    export_lora(decoder, target, rank=8)
    target.chmod(0o750)
    seen, faults, done = set(), [], threading.Event()

    def reader():
        while not done.is_set():
            try:
                files = sorted(os.listdir(target))
                if exchange and len(files) == 2:  # none: an earlier export that is being removed
                    seen.add(whole(target))
                assert not faults and (exchange or files == ["adapter_config.json", "adapter_model.safetensors"])
            except FileNotFoundError:
                if not target.exists():
                    faults.append("gone")
            except Exception as error:  # what another thread raises, nobody sees
                faults.append(repr(error))

    thread = threading.Thread(target=reader)
    thread.start()
    try:
        for turn in range(40):
            export_lora(decoder, target, rank=8 + turn % 2)
    finally:
        done.set()
        thread.join()
    assert not faults and (not exchange or seen == {8, 9})
    assert os.listdir(tmp_path) == ["lora"] and stat.S_IMODE(target.stat().st_mode) == 0o750


IN_FORKS = """
import os, random, signal, sys, time
sys.path.insert(0, {root!r})
from tests.guarantees.test_files import adapt
from tests.models import tiny_decoder
from tinylora_kernels import export_lora, save_adapter
model = adapt(tiny_decoder())
for kill in range({kills}):
    child = os.fork()
    if child == 0:
        for turn in range(10**6):
            if {exports}:
                export_lora(model, sys.argv[1], rank=8 + turn % 2)
            else:
                save_adapter(model, sys.argv[1], include_basis=turn % 2 == 0)
    time.sleep(random.uniform(0.001, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(sorted(os.listdir(os.path.dirname(sys.argv[1]))), flush=True)
"""


TO_PEFT_IN_FORKS = """
import os, random, signal, sys, time
sys.path.insert(0, {root!r})
from tests.guarantees.test_files import adapt, peft_rank
from tests.models import tiny_decoder
from tinylora_kernels.integrations.peft import to_peft
models = [adapt(tiny_decoder(), frozen_rank=rank) for rank in (1, 2)]
to_peft(models[0], sys.argv[1])
for kill in range({kills}):
    child = os.fork()
    if child == 0:
        for turn in range(10**6):
            to_peft(models[turn % 2], sys.argv[1])
    time.sleep(random.uniform(0.001, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(peft_rank(sys.argv[1]), flush=True)
"""


def peft_rank(directory) -> int:
    """The rank of a TinyLoRA directory, which its two files agree on."""
    with safe_open(Path(directory) / "adapter_model.safetensors", "pt") as file:
        ranks = {len(file.get_tensor(name)) for name in file.keys() if name.endswith("tinylora_A")}
    (rank,) = ranks
    assert json.loads((Path(directory) / "adapter_config.json").read_text())["r"] == rank
    return rank


def test_a_directory_of_to_peft_is_the_old_or_the_new_one_at_any_kill(tmp_path):
    pytest.importorskip("peft", minversion="0.21", reason="it writes PEFT's format")
    script, target = TO_PEFT_IN_FORKS.format(root=str(ROOT), kills=30), tmp_path / "made" / "peft"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(target)], env=environment, capture_output=True, text=True,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 30 and set(done.stdout.split()) <= {"1", "2"}
    assert sorted(os.listdir(target)) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("spoil", ["v", "projection", "basis", "inf"])
def test_to_peft_writes_no_number_that_is_none(spoil, tmp_path):
    pytest.importorskip("peft", minversion="0.21", reason="it writes PEFT's format")
    from tinylora_kernels.integrations.peft import to_peft

    model = adapt(tiny_decoder())
    to_peft(model, tmp_path / "peft")
    before = {path.name: path.read_bytes() for path in (tmp_path / "peft").iterdir()}
    layer = next(iter(adapted_layers(model).values()))
    with torch.no_grad():
        getattr(layer, "v" if spoil == "inf" else spoil).flatten()[0] = math.inf if spoil == "inf" else math.nan
    with pytest.raises(ValueError, match=f"^{layer.name}: its .*: expected finite numbers in float32, found (nan|inf)"):
        to_peft(model, tmp_path / "peft")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "peft").iterdir()}


def test_to_peft_keeps_what_else_is_in_a_directory(tmp_path):
    pytest.importorskip("peft", minversion="0.21", reason="it writes PEFT's format")
    from tinylora_kernels.integrations.peft import to_peft

    (tmp_path / "of others").mkdir()
    (tmp_path / "README.md").write_text("kept")
    for rank in (1, 2):
        to_peft(adapt(tiny_decoder(), frozen_rank=rank), tmp_path)
        assert peft_rank(tmp_path) == rank and (tmp_path / "README.md").read_text() == "kept"
    assert len(os.listdir(tmp_path)) == 4


def fails(code):
    def raises(*_, **__):
        raise OSError(code, os.strerror(code))

    return raises


def mounted(target, monkeypatch):
    monkeypatch.setattr(atomic.os, "rename", fails(errno.EBUSY))
    monkeypatch.setattr(atomic, "_exchanged", fails(errno.EBUSY))


def within_another_ones(code):
    def prepare(target, monkeypatch):
        real = os.mkdir

        def mkdir(path, *arguments, **options):
            (fails(code) if Path(path).parent == target.parent else real)(path, *arguments, **options)

        monkeypatch.setattr(atomic.os, "mkdir", mkdir)

    return prepare


STAYING = {
    "the working directory": lambda target, monkeypatch: monkeypatch.chdir(target),
    "a mount point": mounted,
    "in another's": within_another_ones(errno.EACCES),
    "in the system's": within_another_ones(errno.EPERM),
    "in a read-only one": within_another_ones(errno.EROFS),
}


@pytest.mark.parametrize("place", STAYING)
@pytest.mark.parametrize("writer", ["export_lora", "to_peft"])
def test_a_directory_that_has_to_stay_gets_its_files_one_by_one(writer, place, tmp_path, monkeypatch):
    target = tmp_path / "made" / "there"
    target.mkdir(parents=True)
    models = [adapt(tiny_decoder(), frozen_rank=rank) for rank in (1, 2)]
    if writer == "export_lora":
        write, rank_of = (lambda turn: export_lora(models[0], target, rank=1 + turn)), whole
    else:
        pytest.importorskip("peft", minversion="0.21", reason="it writes PEFT's format")
        from tinylora_kernels.integrations.peft import to_peft

        write, rank_of = (lambda turn: to_peft(models[turn], target)), peft_rank
        write(0)  # with what it needs to import
        for file in target.iterdir():
            file.unlink()
    STAYING[place](target, monkeypatch)
    node = target.stat().st_ino
    for turn in range(2):
        write(turn)
        assert rank_of(target) == 1 + turn and target.stat().st_ino == node
        assert os.path.realpath(os.getcwd()) == os.path.realpath(target) or place != "the working directory"
    written, real = [], atomic._write

    def full(descriptor, data):
        written.append(data)
        real(descriptor, data) if len(written) < 2 else fails(errno.ENOSPC)()

    monkeypatch.setattr(atomic, "_write", full)
    with pytest.raises(OSError, match="No space left"):  # with one of two written
        write(0)
    assert rank_of(target) == 2
    assert sorted(os.listdir(target)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert os.listdir(tmp_path / "made") == ["there"]


@pytest.mark.parametrize("exports", [False, True])
def test_writers_that_are_killed_lose_nothing_and_leave_nothing(decoder, exports, tmp_path):
    target = tmp_path / "thing"
    write = (lambda: export_lora(decoder, target)) if exports else (lambda: save_adapter(decoder, target))
    write()
    script = IN_FORKS.format(root=str(ROOT), kills=60, exports=exports)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(target)], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    moments = [eval(line) for line in done.stdout.splitlines()]
    assert len(moments) == 60 and all("thing" in moment for moment in moments)
    assert max(map(len, moments)) <= 3  # the one that was killed, and one more that had been swept but not yet removed
    whole(target) if exports else inspect_adapter(target)
    write()
    assert os.listdir(tmp_path) == ["thing"]


def test_what_is_in_work_is_left_alone(decoder, tmp_path):
    names = ".tinylora-mine", "tinylora-0123456789abcdef", ".tinylora-0123456789ABCDEF"
    others = [tmp_path / name for name in names]
    for path in others:
        path.write_text("mine")
    dead = tmp_path / ".tinylora-00000000000000ff"
    dead.mkdir()
    (dead / "adapter_config.json").write_text("{")
    with atomic._beside(str(tmp_path)) as (file, _), atomic._beside(str(tmp_path), is_directory=True) as (folder, _):
        save_adapter(decoder, tmp_path / "file")
        export_lora(decoder, tmp_path / "lora")
        assert os.path.exists(file) and os.path.isdir(folder) and not dead.exists()
    assert {*tmp_path.iterdir()} == {*others, tmp_path / "file", tmp_path / "lora"}


def test_without_locks_a_leftover_is_one_after_a_day(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_lock", lambda descriptor: None)
    young, old = tmp_path / ".tinylora-00000000000000aa", tmp_path / ".tinylora-00000000000000bb"
    for path in (young, old):
        path.write_text("half")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    save_adapter(decoder, tmp_path / "file")
    assert {*tmp_path.iterdir()} == {young, tmp_path / "file"}


def test_two_writers_of_one_name_both_succeed(decoder, tmp_path):
    """A writer whose file was taken for a leftover, between its making and its locking, makes another."""
    faults = []

    def writer(turns):
        try:
            for turn in range(turns):
                save_adapter(decoder, tmp_path / "file", include_basis=turn % 2 == 0)
                export_lora(decoder, tmp_path / "lora", rank=8 + turn % 2)
        except Exception as error:  # what another thread raises, nobody sees
            faults.append(repr(error))

    threads = [threading.Thread(target=writer, args=(25,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    inspect_adapter(tmp_path / "file")
    whole(tmp_path / "lora")
    assert sorted(os.listdir(tmp_path)) == ["file", "lora"]
