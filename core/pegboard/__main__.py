"""`python -m pegboard` and `torchrun -m pegboard`: the command line of what is installed."""

import sys

from pegboard.cli import main

if __name__ == "__main__":
    sys.exit(main())
