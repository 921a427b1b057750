"""Sines in place of BOLD, as a store: training can be checked end to end without data.

The published system's dummy mode: network i follows a sine of period 4, 8 or 12 s, in turn, with a random
phase of 0 to 2 TRs per run and network. As a decoding task there are two classes of segments, with periods of
1, 2, 4 s against 6, 8, 10 s.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from brainflow.storage import Segment, StoreWriter

PERIODS = (4.0, 8.0, 12.0)
CLASS_PERIODS = {"fast": (1.0, 2.0, 4.0), "slow": (6.0, 8.0, 10.0)}


def sines(
    time_points: int, networks: int, t_r: float, periods: Sequence[float], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return [time_points, networks]: network i has `periods[i % len(periods)]` s, phase 0 to 2 TRs."""
    period = np.resize(np.asarray(periods, dtype=np.float64), networks)
    phase = rng.uniform(0.0, 2.0, networks) * t_r
    seconds = np.arange(time_points)[:, None] * t_r
    return np.sin(2 * np.pi * (seconds + phase) / period).astype(np.float32)


def write_sines(
    path: str | os.PathLike[str],
    *,
    runs: int = 16,
    time_points: int = 120,
    networks: int = 64,
    subjects: int = 4,
    t_r: float = 1.5,
    decoding: bool = False,
    segment: int = 12,
    seed: int = 0,
    dtype: str = "float16",
    overwrite: bool = False,
) -> None:
    """Write a store of sines.

    Parameters
    ----------
    path
        Where the store shall be.
    runs, time_points, networks, subjects
        Size; run i belongs to subject i % subjects.
    t_r
        Repetition time in seconds.
    decoding
        Cut every run into blocks of `segment` TRs, labelled `mental_state` "fast" or "slow" in random order
        (as many of both, as far as the number allows), each with its class's periods.
    segment
        Length of such a block in TRs.
    seed
        Seed of phases and order; the same arguments give the same store.
    dtype, overwrite
        See :meth:`brainflow.storage.StoreWriter.create`.
    """
    if not 1 <= subjects <= runs:
        raise ValueError(f"subjects: got {subjects}, expected a number in [1, runs={runs}]")
    if decoding and not 2 <= segment <= time_points:
        raise ValueError(
            f"segment: got {segment}, expected a number of TRs in [2, time_points={time_points}]"
        )
    with StoreWriter.create(
        path,
        networks=networks,
        dtype=dtype,
        parcellation="synthetic",
        preprocessing={"source": "sines", "decoding": decoding, "seed": seed},
        overwrite=overwrite,
    ) as writer:
        for run in range(runs):
            rng = np.random.default_rng([seed, run])
            segments: list[Segment] = []
            if decoding:
                blocks = time_points // segment
                names = rng.permutation(np.resize(np.array(sorted(CLASS_PERIODS)), blocks)).tolist()
                pieces = [sines(segment, networks, t_r, CLASS_PERIODS[name], rng) for name in names]
                bold = np.concatenate(pieces)
                segments = [
                    Segment(onset=i * segment, length=segment, labels={"mental_state": name})
                    for i, name in enumerate(names)
                ]
            else:
                bold = sines(time_points, networks, t_r, PERIODS, rng)
            writer.append(
                bold,
                t_r=t_r,
                dataset="sines",
                subject=f"{run % subjects + 1:02d}",
                task="classes" if decoding else "rest",
                run=f"{run // subjects + 1:02d}",
                segments=segments,
            )
