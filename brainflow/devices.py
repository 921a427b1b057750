"""The device of a setting."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> torch.device:
    """Return the device that "auto", "cpu" or "cuda" means here; "auto" is CUDA where there is one.

    Raises
    ------
    ValueError
        If CUDA is asked for and not there.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("device: got cuda, but torch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")
