"""Many adapters over one frozen model, one a row of the batch."""
from .bank import AdapterBank
from .ids import BARE
from .selection import Selection

__all__ = ["BARE", "AdapterBank", "Selection"]
