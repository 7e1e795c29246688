"""The two ops, their backends and the choice between them."""
from .autograd import TinyLoRALinear, TinyLoRAUpdate, frozen_linear
from .dispatch import BACKENDS, Backend, choose, requested_backend, set_backend, table

__all__ = [
    "BACKENDS",
    "Backend",
    "TinyLoRALinear",
    "TinyLoRAUpdate",
    "choose",
    "frozen_linear",
    "requested_backend",
    "set_backend",
    "table",
]
