"""TinyLoRA with fused kernels: train a frozen language model by a handful of numbers.

    config = TinyLoRAConfig(frozen_rank=2, trainable_dim=1, n_tie=15, target_modules=["q_proj", "v_proj"])
    model = apply_tiny_lora(model, config)
"""
from . import functional
from .adapter import AdapterError, inspect_adapter, load_adapter, save_adapter
from .bank import AdapterBank
from .config import TinyLoRAConfig
from .export import export_lora
from .layer import TinyLoRALayer
from .lora_xs import LoRAXSConfig, apply_lora_xs
from .merge import merge, merge_fidelity, merged_weights, unmerge
from .model import adapted_layers, apply_tiny_lora, count_trainable_params, remove_adapter, trainable_vectors
from .ops import set_backend
from .rl import GRPOTrainer, SFTTrainer, token_log_probs

__all__ = [
    "AdapterBank",
    "AdapterError",
    "GRPOTrainer",
    "LoRAXSConfig",
    "SFTTrainer",
    "TinyLoRAConfig",
    "TinyLoRALayer",
    "adapted_layers",
    "apply_lora_xs",
    "apply_tiny_lora",
    "count_trainable_params",
    "export_lora",
    "functional",
    "inspect_adapter",
    "load_adapter",
    "merge",
    "merge_fidelity",
    "merged_weights",
    "remove_adapter",
    "save_adapter",
    "set_backend",
    "token_log_probs",
    "trainable_vectors",
    "unmerge",
]
