"""Why the CUDA kernels cannot run on a machine, told from its driver and its GPU, both of which are made up here."""
import pytest
import torch

from tinylora_kernels.ops.native import cuda_driver

SEVEN = "75-real 80-real 86-real 89-real 90-real 100-real 120"


@pytest.fixture
def machine(monkeypatch):
    """machine(torch's CUDA, the driver's, compute capability or None) pretends to be that machine."""

    def pretend(torch_cuda: str | None, driver: tuple[int, int] | None, capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(cuda_driver, "driver_version", lambda: driver)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return pretend


@pytest.mark.parametrize(
    "torch_cuda, driver, capability, reason",
    [
        ("13.0", (13, 0), (9, 0), None),
        ("12.8", (13, 2), (8, 6), None),
        (None, (13, 0), None, "this torch was built without CUDA"),
        ("13.0", None, None, "no NVIDIA driver is installed"),
        ("12.8", (12, 4), (9, 0), "CUDA 12.4, the library was built with 13.0.88. To change that: install driver 580"),
        ("13.0", (13, 0), None, "no GPU is visible"),
        ("13.0", (13, 0), (7, 0), "the GPU is sm_70, the library was built for 75-real"),
    ],
)
def test_reasons(machine, torch_cuda, driver, capability, reason):
    machine(torch_cuda, driver, capability)
    found = cuda_driver.why_not("13.0.88", SEVEN)
    assert found is None if reason is None else reason in found and "To change that: " in found


@pytest.mark.parametrize(
    "architectures, runs, does_not",
    [
        (SEVEN, [(7, 5), (8, 0), (8, 7), (9, 0), (10, 3), (12, 1), (13, 0)], [(7, 0), (6, 1), (11, 0)]),
        ("80-real", [(8, 0), (8, 9)], [(7, 5), (9, 0)]),
        ("86-real", [(8, 6)], [(8, 0)]),
        ("80-virtual", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("90a-real", [(9, 0)], [(8, 9), (10, 0)]),
        ("native", [(7, 0)], []),
    ],
)
def test_which_gpus_an_architecture_covers(architectures, runs, does_not):
    assert all(cuda_driver.covers(architectures, capability) for capability in runs)
    assert not any(cuda_driver.covers(architectures, capability) for capability in does_not)


def test_the_driver_of_this_machine_is_asked_without_an_error():
    version = cuda_driver.driver_version()
    assert version is None or version >= (11, 0)
