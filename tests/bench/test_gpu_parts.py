"""The parts of make gpu, without a card: which tests each one takes, and that no node comes into one that runs."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import __main__ as kit

ROOT = Path(__file__).resolve().parents[2]
COLLECT = """
import json, sys
import pytest, torch
from tinylora_kernels import ops
from tinylora_kernels.linear import node
device, in_cpp, selections = json.loads(sys.argv[1])
if device == "cuda":  # as where every backend runs
    torch.cuda.is_available = lambda: True
    for name in ("cuda", "triton", "reference"):
        ops.BACKENDS[name] = ops.BACKENDS[name]._replace(why_not=lambda kind, *_: None)
    ops.BACKENDS["cpu"] = ops.BACKENDS["cpu"]._replace(why_not=lambda kind, *_: "x" if kind == "cuda" else None)
if in_cpp:  # nothing is run
    node.extension, node.twin = node.extension or object(), node.twin or object()

class Ids:
    def pytest_collection_finish(self, session):
        found.append([item.nodeid for item in session.items])

found = []
for arguments in selections:
    code = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *arguments], plugins=[Ids()])
    assert code == 0, (arguments, code)
print("\\n@" + json.dumps(found))
"""


def selection_of(part: kit.Part) -> list[str]:
    """Of a part of tests: the files and the choice among them."""
    arguments = [argument for argument in part.arguments if argument not in ("-m", "pytest", "-n", "8", *kit.TESTS)]
    return arguments if any(argument.startswith("tests/") for argument in arguments) else []


def collected(device: str, in_cpp: bool, selections: list[list[str]]) -> list[list[str]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({} if in_cpp else kit.NO_NODE)
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, json.dumps([device, in_cpp, selections])], cwd=ROOT, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.rpartition("\n@")[2])


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_test_has_its_part_and_the_node_its_own(device):
    """What needs the node in C++ comes first and with nothing else; Triton's come alone; and none is left out."""
    parts = {part.name: part for part in kit.parts(device, None) if selection_of(part)}
    in_cpp = parts.pop("layers, node in C++")
    assert in_cpp.environment == {} and all(part.environment["TINYLORA_NODE"] == "0" for part in parts.values())
    assert [part.name for part in kit.parts(device, None)][:2] == ["kernels", in_cpp.name]
    everything, of_cpp = collected(device, True, [["tests/gpu"], selection_of(in_cpp)])
    wanted = {name for name in everything if "test_direct" in name or f"cpp-{device}-{device}" in name}
    assert set(of_cpp) == wanted and len(wanted) > 100
    if device == "cpu":  # where Triton has no tests
        del parts["triton"]
    selections = [["tests/gpu", "tests/ops/test_backends.py"], *map(selection_of, parts.values())]
    everything, *others = collected(device, False, selections)
    for part, found in zip(parts.values(), others, strict=True):
        assert found and {"triton" in name for name in found} == {part.name == "triton"}, part.name
    assert set().union(*others) == {name for name in everything if "test_direct" not in name}


class Compiling:
    """A compiler that is done when it is waited for, or never; the process has ended only where it says so."""

    pid = 0

    def __init__(self, code: int | None, at_once: bool):
        self.code, self.ended = code, at_once

    def poll(self):
        return self.code if self.ended else None

    def wait(self, seconds):
        if self.code is None:
            raise subprocess.TimeoutExpired("compile", seconds)
        self.ended = True


@pytest.mark.parametrize("code", [0, 1, None], ids=["compiled", "failed", "too slow"])
@pytest.mark.parametrize("at_once", [False, True])
def test_no_process_looks_for_a_node_that_may_come_while_it_starts(code, at_once, monkeypatch, tmp_path):
    if code is None and at_once:
        return
    compiling, ran, killed = Compiling(code, at_once), [], []
    monkeypatch.setattr(kit.subprocess, "Popen", lambda *_, **__: compiling)
    monkeypatch.setattr(kit.os, "killpg", lambda *_: killed.append(compiling))
    monkeypatch.setattr(kit, "has_xdist", lambda: True)

    def run(part, seconds, results):
        running = compiling.poll() is None and not killed
        assert part.environment.get("TINYLORA_NODE") == "0" or not running, part.name
        ran.append(part)
        return part.name

    monkeypatch.setattr(kit, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--device", "cpu"])
    assert kit.main() == 0
    names = [part.name for part in ran]
    assert names[:2] == ["info", "kernels" if not at_once else "layers, node in C++" if code == 0 else "kernels"]
    if code == 0:
        assert names[1 + (not at_once)] == "layers, node in C++"
    else:
        assert all(part.environment["TINYLORA_NODE"] == "0" for part in ran), "none may have one compiled either"
    wanted = {part.name for part in kit.parts("cpu", None)} | {"info"}
    assert set(names) == wanted - (set() if code == 0 else {"layers, node in C++"}) and len(names) == len(set(names))
    assert bool(killed) == (code is None)


@pytest.mark.parametrize("built, said", [("NVRTC 13.0", "in the library, by NVRTC 13.0"), ("", "TINYLORA_CUDA_ARCHIT")])
def test_it_says_whether_device_code_has_to_be_compiled(built, said, monkeypatch, tmp_path):
    monkeypatch.setattr(kit, "ROOT", tmp_path)
    assert kit.device_code().startswith("no record")
    (tmp_path / "tinylora_kernels").mkdir()
    (tmp_path / "tinylora_kernels/_build_record.json").write_text(json.dumps({"device_code": built}))
    assert said in kit.device_code()
