"""Throughput benchmarks: `brainflow bench`, in a checkout also `python -m benchmarks`."""
