"""Keep people out of pretraining, to test on them: split a store by people, once, into a file.

`pretrain --data.split FILE` and `sweep` then train on the part train and never read the part test; `adapt
--split FILE` tests on the labelled windows of the test people and trains on those of the others. A person who
comes into the store later stands in no part, and is used by nobody, until a new file says otherwise.

Examples
--------
  brainflow split store --test sub-17 sub-18 --out split.json
  brainflow split store --test 0.2 --validation 0.1 --seed 1 --out split.json
  brainflow split store --test 8 --out split.json
  brainflow split grown --test split.json --out grown.json
  brainflow pretrain store --data.split split.json --out run
  brainflow adapt store --from run --target condition --split split.json --out decoding
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from brainflow.cli.usage import WrongUsage
from brainflow.data.splits import Split, Who, listed, people_of, split_people
from brainflow.storage import BoldStore
from brainflow.storage.text import counted, printable


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow split`."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store to split."""
    test: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SHARE|COUNT|sub-NAME …|FILE.json")]
    """Who tests: a share or a number of the people of each dataset, drawn among those with labelled segments
    if there are any; names, as in `sub-17 sub-18` (`DATASET/17` where two datasets have a 17); or another
    split file, whose test people stay test people."""
    validation: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SHARE|COUNT|sub-NAME …|FILE.json")] = (
        "0.05",
    )
    """Who validates pretraining, in the same way, drawn among all the others."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """The file to write."""
    seed: int = 0
    """Seed of the draw."""
    overwrite: bool = False
    """Replace the file."""
    json: bool = False
    """Print one JSON object."""


def run(args: Args) -> int:
    """Split, write the file and say who stands where."""
    out = Path(args.out)
    # A link that leads nowhere is something, too.
    if os.path.lexists(out) and not args.overwrite:
        raise ValueError(f"out: {out} is there already; choose another file, or --overwrite to replace it")
    if out.is_dir():
        raise ValueError(f"out: {out} is a directory, expected a file")
    store = BoldStore.open(args.store)
    people = people_of(store.runs)
    everybody = sorted(set(people.values()))
    with_labels = np.asarray(store.runs.key)[np.unique(np.asarray(store.segments.run))]
    labelled = {people[str(key)] for key in with_labels}
    split = split_people(
        store.runs,
        test=_who("test", args.test, everybody),
        validation=_who("validation", args.validation, everybody),
        labelled=labelled,
        seed=args.seed,
        snapshot=store.snapshot,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    split.save(out)
    parts = {name: sorted({split.subjects[key] for key in keys}) for name, keys in split.parts.items()}
    if args.json:
        told = {name: {"people": who, "runs": len(split.parts[name])} for name, who in parts.items()}
        print(json.dumps({"split": args.out, "seed": args.seed, "checksum": split.checksum, "parts": told}))
        return 0
    print(
        printable(
            f"{args.out}: {counted(len(everybody), 'person', 'people')}, "
            f"{len(labelled)} of them with labelled segments"
        )
    )
    for name, who in parts.items():
        print(f"  {name + ':':<12}{len(who):>5} people, {len(split.parts[name]):>5} runs: {listed(who)}")
    return 0


def _who(part: str, given: tuple[str, ...], everybody: list[str]) -> Who:
    """Return what the command line says about a part: a share, a count, or names as "dataset/subject"."""
    if len(given) == 1 and given[0].endswith(".json"):
        known = {person for person, name in Split.load(given[0]).people.items() if name == part}
        return tuple(person for person in everybody if person in known)
    if len(given) == 1 and (number := _number(given[0])) is not None:
        return number
    if not given:
        raise WrongUsage(f"{part}: got nobody, expected a share, a number of people, or names as in sub-17")
    return tuple(_person(part, name, everybody) for name in given)


def _number(text: str) -> float | int | None:
    """Return the number in a text; 05 is none, but the name of a person."""
    if len(text) > 1 and text.startswith("0") and text.isdigit():
        return None
    # int first: 8 is a number of people, 0.2 a share.
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None


def _person(part: str, name: str, everybody: list[str]) -> str:
    """Return the one person whom a name means: `sub-17`, `17` or `dataset/17`."""
    plain = name.removeprefix("sub-")
    found = [one for one in everybody if name == one or one.partition("/")[2] in (name, plain)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{part}: {name!r} may be {' or '.join(found)}; name it so")
    raise ValueError(
        f"{part}: {name!r} is nobody in the store, which holds {listed(everybody)}; a share or a number of "
        "people stands alone"
    )
