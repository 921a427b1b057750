"""Write a simulated cohort as a store: data whose truth is known, and as much of it as is wanted.

`order`: a state is the order in which groups of regions become active; averages over time do not tell it.
`drive`: a state is a pattern of regions that receive input. `regime`: a state changes how close regions are
to oscillating; variances tell it. The store holds people without labels (task `unlabelled`) and people with
labels (task `states`).

Examples
--------
  brainflow simulate cohort --people 300 --labelled 40
  brainflow simulate small --kind regime --people 0 --labelled 24 --seed 1
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import tyro

from brainflow.progress import progress_bar
from brainflow.simulate import Cohort, write_cohort
from brainflow.storage.text import counted


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow simulate`."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Where the store shall be."""
    kind: Literal["order", "drive", "regime"] = "order"
    """What tells the states apart."""
    people: int = 300
    """People without labels."""
    labelled: int = 40
    """People with labels; their runs are twice as long."""
    networks: int = 60
    """Regions, an even number."""
    states: int = 8
    """Different states."""
    time_points: int = 300
    """Volumes of the run of a person without labels."""
    t_r: float = 2.0
    """Repetition time in seconds."""
    signal: float = 1.0
    """Strength of what tells the states apart."""
    seed: int = 0
    """Another seed is another cohort."""
    overwrite: bool = False
    """Replace the store."""
    json: bool = False
    """Print one JSON object."""


def run(args: Args) -> int:
    """Simulate, write and say what was written."""
    cohort = Cohort(**{field.name: getattr(args, field.name) for field in fields(Cohort)})
    with progress_bar("people", quiet=args.json) as progress:
        write_cohort(
            args.store,
            cohort,
            people=args.people,
            labelled=args.labelled,
            overwrite=args.overwrite,
            progress=progress,
        )
    counts = {"people": args.people, "labelled": args.labelled}
    if args.json:
        print(json.dumps({"store": args.store, **cohort.__dict__, **counts}))
    else:
        minutes = args.time_points * args.t_r * (args.people + 2 * args.labelled) / 60
        print(
            f"{args.store}: {counted(args.people, 'person', 'people')} without labels, "
            f"{args.labelled} with; {minutes:,.0f} minutes"
        )
    return 0
