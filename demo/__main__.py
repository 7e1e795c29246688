"""python -m demo, from the checkout."""
import sys

from .run import main

sys.exit(main())
