"""A digest of everything the package computes and writes for fixed inputs: run it before and after a refactoring.

    python bench/same_bits.py > before.txt;  ...;  python bench/same_bits.py | diff before.txt -

Public names alone, so that it runs on either side of a move. The digests differ between machines (instruction sets
round differently) and hold for one torch and one number of threads, which is 1 here.
"""
from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import tinylora_kernels as tk


def digest(*tensors: Tensor) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous()
        total.update(f"{flat.dtype} {list(flat.shape)}".encode())
        total.update(flat.view(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return total.hexdigest()[:16]


class Model(nn.Module):
    """One layer of every kind, in the shapes that take different ways: wide, narrow, with and without a bias."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.qkv = nn.Linear(64, 96, bias=True)
        self.out = nn.Linear(96, 64, bias=False)
        self.up = nn.Linear(64, 288, bias=False)
        self.down = nn.Linear(288, 64, bias=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)  # [B, T, 64]
        x = x + self.conv(x.mT).mT
        x = x + self.out(torch.tanh(self.qkv(x)))
        return x + self.down(torch.tanh(self.up(x)))


def make_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(5)
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():  # spectra that fall: singular vectors of their own
            if parameter.dim() > 1:
                flat = parameter.flatten(1)
                left, right = torch.randn(flat.shape[0], 4), torch.randn(4, flat.shape[1])
                flat += left @ torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])) @ right / flat.shape[1] ** 0.5
    return model.to(dtype)


NAMES = ["embed", "conv", "qkv", "out", "up", "down"]
CONFIGS = {
    "tiny": tk.TinyLoRAConfig(trainable_dim=13, n_tie=4, target_modules=NAMES, init="uniform", cache=False),
    "linear": tk.TinyLoRAConfig(trainable_dim=3, init="uniform", seed=7, cache=False),
    "sqrt": tk.TinyLoRAConfig(frozen_rank=4, trainable_dim=5, scaling="sqrt", alpha=0.5, tying="structured", n_tie=2,
                              target_modules=NAMES, init="uniform", cache=False),
    "fused": tk.TinyLoRAConfig(trainable_dim=2, target_modules=["qkv", "up"], init="uniform", cache=False,
                               fused={"qkv": (64, 16, 16), "up": 2}),
    "xs": tk.LoRAXSConfig(rank=4, target_modules=NAMES, init="normal", cache=False),
}  # fmt: skip


def adapted(kind: str, dtype: torch.dtype) -> nn.Module:
    config = CONFIGS[kind]
    apply = tk.apply_lora_xs if isinstance(config, tk.LoRAXSConfig) else tk.apply_tiny_lora
    model = apply(make_model(dtype), config, progress=False)
    with torch.no_grad():
        for v in tk.trainable_vectors(model):
            v.mul_(30)
    return model


def rows() -> list[tuple[str, str]]:
    found = []
    folder = Path(tempfile.mkdtemp())
    generator = torch.Generator().manual_seed(3)
    for kind in CONFIGS:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{kind} {str(dtype).removeprefix('torch.')}"
            model = adapted(kind, dtype)
            vectors = tk.trainable_vectors(model)
            for batch in ((1, 1), (3, 7), (4, 40)):
                ids = torch.randint(0, 40, batch, generator=generator)
                for turn in ("first", "again"):
                    y = model(ids)
                    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
                    found.append((f"{name} {batch} {turn}", digest(y, *torch.autograd.grad(y, vectors, g))))
                with torch.no_grad():
                    found.append((f"{name} {batch} no grad", digest(model(ids))))
            path = folder / f"{name}.safetensors"
            tk.save_adapter(model, path)
            found.append((f"{name} file", hashlib.sha256(path.read_bytes()).hexdigest()[:16]))
            tk.save_adapter(model, path, include_basis=True)
            found.append((f"{name} file with basis", hashlib.sha256(path.read_bytes()).hexdigest()[:16]))
            tk.export_lora(model, folder / name, rank=16)
            for file in sorted((folder / name).iterdir()):
                found.append((f"{name} export {file.name}", hashlib.sha256(file.read_bytes()).hexdigest()[:16]))
            weights = dict(tk.merged_weights(model))
            found.append((f"{name} merged", digest(*weights.values())))
            found.append((f"{name} merged names", hashlib.sha256(" ".join(weights).encode()).hexdigest()[:16]))
            found.append((f"{name} fidelity", repr(tk.merge_fidelity(model).survived)))
            loaded = tk.load_adapter(make_model(dtype), path, progress=False, cache=False)
            found.append((f"{name} loaded", digest(loaded(ids))))
            if kind in ("linear", "xs"):
                bank = tk.AdapterBank(model, 5)
                shape = len(vectors), vectors[0].numel()
                for who in range(3):
                    bank.add(f"a{who}", 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(who)))
                with bank.use(["a2", None, "a0", "a1"]):
                    found.append((f"{name} bank", digest(model(ids))))
                bank.close()
    model = adapted("linear", torch.float32)
    trainer = tk.GRPOTrainer(model, group_size=4, lr=0.01)
    ids = torch.randint(0, 40, (8, 9), generator=generator)
    for _ in range(3):
        log_probs = tk.token_log_probs(model(ids)[:, :-1], ids[:, 1:])
        trainer.training_step(log_probs, log_probs.detach(), torch.arange(8.0) % 3)
    found.append(("GRPO", digest(*tk.trainable_vectors(model))))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, value in rows():
        print(f"{value:20} {name}")
    sys.exit(0)
