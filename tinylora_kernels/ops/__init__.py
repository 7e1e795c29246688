"""The ops, their backends and the choice between them."""
from .autograd import TinyLoRAUpdate, TracedUpdate
from .dispatch import BACKENDS, Backend, choose, requested_backend, set_backend, table

__all__ = [
    "BACKENDS", "Backend", "TinyLoRAUpdate", "TracedUpdate", "choose", "requested_backend", "set_backend", "table",
]  # fmt: skip
