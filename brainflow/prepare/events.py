"""Events → labelled segments: shift for the haemodynamic lag, merging into blocks, EV files of the HCP.

A segment holds the time points t = i · TR with onset + shift ≤ t < onset + duration + shift. The published
shifts are 4 TRs of 0.72 s for the HCP's tasks and 3 TRs of 1 s for the multi-domain task battery (MDTB,
ds002105).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from brainflow.optional import need
from brainflow.prepare.records import Unusable
from brainflow.storage.columns import shown
from brainflow.storage.tables import Segment

Preset = Literal["bids", "hcp", "mdtb"]
HCP_SHIFT = 4 * 0.72
MDTB_SHIFT = 3 * 1.0
REST_BLOCK = 30.0

HCP_STATES = {
    "EMOTION": ("fear", "neut"),
    "GAMBLING": ("loss", "win"),
    "LANGUAGE": ("math", "story"),
    "MOTOR": ("lf", "lh", "rf", "rh", "t"),
    "RELATIONAL": ("match", "relation"),
    "SOCIAL": ("mental", "rnd"),
    "WM": ("body", "faces", "places", "tools"),
    "REST": ("rest",),
}
"""States of each HCP task, in the order that numbers them; together 20."""
MDTB_TASKS = (
    "CPRO",
    "GoNoGo",
    "ToM",
    "actionObservation",
    "affective",
    "arithmetic",
    "checkerBoard",
    "emotionProcess",
    "emotional",
    "intervalTiming",
    "landscapeMovie",
    "mentalRotation",
    "motorImagery",
    "motorSequence",
    "nBack",
    "nBackPic",
    "natureMovie",
    "prediction",
    "respAlt",
    "rest",
    "romanceMovie",
    "spatialMap",
    "spatialNavigation",
    "stroop",
    "verbGeneration",
    "visualSearch",
)
"""The 26 tasks of ds002105, in the order in which the published labels number them."""


@dataclass(frozen=True, kw_only=True)
class EventSettings:
    """How events become segments.

    Parameters
    ----------
    preset
        "bids" takes every event; "hcp" the 20 states of the HCP from EV files, `EV.csv` or events; "mdtb"
        merges the trials of the MDTB into blocks of its 26 tasks.
    column
        Column of `events.tsv` that names the event; "" for the usual one of the preset (`trial_type`; the
        MDTB has `taskName`).
    shift
        Seconds added to onsets for the haemodynamic lag; None for the preset's: 3 s, HCP 2.88 s, MDTB 3 s.
    merge
        Merge successive events with the same label into one block, up to the onset of the next event.
    """

    preset: Preset = "bids"
    column: str = ""
    shift: float | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        if self.shift is not None and not math.isfinite(self.shift):
            raise ValueError(f"shift: got {self.shift}, expected seconds")

    @property
    def seconds(self) -> float:
        """The shift that is applied, in seconds."""
        return self.shift if self.shift is not None else HCP_SHIFT if self.preset == "hcp" else MDTB_SHIFT


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a run: seconds from its first volume."""

    onset: float
    duration: float
    label: str


def segments_of(
    files: Sequence[Path], settings: EventSettings, *, task: str, t_r: float, volumes: int, dropped: int = 0
) -> list[Segment]:
    """Return labelled segments of a run.

    Parameters
    ----------
    files
        Its events file or EV files; none for a run without events.
    settings
        How events become segments.
    task
        Its task label.
    t_r
        Seconds.
    volumes
        Time points after `dropped` dummy scans at the start.
    dropped
        Dummy scans.

    Raises
    ------
    Unusable
        If a file cannot be understood.
    """
    if settings.preset == "hcp":
        if task.upper().startswith(("REST", "RFMRI")):
            # Rest has no events whose response would lag behind.
            # 0 dropped: the blocks are laid over the volumes that are left.
            return _to_segments(_rest(volumes * t_r), replace(settings, shift=0.0), "rest", t_r, volumes, 0)
        events = _read_hcp(files, task)
    elif not files:
        return []
    else:
        column = settings.column or ("taskName" if settings.preset == "mdtb" else "trial_type")
        events = read_events(files[0], column)
    if settings.preset == "mdtb":
        # Before instructions are left out: blocks of one task on both sides of one stay two.
        events = merge_blocks([replace(event, label=_mdtb_task(event.label)) for event in events])
        events = [event for event in events if "instruct" not in event.label]
        unknown = {event.label for event in events} - set(MDTB_TASKS)
        if unknown:
            raise Unusable(
                f"{files[0].name}: {', '.join(sorted(unknown))} are none of the MDTB's 26 tasks; other data "
                "are cut into blocks by --events-column and --merge-events"
            )
    elif settings.merge:
        events = merge_blocks(events)
    return _to_segments(events, settings, task, t_r, volumes, dropped)


def read_events(path: Path, column: str) -> list[Event]:
    """Return rows of an `events.tsv` that have an onset and a label, by onset.

    Raises
    ------
    Unusable
        If it is no table or lacks a column.
    """
    pandas = need("pandas", "reading events", "bids")
    try:
        # Only pandas' Python engine finds out what separates columns (sep=None).
        table = pandas.read_csv(
            path, sep=None if path.suffix == ".csv" else "\t", na_values=["n/a"], engine="python"
        )
    except (OSError, ValueError) as error:
        raise Unusable(f"{path.name}: cannot be read as a table ({error})") from error
    missing = [name for name in ("onset", "duration", column) if name not in table]
    if missing:
        raise Unusable(
            f"{path.name}: has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}"
        )
    # Stable: of events at one time the first stays the first.
    table = table.dropna(subset=["onset", column]).sort_values("onset", kind="stable")
    try:
        onsets, durations = table["onset"].astype(float), table["duration"].astype(float)
        if not np.isfinite(onsets).all() or np.isinf(durations).any():
            raise ValueError("one is infinite")
        rows = zip(onsets, durations, table[column], strict=True)
        return [
            # Of no known length: one volume.
            Event(onset=onset, duration=0.0 if math.isnan(duration) else duration, label=str(label))
            for onset, duration, label in rows
        ]
    except ValueError as error:
        raise Unusable(f"{path.name}: onset and duration must be numbers of seconds ({error})") from error


def merge_blocks(events: Sequence[Event]) -> list[Event]:
    """Merge successive events of one label; a block ends where the next begins, the last with its last event.

    Examples
    --------
    >>> a, b = Event(onset=0, duration=1, label="a"), Event(onset=2, duration=1, label="a")
    >>> merge_blocks([a, b, Event(onset=6, duration=3, label="b")])
    [Event(onset=0, duration=6, label='a'), Event(onset=6, duration=3, label='b')]
    """
    blocks: list[Event] = []
    last_end = 0.0
    for event in events:
        if not blocks or blocks[-1].label != event.label:
            if blocks:
                blocks[-1] = replace(blocks[-1], duration=event.onset - blocks[-1].onset)
            blocks.append(event)
            last_end = event.onset + event.duration
        last_end = max(last_end, event.onset + event.duration)
    if blocks:
        blocks[-1] = replace(blocks[-1], duration=last_end - blocks[-1].onset)
    return blocks


def _mdtb_task(name: str) -> str:
    """Return the task of an MDTB event: the second set repeats tasks of the first with a 2 behind."""
    return name.removesuffix("2")


def _read_hcp(files: Sequence[Path], task: str) -> list[Event]:
    states = HCP_STATES.get(task.upper(), ())
    events: list[Event] = []
    for path in files:
        if path.suffix == ".csv":
            return [event for event in read_events(path, "event_type") if event.label in states]
        if path.suffix == ".tsv":
            return [event for event in read_events(path, "trial_type") if event.label in states]
        events += read_ev(path, task)
    return sorted(events, key=lambda event: event.onset)


def read_ev(path: Path, task: str) -> list[Event]:
    """Return events of one EV file of the HCP: onset, duration and amplitude, without a header.

    Files that are no state of the task (`cue.txt`, `win_event.txt`, `2bk_cor.txt`) give none.

    Raises
    ------
    Unusable
        If a line is not three numbers.
    """
    name = path.stem.rpartition("_EV_")[2]
    # Each kind of picture comes as 0-back and 2-back, and is one state.
    state = re.sub(r"^[02]bk_", "", name)
    if state not in HCP_STATES.get(task.upper(), ()):
        return []
    events = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise Unusable(f"{path.name}: cannot be read as text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            # FSL's three columns; the amplitude only shows that the line is one.
            onset, duration, amplitude = map(float, line.split())
            if not math.isfinite(onset + duration + amplitude):
                raise ValueError
        except ValueError:
            raise Unusable(
                f"{path.name}: line {number} is {shown(line)!r}, expected onset, duration, amplitude"
            ) from None
        events.append(Event(onset=onset, duration=duration, label=state))
    return events


def _rest(seconds: float) -> Iterable[Event]:
    """Cut a resting run into blocks that are as long as the blocks of a task."""
    count = max(1, int(seconds // REST_BLOCK))
    return [
        Event(onset=i * REST_BLOCK, duration=min(REST_BLOCK, seconds), label="rest") for i in range(count)
    ]


def _to_segments(
    events: Iterable[Event], settings: EventSettings, task: str, t_r: float, volumes: int, dropped: int
) -> list[Segment]:
    segments = []
    for event in events:
        # Onsets count from the first volume recorded, segments from the first one kept.
        start = _first_volume(event.onset + settings.seconds, t_r) - dropped
        stop = _first_volume(event.onset + event.duration + settings.seconds, t_r) - dropped
        start, stop = (
            max(start, 0),
            min(max(stop, start + 1), volumes),
        )  # an event without duration is one volume
        if stop > start:
            labels: dict[str, Any] = {"mental_state": event.label}
            if settings.preset == "hcp":
                labels |= _hcp_numbers(task, event.label)
            elif settings.preset == "mdtb":
                labels["task_label"] = MDTB_TASKS.index(event.label)
            segments.append(Segment(onset=start, length=stop - start, labels=labels))
    return segments


def _first_volume(seconds: float, t_r: float) -> int:
    """Return the first volume at or after a time; 1 µs of slack for what binary numbers cannot hold."""
    return math.ceil(seconds / t_r - 1e-6 / t_r)


def _hcp_numbers(task: str, state: str) -> dict[str, int]:
    name = "REST" if state == "rest" else task.upper()
    first = 0
    for other, states in HCP_STATES.items():
        if other == name:
            return {"label_in_task": states.index(state), "label_across_tasks": first + states.index(state)}
        first += len(states)
    raise AssertionError(f"no HCP task {task}")
