"""A simulated cohort: an instrument whose truth is known, and unlimited data.

Three kinds of labelled states, each of which another part of a signal carries:

- `order`: six groups of regions become active one behind the other, and a state is the order. Averaged over
  time all states look alike.
- `drive`: a state is a pattern of regions that receive input for a while. Averages over time tell it.
- `regime`: a state is a pattern of regions that are nearer to oscillating by themselves. Variances tell it.

`drive` and `regime` are Stuart–Landau oscillators near their bifurcation, coupled by a connectome (Deco et
al. 2017, doi:10.1038/s41598-017-03073-5). The connectome is synthetic: it falls off with the distance of
regions and links each one to its mirror image in the other hemisphere. Every person has weights, noise and
onsets of their own, drawn from (seed, person), so person 7 is the same in a cohort of 10 and of 3,000.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from brainflow.storage import Segment, StoreWriter

KINDS = ("order", "drive", "regime")
GROUPS = 6
STEP = 3  # volumes from one group to the next
WINDOW = 32  # volumes of a labelled sequence
REACH = 100.0  # mm over which the background of `order` falls off
BLOCK, PAUSE = 16, 6  # volumes of a state of `drive` and `regime`, and between two of them
_RESPONSE = np.array([0.1, 0.5, 1.0, 0.9, 0.6, 0.3, 0.1, -0.05, -0.1, -0.1, -0.05])  # to an event, by volumes
_RESPONSE *= 1.8 / np.linalg.norm(_RESPONSE)
_SUBSTEPS = 10  # of the oscillators in a volume
_COUPLING, _NOISE = 0.3, 0.06
_TOGETHER = 32  # people simulated at once: their products are too small to be shared among threads

Person = tuple[NDArray[np.float32], list[Segment]]


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """What all people of a simulated cohort share.

    Parameters
    ----------
    kind
        "order", "drive" or "regime".
    networks
        Regions, an even number: the second half mirrors the first.
    states
        Different states; chance is one in so many.
    time_points
        Volumes of a person's run.
    t_r
        Repetition time in seconds.
    signal
        Strength of what tells states apart.
    seed
        Names the cohort: its brain, its states and its people.

    Raises
    ------
    ValueError
        If an argument cannot be simulated.
    """

    kind: str = "order"
    networks: int = 60
    states: int = 8
    time_points: int = 300
    t_r: float = 2.0
    signal: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: got {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.networks < 2 * GROUPS or self.networks % 2:
            least = 2 * GROUPS
            raise ValueError(f"networks: got {self.networks}, expected an even number of at least {least}")
        if not 2 <= self.states <= 100:
            raise ValueError(f"states: got {self.states}, expected 2 to 100")
        if self.time_points < 2 * WINDOW:
            raise ValueError(f"time_points: got {self.time_points}, expected at least {2 * WINDOW}")
        if self.t_r <= 0:
            raise ValueError(f"t_r: got {self.t_r}, expected seconds above 0")

    def coordinates(self) -> NDArray[np.float64]:
        """Return centres of the regions in mm, [networks, 3]: on half a shell, and its mirror image."""
        # A stream of its own, as states and people have: none shifts another's draws.
        rng = np.random.default_rng([self.seed, 1])
        points = rng.normal(size=(self.networks // 2, 3))
        points *= np.array([55.0, 75.0, 55.0]) / np.linalg.norm(points, axis=1, keepdims=True)
        points[:, 0] = 8 + np.abs(points[:, 0])
        return np.concatenate([points, points * [-1, 1, 1]])

    def connectome(self) -> NDArray[np.float64]:
        """Return strengths of the links, [networks, networks], rows of sum 1."""
        points, half = self.coordinates(), self.networks // 2
        distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
        links = np.exp(-distance / 30.0)
        mirrored = np.arange(self.networks)
        links[mirrored, (mirrored + half) % self.networks] += 0.5
        np.fill_diagonal(links, 0.0)
        return links / links.sum(1, keepdims=True)

    def people(self, first: int, count: int) -> list[Person]:
        """Simulate some people.

        Returns
        -------
        list
            Of each: BOLD, z-scored, [time_points, networks], and its states as segments labelled `state`.
        """
        rngs = [np.random.default_rng([self.seed, 2, person]) for person in range(first, first + count)]
        bold, segments = _SIMULATORS[self.kind](self, rngs)
        bold = (bold - bold.mean(1, keepdims=True)) / bold.std(1, keepdims=True)
        return list(zip(bold.astype(np.float32), segments, strict=True))


def write_cohort(
    path: str | os.PathLike[str],
    cohort: Cohort,
    *,
    people: int,
    labelled: int,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a cohort as a store.

    Parameters
    ----------
    path
        Where the store shall be.
    cohort
        What its people share.
    people
        People without labels, task `unlabelled`, for pretraining.
    labelled
        Further people, task `states`, whose states are segments; their runs are twice as long.
    overwrite
        Replace the store at `path`.
    progress
        Called with (done, all) after those who are simulated at once: people, with labels counted twice.

    Raises
    ------
    ValueError
        If there would be nobody.
    brainflow.storage.StoreError
        If the store cannot be written.
    """
    if people < 0 or labelled < 0 or people + labelled == 0:
        raise ValueError(f"people, labelled: got {people} and {labelled}, expected somebody")
    provenance = {"simulated": {**cohort.__dict__, "people": people, "labelled": labelled}}
    with StoreWriter.create(
        path,
        networks=cohort.networks,
        parcellation=f"simulated, {cohort.networks} regions",
        network_coordinates=cohort.coordinates(),
        normalisation="z-scored per run and network",
        provenance=provenance,
        overwrite=overwrite,
    ) as writer:
        longer, done = replace(cohort, time_points=2 * cohort.time_points), 0
        for part, begin, end in ((cohort, 0, people), (longer, people, people + labelled)):
            with_labels = part is longer
            for first in range(begin, end, _TOGETHER):
                block = part.people(first, min(_TOGETHER, end - first))
                for person, (bold, segments) in enumerate(block, first):
                    writer.append(
                        bold,
                        t_r=cohort.t_r,
                        dataset=f"simulated-{cohort.kind}",
                        subject=f"{person:05d}",
                        task="states" if with_labels else "unlabelled",
                        segments=segments if with_labels else (),
                    )
                done += len(block) * (2 if with_labels else 1)
                if progress is not None:
                    progress(done, people + 2 * labelled)


def _background(cohort: Cohort) -> NDArray[np.float64]:
    """Return how independent noise becomes the background of `order`, [networks, networks].

    Its patterns are smooth over the cortex, and their variances fall off as those of recordings do: of 16
    people who hear a story (100 networks) the first pattern has 19 % of the variance, and those at 10, 25,
    50, 75 and 90 % of their number 2.6, .70, .22, .08 and .04 times the mean; here, of as many networks, it
    is 18 %, 2.3, .65, .17, .07 and .03. Noise that is nearly white in space leaves nothing to learn of it.
    """
    points = cohort.coordinates()
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    patterns = np.linalg.eigh(np.exp(-distance / REACH))[1][:, ::-1]
    place = (np.arange(cohort.networks) + 0.5) / cohort.networks
    variance = (place + 0.02) ** -1.1 * np.exp(-2.5 * place)
    mixing = patterns * np.sqrt(variance)
    # Noise of variance 1 in each region.
    return np.asarray(mixing / np.linalg.norm(mixing, axis=1, keepdims=True))


def _order(
    cohort: Cohort, rngs: list[np.random.Generator]
) -> tuple[NDArray[np.float64], list[list[Segment]]]:
    """Simulate sequences of six groups in noise with memory and spatial covariance."""
    shared = np.random.default_rng([cohort.seed, 3])
    size, time = cohort.networks, cohort.time_points
    groups = np.zeros((GROUPS, size))
    for group in groups:
        members = shared.choice(size, size // 5, replace=False)
        group[members] = shared.normal(1.0, 0.3, len(members))
    orders = np.stack([shared.permutation(GROUPS) for _ in range(cohort.states)])
    mixing = _background(cohort)
    bold, segments = np.empty((len(rngs), time, size)), []
    for person, rng in enumerate(rngs):
        weights = groups * (1 + 0.5 * rng.normal(size=groups.shape)) + 0.15 * rng.normal(size=groups.shape)
        # 50 volumes more, in which its memory settles.
        noise = rng.normal(size=(time + 50, size)) @ mixing.T
        for t in range(1, len(noise)):
            # 0.7² + 0.71² is about 1: the variance stays.
            noise[t] = 0.7 * noise[t - 1] + 0.71 * noise[t]
        events, found, onset = np.zeros((time, GROUPS)), [], int(rng.integers(3, 10))
        # The response to the last event is to end within the run.
        while onset + GROUPS * STEP + 12 < time:
            state = int(rng.integers(cohort.states))
            events[onset + STEP * np.arange(GROUPS), orders[state]] += 1
            begin = onset - int(rng.integers(0, 6))  # people are not to be read by the clock
            if begin >= 0 and begin + WINDOW <= time:
                found.append(Segment(onset=begin, length=WINDOW, labels={"state": f"order-{state}"}))
            onset += GROUPS * STEP + int(rng.integers(8, 20))
        active = np.stack([np.convolve(column, _RESPONSE)[:time] for column in events.T], axis=1)
        bold[person] = noise[50:] + cohort.signal * (active @ weights)
        segments.append(found)
    return bold, segments


def _blocks(cohort: Cohort, rng: np.random.Generator) -> tuple[NDArray[np.intp], list[Segment]]:
    """Return the state at each volume, -1 between blocks, and the blocks as segments."""
    state_at = np.full(cohort.time_points, -1)
    found, onset = [], int(rng.integers(2, PAUSE + 2))
    while onset + BLOCK <= cohort.time_points:
        state = int(rng.integers(cohort.states))
        state_at[onset : onset + BLOCK] = state
        found.append(Segment(onset=onset, length=BLOCK, labels={"state": f"{cohort.kind}-{state}"}))
        onset += BLOCK + PAUSE + int(rng.integers(0, 5))
    return state_at, found


def _oscillators(
    cohort: Cohort, rngs: list[np.random.Generator]
) -> tuple[NDArray[np.float64], list[list[Segment]]]:
    """Simulate Stuart–Landau oscillators; a state drives regions, or shifts their bifurcation parameter."""
    shared = np.random.default_rng([cohort.seed, 3])
    size, time, people = cohort.networks, cohort.time_points, len(rngs)
    patterns = np.concatenate(
        [shared.normal(size=(cohort.states, size)), np.zeros((1, size))]
    )  # -1: no state
    frequency = 2 * np.pi * shared.uniform(0.03, 0.07, size)  # rad/s, BOLD's slow oscillations
    links = cohort.connectome()
    blocks = [_blocks(cohort, rng) for rng in rngs]
    own = np.stack([1 + 0.5 * rng.normal(size=patterns.shape) for rng in rngs])
    patterns = patterns[None] * own  # [people, states + 1, networks]
    state_at = np.stack([state for state, _ in blocks])
    shift, drive = (0.05, 0.0) if cohort.kind == "regime" else (0.0, 0.006)
    step = cohort.t_r / _SUBSTEPS
    z = 0.1 * np.stack([rng.normal(size=size) + 1j * rng.normal(size=size) for rng in rngs])
    bold = np.empty((people, time, size))
    for t in range(time):
        pattern = cohort.signal * patterns[np.arange(people), state_at[:, t]]
        noise = np.stack([rng.normal(size=(_SUBSTEPS, 2, size)) for rng in rngs], axis=1)
        # Euler and Maruyama: the variance of noise grows with the time of a step, so its SD with the root.
        noise *= _NOISE * np.sqrt(step)
        # Regions are coupled by their differences, and rows of links sum to 1: hence the last term.
        growth = -0.02 + shift * pattern + 1j * frequency - _COUPLING
        for k in range(_SUBSTEPS):
            # One product of real numbers for both parts.
            neighbours = np.concatenate([z.real, z.imag]) @ links.T
            coupling = _COUPLING * (neighbours[:people] + 1j * neighbours[people:])
            flow = (growth - np.abs(z) ** 2) * z + coupling + drive * pattern
            z = z + step * flow + noise[k, :, 0] + 1j * noise[k, :, 1]
        bold[:, t] = z.real
    return bold, [found for _, found in blocks]


_SIMULATORS = {"order": _order, "drive": _oscillators, "regime": _oscillators}
