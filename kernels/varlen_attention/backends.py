"""Which backend computes: by device and by what is installed and can, or as `impl=` says."""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import fa2, fa4, fallback, torch_varlen, window
from .checks import Limits, refusal

BACKENDS: dict[str, ModuleType] = {
    "window": window,
    "fa4": fa4,
    "fa2": fa2,
    "torch": torch_varlen,
    "fallback": fallback,
}
"""By name, the preferred first."""


def choose(q: Tensor, windows: int, max_seqlen: int, dropout_p: float, impl: str | None) -> str:
    """Return the name of the backend for q [tokens, heads, head_dim] and windows up to `max_seqlen` tokens.

    Left to itself on CUDA it warns, once for a reason, where only the fallback can compute this.

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
            impl = next(name for name in BACKENDS if why_not(name, q, windows, max_seqlen, dropout_p) is None)
            if impl == "fallback":
                _warn(no_kernel(q, windows, max_seqlen, dropout_p))
    elif impl not in BACKENDS:
        expected = ", ".join(map(repr, ("naive", *BACKENDS)))
        raise ValueError(f"impl: got {impl!r}, expected one of {expected} or None")
    elif not _installed(impl):
        raise ValueError(f"impl: got {impl!r}, which is not installed here, expected None or 'fallback'")
    problem = refusal(_limits(impl), q, windows, max_seqlen, dropout_p)
    if problem is not None:
        raise problem
    return impl


def settle(q: Tensor, windows: int, max_seqlen: int, dropout_p: float, impl: str | None) -> tuple[str, float]:
    """Return backend and dropout of a model that rather keeps all attention weights than miss a GPU's kernel.

    Parameters
    ----------
    q
        [tokens, heads, head_dim].
    windows
        Their number.
    max_seqlen
        Tokens of the longest.
    dropout_p
        Probability with which a weight is dropped where that is possible; elsewhere none is.
    impl
        Backend on CUDA, or None: the best. On the CPU the fallback runs in any case.

    Raises
    ------
    ValueError, TypeError
        As :func:`choose`.
    """
    if q.device.type != "cuda":
        return choose(q, windows, max_seqlen, dropout_p, None), dropout_p
    if impl is not None:
        p = dropout_p if impl not in BACKENDS or _limits(impl).dropout else 0.0
        return choose(q, windows, max_seqlen, p, impl), p
    for p in (dropout_p, 0.0):
        for name in BACKENDS:
            if name != "fallback" and why_not(name, q, windows, max_seqlen, p) is None:
                return name, p
    return choose(q, windows, max_seqlen, dropout_p, None), dropout_p


def why_not(name: str, q: Tensor, windows: int, max_seqlen: int, dropout_p: float) -> str | None:
    """Return why a backend cannot compute this here, or None if it can."""
    limits = _limits(name)
    if not _installed(name):
        return "it is not installed"
    problem = refusal(limits, q, windows, max_seqlen, dropout_p)
    if problem is not None:
        return str(problem)
    if q.is_cuda and limits.capability is not None and _capability(q.device.index or 0) < limits.capability:
        needed, has = (
            ".".join(map(str, pair)) for pair in (limits.capability, _capability(q.device.index or 0))
        )
        return f"it needs compute capability {needed}, this GPU has {has}"
    return None


def no_kernel(q: Tensor, windows: int, max_seqlen: int, dropout_p: float) -> str | None:
    """Return why no kernel for GPUs can compute this, or None if one can."""
    reasons = {
        name: why_not(name, q, windows, max_seqlen, dropout_p) for name in BACKENDS if name != "fallback"
    }
    if None in reasons.values():
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


@torch.compiler.assume_constant_result
@cache
def _warn(reasons: str | None) -> None:
    warnings.warn(
        "attention: no kernel for GPUs can compute this, so the fallback runs, which loops over windows, "
        f"stops the GPU and is many times as slow ({reasons})",
        stacklevel=2,
    )


def _limits(name: str) -> Limits:
    limits: Limits = BACKENDS[name].LIMITS
    return limits


@torch.compiler.assume_constant_result
def _installed(name: str) -> bool:
    return bool(BACKENDS[name].installed())


@torch.compiler.assume_constant_result
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
