"""Energy that a GPU takes, from NVML (package nvidia-ml-py, optional)."""

from __future__ import annotations

from collections.abc import Callable

import torch

SECONDS = 2.0
"""NVML updates its counter some ten times a second: a reading shorter than this would be coarse."""


def joules(step: Callable[[], object]) -> float | None:
    """Return the joules of one call, over about two seconds of calls; None where NVML does not give them."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        calls = _calls(step)
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)  # millijoules since the driver was loaded
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) - before) / 1e3 / calls
    except pynvml.NVMLError:  # e.g. before Volta
        return None
    finally:
        pynvml.nvmlShutdown()


def _calls(step: Callable[[], object]) -> int:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return max(1, round(SECONDS * 1e3 / begin.elapsed_time(end)))
