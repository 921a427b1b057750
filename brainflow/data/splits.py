"""Splits of a store's runs into parts (train, validation, test), by run or by subject.

A split is made once, saved beside the run as JSON and read back on resume: the file carries the store's
snapshot and a checksum. A unit (a run, or a subject of a dataset) is put into exactly one part, and every
:class:`Split` is checked for that when it is built, whoever builds it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainflow.storage.files import write_text

if TYPE_CHECKING:  # batches need torch, and `brainflow ingest` writes splits without it
    from brainflow.data.sampler import RunColumns

By = Literal["run", "subject"]
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which runs of a store belong to which part.

    Attributes
    ----------
    by
        What was kept together: single runs, or all runs of a subject.
    seed
        Seed of the draw.
    snapshot
        Digest of the store that was split (`store.snapshot`).
    parts
        Part name → run keys.
    subjects
        Run key → "dataset/subject".

    Raises
    ------
    ValueError
        If a run stands in two parts, or, for `by="subject"`, a subject does.
    """

    by: By
    seed: int
    snapshot: str
    parts: Mapping[str, tuple[str, ...]]
    subjects: Mapping[str, str]

    def __post_init__(self) -> None:
        owner: dict[str, str] = {}
        for part, keys in self.parts.items():
            for run in keys:
                unit = self.subjects[run] if self.by == "subject" else run
                if owner.setdefault(unit, part) != part:
                    raise ValueError(
                        f"split: {self.by} {unit!r} stands in the parts {owner[unit]!r} and {part!r}, "
                        "expected in one; make the split again with split_runs"
                    )
            if len(set(keys)) != len(keys):
                raise ValueError(
                    f"split: part {part!r} names a run twice; make the split again with split_runs"
                )

    def part(self, name: str, runs: RunColumns) -> NDArray[np.int64]:
        """Return the run ids (rows of `store.runs`) of one part, ascending.

        Raises
        ------
        ValueError
            If there is no such part, or the store does not have one of its runs.
        """
        if name not in self.parts:
            raise ValueError(f"part: got {name!r}, expected one of {', '.join(map(repr, self.parts))}")
        row = {key: i for i, key in enumerate(_text(runs.key))}
        try:
            return np.sort(np.array([row[key] for key in self.parts[name]], dtype=np.int64))
        except KeyError as missing:
            raise ValueError(
                f"split: run {missing} is not in this store; use the store that the split was made for"
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the split as JSON with a checksum, in one atomic step."""
        body = self._body()
        text = json.dumps({**body, "checksum": _checksum(body)}, indent=1, sort_keys=True)
        write_text(path, f"{text}\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, snapshot: str | None = None) -> Split:
        """Read a split back.

        Parameters
        ----------
        path
            File that :meth:`save` wrote.
        snapshot
            Snapshot of the store in hand; None skips the comparison.

        Raises
        ------
        ValueError
            If the file is damaged or was edited, or the store is not the one that was split.
        """
        try:
            body = json.loads(Path(path).read_text(encoding="utf-8"))
            checksum = body.pop("checksum")
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError):
            raise ValueError(f"split: {os.fspath(path)} is not a split file; make a new one") from None
        if checksum != _checksum(body):
            raise ValueError(
                f"split: the checksum of {os.fspath(path)} does not fit its content: it was edited or damaged"
            )
        if body["format"] != _FORMAT:
            raise ValueError(f"split: {os.fspath(path)} has format {body['format']}, expected {_FORMAT}")
        if snapshot is not None and snapshot != body["snapshot"]:
            raise ValueError(
                f"split: {os.fspath(path)} was made for snapshot {body['snapshot']!r}, this store is "
                f"{snapshot!r}; open the store that it was made for, or make a new split (and a new run)"
            )
        return cls(
            by=body["by"],
            seed=body["seed"],
            snapshot=body["snapshot"],
            parts={name: tuple(keys) for name, keys in body["parts"].items()},
            subjects=body["subjects"],
        )

    def _body(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "by": self.by,
            "seed": self.seed,
            "snapshot": self.snapshot,
            "parts": {name: list(keys) for name, keys in self.parts.items()},
            "subjects": dict(self.subjects),
        }


def split_runs(
    runs: RunColumns,
    *,
    sizes: Mapping[str, float | int],
    by: By = "run",
    seed: int = 0,
    minimum: int = 2,
    snapshot: str = "",
) -> Split:
    """Split runs into the parts named in `sizes`; what is left over is the part "train".

    Parameters
    ----------
    runs
        Run table of the store.
    sizes
        Part → its share of the units of EACH dataset (a float in (0, 1)) or how many units (an int).
        Units are runs or subjects, see `by`.
    by
        "run", or "subject": all runs of a subject then stand in one part.
    seed
        Seed of the draw. The draw of a dataset depends on the seed, its name and its units alone.
    minimum
        A share is rounded up to at least this many units (published: 2 runs per dataset).
        Applies to shares by run; by subject at least 1.
    snapshot
        `store.snapshot`, kept in the file.

    Raises
    ------
    ValueError
        If a size is out of range or a dataset has too few units to leave any for training.

    Examples
    --------
    >>> split = split_runs(store.runs, sizes={"validation": 0.05}, snapshot=store.snapshot)  # doctest: +SKIP
    >>> sampler = WindowSampler(store.runs, runs=split.part("train", store.runs))  # doctest: +SKIP
    """
    if by not in ("run", "subject"):
        raise ValueError(f"by: got {by!r}, expected 'run' or 'subject'")
    for name, size in sizes.items():
        if name == "train":
            raise ValueError("sizes: 'train' is what the other parts leave over; leave it out")
        if not (0 < size < 1 if isinstance(size, float) else size >= 1):
            raise ValueError(
                f"sizes[{name!r}]: got {size!r}, expected a share in (0, 1) or a count of at least 1"
            )
    keys, datasets, subjects = _text(runs.key), _text(runs.dataset), _text(runs.subject)
    if len(set(keys)) != len(keys):
        raise ValueError("runs: two runs of the store have the same key")
    members: dict[str, dict[str, list[str]]] = {}
    for run, dataset, subject in zip(keys, datasets, subjects, strict=True):
        members.setdefault(dataset, {}).setdefault(run if by == "run" else subject, []).append(run)
    parts: dict[str, list[str]] = {"train": [], **{name: [] for name in sizes}}
    for dataset, units in sorted(members.items()):
        names = sorted(units)
        digest = hashlib.sha256(dataset.encode()).digest()
        order = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")]).permutation(len(names))
        taken = 0
        for part, size in sizes.items():
            count = _count(size, len(names), minimum if by == "run" else 1)
            for unit in order[taken : taken + count]:
                parts[part].extend(units[names[unit]])
            taken += count
        if taken >= len(names):
            raise ValueError(
                f"sizes: dataset {dataset!r} has {len(names)} {by}s and {dict(sizes)} takes {taken} of them, "
                "which leaves none for training; ask for less or drop the dataset"
            )
        for unit in order[taken:]:
            parts["train"].extend(units[names[unit]])
    return Split(
        by=by,
        seed=seed,
        snapshot=snapshot,
        parts={name: tuple(sorted(part)) for name, part in parts.items()},
        subjects={run: f"{d}/{s}" for run, d, s in zip(keys, datasets, subjects, strict=True)},
    )


def _count(size: float | int, units: int, minimum: int) -> int:
    return size if isinstance(size, int) else max(minimum, math.floor(size * units + 0.5))


def _text(column: NDArray[Any]) -> list[str]:
    return [str(value) for value in column]


def _checksum(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
