"""`python -m brainflow` and `torchrun -m brainflow` are the `brainflow` command."""

import sys

from brainflow.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
