"""The gate of the variants that a card must choose between, and what their parts of make gpu say without a card."""
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as kit
from bench.gpu.products import Side
from bench.gpu.variants import __main__ as variants
from bench.gpu.variants import cutlass, gate

BFLOAT16 = torch.bfloat16


def half(x: torch.Tensor) -> torch.Tensor:
    """What a bfloat16 keeps: of a factor its high half."""
    return x.bfloat16().float()


def cut_off(d: torch.Tensor) -> torch.Tensor:
    """fp32 to bfloat16 without rounding."""
    return (d.float().contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)


def once(d: torch.Tensor) -> torch.Tensor:
    return d


FAULTS = {  # name: what is wrong with the way
    "no term": dict(term=0.0),
    "M transposed": dict(transposed=True),
    "the product rounded before the term": dict(between=half),
    "cut off": dict(store=cut_off),
    "t without the low half": dict(near=half),
    "an element is not written": dict(hole=True),
    "dv of another t": dict(other_t=True),
}


def run_of(
    side: Side, *, term=1.0, transposed=False, between=once, store=once, near=once, hole=False, other_t=False
):  # fmt: skip
    """A right way, in fp32 with one rounding, but for a fault."""

    def run(i: int) -> None:
        m = torch.tensordot(side.v, side.projection, 1)
        m = m if side.backward != transposed else m.T
        x = side.x[i].float()
        t = x @ near(side.near[i]).T
        side.t[i].copy_(t)
        d = between(x @ side.matrix(i).float()) + term * t @ m @ side.far[i]
        side.d[i].copy_(store(d))
        if hole:
            side.d[i][side.rows // 2 - 3, 5] = torch.nan  # of a row that is not compared
        if side.backward:
            saved = side.saved.flip(0) if other_t else side.saved
            side.dv = torch.einsum("ijk,jk->i", side.projection, t.T @ saved)

    return run


def make_side(backward: bool) -> Side:
    side = Side(64, 96, 500, backward, "cpu")
    side.t = [torch.empty(500, 2)] * 2
    side.v *= 0.05  # the term a part of d: what happens to the product shows
    return side


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
def test_the_gate_lets_one_rounding_pass(backward):
    side = make_side(backward)
    errors = gate.check(side, run_of(side), dv=backward)
    assert set(errors) == {"d", "t", *(["dv"] if backward else [])}
    gate.check(side, run_of(side, term=0.0), term=False)


@pytest.mark.parametrize("name", FAULTS)
def test_the_gate_catches(name):
    side = make_side(backward=True)
    with pytest.raises(gate.Wrong):
        gate.check(side, run_of(side, **FAULTS[name]), dv=True)


def test_they_come_last_in_make_gpu():
    for device in ("cuda", "cpu"):
        names = [part.name for part in kit.parts(device, Path("other"))]
        first = next(i for i, name in enumerate(names) if name.startswith("variants"))
        assert all(name.startswith("variants") for name in names[first:]) and first > 4


def test_without_a_card_they_say_so(capsys):
    assert variants.main(["--device", "cpu"]) == 0
    assert "skipped: variants need a GPU" in capsys.readouterr().out


def test_a_library_of_cutlass_that_cannot_be_built_or_is_not_there(tmp_path, monkeypatch):
    assert "no tree of CUTLASS" in (cutlass.why_not_built(tmp_path) or "") or cutlass.shutil.which("nvcc") is None
    monkeypatch.setattr(cutlass.shutil, "which", lambda name: None)
    assert "no nvcc" in cutlass.why_not_built(tmp_path)
    with pytest.raises(RuntimeError, match="no nvcc"):
        cutlass.build(tmp_path, out=tmp_path / "library.so")
    with pytest.raises(OSError, match="library.so is not there: no nvcc"):
        cutlass.Library(tmp_path / "library.so")


def test_a_tree_of_cutlass_is_known_by_its_headers(tmp_path):
    assert cutlass.find_tree(tmp_path) is None
    for part in ("include/cutlass", "tools/util/include"):
        (tmp_path / part).mkdir(parents=True)
    assert cutlass.find_tree(tmp_path) == tmp_path


NVCC = """#!/bin/sh
echo "$@" >> {log}
for last; do :; done
: > "$last"
echo "ptxas info    : Used 168 registers" >&2
echo "    0 bytes stack frame, 0 bytes spill stores, 8 bytes spill loads" >&2
"""


def test_a_library_of_cutlass_is_built_a_configuration_at_a_time(tmp_path, monkeypatch):
    """With a compiler that only writes down what it is asked for."""
    for part in ("include/cutlass", "tools/util/include"):
        (tmp_path / part).mkdir(parents=True)
    log, compiler = tmp_path / "log", tmp_path / "nvcc"
    compiler.write_text(NVCC.format(log=log))
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    out = tmp_path / "library.so"
    said = cutlass.build(tmp_path, ("128x256", "64x256"), out)
    assert said == dict.fromkeys(("128x256", "64x256"), ["168 registers, 0 bytes spill stores, 8 bytes spill loads"])
    first, second, linked = log.read_text().splitlines()
    assert "-DCONFIG=0" in first and "-DCONFIG=2" in second and "sm_90a" in first
    assert "-shared" in linked and linked.endswith(str(out)) and out.exists()
