"""What the tests of every op share: ulp distances, guard zones, fresh memory full of NaN."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

SENTINEL = 77
"""Value of the guard zones of integer tensors; those of float tensors hold NaN."""


def ulp_distance(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """Return the largest distance in units of the last place of actual's dtype (bf16, fp16 or fp32).

    `expected` (float64) is rounded to that dtype first, so 1 means "the neighbour of the right value".
    """
    widths = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
    if actual.dtype not in widths:
        raise TypeError(f"actual: got dtype {actual.dtype}, expected one of {list(widths)}")
    if actual.numel() == 0:
        return 0
    integer = widths[actual.dtype]

    def ordered(x: torch.Tensor) -> torch.Tensor:
        bits = x.detach().contiguous().view(integer).long()
        return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)

    return int((ordered(actual) - ordered(expected.to(actual.dtype))).abs().max())


def guarded(value: torch.Tensor, guard: int = 512) -> tuple[torch.Tensor, Callable[[], None]]:
    """Copy `value` between two guard zones.

    Parameters
    ----------
    value
        Any contiguous tensor.
    guard
        Elements of each zone (a multiple of 16 bytes keeps the alignment).

    Returns
    -------
    tuple
        The copy (a leaf that requires grad if `value` does) and a function that raises AssertionError
        if a zone was written. Reads outside show as NaN in float results.
    """
    fill = float("nan") if value.is_floating_point() else SENTINEL
    whole = torch.full((value.numel() + 2 * guard,), fill, dtype=value.dtype, device=value.device)
    inner = whole[guard : guard + value.numel()].view(value.shape)
    inner.copy_(value.detach())
    before = torch.cat([whole[:guard], whole[guard + value.numel() :]])

    def check() -> None:
        after = torch.cat([whole[:guard], whole[guard + value.numel() :]])
        assert torch.equal(after.view(torch.uint8), before.view(torch.uint8)), "a guard zone was written"

    return inner.detach().requires_grad_(value.requires_grad), check


@contextmanager
def nan_memory() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN (the largest integer for integers) inside the block."""
    mode = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(mode, warn_only=warn)
