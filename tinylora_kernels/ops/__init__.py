"""The ops, their backends and the choice between them."""
from .autograd import FrozenLinear, TinyLoRALinear, TinyLoRAUpdate, apply_linear
from .dispatch import BACKENDS, Backend, choose, requested_backend, set_backend, table, why_no_node

__all__ = [
    "BACKENDS",
    "Backend",
    "FrozenLinear",
    "TinyLoRALinear",
    "TinyLoRAUpdate",
    "apply_linear",
    "choose",
    "requested_backend",
    "set_backend",
    "table",
    "why_no_node",
]
