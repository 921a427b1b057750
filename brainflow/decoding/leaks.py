"""Whether a model has seen the people on whom it is tested."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from brainflow.data.splits import Split, listed
from brainflow.files import read_json
from brainflow.pretrained.format import CONFIG, located, read_config
from brainflow.pretrained.hub import fetch
from brainflow.pretrained.privacy import seen

TRAINED_BODY = ("finetune", "lora")
"""Ways of decoding that change the weights below the head; a probe leaves none of its labels in them."""
GENERATIONS = 8


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
