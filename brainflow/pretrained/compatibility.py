"""May data be used with a model? Whether they are like those it was trained on, and who among them it saw."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from brainflow.config import ModelConfig
from brainflow.data.splits import Split, listed
from brainflow.files import read_json
from brainflow.frameworks.registry import framework_spec
from brainflow.pretrained.format import CONFIG, located, read_config
from brainflow.pretrained.hub import fetch
from brainflow.pretrained.privacy import seen, without_paths
from brainflow.storage import BoldStore
from brainflow.storage.normalise import APPLIED, kind_of, left_to_remove

log = logging.getLogger(__name__)
MUST_MATCH = {
    "parcellation": "parcellation",
    "network_names": "network names",
    "normalisation": "normalisation",
}
TR_TOLERANCE = 0.05
"""Share by which a TR may lie outside the range that the model was trained on."""
SCALE_TOLERANCE = 5.0
"""Factor by which the mean square of windows may differ from the variance of the runs a model was trained on:
windows of one condition vary; a recording that was not z-scored is off by thousands."""
LEFT_TO_REMOVE = 0.075
"""Share of the mean square of windows that a normalisation over networks would still take away. Where it was
done, z-scoring again leaves up to 0.066 (20 time points of simulated random walks), 0.005 of real runs."""
LONGEST = 50
"""Time points of windows where a model does not say what it was trained on."""
TRAINED_BODY = ("finetune", "lora")
"""Ways of decoding that change the weights below the head; a probe leaves none of its labels in them."""
GENERATIONS = 8
STANDARD = ("standardize", "zscore", "scale")
"""Words of a preprocessing record that say how values were scaled."""


def check_fits(checkpoint: str | os.PathLike[str], store: BoldStore, *, allow: bool = False) -> list[str]:
    """Compare a store with what a model was trained on.

    Parameters
    ----------
    checkpoint
        Folder of a saved model.
    store
        New data.
    allow
        Log the differences and go on; another number of networks is refused in any case.

    Returns
    -------
    list of str
        What differs.

    Raises
    ------
    ValueError
        Naming everything that differs.
    """
    saved = read_config(checkpoint)
    networks = int(saved["model"]["networks"])
    if networks != store.networks:
        raise ValueError(
            f"checkpoint: {checkpoint} was trained on {networks} networks, but the store {store.path} has "
            f"{store.networks}; use a model and a store of one parcellation"
        )
    data = saved.get("data") or {}
    found = differences(data, store.attributes, np.unique(np.asarray(store.runs.t_r)).tolist())
    # The signal is read only where there is something to compare it with.
    if _variance(data) is not None:
        found += _scale(data, fingerprint(store)["variance"])
    if found and not allow:
        raise ValueError(
            f"checkpoint: {checkpoint} does not fit the store {store.path}: {'; '.join(found)}. Prepare the "
            f"data as the model's were{_command(data, store)}, or pass --allow-mismatch if you know why this "
            "does not matter"
        )
    for line in found:
        log.warning("%s against %s: %s", checkpoint, store.path, line)
    return found


def differences(trained: dict[str, Any], ours: dict[str, Any], t_rs: list[float]) -> list[str]:
    """Return in words what differs between the data of a model and other data.

    Parameters
    ----------
    trained
        Section `data` of a model's `config.json`; what is not recorded there is not compared.
    ours
        Attributes of the store.
    t_rs
        Its repetition times in seconds.
    """
    found = []
    for name, what in MUST_MATCH.items():
        theirs, mine = trained.get(name), ours.get(name)
        if isinstance(mine, str):  # a model that was shared has none of the paths of a text
            theirs, mine = (without_paths(str(text)) if text else text for text in (theirs, mine))
        if theirs and mine and theirs != mine:
            theirs_shown, mine_shown = _shown(theirs, mine), _shown(mine, theirs)
            found.append(f"{what}: the model saw {theirs_shown}, the data have {mine_shown}")
        elif name == "normalisation" and "" in (theirs, mine) and _over_networks(theirs or mine):
            # no scale of single networks, which is measured, tells what was taken away over networks
            found.append(f"{what}: the model saw {_told(theirs)}, the data have {_told(mine)}")
    scaled, here = _scaling(trained.get("preprocessing")), _scaling(ours.get("preprocessing"))
    if scaled and here and scaled != here:
        found.append(f"normalisation: the model saw {scaled}, the data have {here}")
    t_r = trained.get("t_r") or []
    if t_r and t_rs:
        low, high = min(t_r) * (1 - TR_TOLERANCE), max(t_r) * (1 + TR_TOLERANCE)
        outside = [value for value in t_rs if not low <= value <= high]
        if outside:
            span = f"{min(t_r):g}" + (f" to {max(t_r):g}" if max(t_r) > min(t_r) else "")
            found.append(
                f"TR: the model saw {span} s, the data have {', '.join(f'{value:g}' for value in outside)} s"
            )
    return found


def check_windows(
    data: dict[str, Any],
    windows: Sequence[NDArray],
    *,
    t_r: float,
    network_names: Sequence[str] | None = None,
    allow: bool = False,
) -> list[str]:
    """Compare windows in memory with what a model was trained on.

    Parameters
    ----------
    data
        Section `data` of the model's `config.json`; what is not recorded there is not compared.
    windows
        Arrays `[time, networks]`; how they are scaled is looked at if they have 20 time points in all.
    t_r
        Seconds between time points.
    network_names
        Names of their networks, where these are known.
    allow
        Log the differences and go on.

    Returns
    -------
    list of str
        What differs.

    Raises
    ------
    ValueError
        Naming everything that differs.
    """
    found = differences(data, {"network_names": list(network_names or [])}, [t_r])
    if sum(len(window) for window in windows) >= 20:
        found += signal_differences(data, np.concatenate(windows))
    if found and not allow:
        kind = kind_of(data.get("normalisation"))
        runs = f"; normalise=True does {kind} to whole runs with tables of events" if kind else ""
        raise ValueError(
            f"X: does not fit the checkpoint: {'; '.join(found)}. Correct the data or t_r{runs}, or set "
            "allow_mismatch=True if you know why this does not matter"
        )
    for line in found:
        log.warning("X against the checkpoint: %s", line)
    return found


def signal_differences(data: dict[str, Any], values: NDArray) -> list[str]:
    """Return in words how values `[time, networks]` are scaled unlike those that a model was trained on."""
    values = np.asarray(values, dtype=np.float64)
    spread = float(np.median(np.square(values).mean(axis=0)))  # a mean shows, too
    return _scale(data, spread) + _shared(data, values)


def _scale(data: dict[str, Any], spread: float) -> list[str]:
    """Say that networks with a mean square of `spread` are not scaled as a model's were, if so."""
    expected = _variance(data)
    if not expected or expected / SCALE_TOLERANCE <= spread <= expected * SCALE_TOLERANCE:
        return []
    return [
        f"normalisation: the model saw networks with a mean square of about {expected:.3g}, the data have "
        f"{spread:.3g}; z-score each network and run as its data were"
    ]


def _shared(data: dict[str, Any], values: NDArray) -> list[str]:
    """Say that networks still share what was taken away from those of a model, if so."""
    kind = kind_of(data.get("normalisation"))
    if kind not in ("spatial", "gsr"):
        return []
    share = left_to_remove(values, kind)
    if share <= LEFT_TO_REMOVE:
        return []
    return [
        f"normalisation: the model saw {APPLIED[kind]!r}, and of the data's mean square {share:.0%} would "
        f"still be removed; normalise each run (not each window) with {kind!r}"
    ]


def _told(text: Any) -> str:
    return repr(text) if text else "no word about it"


def _over_networks(text: object) -> bool:
    """Whether a normalisation takes something away that networks share."""
    return kind_of(text) in ("spatial", "gsr")


def how_to_normalise(theirs: object, mine: object, where: str = "STORE") -> str:
    """Say by which command data become like those of a model; nothing where that is not known.

    Parameters
    ----------
    theirs, mine
        Attribute `normalisation` of the model's data and of the store.
    where
        Path of the store.
    """
    kind = kind_of(theirs)
    if kind is None or theirs == mine:
        return ""
    if _over_networks(mine):
        return f"ingest or prepare its runs anew with --normalise {kind}: what was removed cannot be put back"
    return f"brainflow ingest store {where} NEW --normalise {kind}"


def _command(data: dict[str, Any], store: BoldStore) -> str:
    told = how_to_normalise(data.get("normalisation"), store.attributes["normalisation"], str(store.path))
    return f" ({told})" if told else ""


def _variance(data: dict[str, Any]) -> float | None:
    """Return the variance of a network that a model was trained on, if that is recorded."""
    recorded = (data.get("fingerprint") or {}).get("variance")
    if recorded:
        return float(recorded)
    told = f"{data.get('normalisation')} {_scaling(data.get('preprocessing'))}".lower()
    return 1.0 if "z-score" in told or "zscore" in told else None


def _scaling(record: Any) -> dict[str, Any]:
    """Return the entries of a preprocessing record that say how values were scaled."""
    if not isinstance(record, dict):
        return {}
    return {key: value for key, value in record.items() if any(word in key.lower() for word in STANDARD)}


def _shown(value: Any, other: Any) -> str:
    """Return a name, or where a list begins to differ, for a message."""
    if not isinstance(value, (list, tuple)):
        return repr(value)
    others = list(other) if isinstance(other, (list, tuple)) else []
    first = next((i for i, (a, b) in enumerate(zip(value, others, strict=False)) if a != b), len(others))
    return f"{list(value[first : first + 3])}… from place {first} of {len(value)}"


def longest_window(saved: dict[str, Any], model: ModelConfig, t_r: float | None = None) -> int:
    """Return how many time points a window that a model reads may have: no more than in its pretraining.

    Parameters
    ----------
    saved
        The model's `config.json`.
    model
        Its configuration.
    t_r
        Longest TR of the runs in seconds, for models that know seconds only so far; None: not looked at.
    """
    drawn = ((saved.get("pretrain") or {}).get("data") or {}).get("seq_max")
    longest = model.max_positions - framework_spec(model.framework).special_tokens
    # `seq_max` is exclusive.
    longest = min(longest, LONGEST if drawn is None else int(drawn) - 1)
    if t_r is not None and model.time_encoding == "table":  # seconds that it has rows for
        # The first time point is at 0 s.
        longest = min(longest, int(model.max_seconds / t_r) + 1)
    return max(longest, 1)


def fingerprint(store: BoldStore, runs: Any = None, *, sample: int = 8) -> dict[str, Any]:
    """Return what the signal of a store is like, ready for JSON.

    Parameters
    ----------
    store
        The store.
    runs
        Run numbers; all if None. Statistics are of `sample` of them, spread evenly.
    sample
        Number of runs that are read.

    Returns
    -------
    dict
        `length`: shortest and longest run in time points; medians over runs of `variance` (median over
        networks), `spectrum` (share of power below 0.1 Hz, mean removed) and `correlation` (median absolute
        correlation between at most 200 networks).
    """
    ids = np.arange(len(store.runs)) if runs is None else np.asarray(runs)
    lengths = np.asarray(store.runs.length)[ids]
    chosen = ids[np.unique(np.linspace(0, len(ids) - 1, min(sample, len(ids))).round().astype(int))]
    rows = []
    for run in chosen:
        bold = np.asarray(store.run(int(run)), dtype=np.float64)
        bold = bold - bold.mean(axis=0)
        power = np.square(np.abs(np.fft.rfft(bold, axis=0)))
        slow = np.fft.rfftfreq(len(bold), float(store.runs.t_r[run])) < 0.1
        few = bold[:, np.linspace(0, bold.shape[1] - 1, min(200, bold.shape[1])).round().astype(int)]
        # A network that does not vary has no length to divide by.
        unit = few / np.maximum(np.linalg.norm(few, axis=0), 1e-12)
        edges = np.abs((unit.T @ unit)[np.triu_indices(unit.shape[1], k=1)])
        correlation = float(np.median(edges)) if len(edges) else 0.0
        rows.append(
            (float(np.median(bold.var(axis=0))), power[slow].sum() / max(power.sum(), 1e-12), correlation)
        )
    variance, spectrum, correlation = np.median(np.array(rows), axis=0).tolist()
    return {
        "length": [int(lengths.min()), int(lengths.max())],
        "variance": variance,
        "spectrum": spectrum,
        "correlation": correlation,
    }


class TestedPeople(Protocol):
    """A task: its subjects, which of its rows are tested, and the split file that says so."""

    @property
    def subjects(self) -> NDArray: ...  # noqa: D102
    @property
    def tested(self) -> NDArray[np.int64]: ...  # noqa: D102
    @property
    def people(self) -> Split | None: ...  # noqa: D102


class LeakWarning(UserWarning):
    """A model has seen people on whom it is tested, or does not say; the message names them."""


def check_unseen(checkpoint: str | os.PathLike[str], task: TestedPeople, *, allow: bool = False) -> list[str]:
    """Return the tested subjects whom a model has seen, and warn of them.

    Parameters
    ----------
    checkpoint
        Folder of a saved model.
    task
        Its folds.
    allow
        Go on where the folds come from a split file.

    Raises
    ------
    ValueError
        Naming them, where the folds come from a split file, which is there to keep them apart.

    Warns
    -----
    LeakWarning
        If there are any, or if the folds come from a split file and the model does not say whom it saw.
    """
    tested = {str(name) for name in task.subjects[task.tested]}
    read, fitted, unknown = people_seen(checkpoint, tested)
    told = [f"{checkpoint} was fitted to the labels of {listed(fitted)}"] if fitted else []
    told += [f"pretraining of {checkpoint} read the BOLD, not the labels, of {listed(read)}"] if read else []
    if told and task.people and not allow:
        raise ValueError(
            f"split: {'; '.join(told)}, whom the split file keeps for the test; pretrain with --data.split "
            "and this file, or pass --allow-seen and say so with the scores"
        )
    if told:
        counted = f"{len({*fitted, *read})} of the {len(tested)} tested subjects"
        # The place of the warning is the line that called `adapt`.
        warnings.warn(f"{'; '.join(told)}: {counted}", LeakWarning, stacklevel=3)
    if unknown and task.people:
        warnings.warn(
            f"{unknown} does not name the people that it was trained on, so that nobody can tell whether "
            "they are among those who are tested",
            LeakWarning,
            stacklevel=3,
        )
    return sorted({*fitted, *read})


def check_checkpoint(checkpoint: str | os.PathLike[str], split: Split) -> None:
    """Refuse a model that has seen people whom a split file keeps for the test.

    Raises
    ------
    ValueError
        Naming them.
    """
    read, fitted, _ = people_seen(checkpoint, split.test_people)
    if read or fitted:
        raise ValueError(
            f"checkpoint: {checkpoint} has seen {listed([*fitted, *read])}, whom the split file keeps for "
            "the test; pretrain with --data.split and this file"
        )


def people_seen(checkpoint: str | os.PathLike[str], people: set[str]) -> tuple[list[str], list[str], str]:
    """Return whom of some people a model has seen, and the models that it began from.

    Parameters
    ----------
    checkpoint
        Folder of a saved model.
    people
        Named as "dataset/subject".

    Returns
    -------
    read, fitted, unknown
        Those whose BOLD was read, those whose labels were fitted, and the first of the models, if any, that
        does not say or is to be had neither here nor from the hub.
    """
    read: set[str] = set()
    fitted: set[str] = set()
    unknown, name = "", os.fspath(checkpoint)
    # Bounded: models might name each other in a circle.
    for generation in range(GENERATIONS):
        folder = _ancestor(name) if generation else located(name)
        if not (folder / CONFIG).is_file():
            unknown = unknown or name
            break
        if generation and not isinstance(read_json(folder / CONFIG).get("model"), dict):
            break  # a language model, which saw nobody
        saved = read_config(folder)
        data: dict[str, Any] = saved.get("data") or {}
        salt = {"subjects_salt": data.get("subjects_salt")}
        read.update(seen(data, people))
        if not data.get("training_subjects"):
            unknown = unknown or name
        if (saved.get("decoder") or {}).get("mode") in TRAINED_BODY:
            named = (saved.get("decoding") or {}).get("subjects")
            fitted.update(seen({"training_subjects": named, **salt}, people))
        name = str(((saved.get("pretrain") or {}).get("train") or {}).get("init") or "")
        if not name and not data.get("training_subjects"):  # a decoder has the people of its model beside it
            name = str(saved.get("base_model") or "")
        if not name:
            break
    return sorted(read - fitted), sorted(fitted), unknown


def _ancestor(name: str) -> Path:
    """Return the folder of a model that another began from; of one on the hub `config.json` is fetched."""
    try:
        return fetch(name, files=[CONFIG], ownerless=True)
    except (FileNotFoundError, ImportError):  # gone, without a network, or the hub's client is not installed
        return located(name)
