"""python -m bsgap_kernels.bench: the same as `bsgap bench`, without the command line's dependencies."""

import sys

from .command import main

sys.exit(main())
