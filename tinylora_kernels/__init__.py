"""TinyLoRA with fused kernels: train a frozen language model by a handful of numbers.

    config = TinyLoRAConfig(frozen_rank=2, trainable_dim=1, n_tie=15, target_modules=["q_proj", "v_proj"])
    model = apply_tiny_lora(model, config)
"""
from . import functional
from .bank.bank import AdapterBank
from .files.adapter import load_adapter, save_adapter
from .files.export import export_lora
from .files.format import AdapterError
from .files.inspect import inspect_adapter
from .layers.layer import TinyLoRALayer
from .method.config import LoRAXSConfig, TinyLoRAConfig
from .model.adapted import adapted_layers, count_trainable_params, trainable_vectors
from .model.attach import apply_lora_xs, apply_tiny_lora, refresh_factors, remove_adapter
from .model.fidelity import merge_fidelity
from .model.merging import merge, merged_weights, unmerge
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
    "refresh_factors",
    "remove_adapter",
    "save_adapter",
    "set_backend",
    "token_log_probs",
    "trainable_vectors",
    "unmerge",
]
