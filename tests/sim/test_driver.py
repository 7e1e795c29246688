"""The library on a driver that checks every call: ops from Python to the launch, devices, threads, graphs, errors.

The driver is a stand-in (driver/libcuda.cpp), which the library opens as it would NVIDIA's; the device code that it is
given was compiled by NVRTC on the way.
"""
from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from tinylora_kernels.ops.native import library as native
from tinylora_kernels.ops.native import nvrtc

from . import standin
from .host import emulator
from .mutants import Edit, edited_copy


def _why_not() -> str | None:
    if sys.platform != "linux" or torch.version.cuda:
        return "needs a torch without CUDA, on Linux"
    if native.load().error or not native.load().has_cuda:
        return f"native library: {native.load().error or native.load().record.get('cuda_reason')}"
    try:
        nvrtc.find()
    except nvrtc.CompileError as error:
        return str(error)
    return emulator.why_not()


pytestmark = pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))
READY = """
import json, os, threading, torch
from tests.cases import CASES, Case, make_case, run_ops, assert_within_budget
from tests.sim import checks
from tinylora_kernels.ops.native import library
for dtype in (torch.float32, torch.bfloat16):
    assert library.why_not_cuda("cuda", dtype, 2) is None, library.why_not_cuda("cuda", dtype, 2)
Gpu = standin.Gpu
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """run(script, variables) on the machine with a stand-in driver; what it printed."""
    folder, cache = standin.build(), tmp_path_factory.mktemp("cache")

    def run(script: str, **variables: str) -> str:
        done = standin.run(folder, script, TINYLORA_CACHE=str(cache), **variables)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_the_ops_end_to_end(machine):
    """Every check of the simulators that needs no order of execution, through torch's dispatcher and the driver."""
    names = machine(READY + """
for name in ("budget", "around", "not finite", "rounding", "bare rows", "kept right"):
    options = {} if name in ("rounding", "bare rows") else {"dtypes": (torch.float32, torch.bfloat16)}
    if name == "kept right":
        continue
    checks.CHECKS[name](Gpu, **options)
assert not standin.report(), standin.report()
print(*sorted(set(standin.launched())))
""").split()
    assert len([name for name in names if "rows_kernel" in name]) >= 14 and any("bank_grad" in name for name in names)


def test_two_devices_and_threads_without_a_context(machine):
    """Each device its own code and context, left as they were found; the same bits on both of one architecture."""
    assert "done" in machine(READY + """
inputs = make_case(Case(100, 64, numbers=13), torch.bfloat16)
found = [run_ops(Gpu(device), inputs) for device in (0, 1, 0, 2, 1)]
for one in found[1:]:
    checks.assert_same_outputs(found[0], one)
alone = []
def work(device):
    alone.append(run_ops(Gpu(device), inputs))
for device in (0, 1):
    thread = threading.Thread(target=work, args=(device,))
    thread.start()
    thread.join()
for one in alone:
    checks.assert_same_outputs(found[0], one)
assert standin.driver.standin_calls(b"cuCtxPushCurrent") == standin.driver.standin_calls(b"cuCtxPopCurrent") > 0
assert standin.driver.standin_calls(b"cuDevicePrimaryCtxRetain") == 3
assert not standin.report(), standin.report()
print("done")
""", STANDIN_CARDS="90,90,86")


@pytest.mark.parametrize(
    "file, wanted",
    [
        ("test_layers", "cuda-cuda and not (compiled or nothing_waits or captured or one_x or sibling or same_bits)"),
        ("test_layers", "cuda-cuda and (captured or one_x or sibling) and not 3584"),
        ("test_direct", ""),
    ],
)
def test_layers_on_the_device(machine, file, wanted):
    """What a card will run: layers, plans, both nodes, models, banks, graphs and streams, on tensors of a GPU.

    A graph is replayed with what torch's own operations do in it, and memory that was freed is not given out again.
    """
    assert re.search(r"^[1-9]\d+ passed", machine(f"""
import pytest
code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", {wanted!r}, "tests/gpu/{file}.py"])
assert code == 0 and not standin.report(), (code, standin.report())
"""), re.M)


def test_a_layer_on_another_than_the_current_device(machine):
    """By the node in C++, whose backward pass has a thread of its own."""
    assert "done" in machine("""
import torch
from tests.gpu.test_direct import linear, random, step
layer = linear()
x, g = random(5, 16), random(5, 40)
expected = step(layer, x, g)
elsewhere = linear().to("cuda:1")
for turn in range(2):
    found = step(elsewhere, x.to("cuda:1"), g.to("cuda:1"))
    assert all(one.device.index == 1 and torch.equal(one.cpu(), other.cpu()) for one, other in zip(found, expected))
assert torch.cuda.current_device() == 0
assert standin.driver.standin_calls(b"cuCtxPushCurrent") == standin.driver.standin_calls(b"cuCtxPopCurrent") > 0
assert not standin.report(), standin.report()
print("done")
""", STANDIN_CARDS="90,90")


def test_memory_that_runs_out_is_torchs_own_error(machine):
    """Whichever tensor of a call gets none, scratch included; the next call is right."""
    assert "done" in machine("""
import torch
from tests.gpu.test_direct import linear, random, step
for layer, rows in ((linear(out_features=64), 5), (linear(out_features=64), 600), (linear(out_features=24), 600)):
    x, g = random(rows, 16), random(rows, layer.base.out_features)
    expected = step(layer, x, g)
    refused, done = 0, False
    while not done:
        standin.glue.standin_refuse_allocation(refused)
        try:
            found, done = step(layer, x, g), True
        except torch.OutOfMemoryError as error:
            assert "CUDA out of memory" in str(error), error
            refused += 1
        finally:
            standin.glue.standin_refuse_allocation(-1)
        assert all(torch.equal(one, other) for one, other in zip(step(layer, x, g), expected))
    assert refused >= 5 and all(torch.equal(one, other) for one, other in zip(found, expected)), refused
assert not standin.report(), standin.report()
print("done")
""")


def test_tensors_of_another_device_are_refused(machine):
    """Of every op, before anything is launched: an address of one device, or of the host, means nothing on another."""
    assert "done" in machine(READY + """
bf16, ids = torch.bfloat16, torch.tensor([0, 1, 2])
x, y = torch.randn(6, 32, dtype=bf16), torch.randn(6, 64, dtype=bf16)
v, P = torch.randn(3, 13), torch.randn(13, 2, 2)
basis, right, t = torch.randn(2, 64), torch.randn(2, 32), torch.randn(6, 2)
bias, parts = torch.zeros(64, dtype=bf16), {"basis": basis, "v": v[None], "projection": torch.randn(2, 13, 2, 2)}
factors, columns = {"v": v, "projection": P}, [[16, 64], [0, 0]]
CALLS = {
    "update": ({"y": y, "basis": basis, **factors, "offset": torch.randn(2), "bias": bias, "ids": ids}, []),
    "update_backward": ({"g": y, "basis": basis, **factors, "t": t, "ids": ids}, [True]),
    "low_rank": ({"x": x, "right": right, "basis": basis, **factors, "bias": bias, "ids": ids}, []),
    "update_input_grad": ({"dx": x, "right": right, "g": y, "basis": basis, **factors, "t": t, "ids": ids}, [True]),
    "update_parts": ({"y": y, **parts, "offset": torch.randn(2, 2), "bias": bias, "x": None, "right": None, "ids": ids},
                     columns),
    "update_parts_backward": ({"g": y, **parts, "t": torch.randn(2, 6, 2), "ids": ids}, [*columns, True]),
    "refresh_right": ({"right": right, "samples": torch.zeros(1, 256, dtype=torch.int32),
                       "weight": torch.randn(64, 32, dtype=bf16), "basis": basis}, [True]),
}
with_x = {"y": y, **parts, "offset": None, "bias": bias, "x": x, "right": torch.randn(2, 2, 32), "ids": ids}
tried = 0
for op, tensors, rest in [*((op, *call) for op, call in CALLS.items()), ("update_parts", with_x, columns)]:
    run = getattr(torch.ops.tinylora, op).default
    put = lambda tensor, device: None if tensor is None else standin.ops_to_gpu(tensor, device)
    gpu = {name: put(tensor, 0) for name, tensor in tensors.items()}
    run(*gpu.values(), *rest)
    before = len(standin.launched())
    for name, tensor in tensors.items():
        for other in (put(tensor, 1), tensor) if tensor is not None else ():
            try:
                run(*(gpu | {name: other}).values(), *rest)
            except (ValueError, RuntimeError) as error:
                assert isinstance(error, ValueError) or "tinylora::" in str(error), (op, name, error)
            else:
                raise AssertionError((op, name, other.device))
            tried += 1
    assert len(standin.launched()) == before, op
tensors, rest = CALLS["update_input_grad"]  # what is written and its factor together: each fits the other
elsewhere = [put(tensor, int(name in ("dx", "right"))) for name, tensor in tensors.items()]
try:
    torch.ops.tinylora.update_input_grad.default(*elsewhere, *rest)
except ValueError as error:
    assert "dx: expected the device of g, found another" in str(error), error
else:
    raise AssertionError("dx and right of another device than g")
assert tried > 90 and not standin.report(), (tried, standin.report())
print("done")
""", STANDIN_CARDS="90,90")


def test_a_graph_that_is_captured_before_anything_was_loaded(machine):
    """Nothing runs while it is captured, nothing forbidden is called, and what is run later has the bits of a call."""
    assert "done" in machine(READY + """
inputs = make_case(Case(100, 64, numbers=13), torch.bfloat16)
gpu = {name: standin.ops_to_gpu(getattr(inputs, name), 0) for name in ("y", "g", "basis", "v", "projection", "offset")}
cpu = torch.ops.standin.on_cpu
ops, factors = torch.ops.tinylora, (gpu["basis"], gpu["v"], gpu["projection"])
stream = standin.driver.standin_stream(0)
standin.glue.standin_use_stream(0, __import__("ctypes").c_void_p(stream))
pointer = __import__("ctypes").c_void_p(stream)
standin.driver.standin_capture(pointer, 1)
t = ops.update.default(gpu["y"], *factors, gpu["offset"], None, None)
g0, dv = ops.update_backward.default(gpu["g"], *factors, t, None, True)
standin.driver.standin_capture(pointer, 0)
assert torch.equal(cpu(gpu["y"]), inputs.y) and cpu(t).isnan().all()
assert standin.driver.standin_replay(pointer) == 2  # the update and its gradient
expected = run_ops(Gpu(), inputs)
for name, found in (("y", gpu["y"]), ("t", t), ("g0", g0), ("dv", dv)):
    assert checks.same_bits(cpu(found), getattr(expected, name)), name
before = cpu(dv).clone()
standin.driver.standin_replay(pointer)
assert not standin.report(), standin.report()
print("done")
""")


def test_more_captured_launches_than_tickets(machine):
    """Then each sets a ticket of its own to zero, which is a node more."""
    assert "done" in machine("""
import ctypes, torch
from tests.cases import Case, make_case
tickets = 1 << 15  # tiles.h: kGraphTickets
inputs = make_case(Case(100, 64, numbers=13), torch.bfloat16)
names = ("g", "basis", "v", "projection")
g, basis, v, projection = (standin.ops_to_gpu(getattr(inputs, name), 0) for name in names)
t = standin.ops_to_gpu(torch.zeros(100, 2), 0)
backward = torch.ops.tinylora.update_backward.default
stream = ctypes.c_void_p(standin.driver.standin_stream(0))
standin.glue.standin_use_stream(0, stream)
standin.driver.standin_capture(stream, 1)
for _ in range(tickets + 3):
    backward(g, basis, v, projection, t, None, False)
standin.driver.standin_capture(stream, 0)
assert standin.driver.standin_replay(stream) == 3, "of the launches none is recorded, of idle ones"
assert not standin.report(), standin.report()
print("done")
""", STANDIN_IDLE="1")


def test_an_op_before_any_backend_was_chosen_has_its_code_made(machine):
    """As vLLM's layers and compiled graphs call it; where there is none, the op says why in one line."""
    out = machine("""
from tests.cases import Case, make_case, run_ops
import torch
from tinylora_kernels.ops.native import library
assert library.load().error is None
run_ops(standin.Gpu(), make_case(Case(9, 64, numbers=3), torch.float16))
assert not standin.report(), standin.report()
try:
    run_ops(standin.Gpu(1), make_case(Case(9, 64, numbers=3), torch.float16))
except RuntimeError as error:
    print(str(error).splitlines()[0])
""", STANDIN_CARDS="90,70")
    assert out == (
        "tinylora: nothing in this library runs on sm_70: the GPU is sm_70, expected sm_75 or later\n"
    )


def test_every_call_that_fails_is_one_line(machine):
    """The call, what it was about, the driver's word for it; and the next op works."""
    lines = json.loads(machine("""
import json, os, threading, torch
from tests.cases import Case, make_case, run_ops
from tinylora_kernels.ops.native import cuda_code, library
import ctypes
loaded = ctypes.CDLL(str(library.LIBRARY))
assert library.load().error is None
cuda_code.make_ready(loaded, torch.bfloat16, 2, 90)
inputs, empty = make_case(Case(100, 64, numbers=13), torch.bfloat16), make_case(Case(0, 64, numbers=13), torch.bfloat16)
lines = {}
def attempt(name, inputs):
    os.environ["STANDIN_FAIL"] = name + ":719"
    try:
        run_ops(standin.Gpu(), inputs)
    except RuntimeError as error:
        lines[name] = str(error)
    os.environ["STANDIN_FAIL"] = ""
calls = ("cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent",
         "cuCtxPushCurrent", "cuThreadExchangeStreamCaptureMode", "cuLibraryLoadData", "cuLibraryGetKernel",
         "cuKernelGetFunction", "cuOccupancyMaxActiveBlocksPerMultiprocessor", "cuLibraryGetGlobal", "cuLaunchKernel")
for name in calls:
    attempt(name, inputs)
attempt("cuMemsetD32Async", empty)
standin.driver.standin_set_device(0)
attempt("cuCtxGetDevice", inputs)
assert set(lines) == {*calls, "cuMemsetD32Async", "cuCtxGetDevice"}, lines
run_ops(standin.Gpu(), inputs)
for name in ("cuStreamIsCapturing", "cuStreamGetId"):  # then a ticket of the launch's own
    os.environ["STANDIN_FAIL"] = name + ":719"
    run_ops(standin.Gpu(), inputs)
print(json.dumps(lines))
"""))
    for name, line in lines.items():
        assert re.search(rf"tinylora: {name}( of \S.*)? failed: CUDA_ERROR_LAUNCH_FAILED", line), line
        assert "\n" not in line.split("\nException raised from")[0]


@pytest.mark.parametrize(
    "variables, reason",
    [
        ({"STANDIN_MISSING": "cuLibraryGetKernel"}, "the NVIDIA driver has no cuLibraryGetKernel of CUDA 12.0: install "
         "driver 525"),
        ({"STANDIN_VERSION": "11080"}, "the NVIDIA driver is too old: it runs CUDA 11.8, expected 12.0 or later"),
        ({"STANDIN_CARDS": "70"}, "the GPU is sm_70, expected sm_75 or later"),
        ({"STANDIN_CARDS": "90,70"}, "the GPU is sm_70, expected sm_75 or later"),
        ({"STANDIN_FAIL": "cuLibraryLoadData:200"}, "the driver refuses: tinylora: cuLibraryLoadData of code for "
         "sm_90 on sm_90 failed: CUDA_ERROR_INVALID_IMAGE"),
    ],
)  # fmt: skip
def test_a_machine_that_cannot_has_one_line_and_the_next_backend(machine, variables, reason):
    out = machine("""
import torch, warnings
from tinylora_kernels.ops import dispatch
from tinylora_kernels.ops.native import library
print(library.why_not_cuda("cuda", torch.bfloat16, 2))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(dispatch.choose("cuda", torch.bfloat16, 2))
print(sum("backend 'cuda' is not used" in str(warning.message) for warning in caught))
""", **variables)
    line, chosen, warned = out.strip().split("\n")
    assert reason in line and chosen in ("triton", "reference") and warned == "1"


def test_a_card_of_tomorrow_takes_ptx(machine):
    assert "done" in machine(READY + """
assert all(name for name in run_ops(Gpu(), make_case(Case(9, 64, numbers=3), torch.bfloat16)).__dict__)
checks.CHECKS["rounding"](Gpu)
assert not standin.report(), standin.report()
print("done")
""", STANDIN_CARDS="160")


# What goes wrong between an op and its launch. (the fault, the edit of csrc/cuda, what is said of it)
FAULTS = (
    ("source and target exchanged", Edit("kernel_arguments.h",
     "  Side source;          // multiplied with its factor: the coefficients\n"
     "  Side target;          // is given the gains times its factor; rows null: nothing is written\n",
     "  Side target;\n  Side source;\n"), "error|not in the memory|nan"),
    ("v and the projection exchanged", Edit("kernel_arguments.h",
     "  const float* v;           // [u], or [K, u] with adapter ids\n"
     "  const float* projection;  // [u, R, R], or [R, R] where elementwise\n",
     "  const float* projection;\n  const float* v;\n"), "error"),
    ("the address of the address of the arguments", Edit("driver.cpp",
     "void* parameters[] = {const_cast<void*>(arguments)};", "void* parameters[] = {&arguments};"),
     "not in the memory of any device|makes no sense"),
    ("a thread without a context", Edit("driver.cpp",
     "  CALL(cuCtxPushCurrent, card_.primary);\n  pushed_ = true;\n", ""), "the thread has no context"),
    ("the first GPU's context for every GPU", Edit("driver.cpp", "card_(Card::of(index))", "card_(Card::of(0))"),
     "memory of device 1 on device 0"),
    ("a context is left behind", Edit("driver.cpp",
     "if (pushed_) driver_functions().cuCtxPopCurrent(&popped);", ""), "contexts left behind"),
    ("loaded while a stream is captured", Edit("driver.cpp",
     "  const Uncaptured uncaptured;\n  const std::string name", "  const std::string name"),
     "cuLibraryLoadData while a stream is being captured"),
    ("the grid along another axis", Edit("driver.cpp", "grid.x, grid.y, 1,", "grid.y, grid.x, 1,"), "error"),
    ("more threads than a kernel was compiled for", Edit("launch.cpp",
     "p.longer = p.rows % plan.blocks;\n  const Extent grid{unsigned(plan.blocks)}, block{unsigned(plan.team),",
     "p.longer = p.rows % plan.blocks;\n  const Extent grid{unsigned(plan.blocks)}, block{16 * unsigned(plan.team),"),
     "compiled for 256"),
    ("the default stream for every stream", Edit("driver.cpp",
     "static_cast<StreamHandle>(stream), parameters, nullptr)", "nullptr, parameters, nullptr)"),
     "ran while captured|the ticket is not zero"),
    ("a graph takes the ticket of its stream", Edit("driver.cpp", "captured = status != kNotCapturing",
     "captured = false"), "ticket of another launch"),
    ("two launches of a graph take one ticket", Edit("driver.cpp", "kStreamTickets + used++", "kStreamTickets + used"),
     "ticket of another launch"),
    ("a graph's tickets begin among those of streams", Edit("driver.cpp", "ticket(module, kStreamTickets + used++)",
     "ticket(module, used++)"), "ticket of another launch"),
    ("the kernel of rows with ids for those without", Edit("launch.cpp", "p.mixing.ids != nullptr", "!p.mixing.ids"),
     "the kernel of rows with ids, and no ids"),
    ("another kernel's name", Edit("kernel.cpp", "13RowsArgumentsE", "14RowsArgumentsE"),
     "cuLibraryGetKernel of _ZN8tinylora11rows_kernel.* CUDA_ERROR_NOT_FOUND"),
    ("machine code of another architecture", Edit("images.cpp", "return architecture <= capability &&",
     "return true ||"), "CUDA_ERROR_NO_BINARY_FOR_GPU"),
)  # fmt: skip
SCENARIO = """
import ctypes, threading, torch
import tinylora_kernels
from tests.cases import Case, run_ops, make_case, assert_within_budget
from tests.sim import checks
from tinylora_kernels.ops.native import cuda_code
torch.ops.load_library({path!r})
for architecture in (90, 86):
    cuda_code.make_ready(ctypes.CDLL({path!r}), torch.bfloat16, 2, architecture)
Gpu, cpu, ops = standin.Gpu, torch.ops.standin.on_cpu, torch.ops.tinylora

def graph():
    inputs = make_case(Case(100, 64, numbers=13), torch.bfloat16)
    names = ("y", "g", "basis", "v", "projection", "offset")
    y, g, basis, v, projection, offset = (standin.ops_to_gpu(getattr(inputs, name), 0) for name in names)
    stream = ctypes.c_void_p(standin.driver.standin_stream(0))
    standin.glue.standin_use_stream(0, stream)
    standin.driver.standin_capture(stream, 1)
    t = ops.update.default(y, basis, v, projection, offset, None, None)
    g0, dv = ops.update_backward.default(g, basis, v, projection, t, None, True)
    again, _ = ops.update_backward.default(g, basis, v, projection, t, None, True)
    standin.driver.standin_capture(stream, 0)
    assert torch.equal(cpu(y), inputs.y), "ran while captured"
    nodes = standin.driver.standin_replay(stream)
    standin.glue.standin_use_stream(0, None)
    assert nodes == 3, f"{{nodes}} nodes"
    expected = run_ops(Gpu(), inputs)
    for name, found in (("y", y), ("t", t), ("g0", g0), ("g0", again), ("dv", dv)):
        assert checks.same_bits(cpu(found), getattr(expected, name)), f"{{name}}: error"

def work(device):
    try:
        for case in (Case(100, 64, numbers=13), Case(34, 72, numbers=2, adapters=64)):
            inputs = checks.draws(case, torch.bfloat16)
            assert_within_budget([run_ops(Gpu(device), one) for one in inputs], inputs)
    except BaseException as error:
        failures.append(error)

failures = []
graph()
for device in (0, 1):
    thread = threading.Thread(target=work, args=(device,))
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
calls = standin.driver.standin_calls
assert calls(b"cuCtxPushCurrent") == calls(b"cuCtxPopCurrent"), "contexts left behind"
assert not standin.report(), standin.report()
print("nothing wrong")
"""


@pytest.mark.parametrize("fault", [None, *FAULTS], ids=lambda fault: fault[0] if fault else "none")
def test_a_planted_fault_is_seen(machine, tmp_path, fault):
    sources = edited_copy(emulator.KERNELS, tmp_path / "sources", (fault[1],) if fault else ())
    script = SCENARIO.format(path=str(standin.build_library(sources)))
    if fault is None:
        assert "nothing wrong" in machine(script, STANDIN_CARDS="90,86")
        return
    with pytest.raises(AssertionError) as caught:
        machine(script, STANDIN_CARDS="90,86")
    assert re.search(fault[2], str(caught.value)), str(caught.value)
