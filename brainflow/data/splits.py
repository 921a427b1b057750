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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainflow.files import parse_json, read_text
from brainflow.storage.files import write_text
from brainflow.storage.text import printable

if TYPE_CHECKING:  # batches need torch, and `brainflow ingest` writes splits without it
    from brainflow.data.sampler import RunColumns

By = Literal["run", "subject"]
Who = float | int | Sequence[str]
"""A share of the people, a number of them, or their names as "dataset/subject"."""
_FORMAT = 1
_MOST = 2**30
"""Bytes of the largest file that is read: the keys of some million runs."""
_NAMED = 5


class SplitWarning(UserWarning):
    """A store holds people whom its split does not know; the message says what becomes of them."""


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

    @property
    def people(self) -> dict[str, str]:
        """Person, as "dataset/subject" → part; of a split by run, people who stand in one part alone."""
        parts: dict[str, set[str]] = {}
        for part, keys in self.parts.items():
            for run in keys:
                parts.setdefault(self.subjects[run], set()).add(part)
        return {person: min(found) for person, found in parts.items() if len(found) == 1}

    @property
    def test_people(self) -> set[str]:
        """People of the part "test"."""
        return {person for person, part in self.people.items() if part == "test"}

    @property
    def left_out(self) -> list[str]:
        """People of whom a run stands in no part, sorted."""
        known = {run for keys in self.parts.values() for run in keys}
        return sorted({person for run, person in self.subjects.items() if run not in known})

    def for_store(self, runs: RunColumns, *, snapshot: str) -> Split:
        """Return this split for a store that has grown since, or for another one of the same people.

        A run stands where its person does (by run: where it stood). What the split does not know stands in no
        part, see :attr:`left_out`.

        Parameters
        ----------
        runs
            Run table of the store.
        snapshot
            `store.snapshot`.
        """
        subjects = people_of(runs)
        if self.by == "subject":
            people = self.people
            owners = {run: people.get(person) for run, person in subjects.items()}
        else:
            owners = {run: part for part, keys in self.parts.items() for run in keys if run in subjects}
        parts = {
            name: tuple(sorted(run for run, part in owners.items() if part == name)) for name in self.parts
        }
        return replace(self, snapshot=snapshot, parts=parts, subjects=subjects)

    def sides(self, people: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return which windows train a decoder and which test it: one entry of scikit-learn's `cv`.

        Parameters
        ----------
        people
            Person of each window, named as "dataset/subject", `[windows]`.

        Returns
        -------
        train, test
            Positions, ascending: windows of people of the part "test" test, those of the other parts' people
            train; people of no part do neither.

        Raises
        ------
        ValueError
            If the split is by run or has no part "test", or none of these people stands in it, or all do.

        Examples
        --------
        >>> cross_val_score(decoder, windows, names, cv=[split.sides(people)])  # doctest: +SKIP
        """
        if self.by != "subject" or not self.parts.get("test"):
            raise ValueError(
                f"split: is by {self.by} with the parts {', '.join(self.parts)}, expected one by subject "
                "with people in the part test; make one with `brainflow split`"
            )
        owner = self.people
        part = np.array([owner.get(str(person), "") for person in np.asarray(people)], dtype=np.str_)
        test = np.flatnonzero(part == "test").astype(np.int64)
        train = np.flatnonzero((part != "test") & (part != "")).astype(np.int64)
        for side, found in (("test", test), ("train", train)):
            if not len(found):
                known = sorted(
                    person for person, name in owner.items() if (name == "test") == (side == "test")
                )
                raise ValueError(
                    f"split: none of the labelled windows is of a person to {side} ({listed(known)}); the "
                    f"windows are of {listed(sorted(set(map(str, np.asarray(people)))))}; use the split of "
                    "this store, or make one with `brainflow split`"
                )
        return train, test

    def check_training(self, people: ArrayLike) -> None:
        """Refuse people of the part "test" among those who train.

        Parameters
        ----------
        people
            Person of each training window, named as "dataset/subject".

        Raises
        ------
        ValueError
            Naming them.
        """
        leak = sorted(self.test_people & set(map(str, np.asarray(people))))
        if leak:
            raise ValueError(
                f"split: {listed(leak)} would train, but the split file keeps them for the test; train on "
                "`Split.load(FILE).sides(people)[0]`"
            )

    @property
    def checksum(self) -> str:
        """What the file of this split is sealed with; equal splits have equal ones."""
        return _checksum(self._body())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the split as JSON with a checksum, in one atomic step."""
        text = json.dumps({**self._body(), "checksum": self.checksum}, indent=1, sort_keys=True)
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
        FileNotFoundError
            If there is no such file.
        """
        name = os.fspath(path)
        try:
            body = parse_json(read_text(path, most=_MOST), name)
            checksum = body.pop("checksum")
        except (ValueError, KeyError):
            raise ValueError(f"split: {name} is not a split file; make a new one") from None
        if checksum != _checksum(body):
            raise ValueError(
                f"split: the checksum of {name} does not fit its content: it was edited or damaged"
            )
        if body.get("format") != _FORMAT:
            raise ValueError(f"split: {name} has format {body.get('format')!r}, expected {_FORMAT}")
        if not _is_split(body):
            raise ValueError(f"split: {name} is not a split file; make a new one")
        if snapshot is not None and snapshot != body["snapshot"]:
            raise ValueError(
                f"split: {name} was made for snapshot {body['snapshot']!r}, this store is "
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
        # By name: who is drawn must not depend on the order in which runs were ingested.
        names = sorted(units)
        order = _order(seed, dataset, len(names))
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
        subjects=people_of(runs),
    )


def split_people(
    runs: RunColumns,
    *,
    test: Who,
    validation: Who = 0.05,
    labelled: Collection[str] | None = None,
    seed: int = 0,
    snapshot: str = "",
) -> Split:
    """Put whole people into the parts test and validation; all others are the part "train".

    Parameters
    ----------
    runs
        Run table of the store.
    test, validation
        Their names as "dataset/subject", or how many of the people of EACH dataset are drawn: a number, or a
        share in (0, 1), which is at least one person and never all that are left of a dataset.
    labelled
        People with labels, named as "dataset/subject": test people are drawn among them. None or empty: among
        all. Those who are named need no labels.
    seed
        Seed of the draw. The draw of a dataset depends on the seed, its name and its people alone.
    snapshot
        `store.snapshot`, kept in the file.

    Raises
    ------
    ValueError
        If somebody is not in the store or named for both parts, a dataset has too few people, or nobody is
        left to train.
    """
    subjects = people_of(runs)
    known = set(subjects.values())
    everybody = sorted(known)
    if len(everybody) < 2:
        raise ValueError(
            f"store: holds one person ({listed(everybody)}), expected at least 2: people who train and "
            "others who test; `brainflow adapt` splits one person by run"
        )
    wanted: dict[str, Who] = {"test": test, "validation": validation}
    owner: dict[str, str] = {}
    for part, who in wanted.items():
        for person in who if isinstance(who, Sequence) else ():
            if person not in known:
                raise ValueError(f"{part}: {person!r} is not in the store, which holds {listed(everybody)}")
            if owner.setdefault(person, part) != part:
                raise ValueError(f"{part}: {person!r} is in {owner[person]} already, expected in one part")
    datasets: dict[str, set[str]] = {}
    for run, dataset in zip(_text(runs.key), _text(runs.dataset), strict=True):
        datasets.setdefault(dataset, set()).add(subjects[run])
    for dataset, owners in sorted(datasets.items()):
        members = sorted(owners)
        order = [members[i] for i in _order(seed, dataset, len(members))]
        for part, who in wanted.items():
            if isinstance(who, Sequence):
                continue
            pool = [one for one in order if part != "test" or not labelled or one in labelled]
            for person in _drawn(part, who, dataset, pool, order, owner):
                owner[person] = part
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for run, person in subjects.items():
        parts[owner.get(person, "train")].append(run)
    for part in ("test", "train"):
        if not parts[part]:
            raise ValueError(f"split: leaves nobody to {part}, expected at least one person; take others")
    return Split(
        by="subject",
        seed=seed,
        snapshot=snapshot,
        parts={name: tuple(sorted(part)) for name, part in parts.items() if part},
        subjects=subjects,
    )


def _drawn(
    part: str, who: float | int, dataset: str, pool: list[str], members: list[str], owner: Mapping[str, str]
) -> list[str]:
    """Return the people of a dataset who are drawn for a part, of `pool` without those who have one."""
    if not (0 < who < 1 if isinstance(who, float) else who >= 1):
        raise ValueError(
            f"{part}: got {who!r}, expected a share in (0, 1), a count of at least 1, or names of people"
        )
    free = [person for person in pool if person not in owner]
    left = sum(person not in owner for person in members)
    if isinstance(who, float):
        return free[: min(_count(who, len(pool), 1), left - 1)] if free else []
    if free and (who > len(free) or who >= left):
        raise ValueError(
            f"{part}: got {who} people of each dataset, but dataset {dataset!r} has {len(free)} to draw from "
            f"and {left} in all, and one must be left to train; ask for fewer, for a share, or name people"
        )
    return free[:who]


def people_of(runs: RunColumns) -> dict[str, str]:
    """Return the person of each run, named as "dataset/subject", by the run's key."""
    columns = zip(_text(runs.key), _text(runs.dataset), _text(runs.subject), strict=True)
    return {key: f"{dataset}/{subject}" for key, dataset, subject in columns}


def listed(names: Sequence[str]) -> str:
    """Return names for a message: the first few, and how many there are."""
    shown = printable(", ".join(names[:_NAMED])) or "nobody"
    return shown + (f", … ({len(names)} in all)" if len(names) > _NAMED else "")


def _order(seed: int, dataset: str, units: int) -> NDArray[np.int64]:
    # For each dataset by itself: one more dataset leaves the draws of the others as they were.
    digest = hashlib.sha256(dataset.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")]).permutation(units)


def _count(size: float | int, units: int, minimum: int) -> int:
    # Half up; Python's `round` would go to the even number.
    return size if isinstance(size, int) else max(minimum, math.floor(size * units + 0.5))


def _is_split(body: Mapping[str, Any]) -> bool:
    """Whether the content of a file has the types of a split, and names a person for each run of a part."""
    parts, subjects = body.get("parts"), body.get("subjects")
    return (
        body.get("by") in get_args(By)
        and isinstance(body.get("seed"), int)
        and isinstance(body.get("snapshot"), str)
        and isinstance(parts, dict)
        and isinstance(subjects, dict)
        and all(isinstance(person, str) for person in subjects.values())
        and all(isinstance(keys, list) and _all_in(keys, subjects) for keys in parts.values())
    )


def _all_in(keys: Iterable[Any], known: Mapping[str, str]) -> bool:
    return all(isinstance(key, str) and key in known for key in keys)


def _text(column: NDArray[Any]) -> list[str]:
    return [str(value) for value in column]


def _checksum(body: Mapping[str, Any]) -> str:
    # In one form, so that the layout of the file does not count.
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
