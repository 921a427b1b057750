"""The table of `python -m benchmarks kernels --static`: what the Triton kernels compile to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from brainflow.kernels import aot


def table(archs: Sequence[str]) -> list[dict[str, Any]]:
    """Compile every production configuration and return one row each.

    Parameters
    ----------
    archs
        Compute capabilities times ten, for example ("80", "90", "100").

    Returns
    -------
    list of dict
        kernel, sm, warps, registers, spills (bytes), shared (bytes), loads and stores of tensors of shape
        [tokens, networks] by width, and "ok" or what :func:`brainflow.kernels.aot.check` says against it.
    """
    rows = []
    for config, report in aot.compile_all([int(arch) for arch in archs]):
        rows.append(
            {
                "kernel": report.name,
                "sm": report.arch,
                "warps": report.num_warps,
                "registers": report.registers,
                "spills": report.spills,
                "shared": report.shared,
                "loads": _widths(report.loads, config.wide),
                "stores": _widths(report.stores, config.wide),
                "check": "; ".join(aot.problems(config, report)) or "ok",
            }
        )
    return rows


def _widths(accesses: Mapping[str, Mapping[int, int]], names: Sequence[str]) -> str:
    """Return for example "store 8×128" for eight accesses of 128 bits."""
    return ", ".join(
        f"{name} " + "+".join(f"{n}×{width}" for width, n in sorted(accesses[name].items()))
        for name in names
        if name in accesses
    )
