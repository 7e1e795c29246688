"""The names of wheels and machines; the wheels are built by `make wheels`, and refused there."""
import pytest


def test_a_flavour_names_its_machine(script, monkeypatch):
    wheels = script("wheels")
    monkeypatch.setattr(wheels.platform, "machine", lambda: "x86_64")
    assert [wheels.machine_of(name) for name in ("cpu", "gpu", "gpu-aarch64")] == ["x86_64", "x86_64", "aarch64"]


def test_without_a_compiler_for_it_a_machine_is_refused_in_one_line(script, monkeypatch, tmp_path):
    wheels = script("wheels")
    monkeypatch.setattr(wheels.shutil, "which", lambda name: None)
    with pytest.raises(wheels.Failure, match=r"^aarch64: expected aarch64-linux-gnu-g\+\+ on PATH, found none; apt "):
        wheels.for_another_machine("aarch64", tmp_path, tmp_path)
    with pytest.raises(wheels.Failure, match=r"^riscv64: expected .* found none; build it on a machine of riscv64$"):
        wheels.for_another_machine("riscv64", tmp_path, tmp_path)
