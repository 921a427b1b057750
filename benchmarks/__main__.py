"""`python -m benchmarks` in a checkout is `brainflow bench`."""

import sys

from brainflow.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
