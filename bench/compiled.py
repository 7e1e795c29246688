"""A decoder block under torch.compile: the op, or the update as operations that Inductor fuses, over the frozen block.

    frozen           the bare block, compiled
    op               adapted, on the backend that eager layers use here (cuda, triton or cpu)
    inductor         adapted, the update dissolved into the kernels around it (ops/inductor.py)

Each also with Inductor's search for better sizes of blocks ("tuned"): its own choice is one row of a reduction a block,
which reads U once a row.

    python bench/compiled.py                    on a GPU: Qwen2.5-7B's block at 8192, 2048, 512 tokens and one; minutes
    python bench/compiled.py --device cpu       SmolLM2-135M's block
    python bench/compiled.py --tokens 8192 --phases both --seconds 20 --no-tuned        one case, two minutes

Into bench/results/compiled.csv; `measure` is one case, for other scripts. Nothing is timed that does not agree with the
reference in float32 first.
"""
from __future__ import annotations

import argparse
import copy
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.grid import environment, table  # noqa: E402
from bench.grid.timing import interleave  # noqa: E402
from tinylora_kernels.layers.layer import TinyLoRALayer  # noqa: E402
from tinylora_kernels.ops import choose  # noqa: E402

FILE = "compiled.csv"
FROZEN, AGAIN, OP, DISSOLVED = "frozen", "frozen again", "op", "inductor"
WAYS = (FROZEN, AGAIN, OP, DISSOLVED)
NUMBERS, RANK = 13, 2
TUNED = {"coordinate_descent_tuning": True}
TOLERANCE = {torch.float32: (2e-5, 1e-3), torch.bfloat16: (2e-2, 5e-2)}  # of y and dv, relative to the reference's
COLUMNS = [
    "device", "block", "tokens", "dtype", "phase", "tuned", "way", "backend", "rounds", "us", "ratio_p20", "ratio_p50",
    "ratio_p80", *environment.describe(),
]  # fmt: skip


class Size(NamedTuple):
    """Of a decoder block."""

    name: str
    width: int
    inner: int
    heads: int
    kv_heads: int
    bias: bool  # of q, k and v


SIZES = {
    "cuda": Size("Qwen2.5-7B", 3584, 18944, 28, 4, True),
    "cpu": Size("SmolLM2-135M", 576, 1536, 9, 3, False),
}
TOKENS = {"cuda": (8192, 2048, 512, 1), "cpu": (512, 1)}


class Block(nn.Module):
    """Pre-norm attention with rotary positions and SwiGLU, as in Qwen2 and Llama."""

    def __init__(self, size: Size):
        super().__init__()
        self.size, self.head = size, size.width // size.heads
        kv = size.kv_heads * self.head
        self.q = nn.Linear(size.width, size.width, bias=size.bias)
        self.k, self.v = (nn.Linear(size.width, kv, bias=size.bias) for _ in range(2))
        self.o = nn.Linear(size.width, size.width, bias=False)
        self.gate, self.up = (nn.Linear(size.width, size.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(size.inner, size.width, bias=False)
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(size.width)) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.head)).transpose(1, 2)

        def turned(y: Tensor) -> Tensor:
            low, high = y.chunk(2, -1)
            return y * cos + torch.cat((-high, low), -1) * sin

        z = _norm(x, self.norms[0])
        q, k, v = turned(heads(self.q(z))), turned(heads(self.k(z))), heads(self.v(z))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(z.transpose(1, 2).flatten(2))
        z = _norm(x, self.norms[1])
        return x + self.down(F.silu(self.gate(z)) * self.up(z))


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def make_block(size: Size, device: str, dtype: torch.dtype) -> Block:
    torch.manual_seed(0)
    with torch.device(device):
        return Block(size).to(dtype).requires_grad_(False)


def adapt(block: Block, backend: str) -> Block:
    """A copy on the same weights whose seven linear layers are adapted with one v."""
    block = copy.deepcopy(block, {id(p): p for p in block.parameters()})
    device = block.q.weight.device
    draw = torch.Generator(device).manual_seed(1)
    v = nn.Parameter(0.1 * torch.randn(NUMBERS, device=device, generator=draw))
    for name, base in list(block.named_children()):
        if isinstance(base, nn.Linear):
            basis = torch.linalg.qr(torch.randn(base.out_features, RANK, device=device, generator=draw))[0].T
            projection = torch.randn(NUMBERS, RANK, RANK, device=device, generator=draw)
            layer = TinyLoRALayer(base, basis.contiguous(), torch.ones(RANK), projection, v)
            layer.backend = backend
            setattr(block, name, layer)
    return block


def inputs(block: Block, tokens: int, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    weight = block.norms[0]
    draw = torch.Generator(weight.device).manual_seed(2)
    shape = rows, tokens, block.size.width
    x = torch.randn(shape, device=weight.device, generator=draw).to(weight.dtype)
    angle = torch.arange(tokens, device=weight.device)[:, None] / 10000 ** (
        torch.arange(block.head // 2, device=weight.device) * 2 / block.head
    )
    angle = torch.cat((angle, angle), -1)
    return x, angle.cos().to(weight.dtype), angle.sin().to(weight.dtype)


def check(way: str, block: Block, size: Size, run: Callable) -> None:
    """Raises where y or dv of 64 tokens is not what the reference gives in float32 for the same weights."""
    limits = TOLERANCE[block.norms[0].dtype]
    x, cos, sin = inputs(block, 64)
    exact = adapt(make_block(size, str(x.device), torch.float32).to(x.dtype).float(), "reference")
    found, expected = (
        _outputs(call, vector_of(module), *(t.to(dtype) for t in (x, cos, sin)))
        for call, module, dtype in ((run, block, x.dtype), (exact, exact, torch.float32))
    )
    for name, limit, ours, theirs in zip(("y", "dv"), limits, found, expected, strict=True):
        error = float((ours.float() - theirs).norm() / theirs.norm())
        if not error < limit:
            raise AssertionError(f"{way}: {name}: error {error:.1e}, expected {limit:.0e} of the reference at most")


def vector_of(block: Block) -> Tensor:
    return next(p for p in block.parameters() if p.requires_grad)


def _outputs(call: Callable, v: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    y = call(x, cos, sin)
    return y.detach(), torch.autograd.grad(y.float().square().mean(), v)[0]


def measure(
    size: Size, device: str, dtype: torch.dtype, tokens: int, phase: str, *, tuned: bool = False, seconds: float = 5.0,
    ways: tuple[str, ...] = WAYS,
) -> list[dict]:  # fmt: skip
    """Rows of one case; phase is "both" (forward and backward to x and v) or "forward" (without gradients)."""
    frozen = make_block(size, device, dtype)
    backends = {OP: choose(device, dtype, RANK), DISSOLVED: "inductor"}
    blocks = {way: adapt(frozen, backends[way]) if way in backends else copy.deepcopy(frozen) for way in ways}
    compiled = {}
    for way, block in blocks.items():
        torch._dynamo.reset()  # or the next one is a recompilation of this one's forward, and may be of any shape
        compiled[way] = torch.compile(block, fullgraph=True, dynamic=False, options=TUNED if tuned else None)
        if way in backends:
            check(f"{way} {device}", block, size, compiled[way])
        _step(compiled[way], block, device, tokens, phase)()  # compiles for this length
    steps = {way: _step(run, blocks[way], device, tokens, phase) for way, run in compiled.items()}
    timed = interleave(steps, FROZEN, seconds=seconds, most=500)
    described = {
        "device": device_name(device), "block": size.name, "tokens": tokens, "dtype": str(dtype).removeprefix("torch."),
        "phase": phase, "tuned": int(tuned),
    }  # fmt: skip
    found = {way: timed[way]["seconds"] for way in ways}
    return [
        described
        | {"way": way, "backend": backends.get(way, ""), "rounds": s.rounds, "us": s.p50}
        | {"ratio_p20": s.ratio_p20, "ratio_p50": s.ratio_p50, "ratio_p80": s.ratio_p80}
        for way, s in found.items()
    ]


def _step(run: Callable, block: Block, device: str, tokens: int, phase: str) -> Callable[[], dict[str, float]]:
    x, cos, sin = inputs(block, tokens)
    wanted = [x.requires_grad_(phase == "both"), *(p for p in block.parameters() if p.requires_grad)]
    g = torch.ones_like(x).normal_(generator=torch.Generator(device).manual_seed(3))

    def step() -> None:
        if phase == "forward":
            with torch.no_grad():
                run(x, cos, sin)
        else:
            torch.autograd.grad(run(x, cos, sin), wanted, g)

    def on_stream() -> dict[str, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return {"seconds": 1e-3 * start.elapsed_time(end)}

    def on_host() -> dict[str, float]:
        begun = time.perf_counter()
        step()
        return {"seconds": time.perf_counter() - begun}

    return on_stream if device == "cuda" else on_host


@functools.cache
def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else environment.cpu_model()


def cases(options: argparse.Namespace) -> Iterator[tuple[int, str, bool]]:
    for tuned in (False, True) if options.tuned and options.device == "cuda" else (False,):
        for tokens in options.tokens or TOKENS[options.device]:
            for phase in options.phases:
                if tokens > 1 or phase == "forward":
                    yield tokens, phase, tuned


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--phases", choices=("both", "forward"), nargs="+", default=["both", "forward"])
    parser.add_argument("--tuned", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds", type=float, default=5.0, help="a case, beside its compilation (default: 5)")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(argv)
    size, dtype, facts = SIZES[options.device], getattr(torch, options.dtype), environment.describe()
    for tokens, phase, tuned in cases(options):
        rows = measure(size, options.device, dtype, tokens, phase, tuned=tuned, seconds=options.seconds)
        table.append(options.out / FILE, COLUMNS, [row | facts for row in rows])
        numbers = ", ".join(f"{row['way']} {row['ratio_p50']:.3f}" for row in rows[1:])
        case = f"{tokens} tokens, {phase}, {options.dtype}{', tuned' if tuned else ''}"
        print(f"{case}: {rows[0]['us']:.0f} us; {numbers}", flush=True)


if __name__ == "__main__":
    main()
