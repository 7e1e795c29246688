"""TinyLoRA with fused kernels: train a frozen language model by a handful of numbers.

    config = TinyLoRAConfig(frozen_rank=2, trainable_dim=1, n_tie=15, target_modules=["q_proj", "v_proj"])
    model = apply_tiny_lora(model, config)
"""
from . import functional
from .config import TinyLoRAConfig
from .layer import TinyLoRALayer
from .model import adapted_layers, apply_tiny_lora, count_trainable_params, remove_adapter, trainable_vectors
from .ops import set_backend

__all__ = [
    "TinyLoRAConfig",
    "TinyLoRALayer",
    "adapted_layers",
    "apply_tiny_lora",
    "count_trainable_params",
    "functional",
    "remove_adapter",
    "set_backend",
    "trainable_vectors",
]
