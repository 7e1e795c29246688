"""Times variants that a card must choose between; README.md has the rule by which the figures decide.

    python -m bench.gpu.variants [--families persistent skinny cutlass] [--cases q8192 gate2048] [--device cpu]

A ratio is time over the frozen product; whole ways end with dv where the direction is backward. Each is checked against
float64 before it is timed; a wrong or crashing one is named and left out. What is missing (Triton, Hopper, a library of
CUTLASS) is said.

    persistent         pass, then the product with the term in fp32 in its epilogue
    ..., dependent     the same, the product launched while the pass runs; it waits for gains at the end of a tile
    ..., step          the term as one more step of the product's depth
    ..., given         either without the pass: what is left where one pass serves several layers
    cutlass            pass, then CUTLASS's product with the term in its epilogue
    skinny 32, 64      up to 16 rows: t made by the product itself, by so many columns a program
    ..., passed        the pass, and the product dependent on it
    ..., bare          the product alone: what another library than cuBLAS costs
"""
from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..measure import device_times, emit
from ..products import FEW, SHAPES, Side
from . import dependent, gate

CASES = {
    "persistent": ["q8192", "gate8192", "q2048", "gate2048", "down8192", "kv8192", "gate512"],
    "skinny": ["q1", "gate1", "down1", "kv1", "q16", "gate16"],
    "cutlass": ["q8192", "gate8192", "q2048", "gate2048", "down8192", "kv8192"],
}


class Way(NamedTuple):
    """A run on buffers i, and what it makes."""

    run: Callable[[int], None]
    term: bool = True
    t: bool = True
    dv: bool = False


class Passed:
    """A side and its pass: coefficients and gains of every row, on each of the buffers."""

    def __init__(self, side: Side) -> None:
        from . import coefficients as of

        self.side, self.of = side, of
        rank, dtype = len(side.near[0]), side.x[0].dtype
        self.buffers = [of.buffers(x, rank) for x in side.x]
        self.halves = [of.halves_of(factor, dtype) for factor in side.near]
        self.deep = [of.deep_factor(factor, dtype) for factor in side.far]
        side.t, side.dv = [b.t for b in self.buffers], torch.empty_like(side.v)
        for i in range(side.copies):
            self.run(i)

    def run(self, i: int, deep: bool = True, dependents: bool = False) -> None:
        self.of.coefficients(
            self.side.x[i], self.halves[i], self.side.v, self.side.projection, self.buffers[i],
            backward=self.side.backward, saved=self.side.saved if self.side.backward else None, deep=deep,
            dependents=dependents,
        )  # fmt: skip

    def gradient(self, i: int) -> None:
        if self.side.backward:
            self.of.vector_grad(self.buffers[i], self.side.projection, self.side.dv)


def persistent_ways(side: Side) -> dict[str, Way]:
    from . import persistent

    passed, dv, none = Passed(side), side.backward, persistent.Term.NONE
    programs = torch.cuda.get_device_properties(0).multi_processor_count

    def product(i: int, tiling, term, behind: bool = False) -> None:
        factor = passed.deep[i] if term is persistent.Term.STEP else side.far[i]
        persistent.product(
            side.x[i], side.weights[i], side.d[i], backward=side.backward, programs=programs, tiling=tiling, term=term,
            gains=passed.buffers[i], factor=factor, dependent=behind,
        )  # fmt: skip

    bare = {str(tiling): lambda i, tiling=tiling: product(i, tiling, none) for tiling in persistent.TILINGS}
    times = device_times(bare, side.copies, "cuda")
    by_time = sorted(persistent.TILINGS, key=lambda tiling: times[str(tiling)][0])
    found = {"persistent, bare": Way(lambda i: product(i, by_time[0], none), term=False, t=False)}
    for term in (persistent.Term.EPILOGUE, persistent.Term.STEP):
        best = next(tiling for tiling in by_time if persistent.fits(tiling, term, len(side.near[0])))
        print(f"persistent, {term.name.lower()}: {best}", flush=True)
        name = "persistent" if term is persistent.Term.EPILOGUE else "persistent, step"

        def whole(i: int, behind: bool = False, best=best, term=term) -> None:
            passed.run(i, term is persistent.Term.STEP, dependents=behind)
            product(i, best, term, behind)
            passed.gradient(i)

        found[f"{name}, given"] = Way(lambda i, best=best, term=term: product(i, best, term), t=False)
        found[name] = Way(whole, dv=dv)
        if dependent.why_not() is None:
            found[f"{name}, dependent"] = Way(lambda i, whole=whole: whole(i, True), dv=dv)
    return found


def skinny_ways(side: Side) -> dict[str, Way]:
    from . import skinny

    passed, term = Passed(side), skinny.Term
    own = [torch.empty_like(t) for t in side.t]  # t of the product, beside the pass's
    found = {}
    for columns in skinny.COLUMNS:

        def product(i: int, term=term.INSIDE, behind: bool = False, columns=columns) -> None:
            side.t[i] = own[i] if term is skinny.Term.INSIDE else passed.buffers[i].t
            skinny.product(
                side.x[i], side.weights[i], side.d[i], side.v, side.projection, columns=columns, term=term,
                halves=passed.halves[i], basis=side.far[i], t=own[i], gains=passed.buffers[i].gains, dependent=behind,
            )  # fmt: skip

        def after_pass(i: int, product=product) -> None:
            passed.run(i, deep=False, dependents=True)
            product(i, term.GIVEN, True)

        name = f"skinny {columns}"
        found[f"{name}, bare"] = Way(lambda i, product=product: product(i, term.NONE), term=False, t=False)
        found[name] = Way(product)
        if dependent.why_not() is None:
            found[f"{name}, dependent"] = Way(lambda i, product=product: product(i, term.INSIDE, True))
            found[f"{name}, passed"] = Way(after_pass)
    return found


def cutlass_ways(side: Side) -> dict[str, Way]:
    from . import cutlass

    library = cutlass.Library()
    passed = Passed(side)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count

    def product(i: int, how: tuple[str, int], term: bool) -> None:
        library.product(
            side.x[i], side.weights[i], side.d[i], backward=side.backward, config=how[0], swizzle=how[1],
            multiprocessors=multiprocessors, gains=passed.buffers[i].gains if term else None, factor=side.far[i],
            stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip

    hows = {f"{c}, {s}": (c, s) for c in library.products for s in cutlass.SWIZZLES}
    bare = {name: lambda i, how=how: product(i, how, False) for name, how in hows.items()}
    times = device_times(bare, side.copies, "cuda")
    best = min(times, key=lambda name: times[name][0])
    print(f"cutlass: tile {best}", flush=True)

    def whole(i: int) -> None:
        passed.run(i, deep=False)
        product(i, hows[best], True)
        passed.gradient(i)

    return {
        "cutlass, bare": Way(lambda i: product(i, hows[best], False), term=False, t=False),
        "cutlass, given": Way(lambda i: product(i, hows[best], True), t=False),
        "cutlass": Way(whole, dv=side.backward),
    }


WAYS = {"persistent": persistent_ways, "skinny": skinny_ways, "cutlass": cutlass_ways}


def run(family: str, case: str) -> None:
    name = case.rstrip("0123456789")
    rows, (out, width) = int(case[len(name) :]), SHAPES[name]
    for backward in (False, True) if rows > FEW else (False,):
        side = Side(out, width, rows, backward, "cuda")
        direction = "backward" if backward else "forward"
        runs = {"frozen": lambda i, side=side: torch.mm(side.x[i], side.matrix(i), out=side.d[i])}
        for way, made in WAYS[family](side).items():
            try:
                gate.check(side, made.run, term=made.term, t=made.t, dv=made.dv)
                runs[way] = made.run
            except Exception as error:
                print(f"WRONG {case} {direction} {way}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        for way, (us, ratio) in device_times(runs, side.copies, "cuda").items():
            emit(f"variants, {direction}", case, way, us, None if way == "frozen" else ratio)


def why_not(device: str) -> str | None:
    """None where there is something to time, else what is missing."""
    if device != "cuda" or not torch.cuda.is_available():
        return "variants need a GPU; tests/sim/test_variants.py runs them under Triton's interpreter"
    if torch.cuda.get_device_capability() < (9, 0):
        return f"variants are for Hopper and newer, not {torch.cuda.get_device_name()}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"variants need Triton ({error})"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.variants", description=__doc__)
    parser.add_argument("--families", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args(arguments)
    if problem := why_not(options.device):
        print(f"skipped: {problem}", flush=True)
        return 0
    if problem := dependent.why_not():
        print(f"no dependent launches: {problem}", flush=True)
    for family in options.families:
        for case in options.cases or CASES[family]:
            try:
                run(family, case)
            except OSError as error:  # no library of CUTLASS
                print(f"{family} skipped: {error}", flush=True)
                break
            except Exception:
                print(f"WRONG {family} {case}", traceback.format_exc(limit=3), flush=True)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
