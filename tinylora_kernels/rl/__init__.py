"""Training steps for a handful of numbers: GRPO, SFT and the log-probabilities both are fed with."""
from .grpo import GRPOTrainer, group_advantages
from .log_probs import token_log_probs
from .population import PopulationAdam, PopulationGRPO, PopulationSFT
from .sft import SFTTrainer

__all__ = [
    "GRPOTrainer",
    "PopulationAdam",
    "PopulationGRPO",
    "PopulationSFT",
    "SFTTrainer",
    "group_advantages",
    "token_log_probs",
]
