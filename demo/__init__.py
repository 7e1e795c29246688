"""A real language model trained by a handful of numbers: python -m demo, or make demo."""
from .run import main

__all__ = ["main"]
