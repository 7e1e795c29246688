"""An adapted model as the PeftModel that trainers know, so that a rollout engine never gets the frozen base.

    trainer = GRPOTrainer(model=as_peft_model(apply_tiny_lora(base, config)), reward_funcs=..., args=..., ...)

TRL sends its rollout engine the weights of a model as they are, unless it is a PeftModel: then it calls
merge_adapter(), walks named_parameters() and calls unmerge_adapter(). Between the two this wrapper shows the merged
weights under the names of the original model, each one made when it is asked for: no weight is written to, none is kept
twice.
"""
from __future__ import annotations

from peft import PeftModel
from transformers import PreTrainedModel

from ..base.names import inside
from ..layers.layer import TinyLoRALayer
from ..model.adapted import adapted_layers, expect_all_vectors
from ..model.targets import output_head
from .peft_model import AdaptedModel
from .vllm.rollouts import use_native_rollouts


def as_peft_model(model: PreTrainedModel) -> PeftModel:
    """Wrap an adapted model for TRL's GRPOTrainer and SFTTrainer, or transformers' Trainer.

    Args:
        model: a transformers model adapted by apply_tiny_lora or apply_lora_xs; it is wrapped, not copied.

    Returns:
        A PeftModel over the same layers and vectors. Checkpoints hold the adapter file alone, a KL reference is the
        adapter as it was on entering the trainer. TRL's vLLM engines get the numbers alone (vllm/rollouts.py), other
        rollout engines merged weights. ``get_base_model()`` gives the adapted model back.

    Raises:
        ValueError: no adapter; a model that something stands around already (torch.compile, DDP, a PeftModel); an
            adapted output head: TRL multiplies by lm_head.weight itself and would pass it by.
    """
    if inside(model) is not model:
        raise ValueError(
            f"model: expected the model itself, found it in a {type(model).__name__}; put that around "
            "as_peft_model(model)"
        )
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model: it has no adapter; call apply_tiny_lora(model, config) first")
    expect_all_vectors(layers, "model")
    head = output_head(model)
    if isinstance(head, TinyLoRALayer):
        raise ValueError(
            f"model: {head.name} is adapted, and TRL computes log-probabilities from its weight without calling it; "
            "leave it out of target_modules"
        )
    use_native_rollouts()
    return AdaptedModel(model)
