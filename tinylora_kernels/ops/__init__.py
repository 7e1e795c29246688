"""The ops, their backends and the choice between them."""
from .autograd import TinyLoRAPartsUpdate, TinyLoRAUpdate, TracedUpdate, refuse_second_derivatives, run_update
from .dispatch import BACKENDS, Backend, choose, requested_backend, set_backend, table

__all__ = [
    "BACKENDS", "Backend", "TinyLoRAPartsUpdate", "TinyLoRAUpdate", "TracedUpdate", "choose",
    "refuse_second_derivatives", "requested_backend", "run_update", "set_backend", "table",
]  # fmt: skip
