"""Many adapters over one frozen model, one a row of the batch."""
from .bank import AdapterBank
from .selection import BARE, Selection

__all__ = ["BARE", "AdapterBank", "Selection"]
