"""Which backend computes: by device and by what is installed and can, or as `impl=` says."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import fa2, fa4, fallback, torch_varlen
from .checks import Limits, refusal

BACKENDS: dict[str, ModuleType] = {"fa4": fa4, "fa2": fa2, "torch": torch_varlen, "fallback": fallback}
"""By name, the preferred first."""


def choose(q: Tensor, windows: int, dropout_p: float, impl: str | None) -> str:
    """Return the name of the backend for q [tokens, heads, head_dim].

    Raises
    ------
    ValueError, TypeError
        If `impl` names no backend, or one that is not installed or cannot compute this.
    """
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a probability in [0, 1)")
    if impl is None:
        if q.device.type != "cuda":
            impl = "fallback"
        else:
            impl = next(name for name in BACKENDS if _can(name, q, windows, dropout_p))
    elif impl not in BACKENDS:
        expected = ", ".join(map(repr, ("naive", *BACKENDS)))
        raise ValueError(f"impl: got {impl!r}, expected one of {expected} or None")
    elif not _installed(impl):
        raise ValueError(f"impl: got {impl!r}, which is not installed here, expected None or 'fallback'")
    problem = refusal(_limits(impl), q, windows, dropout_p)
    if problem is not None:
        raise problem
    return impl


def _can(name: str, q: Tensor, windows: int, dropout_p: float) -> bool:
    limits = _limits(name)
    if refusal(limits, q, windows, dropout_p) is not None or not _installed(name):
        return False
    return limits.capability is None or _capability(q.device.index or 0) >= limits.capability


def _limits(name: str) -> Limits:
    limits: Limits = BACKENDS[name].LIMITS
    return limits


@torch.compiler.assume_constant_result
def _installed(name: str) -> bool:
    return bool(BACKENDS[name].installed())


@torch.compiler.assume_constant_result
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
