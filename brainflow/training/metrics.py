"""What a run writes while it trains.

`metrics.jsonl` holds one JSON object a line, of two kinds, both with `step` = optimizer steps done:

- training: `loss` (mean over the good steps since the line before), `lr`, `grad_norm`, `skipped` (steps
  skipped so far because something was not finite), what the framework reports, and `loss_max` (the largest
  loss of a part of the batch, where there are several); `grad_norm`, `loss_max` and the framework's numbers
  are those of the last step alone. Of speed, over all ranks: `trs_per_s` (time points of recordings read a
  second), `tokens_per_s` (rows through the transformer, special and mask tokens included), `steps_per_s`,
  `data_wait` (share of the time spent waiting for the loader), `mfu` (model FLOPs utilisation, see
  `meters.py`), `gpu_memory_gib` (largest so far, on a GPU), `seconds` since the process began to train;
- validation: every key begins with `val_`, see `validation.py`.

`train_history.csv` (step,loss,lr) and `eval_history.csv` (step,loss,accuracy) are as published.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from brainflow.files import is_count, is_number, parse_json, read_text
from brainflow.storage.files import write_text

# Keys that differ between two runs of the same configuration.
TIMING = (
    "trs_per_s",
    "tokens_per_s",
    "steps_per_s",
    "data_wait",
    "mfu",
    "gpu_memory_gib",
    "seconds",
)
METRICS, TRAIN_CSV, EVAL_CSV = "metrics.jsonl", "train_history.csv", "eval_history.csv"
MOST_LOG = 2**30
STAYS = 0.01  # explained variance below which a model is said to predict the mean
MANY = ("val_network_correlation", "val_by_dataset")  # keys with more than one number
_HEADERS = {TRAIN_CSV: "step,loss,lr\n", EVAL_CSV: "step,loss,accuracy\n"}


class RunLog:
    """Append-only logs of one run directory; each line goes out in a single write.

    Parameters
    ----------
    folder
        Run directory.
    step
        Lines of later steps are dropped: a resumed run writes them again.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        self.folder = folder
        _keep(folder / METRICS, lambda line, where: _metrics(line, where)["step"] <= step)
        for name, header in _HEADERS.items():
            _keep(
                folder / name, lambda line, where: line.startswith("step,") or _row_step(line, where) <= step
            )
            if not (folder / name).exists():
                _append(folder / name, header)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl` and its published part to a CSV.

        Numbers that are not finite become null: JSON has no name for them.
        """
        _append(self.folder / METRICS, json.dumps(_clean(line)) + "\n")
        if "val_loss" in line:
            accuracy = line.get("val_accuracy", "")
            _append(self.folder / EVAL_CSV, f"{line['step']},{line['val_loss']},{accuracy}\n")
        else:
            _append(self.folder / TRAIN_CSV, f"{line['step']},{line['loss']},{line['lr']}\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a run's `metrics.jsonl`.

    Raises
    ------
    FileNotFoundError
        If the folder holds none.
    ValueError
        If a line is damaged; the message gives its number.
    """
    path = folder / METRICS
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} holds no {METRICS}; expected the directory of a `brainflow pretrain` run"
        )
    return [_metrics(line, f"{path}, line {i}") for i, line in enumerate(_lines(path), 1)]


def explained(line: dict[str, Any]) -> dict[str, float]:
    """Return how much of the variance each prediction of a validation line explains, the model's first.

    Examples
    --------
    >>> explained({"val_mse": 0.5, "val_mean_mse": 1.0, "val_last_mse": 0.8})
    {'model': 0.5, 'last value': 0.19999999999999996}
    """
    total = line.get("val_mean_mse")
    names = {
        "model": "val_mse",
        "network alone": "val_network_mse",
        "best linear": "val_linear_mse",
        "AR(1)": "val_ar1_mse",
        "last value": "val_last_mse",
    }
    known = {name: line.get(key) for name, key in names.items()}
    return {name: 1 - error / total for name, error in known.items() if error is not None and total}


def verdict(line: dict[str, Any]) -> str:
    """Return what a validation line says against the model, in words; nothing if it says nothing."""
    found = explained(line)
    if "model" not in found:
        return ""
    if found["model"] < STAYS:
        return (
            f"the model explains {100 * found['model']:.1f} % of the variance: it predicts the mean; train "
            "longer, or look at the learning rate"
        )
    if found.get("network alone", 1.0) < STAYS:
        return "the network explains nothing by itself: its states hold nothing to decode yet; train longer"
    if "best linear" in found and found["model"] < found["best linear"] - 0.005:
        return (
            f"a ridge predicts better (explained variance {found['best linear']:.3f}); set model.linear, "
            "or train longer"
        )
    return ""


def _metrics(line: str, where: str) -> dict[str, Any]:
    """Return a line of `metrics.jsonl`: numbers or null by name, the step among them."""
    found = parse_json(line, where)
    if not is_count(found.get("step")):
        raise ValueError(f"{where}: has no step, expected a line of a run's metrics; delete this line")
    for name, value in found.items():
        if not all(one is None or is_number(one) for one in _leaves(value, deep=name in MANY)):
            raise ValueError(f"{where}: {name[:60]!r} is no number, expected one or null; delete this line")
    return found


def _leaves(value: Any, *, deep: bool) -> list[Any]:
    """Return the values in lists and objects, if there may be such, else the value itself."""
    if not deep or not isinstance(value, list | dict):
        return [value]
    inside = value.values() if isinstance(value, dict) else value
    return [leaf for one in inside for leaf in _leaves(one, deep=deep)]


def _row_step(line: str, where: str) -> int:
    try:
        return int(line.split(",")[0])
    except ValueError:
        raise ValueError(f"{where}: does not begin with a step, expected one; delete this line") from None


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[str]:
    """Return the lines that end in a newline: a process killed while writing may leave a piece of one."""
    return [line for line in read_text(path, most=MOST_LOG).splitlines(keepends=True) if line.endswith("\n")]


def _keep(path: Path, wanted: Callable[[str, str], bool]) -> None:
    """Rewrite a log with the lines that are wanted, which is asked with each line and where it stands."""
    if path.exists():
        lines = [line for i, line in enumerate(_lines(path), 1) if wanted(line, f"{path}, line {i}")]
        write_text(path, "".join(lines))


def _append(path: Path, line: str) -> None:
    data = line.encode()
    try:
        # In place of a log there may lie a link, which is not followed, or a pipe, which is not waited for.
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            written = os.write(handle, data)
        finally:
            os.close(handle)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}; free space, then resume") from error
    if written < len(data):
        raise OSError(f"{path} could not be written: the disk is full; free space, then resume")
