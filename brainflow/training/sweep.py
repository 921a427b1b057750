"""Search over settings: many runs of `pretrain`, by any number of machines that share one Optuna study.

A space says which settings vary: a list of choices, or a range.

    [model]
    layers = [2, 4, 6]
    [train]
    lr = {low = 1e-5, high = 1e-3, log = true}
    [[together]]                      # each of these tables is one choice
    model = {width = 192, heads = 3}
    [[together]]
    model = {width = 384, heads = 6}

Where all of it are choices, each combination is run once; else Optuna's sampler (TPE) proposes. The study
lives in SWEEP/study.log, a journal that machines with a common file system append to, or in a database. A run
that was killed is taken up again, by whichever machine comes first, and continues from its checkpoint.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from brainflow.config import PretrainConfig
from brainflow.data.splits import Split
from brainflow.files import is_number, read_json, read_toml
from brainflow.frameworks import check_framework, own_config
from brainflow.frameworks.settings import SECTIONS, check_settings, pretrain_config, without_foreign
from brainflow.optional import need
from brainflow.progress import Remaining
from brainflow.storage.files import output_folder, write_text

from .metrics import read_metrics
from .run_dir import Busy, flatten

Space = dict[str, Any]
TOGETHER, STUDY, RECORD = "together", "study.log", "sweep.json"
# Depth × width of the models of 2022, a head for each 64 values, 200,000 steps (arXiv 2206.11417, figure 3).
PUBLISHED: Space = {
    "model": {"layers": [4, 8, 12]},
    TOGETHER: [{"model": {"width": width, "heads": width // 64}} for width in (192, 384, 768)],
}


def read_space(name: str, framework: str = "csm") -> Space:
    """Return the space of that name ("published") or in that TOML file, checked.

    Parameters
    ----------
    name
        "published", or a path.
    framework
        That of the runs, where the space does not vary it; a space that does may hold the settings of each.

    Raises
    ------
    ValueError
        If it names a setting that its frameworks do not have, or a choice that is none.
    FileNotFoundError
        If there is no such file.
    """
    if name == "published":
        return PUBLISHED
    space = read_toml(name)
    try:
        _check(space, framework)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return space


def _check(space: Space, framework: str) -> None:
    sets = space.get(TOGETHER, [])
    if not isinstance(sets, list) or not all(isinstance(x, dict) for x in sets):
        raise ValueError(f"{TOGETHER}: got {sets!r}, expected tables, as in [[{TOGETHER}]]")
    among = _frameworks(space) or [framework]
    for settings in sets:
        _check_for_one(settings, _frameworks({TOGETHER: [settings]}) or among)
        if outside := settings.keys() - set(SECTIONS):
            raise ValueError(f"{TOGETHER}: got {min(outside)}, expected settings of {', '.join(SECTIONS)}")
    for section, settings in space.items():
        if section == TOGETHER:
            continue
        if section not in SECTIONS or not isinstance(settings, dict):
            raise ValueError(f"{section}: is no section, expected {', '.join([*SECTIONS, TOGETHER])}")
        for name, values in settings.items():
            wrong = f"{section}.{name}: got {values!r}, expected choices [a, b, …] or {{low = a, high = b}}"
            if isinstance(values, dict):
                _check_range(f"{section}.{name}", values, wrong)
                values = [values["low"]]
            elif not isinstance(values, list) or not values:
                raise ValueError(wrong)
            for value in values:
                _check_for_one({section: {name: value}}, among)
    if not space:
        raise ValueError("space: is empty, expected at least one setting that varies")


def _check_range(name: str, values: dict[str, Any], wrong: str) -> None:
    if not {"low", "high"} <= values.keys() <= {"low", "high", "log", "step"}:
        raise ValueError(wrong + " with log = true or step = c")
    for key in values.keys() - {"log"}:
        if not is_number(values[key]):
            raise ValueError(f"{name}.{key}: got {values[key]!r}, expected a number")
    if not isinstance(values.get("log", False), bool):
        raise ValueError(f"{name}.log: got {values['log']!r}, expected true or false")
    if not values["low"] <= values["high"] or values.get("step", 1) <= 0:
        raise ValueError(f"{name}: got {values!r}, expected low <= high and a positive step")
    if values.get("log") and (values["low"] <= 0 or "step" in values):
        raise ValueError(f"{name}: got {values!r}, expected low > 0 and no step with log = true")


def _frameworks(space: Space) -> list[str]:
    """Return the frameworks that a space varies, none where it does not."""
    alone = space.get("model", {})
    tables = [settings.get("model", {}) for settings in space.get(TOGETHER, [])]
    found = [table.get("framework", []) for table in [alone, *tables] if isinstance(table, dict)]
    names = [name for some in found for name in (some if isinstance(some, list) else [some])]
    return [name for name in names if isinstance(name, str)]


def _check_for_one(settings: dict[str, Any], frameworks: list[str]) -> None:
    """Check settings for any of these frameworks: a trial that has another of them fails alone."""
    refusals = []
    for framework in frameworks:
        try:
            return check_settings(settings, framework)
        except ValueError as error:
            refusals.append(error)
    raise refusals[0]


def grid(space: Space) -> list[dict[str, Any]]:
    """Return all combinations of a space of choices; none if there is a range in it."""
    if _ranges(space):
        return []
    dimensions = _dimensions(space)
    return [dict(zip(dimensions, way, strict=True)) for way in itertools.product(*dimensions.values())]


def sweep(
    base: PretrainConfig,
    space: Space,
    folder: Path,
    *,
    trials: int,
    metric: str = "val_loss",
    storage: str = "",
    train: Callable[[PretrainConfig], object],
    said: Callable[[str], object] = lambda text: None,
) -> Any:
    """Run trials until the study has `trials` of them, and return the study.

    Parameters
    ----------
    base
        Settings that do not vary; each run goes to `folder`/trial-NNNN.
    space
        What varies.
    folder
        Directory of the sweep.
    trials
        Runs of the study in all, over all machines; 0: each combination of a grid once.
    metric
        Key of a validation line that is made small (its best value counts).
    storage
        URL of Optuna's database; empty: a journal in `folder`.
    train
        Runs one configuration.
    said
        Is told of each trial that ends.

    Raises
    ------
    ValueError
        If the folder belongs to another sweep, the split file is none, or a space with ranges comes without
        `trials`.
    ImportError
        If Optuna is not installed.
    """
    optuna = need("optuna", "sweep", "sweep")
    trials = trials or len(grid(space))
    if not trials:
        raise ValueError("trials: got 0, but the space has a range; say how many runs you want")
    if base.data.split:
        Split.load(base.data.split)  # a bad file ends the sweep, not each of its trials
    _record(folder, base, space, metric)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _study(storage, folder)
    left = Remaining(trials, done=_ended(study))  # what other machines do counts, too
    for trial, params in _trials(study, space, trials):
        config = _configure(base, space, params, folder / f"trial-{trial.number:04d}")
        try:
            if isinstance(config, ValueError):
                raise config
            train(config)
            value = best(Path(config.out), metric)
        except Busy:
            continue  # another machine took it up
        except ValueError as error:  # an impossible combination, or a loss that is not finite any more
            _tell(study, trial.number, state=optuna.trial.TrialState.FAIL)
            outcome = f"failed: {error}"
        else:
            _tell(study, trial.number, value)
            outcome = f"{metric} {value:.5f}"
        left.advance(_ended(study))
        said(
            f"trial {trial.number}: {_words(space, params)}: {outcome} ({left.done} of {trials}, {left} left)"
        )
    return study


def _ended(study: Any) -> int:
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


def best(run: Path, metric: str) -> float:
    """Return the smallest value of a validation metric in a run.

    Raises
    ------
    ValueError
        If the run has no such metric.
    """
    lines = [line for line in read_metrics(run) if "val_loss" in line]
    values = [line[metric] for line in lines if isinstance(line.get(metric), float)]
    if not values:
        known = [k for k, v in (lines[-1] if lines else {}).items() if isinstance(v, float)]
        raise ValueError(f"metric: got {metric!r}, expected one of {', '.join(known)}")
    return min(values)


def _trials(study: Any, space: Space, count: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield first what killed processes left, then new trials until the study has `count`."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import PartialFixedSampler
    from optuna.trial import TrialState

    ways, sampler = grid(space), study.sampler
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.params:  # without, it was killed before it knew what to run
            yield trial, dict(trial.params)
    while len(study.get_trials(deepcopy=False)) < count:
        trial = study.ask()
        if trial.number >= count:  # another machine was faster
            study.tell(trial, state=TrialState.FAIL)
            return
        # Not Optuna's grid sampler: it raises with ask and tell, and two machines may draw the same point.
        if ways:  # the study gives each number once, so each combination comes once
            with warnings.catch_warnings(category=ExperimentalWarning, action="ignore"):
                study.sampler = PartialFixedSampler(ways[trial.number % len(ways)], sampler)
        params = {name: _suggest(trial, name, values) for name, values in _dimensions(space).items()}
        yield trial, params


def _tell(study: Any, number: int, *value: float, **state: Any) -> None:
    from optuna.exceptions import UpdateFinishedTrialError

    with suppress(UpdateFinishedTrialError):  # another machine took it up and said the same
        study.tell(number, *value, **state, skip_if_finished=True)


def _dimensions(space: Space) -> dict[str, Any]:
    """Return parameter of the study → its choices or its range."""
    dimensions: dict[str, Any] = dict(_ranges(space))
    dimensions |= {n: v for n, v in flatten(_without(space)).items() if isinstance(v, list)}
    if space.get(TOGETHER):
        dimensions[TOGETHER] = list(range(len(space[TOGETHER])))
    return dimensions


def _ranges(space: Space) -> dict[str, dict[str, Any]]:
    return {
        f"{section}.{name}": values
        for section, settings in _without(space).items()
        for name, values in settings.items()
        if isinstance(values, dict)
    }


def _without(space: Space) -> Space:
    return {section: settings for section, settings in space.items() if section != TOGETHER}


def _suggest(trial: Any, name: str, values: Any) -> Any:
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    low, high = values["low"], values["high"]
    kind = trial.suggest_int if isinstance(low, int) and isinstance(high, int) else trial.suggest_float
    more = {key: values[key] for key in ("log", "step") if key in values}
    return kind(name, low, high, **more)


def _configure(base: PretrainConfig, space: Space, params: dict[str, Any], out: Path) -> Any:
    """Return the configuration of a trial, or the ValueError that says why there is none."""
    values = asdict(replace(base, out=str(out), model=own_config(base.model)))
    changed: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in params.items():
        if name == TOGETHER:
            for section, settings in space[TOGETHER][value].items():
                changed[section] |= settings
        else:
            section, _, key = name.partition(".")
            changed[section][key] = value
    try:
        if "framework" in changed["model"]:  # what is the base's own would be refused with another one
            framework = changed["model"]["framework"]
            values["model"] = without_foreign({**values["model"], "framework": framework})
        for section, settings in changed.items():
            values[section] |= settings
        config = pretrain_config(values)
        check_framework(config)
    except ValueError as error:
        return error
    return config


def _words(space: Space, params: dict[str, Any]) -> str:
    shown = {name: value for name, value in params.items() if name != TOGETHER}
    if TOGETHER in params:
        shown |= flatten(space[TOGETHER][params[TOGETHER]])
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in shown.items()
    )


def _study(storage: str, folder: Path) -> Any:
    """Open the study, or make it.

    Raises
    ------
    ValueError
        If the journal is damaged, or there is no such database.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = folder / STUDY
    if not storage and path.is_symlink():
        raise ValueError(f"out: {path} is a link, expected a file of the sweep; delete it")
    try:
        return optuna.create_study(
            study_name="sweep",
            storage=storage or JournalStorage(JournalFileBackend(str(path))),
            load_if_exists=True,
            direction="minimize",
        )
    except Exception as error:  # SQLAlchemy, its drivers and the journal's reader raise types of their own
        reason = (str(error).splitlines() or [""])[0][:200]
        if storage:
            raise ValueError(
                f"storage: got {storage!r}, which cannot be opened ({type(error).__name__}: {reason}); "
                "expected Optuna's URL of a database that is there, as in sqlite:///study.db"
            ) from error
        raise ValueError(
            f"out: {path} is damaged ({type(error).__name__}: {reason}); put a copy back, or choose another "
            "--out. The runs in its folders are whole"
        ) from error


def varied(space: Space) -> set[str]:
    """Return the names of the settings that a space varies, such as "model.width"."""
    together = (flatten(settings) for settings in space.get(TOGETHER, []))
    alone = {f"{section}.{name}" for section, some in _without(space).items() for name in some}
    return alone.union(*together)


def as_begun(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Return settings of the runs of a sweep that has begun in a folder; none if it has not."""
    path = folder / RECORD
    found = flatten(read_json(path).get("base", {})) if path.exists() else {}
    return {name: found[name] for name in names if name in found}


def _record(folder: Path, base: PretrainConfig, space: Space, metric: str) -> None:
    """Write down what the sweep is, or compare with what is there."""
    output_folder(folder, "sweep")
    # Without the store's path, which may be another one on another machine.
    base = replace(base, out="", store="", model=own_config(base.model))
    mine = {"base": asdict(base), "space": space, "metric": metric}
    path = folder / RECORD
    if not path.exists():
        write_text(path, json.dumps(mine, indent=1) + "\n")
    # Read back in any case: another machine may have come first.
    theirs = read_json(path)
    begun = theirs.get("base")
    if isinstance(begun, dict) and isinstance(begun.get("model"), dict):
        begun["model"] = without_foreign(begun["model"])
    ours, found = flatten(json.loads(json.dumps(mine))), flatten(theirs)
    changed = sorted(k for k in ours.keys() | found.keys() if ours.get(k) != found.get(k))
    if changed:
        raise ValueError(
            f"out: {folder} holds another sweep (different: {', '.join(changed)}); choose another --out"
        )
