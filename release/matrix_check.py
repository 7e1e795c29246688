"""What every environment of the matrix is asked, with the installed package: one line of JSON, or an error.

    python matrix_check.py BACKEND      BACKEND is the one that must serve CPU tensors: "cpu" or "reference"
"""
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import tinylora_kernels as tl
from tinylora_kernels.functional import tiny_lora_update
from tinylora_kernels.ops import choose
from tinylora_kernels.ops.native import library as native

# Against the float64 reference on the same inputs: four times the error of the plain PyTorch chain, which is that of dv
# (a float32 sum that cancels) in float32, and the rounding of the outputs in the others.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def forward_and_backward(dtype: torch.dtype, compute: torch.dtype, backend: str) -> list[torch.Tensor]:
    """y, dy and dv of one update of activations of `dtype`, computed in `compute`; the same inputs everywhere."""
    rows, features, rank, numbers = 40, 96, 2, 13
    wave = torch.arange(rows * features, dtype=torch.float64).sin()
    single = torch.float64 if compute is torch.float64 else torch.float32
    y0 = wave.view(rows, features).to(dtype).to(compute).requires_grad_()  # [N, D]
    g = wave.cos().view(rows, features).to(dtype).to(compute)  # [N, D]
    basis = torch.linalg.qr(wave[: features * rank].cos().view(features, rank)).Q.T.float().to(single).contiguous()
    projection = wave[: numbers * rank * rank].view(numbers, rank, rank).float().to(single)  # [u, r, r]
    v = wave[7 : 7 + numbers].mul(0.1).float().to(single).requires_grad_()  # [u]
    y = tiny_lora_update(y0, basis, v, projection, backend=backend)
    y.backward(g)
    return [y.detach(), y0.grad, v.grad]


def check_update(backend: str) -> float:
    """Largest error of y, dy and dv in float32, relative to the largest value; asserts it for every dtype."""
    errors = {}
    for dtype, tolerance in TOLERANCE.items():
        exact = forward_and_backward(dtype, torch.float64, "reference")
        found = forward_and_backward(dtype, dtype, backend)
        pairs = zip(found, exact, strict=True)
        errors[dtype] = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
        assert errors[dtype] <= tolerance, f"{dtype}: error {errors[dtype]:.1e}, expected at most {tolerance:.0e}"
    return errors[torch.float32]


def check_adapter_file() -> None:
    """An adapter that is saved and loaded into a fresh base computes the same bits."""
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 24))

    x = torch.arange(64.0).sin().view(2, 32)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "adapter.safetensors"
        model = tl.apply_tiny_lora(base(), tl.TinyLoRAConfig(trainable_dim=3, n_tie=2, cache=False))
        for vector in tl.trainable_vectors(model):
            vector.copy_(torch.tensor([0.1, -0.2, 0.3]))
        tl.save_adapter(model, path)
        loaded = tl.load_adapter(base(), path, cache=False)
        assert torch.equal(loaded(x), model(x)), "the loaded adapter computes something else"
        assert not torch.equal(model(x), base()(x)), "the adapter changes nothing"


def main(backend: str) -> None:
    status = native.load()
    assert Path(tl.__file__).is_relative_to(sys.prefix), f"{tl.__file__} is not the installed package"
    assert (status.error is None) == (backend == "cpu"), status.error
    assert choose("cpu", torch.float32, 2) == backend
    error = check_update(backend)
    check_adapter_file()
    facts = {"python": platform.python_version(), "torch": torch.__version__, "isa": status.isa, "error": error}
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
