"""The C++ node that is compiled behind the first call: by whom, when, what of a failure, and the change to it at work.

Most of it with a compiler that hands out the node of this checkout, in processes of their own that run a copy of the
package without one.
"""
import contextlib
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo.compiled_autograd
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import tinylora_kernels
from tests.models import TARGETS, tiny_decoder
from tinylora_kernels import AdapterBank, TinyLoRAConfig, apply_tiny_lora, trainable_vectors
from tinylora_kernels.linear import build, compiled, node, plan

pytestmark = pytest.mark.skipif(node.extension is None, reason=f"no node in C++: {node.why_no_twin}")
EXTENSION, NAME, PATIENCE = node.extension, build.file_name(compiled.TORCH), 60.0

BEGIN = """
    import os, sys, threading, time, torch, tinylora_kernels as t
    from tinylora_kernels.linear import compiled, node, plan

    def is_waiting():
        return "tinylora node" in [thread.name for thread in threading.enumerate()]

    def until(condition):
        end = time.time() + 60
        while not condition():
            assert time.time() < end, "waited for a minute"
            time.sleep(0.02)

    assert node.twin is None or "there" in sys.argv, "a node was found"
    model = t.apply_tiny_lora(torch.nn.Sequential(torch.nn.Linear(32, 16)), t.TinyLoRAConfig(
        target_modules=["0"], init="uniform", cache=False), progress=False)
    x = torch.randn(3, 32)
"""


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited for a minute"
        time.sleep(0.02)


class Machine:
    """A copy of the package without its node, a cache, and a compiler that waits, fails and counts as it is told."""

    def __init__(self, package: Path, folder: Path):
        self.package, self.cache, self.tools = package, folder / "cache", folder / "tools"
        self.folder = self.cache / f"node-{os.geteuid()}"
        self.library = self.folder / NAME
        self.tools.mkdir(parents=True)
        self.compiler = self.tools / "c++"
        self.compiler.write_text(textwrap.dedent(f"""\
            #!/bin/sh
            cut -d' ' -f5,19,41 /proc/self/stat >> {self.tools}/calls
            while [ -e {self.tools}/hold ]; do sleep 0.02; done
            if [ -e {self.tools}/fails ]; then echo 'node.cpp:1: error: no such header'; exit 1; fi
            while [ $# -gt 0 ]; do if [ "$1" = -o ]; then cp {EXTENSION.__file__} "$2"; fi; shift; done
            """))
        self.compiler.chmod(0o755)
        self.variables = {"CXX": str(self.compiler)}

    def tell(self, word: str, on: bool = True) -> None:
        (self.tools / word).touch() if on else (self.tools / word).unlink()

    @property
    def calls(self) -> list[str]:
        """Process group, niceness and scheduling policy of each."""
        path = self.tools / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def start(self, *scripts: str, there: bool = False, **variables: str) -> subprocess.Popen:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TINYLORA_")}
        environment |= {"PYTHONPATH": str(self.package), "TINYLORA_CACHE": str(self.cache), "OMP_NUM_THREADS": "1"}
        script = "".join(map(textwrap.dedent, (BEGIN, f"calls = {str(self.tools / 'calls')!r}\n", *scripts)))
        command = [sys.executable, "-c", script, *["there"] * there]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.tools, env=environment | self.variables | variables, stdout=pipe, stderr=pipe, text=True
        )

    def run(self, *scripts: str, there: bool = False, **variables: str) -> tuple[str, str]:
        """What it wrote to its two streams."""
        process = self.start(*scripts, there=there, **variables)
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return out.strip(), errors.strip()

    def builders(self) -> list[int]:
        """Processes that compile into this cache, and wait for it."""
        return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and self._is_builder(path)]

    def _is_builder(self, process: Path) -> bool:
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            return False
        return b"build.py" in command and os.fsencode(self.folder) in command


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    root = tmp_path_factory.mktemp("package")
    skip = shutil.ignore_patterns("libtinylora_node-*", "__pycache__")
    shutil.copytree(Path(tinylora_kernels.__file__).parent, root / "tinylora_kernels", ignore=skip)
    return root


@pytest.fixture
def machine(package, tmp_path):
    machine = Machine(package, tmp_path)
    yield machine
    with contextlib.suppress(FileNotFoundError):
        machine.tell("hold", on=False)
    until(lambda: not machine.builders())


BEGINS = """
    before = len(open(calls).readlines()) if os.path.exists(calls) else 0
    model(x)
    until(lambda: os.path.exists(calls) and len(open(calls).readlines()) > before)
"""
CHANGES = """
    y = model(x)
    until(lambda: node.twin is not None)
    assert torch.equal(model(x), y) and type(model[0]._plan) is plan.twin and node.why_no_twin is None
"""


def test_the_first_call_has_it_compiled_and_the_next_ones_run_it(machine):
    machine.tell("hold")
    free = subprocess.run(["sh", "-c", "cut -d' ' -f5,19,41 /proc/self/stat"], capture_output=True, text=True).stdout
    _, errors = machine.run(f"""
        assert compiled.outlook() == "the first call of an adapted layer has it compiled, in the background"
        assert not os.path.exists({str(machine.cache)!r})
        model(x)
        until(lambda: os.path.exists(calls))
        assert node.twin is None and type(model[0]._plan) is plan.Plan
        assert compiled.outlook() == "a process compiles it now"
        os.unlink({str(machine.tools / "hold")!r})
    """, CHANGES)
    notice = "tinylora_kernels: the C++ node of linear layers is being compiled for torch "
    assert errors.startswith(notice) and errors.count("\n") == 0
    assert sorted(os.listdir(machine.folder)) == sorted([NAME, build.record_of(machine.library).name, "lock"])
    assert os.stat(machine.folder).st_mode & 0o077 == 0
    (group, nice, policy), own = machine.calls[0].split(), free.split()
    assert int(nice) == 19 and group != own[0] and int(policy) == os.SCHED_IDLE
    # From then on it is there at the start, and nothing is said.
    out, errors = machine.run("model(x); print(type(model[0]._plan) is plan.twin, compiled.load()[1])", there=True)
    assert out == "True None" and not errors and len(machine.calls) == 1


def test_a_process_ends_at_once_and_its_node_is_there_for_the_next(machine):
    machine.tell("hold")
    _, errors = machine.run(BEGINS)  # its streams are closed: nobody holds them
    assert "is being compiled" in errors
    assert len(machine.builders()) == 1 and not machine.library.exists()
    machine.tell("hold", on=False)
    until(lambda: not machine.builders())
    machine.run("model(x); assert type(model[0]._plan) is plan.twin", there=True)
    assert len(machine.calls) == 1


def test_nothing_is_left_of_it_in_the_process_table(machine):
    machine.run(CHANGES, """
        def zombies():
            for process in filter(str.isdigit, os.listdir("/proc")):
                try:
                    state, parent = open(f"/proc/{process}/stat").read().rsplit(")", 1)[1].split()[:2]
                except OSError:
                    continue
                if parent == str(os.getpid()) and state == "Z":
                    yield process
        until(lambda: not list(zombies()))
        until(lambda: not is_waiting())
    """)


def test_processes_at_once_have_it_compiled_once(machine):
    machine.tell("hold")
    ready = "model(x)\nopen(f'{calls}-{os.getpid()}', 'w').close()\n"
    processes = [machine.start(ready, CHANGES) for _ in range(3)]
    until(lambda: machine.calls and len(list(machine.tools.glob("calls-*"))) == 3)
    machine.tell("hold", on=False)
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert sum("is being compiled" in errors for _, errors in results) == 1 and len(machine.calls) == 1


def test_a_kill_leaves_no_half_file_and_is_tried_again_twice(machine):
    machine.tell("hold")
    for attempt in (1, 2, 3):
        machine.run(BEGINS)
        assert len(machine.calls) == attempt
        (builder,) = machine.builders()
        os.kill(builder, signal.SIGKILL)
        until(lambda: not machine.builders())
        assert not machine.library.exists()
        assert len(list(machine.folder.glob(f"{build.UNFINISHED}*"))) == 1  # of this attempt alone
    assert "compiling it was interrupted 3 times. To change that: " in machine.run("""
        model(x)
        print(compiled.outlook())
    """)[0]
    assert len(machine.calls) == 3
    os.utime(build.record_of(machine.library), (time.time() - compiled.PATIENCE - 9,) * 2)  # a week later
    machine.tell("hold", on=False)
    machine.run(CHANGES)
    assert sorted(os.listdir(machine.folder)) == sorted([NAME, build.record_of(machine.library).name, "lock"])


def test_its_process_may_be_killed_with_everything_else(machine):
    machine.tell("hold")
    process = machine.start("model(x); time.sleep(60)")
    until(lambda: machine.calls)
    for number in (process.pid, *machine.builders()):
        os.kill(number, signal.SIGKILL)
    process.communicate()
    machine.tell("hold", on=False)
    machine.run(CHANGES)


FAILS = "\nmodel(x); until(lambda: os.path.exists({!r}) and 'error' in open({!r}).read()); print(compiled.outlook())"


def test_a_failure_is_remembered_until_another_compiler_comes(machine):
    machine.tell("fails")
    record = str(build.record_of(machine.library))
    script = FAILS.format(record, record)
    for _ in range(2):
        out, errors = machine.run(script)
        assert out == f"c++: node.cpp:1: error: no such header. To change that: {build.COMMAND}"
    assert len(machine.calls) == 1 and not errors  # said once
    machine.tell("fails", on=False)
    os.utime(machine.compiler, (9e8, 9e8))  # an update of it
    machine.run(CHANGES)
    assert len(machine.calls) == 2


def test_a_python_that_cannot_do_it_is_a_failure_too(machine):
    record = str(build.record_of(machine.library))
    script = FAILS.format(record, record).replace("'error'", "'ended'")
    out, _ = machine.run("compiled.build.__file__ = '/nowhere.py'", script)
    assert out == f"the process that was to compile it ended with status 2. To change that: {build.COMMAND}"


@pytest.mark.parametrize("damage", ["a byte", "cut short", "emptied", "no record", "a record of nothing", "a FIFO"])
def test_a_damaged_one_is_not_loaded_but_compiled_again(machine, damage):
    machine.folder.mkdir(mode=0o700, parents=True)
    original = Path(EXTENSION.__file__).read_bytes()
    machine.library.write_bytes(original)
    build.write_record(machine.library, build.Record("c++", 1, None, build.hashlib.sha256(original).hexdigest()))
    if damage == "a byte":
        machine.library.write_bytes(original[:-1000] + bytes([original[-1000] ^ 1]) + original[-999:])
    elif damage in ("cut short", "emptied"):
        machine.library.write_bytes(original[: len(original) // 2 if damage == "cut short" else 0])
    elif damage == "a FIFO":
        machine.library.unlink()
        os.mkfifo(machine.library)
    else:
        record = build.record_of(machine.library)
        record.write_text("[]") if damage == "a record of nothing" else record.unlink()
    machine.run(CHANGES)
    assert machine.library.read_bytes() == original and len(machine.calls) == 1


def no_compiler(machine):
    del machine.variables["CXX"]
    machine.variables["PATH"] = str(machine.cache)
    return "no C++ compiler found"


def a_compiler_that_is_not_there(machine):
    machine.variables["CXX"] = "none-such"
    return "CXX=none-such: none-such is not on PATH"


def open_to_others(machine):
    machine.folder.mkdir(parents=True)
    machine.folder.chmod(0o770)
    return f"others may write to {machine.folder} (chmod go-w)"


def another_users(machine):
    machine.folder.mkdir(parents=True)
    os.chown(machine.folder, os.geteuid() + 4321, -1)
    return f"{machine.folder} is another user's"


def a_link(machine):
    machine.cache.mkdir()
    machine.folder.symlink_to(machine.tools)
    return f"{machine.folder} is no directory"


def no_directory(machine):
    machine.cache.write_text("in the way")
    return f"{machine.folder} cannot be read (Not a directory)"


def switched_off(machine):
    machine.variables["TINYLORA_NODE"] = "0"
    return "TINYLORA_NODE=0 has none compiled"


def only_one_that_is_there(machine):
    machine.variables["TINYLORA_NODE"] = "ready"
    return "TINYLORA_NODE=ready has none compiled"


OBSTACLES = [
    no_compiler, a_compiler_that_is_not_there, open_to_others, another_users, a_link, no_directory, switched_off,
    only_one_that_is_there,
]  # fmt: skip


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda obstacle: obstacle.__name__)
def test_what_speaks_against_it_is_no_word_to_the_user_but_in_info(machine, obstacle):
    if obstacle is another_users and os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    reason = obstacle(machine)
    before = sorted(machine.cache.rglob("*")) if machine.cache.is_dir() else None
    out, errors = machine.run("""
        from tinylora_kernels import diagnostics
        model(x)
        assert not is_waiting() and node.twin is None
        print(diagnostics.report(diagnostics.collect()))
    """)
    line = next(line for line in out.splitlines() if line.startswith("  linear layers "))
    missing = f"not compiled for torch {torch.__version__}"
    found = "switched off by TINYLORA_NODE=0" if obstacle is switched_off else missing
    assert line.startswith(f"  linear layers  one node of autograd in Python: the one in C++ is {found}; {reason}")
    assert not errors and not machine.calls
    assert before == (sorted(machine.cache.rglob("*")) if machine.cache.is_dir() else None)


def test_nor_is_one_used_from_a_folder_that_is_not_ones_own(machine):
    machine.run(CHANGES)
    machine.folder.chmod(0o777)
    machine.run("model(x); assert node.twin is None")
    machine.folder.chmod(0o700)
    machine.run("model(x); assert node.twin is not None", there=True)


def test_a_cache_that_cannot_be_written_to_is_read(machine, monkeypatch):
    machine.run(CHANGES)
    monkeypatch.setenv("TINYLORA_CACHE", str(machine.cache))
    monkeypatch.setenv("CXX", str(machine.compiler))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != machine.folder and access(path, mode))

    def refuse(*arguments):
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    assert compiled._cached() == machine.library
    machine.library.unlink()
    monkeypatch.delenv("TINYLORA_NODE")
    assert compiled.why_not().startswith(f"{machine.folder} cannot be written to. To change that: name another ")


def test_forked_processes_and_workers_of_data_loaders_have_none_compiled(machine):
    out, errors = machine.run("""
        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return 2
            def __getitem__(self, n):
                with torch.no_grad():
                    return model(x)[n], is_waiting(), hash(compiled.why_not()) == self.said
        Rows.said = hash(f"a forked process or a data loader's worker has none compiled. To change that: "
                         f"{compiled.build.COMMAND}")
        for context in ("fork", None):
            if not (child := os.fork()):
                model(x)
                os._exit(is_waiting())
            assert os.waitpid(child, 0)[1] == 0
        for _, waiting, said in torch.utils.data.DataLoader(Rows(), num_workers=1, multiprocessing_context="fork"):
            assert said and not waiting
        compiled._forked.clear()
        torch.utils.data._utils.worker._worker_info = object()  # of one that was spawned
        print(compiled.why_not())
    """)
    assert out.startswith("a forked process or a data loader's worker") and not machine.calls and not errors


def test_a_cache_keeps_the_ones_used_last(tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    machine = Machine(tmp_path, tools)
    monkeypatch.setenv("CXX", str(machine.compiler))
    monkeypatch.setattr(build, "_stand_back", lambda: None)
    cache = tmp_path / "cache"
    cache.mkdir()
    stem = NAME.split("-")
    others = [NAME.replace(stem[1], f"9.{number}") for number in range(12)]
    older = NAME.replace(NAME.split(".cpython")[0][-8:], "0" * 8)
    for age, name in enumerate([older, *others]):
        for path in (cache / name, build.record_of(cache / name)):
            path.write_text("[]")
            os.utime(path, (1e9 + age, 1e9 + age))
    build.compile_aside(compiled.TORCH, cache)
    kept = {NAME, *others[-build.KEPT + 1 :]}
    assert {path.name for path in cache.iterdir()} == kept | {build.record_of(Path(name)).name for name in kept}
    tools, attempts, error, digest = json.loads(build.record_of(cache / NAME).read_text())
    assert attempts == 1 and error is None and digest == build.hashlib.sha256((cache / NAME).read_bytes()).hexdigest()


def test_the_node_of_these_sources_is_compiled_by_what_is_here(machine):
    """By the compiler that is here, and not a file that was handed out; half a minute."""
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    machine.variables.clear()
    folder = str(machine.folder)
    machine.folder.mkdir(mode=0o700, parents=True)
    done = subprocess.run([sys.executable, "-I", "-S", build.__file__, compiled.TORCH, folder], capture_output=True)
    assert done.returncode == 0 and not done.stdout and not done.stderr
    machine.run("model(x).sum().backward(); assert type(model[0]._plan) is plan.twin", there=True)


# The change from one node to the other, at work


@pytest.fixture
def in_python(monkeypatch):
    """Layers run the node in Python; returns what changes to the one in C++."""
    for name in ("extension", "twin"):
        monkeypatch.setattr(node, name, None)
    monkeypatch.setattr(node, "why_no_twin", "not compiled yet")
    monkeypatch.setattr(plan, "twin", None)
    shared_from = EXTENSION.share_dx_from(0)
    yield lambda: plan.take_twin(EXTENSION)
    EXTENSION.share_dx_from(shared_from)


def adapted(dtype=torch.float32, **kwargs):
    config = TinyLoRAConfig(target_modules=TARGETS, trainable_dim=3, init="uniform", cache=False)
    return apply_tiny_lora(tiny_decoder(**kwargs).to(dtype), config, progress=False)


def step(model, tokens, change=lambda: None, between=lambda: None, blocks=None):
    """Output and gradients of a step, with something done after the first block, and between the passes."""
    trained = [*trainable_vectors(model), model.embedding.weight]
    for parameter in trained:
        parameter.grad = None
    x = model.embedding(tokens)
    for n, layer in enumerate(model.layers):
        x = blocks(layer, x) if blocks else layer(x)
        if n == 0:
            change()
    y = model.lm_head(x)
    between()
    y.float().square().sum().backward()
    return [y, *(parameter.grad for parameter in trained if parameter.requires_grad)]


CHECKPOINTS = {
    "none": None,
    "reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=True),
    "not reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    "not reentrant, to its end": lambda layer, x: checkpoint(layer, x, use_reentrant=False, early_stop=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("blocks", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("when", ["in the forward pass", "between the passes"])
def test_a_step_in_which_the_node_changes_has_the_bits_of_either(when, blocks, bias, dtype, in_python):
    model, tokens = adapted(dtype, bias=bias), torch.randint(17, (2, 5))
    model.embedding.requires_grad_(True)
    before = step(model, tokens, blocks=blocks)
    at = {"in the forward pass": "change", "between the passes": "between"}[when]
    meanwhile = step(model, tokens, blocks=blocks, **{at: in_python})
    after = step(model, tokens, blocks=blocks)
    assert node.twin is not None and type(model.layers[0].q_proj._plan) is plan.twin
    for one, two, three in zip(before, meanwhile, after, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_what_the_two_nodes_save_is_the_same(in_python):
    model, x = adapted(), torch.randn(5, 24, requires_grad=True)
    layer, found = model.layers[0].q_proj, []
    for change in (lambda: None, in_python):
        change()
        for trained in (True, False):
            trainable_vectors(model)[0].requires_grad_(trained)
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t.clone()) or t, lambda t: t):
                name = layer(x).grad_fn.name()
            found.append((trained, [tuple(t.shape) for t in saved], "C++" in name))
        trainable_vectors(model)[0].requires_grad_(True)
    assert found == [(True, [(5, 2)], False), (False, [], False), (True, [(5, 2)], True), (False, [], True)]


@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize("what", ["v", "the frozen weight"])
def test_either_node_refuses_what_was_written_between_the_passes(what, change, in_python):
    layer = adapted().layers[0].q_proj
    if change:
        in_python()
    y = layer(torch.randn(5, 24, requires_grad=True))
    with torch.no_grad():
        (layer.v if what == "v" else layer.base.weight).mul_(1)
    message = f"modified by an inplace operation: {what} .* is at version [0-9]+; expected version [0-9]+ instead"
    with pytest.raises(RuntimeError, match=message):
        y.sum().backward()


def test_a_graph_that_is_kept_runs_again_and_one_that_is_not_says_so(in_python):
    model, x = adapted(), torch.randn(5, 24, requires_grad=True)
    y = model.layers[0](x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    in_python()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.sum(), x)


def test_what_was_compiled_is_not_compiled_again(in_python):
    model, tokens = adapted(), torch.randint(17, (2, 5))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(model, backend=counter, fullgraph=True)
    before = torch.autograd.grad(traced(tokens).sum(), trainable_vectors(model))
    assert counter.frame_count == 1
    in_python()
    after = torch.autograd.grad(traced(tokens).sum(), trainable_vectors(model))
    assert counter.frame_count == 1
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_a_backward_pass_that_is_compiled_is_of_nodes_in_python(in_python):
    model, tokens = adapted(), torch.randint(17, (2, 5))
    expected = step(model, tokens)
    in_python()
    enabled = torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager"))
    with torch._dynamo.config.patch(compiled_autograd=True), enabled:
        found = step(model, tokens)
    assert type(model.layers[0].q_proj._plan) is plan.Plan
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(one, two)


def test_threads_that_call_while_it_changes_get_the_same_bits(in_python):
    model, tokens = adapted(), torch.randint(17, (2, 5))
    calls, wrong, end = itertools.count(), [], threading.Event()

    def results():
        y = model(tokens)
        return y, *torch.autograd.grad(y.square().sum(), trainable_vectors(model))

    expected = results()

    def work():
        while not end.is_set():
            next(calls)
            if not all(torch.equal(one, two) for one, two in zip(results(), expected, strict=True)):
                wrong.append(node.twin)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for change in (False, True, False):
        seen = next(calls)
        if change:
            in_python()
        until(lambda seen=seen: next(calls) > seen + 100)
    end.set()
    for thread in threads:
        thread.join()
    assert not wrong and type(model.layers[0].q_proj._plan) is plan.twin


def test_a_banks_block_goes_on_through_it(in_python):
    model, tokens = adapted(), torch.randint(17, (2, 5))
    bank = AdapterBank(model, capacity=2)
    bank.add("a", torch.full((len(trainable_vectors(model)), 3), 0.3))
    with torch.no_grad(), bank.use(["a", None]):
        outputs = [model(tokens) for _ in range(3)]
        in_python()
        outputs += [model(tokens) for _ in range(3)]
    assert all(torch.equal(outputs[0], other) for other in outputs)


def test_numbers_of_changes_never_come_back():
    """Two threads that note a change at once: no plan that one of them has ended holds again."""
    seen = [plan.changes()]
    for _ in range(3):
        plan.note_change()
        seen.append(plan.changes())
    assert seen == sorted(set(seen))


def test_a_plan_that_might_have_been_the_twins_asks_once(in_python, monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(compiled, "wanted", asked.append)
    with caplog.at_level(logging.DEBUG, "tinylora_kernels"):
        nn.Sequential(adapted().layers[0].q_proj)(torch.randn(3, 24))
    assert asked == [plan.take_twin] and not caplog.records
    layer = adapted().layers[0].q_proj
    layer.backend = "reference"  # which has no twin
    layer(torch.randn(3, 24))
    assert len(asked) == 1
