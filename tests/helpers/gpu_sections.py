"""Sections of `brainflow bench gpu` in which things go wrong; processes that measure import this file."""

import os
import time

from brainflow.benchmarks import gpu
from brainflow.benchmarks.timing import Row
from brainflow.kernels import conformance


def right():
    return gpu._compared("right", conformance.ops("cpu")["mask_tokens/networks/float32/network"])


def wrecked():
    real = conformance.mask_tokens
    conformance.mask_tokens = lambda *given, impl, **named: (
        real(*given, impl=impl, **named) * (1 if impl == "naive" else 1.01)
    )
    try:
        return gpu._compared("wrecked", conformance.ops("cpu")["mask_tokens/networks/float32/network"])
    finally:
        conformance.mask_tokens = real


def dies():
    os._exit(9)


def raises():
    raise RuntimeError("out of something")


def hangs():
    time.sleep(600)


def faulty(dry, device):
    return {"right": right, "wrecked": wrecked, "dies": dies, "raises": raises, "right again": right}


def endless(dry, device):
    return {"first": right, "hangs": hangs, "waits": right}


def after(dry, device):
    return {"last": lambda: [Row(suite="gpu", case="last", metric="number", value=2.0, unit="")]}
