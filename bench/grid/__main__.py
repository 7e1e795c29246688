"""python -m bench.grid, from the checkout."""
import sys

from .command import main

sys.exit(main())
