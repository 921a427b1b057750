"""Search over settings: many pretraining runs, on any number of machines that share one study.

The space is a TOML file of choices and ranges, or `published`: the layers × width grid of 2022. All settings
of `brainflow pretrain` may be given; they hold for every run. What neither they nor the space say is chosen
once, as `pretrain` chooses it. The same command on other machines (a common file system, or --storage with a
database) works on the same study; started again it takes up what was killed.

Examples
--------
  brainflow sweep store --out sweep --space space.toml --trials 50 --train.steps 20000
  brainflow sweep store --out sweep --space published --framework seq-bert --train.steps 200000
  sbatch --array 0-9 --gpus 1 --wrap "brainflow sweep store --out sweep --space published"

where space.toml holds, for example

  [model]
  layers = [2, 4, 6]
  [train]
  lr = {low = 1e-5, high = 1e-3, log = true}
  [[together]]
  model = {width = 192, heads = 3}
  [[together]]
  model = {width = 384, heads = 6}
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from brainflow.cli import pretrain
from brainflow.cli.usage import WrongUsage
from brainflow.frameworks import check_framework

arguments = pretrain.arguments
settled = pretrain.settled


def defaults(given: list[str]) -> Args:
    """Return what the arguments are where the command line does not say; `out` and `space` it has to."""
    return Args(out=tyro.MISSING, space=tyro.MISSING, model=pretrain.model_defaults(given))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(pretrain.Settings):
    """Arguments of `brainflow sweep`."""

    out: Annotated[str, tyro.conf.arg(metavar="SWEEP")]
    """Directory of the sweep: the study, and a run directory for each trial."""
    space: Annotated[str, tyro.conf.arg(metavar="TOML")]
    """File that says what varies, or `published`."""
    trials: int = 0
    """Runs in all, over all machines. 0: each combination once, where the space has choices only."""
    metric: str = "val_loss"
    """Validation metric whose smallest value counts, e.g. val_l1."""
    storage: Annotated[str, tyro.conf.arg(metavar="URL")] = ""
    """Optuna's database, e.g. sqlite:///study.db or postgresql://…; without, a journal in SWEEP."""
    json: bool = False
    """Print the result as one JSON object on stdout."""


def run(args: Args) -> int:
    """Run trials, print the best and return the exit code."""
    from brainflow.devices import resolve_device
    from brainflow.storage import BoldStore
    from brainflow.storage.text import counted, printable
    from brainflow.training import sizing
    from brainflow.training.interrupt import Preempted
    from brainflow.training.loop import pretrain as train
    from brainflow.training.parallel import from_environment
    from brainflow.training.sweep import as_begun, read_space, sweep, varied

    base = pretrain.pretrain_config(args)
    space = read_space(args.space, base.model.framework)
    if from_environment().world > 1:
        raise ValueError(
            "sweep: was started as several ranks of one job, expected a process of its own for each trial at "
            "a time; start it without torchrun, as often as you like"
        )
    if args.stated is not None:
        store, cuda = BoldStore.open(base.store), resolve_device(base.device).type == "cuda"
        stated = {*args.stated, *varied(space)}
        base, chosen = sizing.choose(base, store, stated, cuda=cuda, resume="never")
        if before := as_begun(Path(args.out), chosen):  # the other machines of this sweep have chosen already
            base = sizing.with_settings(base, before)
        elif chosen:
            print(sizing.explain(base, store, chosen, cuda=cuda), file=sys.stderr)
        try:
            check_framework(base)
        except ValueError as error:
            raise WrongUsage(str(error)) from error
    try:
        study = sweep(
            base,
            space,
            Path(args.out),
            trials=args.trials,
            metric=args.metric,
            storage=args.storage,
            train=train,
            said=lambda text: print(printable(text), file=sys.stderr, flush=True),
        )
    except Preempted as stopped:
        print(f"brainflow sweep: {stopped}", file=sys.stderr)
        return stopped.exit_code
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.value is not None]
    if not done:
        raise ValueError("no trial has succeeded; the lines above say why")
    top = min(done, key=lambda trial: trial.value)
    folder = Path(args.out) / f"trial-{top.number:04d}"
    if args.json:
        trials = [{"trial": t.number, "value": t.value, "settings": t.params} for t in done]
        best = {"trial": top.number, "value": top.value, "settings": top.params, "run": str(folder)}
        print(json.dumps({"metric": args.metric, "best": best, "trials": trials}))
    else:
        print(f"{folder}: the best of {counted(len(done), 'run')}, {args.metric} {top.value:.5f}")
    return 0
