"""Throughput benchmarks; `python -m benchmarks` in a checkout, `brainflow bench` where it is installed."""
