"""`python -m bsgap_kernels` is the command `bsgap`."""

import sys

from bsgap_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
