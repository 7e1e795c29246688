"""The variants of bench/gpu under Triton's own interpreter, and planted faults of them: one process, one line a check.

    TRITON_INTERPRET=1 python -m tests.sim.variants_interpreter

float16 alone: the interpreter's products of bfloat16 are wrong. What surrounds every operand in memory is NaN, which a
load without its mask brings into the result, and which a store without its mask overwrites.
"""
from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "bench" / "gpu" / "variants"
MODULES = ("coefficients", "persistent", "skinny")


class Shape(NamedTuple):
    out: int
    width: int
    rows: int
    rank: int = 2
    backward: bool = False

    def __str__(self) -> str:
        return f"{self.rows}x{self.width}->{self.out} r{self.rank}{' backward' * self.backward}"


MANY = [  # rows on 16 bytes, and not; parts of tiles on every side; fewer tiles than programs, and several each
    Shape(72, 40, 37), Shape(77, 45, 19), Shape(130, 70, 33, 4), Shape(64, 48, 20, 8), Shape(50, 300, 5, 1),
    Shape(1, 33, 3, 1), Shape(96, 8, 1), Shape(200, 64, 150), Shape(33, 31, 70, 8),
]  # fmt: skip
MANY += [shape._replace(backward=True) for shape in MANY]
FEW = [  # one piece of W's rows and several, whole and not; a part of the last program, and one column
    Shape(72, 40, 5), Shape(29, 513, 1), Shape(28, 256, 16), Shape(100, 300, 2, 1), Shape(64, 520, 3, 8),
    Shape(57, 768, 7, 4), Shape(1, 33, 3, 1),
]  # fmt: skip


class Mutant(NamedTuple):
    module: str
    old: str
    new: str


MUTANTS = {
    "M and its transpose swapped": Mutant("coefficients",
        "gains = tl.sum(t[:, None, :] * mixing, axis=2)", "gains = tl.sum(t[:, :, None] * mixing, axis=1)"),
    "M not transposed backward": Mutant("coefficients",
        "gains = tl.sum(t[:, :, None] * mixing, axis=1)", "gains = tl.sum(t[:, None, :] * mixing, axis=2)"),
    "the low half of the factor forgotten": Mutant("coefficients",
        "halves[:rank], halves[rank : 2 * rank] = high, (factor - high.float()).to(dtype)",
        "halves[:rank] = high"),
    "coefficients of rows past the last": Mutant("coefficients", "row_ok = rows < N\n", "row_ok = rows < N + 1\n"),
    "the pass loads columns past the end": Mutant("coefficients",
        "row_ok[:, None] & (cols < E)[None, :]", "row_ok[:, None] & (cols <= E)[None, :]"),
    "dM is t^T a": Mutant("coefficients", "t[:, :, None] * saved[:, None, :]", "t[:, None, :] * saved[:, :, None]"),
    "the step without gains' low half": Mutant("coefficients",
        "tl.store(deep + R, low", "tl.store(deep + R, 0.0 * low"),
    "the step without the factor's low half": Mutant("coefficients",
        "= high, high, (factor - high.float()).to(dtype)", "= high, high, torch.zeros_like(high)"),
    "factors of the first columns": Mutant("persistent",
        "i, j = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)\n            for",
        "i, j = row + tl.arange(0, ROWS), tl.arange(0, COLUMNS)\n            for"),
    "gains of the first rows": Mutant("persistent",
        "i, j = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)\n            for",
        "i, j = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)\n            for"),
    "the first factor for every j": Mutant("persistent", "factor_ptr + r * D + j", "factor_ptr + j"),
    "the step of the first columns": Mutant("persistent", "0, column, DEPTH, D, D,", "0, 0, DEPTH, D, D,"),
    "the step of the first rows": Mutant("persistent", "row, 0, N, DEPTH, DEPTH,", "0, 0, N, DEPTH, DEPTH,"),
    "the second piece over the first": Mutant("persistent", "right, row, column + HALF,", "right, row, column,"),
    "a tile loads columns past the end": Mutant("persistent",
        "tile = tl.load(at, mask=(i < rows)[:, None] & (j < columns)[None, :]",
        "tile = tl.load(at, mask=(i < rows)[:, None] & (j <= columns)[None, :]"),
    "a tile is stored past the last row": Mutant("persistent",
        "tile.to(target.dtype.element_ty), mask=(i < rows)", "tile.to(target.dtype.element_ty), mask=(i <= rows)"),
    "the last group as high as the others": Mutant("persistent", "min(tiles_down - group * GROUP, GROUP)", "GROUP"),
    "one tile a program": Mutant("persistent", "tiles_down * tiles_across, tl.num_programs(0)",
        "tl.minimum(tl.num_programs(0), tiles_down * tiles_across), tl.num_programs(0)"),
    "columns between programs are lost": Mutant("skinny",
        "columns = tl.program_id(0) * OWN + place", "columns = tl.program_id(0) * COLUMNS + place"),
    "t without the factor's low half": Mutant("skinny",
        "mine = (place == OWN + i) | (place == OWN + R + i)", "mine = place == OWN + i"),
    "M transposed for few rows": Mutant("skinny",
        "gains = tl.sum(t[:, None, :] * mixing, axis=2)", "gains = tl.sum(t[:, :, None] * mixing, axis=1)"),
    "the first piece of W twice": Mutant("skinny", "tl.range(BLOCK, E, BLOCK", "tl.range(0, E, BLOCK"),
    "W is loaded past its end": Mutant("skinny",
        "read[:, None] & (at < E)[None, :]", "read[:, None] & (at <= E)[None, :]"),
    "rows past the last are stored": Mutant("skinny",
        "element_ty), mask=row_ok[:, None] & inside[None, :])",
        "element_ty), mask=(rows <= N)[:, None] & inside[None, :])"),
    "the first row of U^T for every j": Mutant("skinny", "basis_ptr + j * D + columns", "basis_ptr + columns"),
    "given gains of the first j": Mutant("skinny",
        "gains_ptr + rank[None, :] * N +", "gains_ptr + 0 * rank[None, :] +"),
}  # fmt: skip


def framed(tensor):
    """The same matrix amid NaN, 8 elements on each side and a row above and below; rows on 16 bytes if they were."""
    import torch

    rows, width = tensor.shape
    wide = torch.full((rows + 2, width + 16), torch.nan, dtype=tensor.dtype)
    wide[1:-1, 8:-8] = tensor
    return wide[1:-1, 8:-8]


def enclosed(tensor):
    """The same tensor, contiguous, between NaN."""
    import torch

    flat = torch.full((tensor.numel() + 128,), torch.nan, dtype=tensor.dtype)
    flat[64:-64] = tensor.flatten()
    return flat[64:-64].view(tensor.shape)


def untouched(tensor) -> bool:
    """Whether the frame is still NaN."""
    whole = tensor._base
    return int(whole.isnan().sum()) - int(tensor.isnan().sum()) == whole.numel() - tensor.numel()


def make_side(shape: Shape):
    import torch

    from bench.gpu.products import Side

    side = Side(shape.out, shape.width, shape.rows, shape.backward, "cpu", shape.rank, torch.float16)
    side.copies = 1
    for name in ("x", "weights", "d"):
        setattr(side, name, [framed(getattr(side, name)[0])])
    side.near, side.far = [enclosed(side.near[0])], [enclosed(side.far[0])]
    side.v, side.projection, side.saved = map(enclosed, (side.v, side.projection, side.saved))
    return side


def checked(side, what: str, run: Callable[[int], None], **made: bool) -> None:
    from bench.gpu.variants import gate

    try:
        gate.check(side, run, **made)
    except gate.Wrong as error:
        raise AssertionError(f"{what}: {error}") from None
    assert untouched(side.d[0]), f"{what}: wrote outside d"


def check_many(modules: SimpleNamespace, shape: Shape) -> None:
    """The pass, and the persistent product in every way, with several tiles a program and several groups of tiles."""
    import torch

    of, persistent = modules.coefficients, modules.persistent
    side = make_side(shape)
    made = of.buffers(side.x[0], shape.rank)
    made = type(made)(*(enclosed(tensor) for tensor in made))
    halves = enclosed(of.halves_of(side.near[0], torch.float16))
    deep = enclosed(of.deep_factor(side.far[0], torch.float16))
    side.t, side.dv = [made.t], torch.empty_like(side.v)
    saved = side.saved if shape.backward else None
    tilings = persistent.Tiling(32, 64, 32, 2, 1), persistent.Tiling(16, 32, 16, 2, 2)
    persistent.GROUP = 2
    for term in persistent.Term:
        for tiling in tilings:

            def run(i: int, term=term, tiling=tiling) -> None:
                of.coefficients(
                    side.x[i], halves, side.v, side.projection, made, backward=shape.backward, saved=saved,
                    deep=term is persistent.Term.STEP,
                )  # fmt: skip
                if shape.backward:
                    of.vector_grad(made, side.projection, side.dv)
                persistent.product(
                    side.x[i], side.weights[i], side.d[i], backward=shape.backward, programs=3, tiling=tiling,
                    term=term, gains=made, factor=deep if term is persistent.Term.STEP else side.far[i],
                )  # fmt: skip

            checked(side, f"{shape} {term.name} {tiling}", run, term=term > 0, dv=shape.backward)
            assert untouched(made.t) and untouched(made.gains) and untouched(made.deep), f"{shape}: wrote past gains"


def check_few(modules: SimpleNamespace, shape: Shape) -> None:
    import torch

    of, skinny = modules.coefficients, modules.skinny
    side = make_side(shape)
    made = of.buffers(side.x[0], shape.rank)
    made = type(made)(*(enclosed(tensor) for tensor in made))
    halves = enclosed(of.halves_of(side.near[0], torch.float16))
    side.t = [made.t]
    for columns in skinny.COLUMNS:
        for term in skinny.Term:

            def run(i: int, term=term, columns=columns) -> None:
                if term is skinny.Term.GIVEN:
                    of.coefficients(side.x[i], halves, side.v, side.projection, made, backward=False)
                skinny.product(
                    side.x[i], side.weights[i], side.d[i], side.v, side.projection, columns=columns, term=term,
                    halves=halves, basis=side.far[i], t=made.t, gains=made.gains,
                )  # fmt: skip

            checked(side, f"{shape} {term.name} {columns}", run, term=term > 0, t=term > 0)
            assert untouched(made.t), f"{shape}: wrote past t"


class Library:
    """What a library of CUTLASS is asked, answered by torch."""

    products = {"128x256": None}

    def product(self, x, w, d, *, backward, config, swizzle, multiprocessors, gains, factor, stream) -> None:
        found = x.float() @ (w if backward else w.T).float()
        d.copy_(found if gains is None else found + gains.T @ factor)


def figures(family: str, rows: int, dtype, **patched) -> dict[str, set[str]]:
    """Part -> the names that `python -m bench.gpu.variants` times for a family on a small shape, without a card.

    Args:
        patched: what else is another in bench/gpu/variants/__main__.py.
    """
    import torch

    from bench.gpu.products import Side
    from bench.gpu.variants import __main__ as kit
    from bench.gpu.variants import cutlass

    def side(out: int, width: int, rows: int, backward: bool, device: str) -> Side:
        return Side(64, 128, rows, backward, "cpu", 2, dtype)

    def times(runs, copies: int, device: str):
        assert copies == 2 and device == "cuda"
        return {name: (run(1), (1.0, 1.0))[1] for name, run in runs.items()}  # on the last of the buffers

    card = SimpleNamespace(multi_processor_count=3)
    said = io.StringIO()
    with (
        mock.patch.multiple(kit, Side=side, device_times=times, **patched),
        mock.patch.object(cutlass, "Library", Library),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: card),
        mock.patch.object(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0)),
        contextlib.redirect_stdout(said),
    ):
        kit.run(family, f"q{rows}")
    lines = said.getvalue().splitlines()
    assert not [line for line in lines if line.startswith("WRONG")], said.getvalue()
    found: dict[str, set[str]] = {}
    for row in (json.loads(line[1:]) for line in lines if line.startswith("@")):
        found.setdefault(row["part"], set()).add(row["name"])
    return found


WAYS = {  # what a family times where there are no dependent launches
    "persistent": {"bare", "given", "", "step", "step, given"},
    "cutlass": {"bare", "given", ""},
    "skinny": {"bare", ""},
}


def check_ways(modules: SimpleNamespace, family: str) -> None:
    """Every way that is timed passes its gate first."""
    import torch

    from bench.gpu.variants import dependent

    none = SimpleNamespace(why_not=lambda: "not under the interpreter")
    assert dependent.why_not() is None
    stems = [f"skinny {columns}" for columns in modules.skinny.COLUMNS] if family == "skinny" else [family]
    names = {"frozen"} | {", ".join(filter(None, (stem, way))) for stem in stems for way in WAYS[family]}
    found = figures(family, 5 if family == "skinny" else 40, torch.float16, dependent=none)
    assert found == {f"variants, {way}": names for way in ("forward", "backward")[: 1 if family == "skinny" else 2]}


def loaded(mutant: Mutant | None, folder: Path) -> SimpleNamespace:
    """The modules of the variants, one of them changed."""
    found = {name: importlib.import_module(f"bench.gpu.variants.{name}") for name in MODULES}
    if mutant is not None:
        text = (FOLDER / f"{mutant.module}.py").read_text()
        assert text.count(mutant.old) == 1, f"{mutant.module}.py: {text.count(mutant.old)} of {mutant.old!r}"
        path = folder / f"{mutant.module}.py"
        path.write_text(text.replace(mutant.old, mutant.new))
        found[mutant.module] = _module(path)
    return SimpleNamespace(**found)


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench.gpu.variants.mutated_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcomes() -> Iterator[dict]:
    """{"check": the case or the mutant, "error": what was found}, one after the other."""
    from triton.runtime.errors import InterpreterError

    with tempfile.TemporaryDirectory() as scratch:
        modules = loaded(None, Path(scratch))
        for check, shapes in ((check_many, MANY), (check_few, FEW)):
            for shape in shapes:
                yield {"check": f"{check.__name__} {shape}", "error": _error(check, modules, shape, AssertionError)}
        for family in WAYS:
            yield {"check": f"ways of {family}", "error": _error(check_ways, modules, family, AssertionError)}
        for name, mutant in MUTANTS.items():
            check, shapes = (check_few, FEW) if mutant.module == "skinny" else (check_many, MANY)
            errors = (
                _error(check, loaded(mutant, Path(scratch)), shape, (AssertionError, InterpreterError))
                for shape in shapes
            )
            yield {"check": name, "error": next(filter(None, errors), None)}


def _error(check, modules: SimpleNamespace, what: Shape | str, kinds) -> str | None:
    try:
        check(modules, what)
        return None
    except kinds as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


if __name__ == "__main__":
    inspect.getmembers = functools.cache(inspect.getmembers)  # the interpreter asks at every call of every function
    for outcome in outcomes():
        print(json.dumps(outcome), flush=True)
