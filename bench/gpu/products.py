"""Ways around the product of a frozen layer, over the product alone, on the shapes of Qwen2.5-7B. r = 2, u = 13, bf16.

    python bench/gpu/products.py --backend cuda [--label before] [--cases q8192 gate2048] [--device cpu]

    <label>         forward: product, then `update`; backward: `update_backward` with dv, then product
    <label>, first  forward: `low_rank`, then addmm; backward: `update_input_grad`, then addmm
    part: ...       the ops alone, in microseconds

Each is checked against float32 on sampled rows before it is timed; a wrong or crashing one is named and left out. Run
by its path, PYTHONPATH says which build of the package is measured.
"""
from __future__ import annotations

import argparse
import math
import sys
import traceback
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from measure import FLUSH, device_times, emit  # noqa: E402

from tinylora_kernels.ops import BACKENDS  # noqa: E402

SHAPES = {"q": (3584, 3584), "gate": (18944, 3584), "down": (3584, 18944), "kv": (512, 3584)}  # out, in
CASES = [  # what matters most first: a run that is cut short keeps what it has
    "q8192", "gate8192", "down8192", "kv8192", "q2048", "gate2048", "q1", "gate1", "q16", "gate512", "gate256",
    "gate1024", "gate64", "down2048", "kv2048", "q64", "down1",
]  # fmt: skip
NUMBERS, FEW = 13, 16  # rows up to which there is no backward pass to time


class Side:
    """One direction: d [N, n] = x [N, k] times W and the term; buffers for several rounds.

    near: the factor of x's side [r, k]; far: that of d's.
    """

    def __init__(
        self, out: int, width: int, rows: int, backward: bool, device: str, rank: int = 2,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        torch.manual_seed(out + 3 * width + rows)
        self.copies = max(2, math.ceil(FLUSH / (2 * (out * width + rows * (out + width))))) if device == "cuda" else 2
        kind = {"dtype": dtype, "device": device}
        self.backward, self.rows = backward, rows
        self.weights = [torch.randn(out, width, **kind) / width**0.5 for _ in range(self.copies)]
        bases = [torch.linalg.qr(torch.randn(out, rank, device=device))[0].T.contiguous() for _ in self.weights]
        rights = [basis @ weight.float() for basis, weight in zip(bases, self.weights, strict=True)]
        self.bases, self.rights = bases, rights
        self.near, self.far = (bases, rights) if backward else (rights, bases)
        self.n, self.k = (width, out) if backward else (out, width)
        self.v = torch.randn(NUMBERS, device=device) / NUMBERS**0.5
        self.projection = 20 * torch.randn(NUMBERS, rank, rank, device=device)
        self.x = [torch.randn(rows, self.k, **kind) for _ in self.weights]
        self.d = [torch.empty(rows, self.n, **kind) for _ in self.weights]
        self.t = [torch.empty(0, device=device)] * self.copies
        self.saved = torch.randn(rows, rank, device=device)  # t of the forward pass
        self.dv = torch.empty(0, device=device)

    def matrix(self, i: int) -> Tensor:
        """W as a product wants it, [k, n]."""
        return self.weights[i] if self.backward else self.weights[i].t()

    def check(self, run) -> None:
        self.d[0].fill_(torch.nan)
        found = run(0)
        at = torch.linspace(0, self.rows - 1, min(self.rows, 200), device=self.v.device).round().long()
        x = self.x[0][at].float()
        mixing = torch.einsum("i,ijk->jk", self.v, self.projection)
        t = x @ self.near[0].T
        d = x @ self.matrix(0).float() + t @ (mixing if self.backward else mixing.T) @ self.far[0]
        self._expect("d", found[at].float(), d)  # without its update it is off by 0.2 or more
        if self.backward:
            a = self.x[0].float() @ self.near[0].T
            self._expect("dv", self.dv, torch.einsum("ijk,jk->i", self.projection, a.T @ self.saved))
        else:
            self._expect("t", self.t[0][at], t, limit=3e-2)  # of y as it is rounded; of one row it may be small

    @staticmethod
    def _expect(name: str, found: Tensor, truth: Tensor, limit: float = 1e-2) -> None:
        error = float((found - truth).norm() / truth.norm())
        if not error < limit:
            raise ValueError(f"wrong {name}: error {error:.2e}")


def ways(side: Side, backend: str, label: str) -> tuple[dict, dict]:
    """name -> run on buffers i: whole directions, and parts of them."""
    ops = BACKENDS[backend]
    v, projection = side.v, side.projection

    def update(i: int) -> None:
        side.t[i] = ops.update(side.d[i], side.bases[i], v, projection, None, None, None)

    def after(i: int) -> Tensor:
        torch.mm(side.x[i], side.matrix(i), out=side.d[i])
        update(i)
        return side.d[i]

    def low_rank(i: int) -> Tensor:
        y, side.t[i] = ops.low_rank(side.x[i], side.rights[i], side.bases[i], v, projection, None, None)
        return y

    def first(i: int) -> Tensor:
        return low_rank(i).addmm_(side.x[i], side.matrix(i))

    def gradients(i: int, t: Tensor | None) -> Tensor:
        g0, side.dv = ops.update_backward(side.x[i], side.bases[i], v, projection, t, None, True)
        return g0

    def after_backward(i: int) -> Tensor:
        return torch.mm(gradients(i, side.saved), side.matrix(i), out=side.d[i])

    def input_grad(i: int) -> None:
        side.dv = ops.update_input_grad(
            side.d[i], side.rights[i], side.x[i], side.bases[i], v, projection, side.saved, None, False
        )

    def first_backward(i: int) -> Tensor:
        input_grad(i)
        return side.d[i].addmm_(side.x[i], side.matrix(i))

    if side.backward:
        whole = {label: after_backward, f"{label}, first": first_backward}
        parts = {"g0, dv": lambda i: gradients(i, side.saved), "g0": lambda i: gradients(i, None), "dx, dv": input_grad}
    else:
        whole, parts = {label: after, f"{label}, first": first}, {"update": update, "low_rank": low_rank}
    parts = {f"part: {label} {name}": run for name, run in parts.items()}
    if getattr(ops, "low_rank", None) is None:
        del whole[f"{label}, first"], parts[f"part: {label} {'dx, dv' if side.backward else 'low_rank'}"]
    return whole, parts


def run(case: str, backend: str, label: str, device: str) -> None:
    name = case.rstrip("0123456789")
    rows, (out, width) = int(case[len(name) :]), SHAPES[name]
    if device == "cpu":  # to try the script
        out, width, rows = out // 32, width // 32, min(rows, 64)
    for backward in (False, True) if rows > FEW else (False,):
        side = Side(out, width, rows, backward, device)
        direction = "backward" if backward else "forward"
        whole, parts = ways(side, backend, label)
        runs = {"frozen": lambda i, side=side: torch.mm(side.x[i], side.matrix(i), out=side.d[i])}
        for way, call in whole.items():
            try:
                side.check(call)
                runs[way] = call
            except Exception as error:
                print(f"WRONG {case} {direction} {way}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        for way, (us, ratio) in device_times(runs | parts, side.copies, device).items():
            emit(direction, case, way, us, None if way in parts or way == "frozen" else ratio)


def ceilings() -> None:
    """What the card copies and multiplies at best."""
    one, other = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    a, b, c = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    runs = {"copy": lambda i: other.copy_(one), "product": lambda i: torch.mm(a, b, out=c)}
    times = device_times(runs, 1, "cuda")
    copied, multiplied = 2**31 / times["copy"][0] * 1e-6, 2 * 8192**3 / times["product"][0] * 1e-6
    print(f"{torch.cuda.get_device_name()}: copy {copied:.2f} TB/s, 8192^3 {multiplied:.0f} TFLOP/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--label")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    if options.device == "cuda" and options.label is None:
        ceilings()
    for case in options.cases:
        try:
            run(case, options.backend, options.label or options.backend, options.device)
        except Exception:
            print(f"WRONG {case}", traceback.format_exc(limit=3), flush=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
