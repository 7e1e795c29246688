"""The ops, their backends and the choice between them."""
from .autograd import TinyLoRAUpdate
from .dispatch import BACKENDS, Backend, choose, requested_backend, set_backend, table

__all__ = ["BACKENDS", "Backend", "TinyLoRAUpdate", "choose", "requested_backend", "set_backend", "table"]
