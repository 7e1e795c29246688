"""What Inductor generates for an H100, without one: kernels and bytes of a decoder block, the table of docs and tests.

Fake tensors on "cuda" have shapes and no memory; Inductor compiles graphs of them to the text of Triton kernels, and
counts the bytes that each kernel reads and writes, a tensor once a kernel. Nothing of it is executed.

    python tests/sim/inductor_gpu.py [--tokens 8192] [--ways frozen op inductor] [--code DIRECTORY]
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCE = pathlib.Path(__file__).with_name("absent_gpu.cpp")


def compile_absent_gpu() -> pathlib.Path:
    """The library of absent_gpu.cpp for the torch at hand; kept by the hash of what went in, the torch's place too."""
    package = pathlib.Path(importlib.util.find_spec("torch").origin).parent
    version = (package / "version.py").read_bytes()
    digest = hashlib.sha256(SOURCE.read_bytes() + version + os.fsencode(package)).hexdigest()[:16]
    path = pathlib.Path(tempfile.gettempdir()) / f"absent_gpu-{digest}.so"
    if not path.is_file():
        unfinished = pathlib.Path(tempfile.mkdtemp()) / path.name
        subprocess.run(
            [
                "c++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", SOURCE, "-o", unfinished,
                f"-isystem{package / 'include'}", f"-L{package / 'lib'}", f"-Wl,-rpath,{package / 'lib'}", "-lc10",
                "-ltorch_cpu",
            ],
            check=True,
        )  # fmt: skip
        unfinished.replace(path)
    return path


if __name__ == "__main__":  # before torch
    sys.path.insert(0, str(ROOT))
    ctypes.CDLL(str(compile_absent_gpu()))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._dynamo.device_interface import CudaInterface  # noqa: E402
from torch._inductor import config  # noqa: E402
from torch._inductor.fx_passes import joint_graph, post_grad  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.runtime.hints import DeviceProperties  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils import _triton  # noqa: E402

from bench.compiled import DISSOLVED, FROZEN, OP, SIZES, Block, adapt  # noqa: E402
from tinylora_kernels import ops  # noqa: E402

H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10, gcnArchName="",
)  # fmt: skip


@torch.library.custom_op("tinylora_test::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In place of flash attention, which a torch without CUDA would take apart: a kernel that nothing fuses into."""
    raise AssertionError("compiled for, never run")


@torch.library.custom_op("tinylora_test::attention_backward", mutates_args=())
def attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise AssertionError("compiled for, never run")


attention.register_fake(lambda q, k, v: torch.empty_like(q.transpose(1, 2)).transpose(1, 2))
attention_backward.register_fake(lambda g, q, k, v, out: tuple(map(torch.empty_like, (q, k, v))))
attention.register_autograd(
    lambda ctx, g: attention_backward(g, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
)


class Compiled(Exception):
    """The backward pass has been compiled, and cannot be run."""


@contextlib.contextmanager
def pretended_h100() -> Iterator[None]:
    """Inductor believes that there is one."""
    properties = staticmethod(lambda *_: H100)
    device = staticmethod(lambda: 0)
    # These look for patterns on a real tensor of the device.
    for passes in (joint_graph, post_grad):
        passes.lazy_init(torch.device("cpu"))
    patches = [
        mock.patch.multiple(
            CudaInterface, get_device_properties=properties, current_device=device,
            device_count=staticmethod(lambda: 1), is_available=staticmethod(lambda: True),
            is_bf16_supported=staticmethod(lambda *_, **__: True), get_compute_capability=staticmethod(lambda *_: 90),
        ),
        mock.patch.multiple(CudaInterface.Worker, get_device_properties=properties, current_device=device),
        mock.patch.multiple(
            torch.cuda, get_device_properties=lambda *_: H100, get_device_capability=lambda *_: (9, 0),
            current_device=lambda: 0, device_count=lambda: 1,
        ),
        mock.patch.object(_triton, "triton_hash_with_backend", lambda: "none"),
        *(mock.patch.object(passes, "lazy_init", lambda *_: None) for passes in (joint_graph, post_grad)),
        config.patch(fx_graph_cache=False, compile_threads=1, joint_graph_constant_folding=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        for cached in (_triton.has_triton, DeviceProperties.create):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        yield


def generated(call: Callable[[], object]) -> list[tuple[str, int]]:
    """(code, bytes read and written) of the graphs that a call of compiled functions on fake tensors compiles."""
    graphs: list[tuple[str, int]] = []

    def instead_of_loading(graph: GraphLowering) -> SimpleNamespace:
        graphs.append((graph.codegen()[0].value, graph.count_bytes()[0]))
        if graph.is_backward:
            raise Compiled
        module = graph.module

        def run(arguments: list) -> object:
            return torch.fx.Interpreter(module).run(*arguments)

        return SimpleNamespace(call=run, __file__="", runner=None)

    torch._dynamo.reset()
    with pretended_h100(), mock.patch.object(GraphLowering, "compile_to_module", instead_of_loading):
        try:
            call()
        except Exception:  # Compiled, in whatever autograd and Inductor wrap it
            if len(graphs) < 2:
                raise
    return graphs


def triton_kernels(code: str) -> list[str]:
    """The kernels that the code launches, in order."""
    return re.findall(r"^ +(triton_\w+)\.run\(", code, re.MULTILINE)


def block_on_fake_tensors(way: str) -> Block:
    """bench.compiled's block of Qwen2.5-7B; to be called under a FakeTensorMode."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        block = Block(SIZES["cuda"])
    torch.set_default_dtype(before)
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
            module._parameters[name] = nn.Parameter(fake, requires_grad=False)
    if way == FROZEN:
        return block
    with (
        mock.patch.object(torch, "randn", lambda *shape, device, generator: torch.empty(shape, device=device)),
        mock.patch.object(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None)),
        mock.patch.object(torch.linalg, "qr", lambda matrix: (matrix, None)),
    ):
        return adapt(block, {OP: "cuda", DISSOLVED: None}[way])


def graphs_of_block(way: str, tokens: int) -> list[tuple[str, int]]:
    """Forward with gradients, and backward to x and v."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **_: attention(q, k, v)),
        mock.patch.dict(ops.BACKENDS, cuda=ops.BACKENDS["cuda"]._replace(why_not=lambda *_: None)),
    ):
        block = block_on_fake_tensors(way)
        x = torch.empty(1, tokens, block.size.width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        angle = torch.empty(tokens, block.head, dtype=torch.bfloat16, device="cuda")
        wanted = [x, *(p for p in block.parameters() if p.requires_grad)]

        def call() -> None:
            y = torch.compile(block, fullgraph=True, dynamic=False)(x, angle, angle)
            torch.autograd.grad(y, wanted, torch.empty_like(y))

        return generated(call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--ways", nargs="+", choices=(FROZEN, OP, DISSOLVED), default=[FROZEN, OP, DISSOLVED])
    parser.add_argument("--code", type=pathlib.Path, help="a directory for the generated code")
    options = parser.parse_args()
    for way in options.ways:
        for phase, (code, count) in zip(("forward", "backward"), graphs_of_block(way, options.tokens), strict=True):
            ours = len(re.findall(r"torch\.ops\.tinylora\.\w+\.default\(", code))
            row = {"way": way, "phase": phase, "kernels": len(triton_kernels(code)), "ops": ours, "bytes": count}
            print(json.dumps(row), flush=True)
            if options.code:
                options.code.mkdir(parents=True, exist_ok=True)
                (options.code / f"{way}-{phase}.py").write_text(code)


if __name__ == "__main__":
    main()
