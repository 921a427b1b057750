"""Throughput benchmarks: `brainflow bench`, in a checkout also `python -m benchmarks`."""

import sys

# While `python -m` looks for a module, argv[0] is "-m": the folder's own name is right there, and only there.
if __name__ == "benchmarks" and not (sys.argv[0] == "-m" and "benchmarks" in sys.orig_argv):
    raise ImportError("this folder is a package of brainflow: write `from brainflow.benchmarks import …`")
