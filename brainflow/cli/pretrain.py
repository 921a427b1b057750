"""Train a model on a store with one of the learning frameworks.

Settings come from their defaults, then from a TOML file (--config), then from the command line. Where no size
of the model is given (a preset, layers, width, heads, or weights to begin from), a preset is chosen for the
store and the machine, and a number of steps where none is given; what, why, and what the published run would
cost is said. The same command again continues a run that was stopped or killed, with the losses that it would
have had undisturbed.

Examples
--------
  brainflow pretrain store --framework csm --out run
  brainflow pretrain store --out run --model.width 256 --model.heads 4 --train.steps 2000
  brainflow pretrain store --out run --preset small --framework seq-bert
  brainflow pretrain store --out run --init released --freeze embedder,decoder
  brainflow pretrain --config run.toml --train.lr 5e-4
  torchrun --nproc-per-node 8 -m brainflow pretrain store --out run
  brainflow pretrain store --out run --submit --slurm.nodes 4 --slurm.gpus 8 --slurm.tasks 8

where run.toml holds, for example

  store = "store"
  out = "run"
  [model]
  framework = "seq-bert"
  width = 256
  heads = 4
  [train]
  steps = 2000
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from brainflow.cli.slurm import SlurmConfig, requeue, started_again, submit
from brainflow.cli.usage import WrongUsage
from brainflow.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from brainflow.files import read_toml
from brainflow.frameworks import CSMConfig, check_framework, framework_spec, model_config
from brainflow.frameworks.settings import check_settings, refuse_foreign
from brainflow.recipes import SIZED_BY, PresetName, preset, today


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What one run and a sweep of runs are told alike."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")] = ""
    """Store to train on (needed here or as `store` in the TOML file)."""
    out: Annotated[str, tyro.conf.arg(metavar="RUN")]
    """Run directory: logs, checkpoints, the trained model."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="TOML")] = None
    """TOML file with the settings below; the command line wins over it."""
    framework: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Learning framework: csm, seq-bert, net-bert, autoencoder, or one that another package registers; short
    for --model.framework. With it, --help shows its own settings."""
    preset: Annotated[PresetName | None, tyro.conf.arg(metavar="NAME")] = None
    """Sizes and the settings that go with them: tiny, small, published (the runs of 2022, framework by
    framework), base, large, 1b; by default chosen by the data and the machine. TOML file and command line win
    over it."""
    init: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Weights to begin from; short for --train.init."""
    freeze: Annotated[str | None, tyro.conf.arg(metavar="PART,…")] = None
    """Parts that are not trained; short for --train.freeze."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    model: ModelConfig = dataclasses.field(default_factory=CSMConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    stated: Annotated[tuple[str, ...] | None, tyro.conf.Suppress] = None
    """Names of the settings that were given, by :func:`settled`; None where all of them were meant."""


AnySettings = TypeVar("AnySettings", bound=Settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Settings):
    """Arguments of `brainflow pretrain`."""

    resume: bool = True
    """Continue from the newest checkpoint in RUN. With --no-resume, delete what an earlier run left there
    (once: a job that SLURM or torchrun starts again continues)."""
    json: bool = False
    """Print a summary as one JSON object on stdout."""
    submit: bool = False
    """Hand the run in as a job of the cluster that `slurm` describes (extra `slurm`), and return."""
    slurm: SlurmConfig = dataclasses.field(default_factory=SlurmConfig)


def arguments(given: list[str]) -> list[str]:
    """Put the settings of `--preset` and of the TOML file `--config` before the command line: the later win.

    Without a preset they are those that every run has.

    Raises
    ------
    ValueError
        If the file is not TOML or names a setting that does not exist, a setting is of another framework, or
        there is no such preset or framework.
    FileNotFoundError
        If there is no such file.
    """
    path, framework = _option(given, "--config"), _framework(given)
    settings = _read_toml(Path(path), framework) if path else {}
    options = _flags(settings)
    name = _option(given, "--preset")
    framework = framework or settings.get("model", {}).get("framework", "csm")
    stated = (word.partition(".") for word in _stated(given))
    refuse_foreign([setting for section, _, setting in stated if section == "model"], framework)
    initial = (
        _option(given, "--init") or _option(given, "--train.init") or settings.get("train", {}).get("init")
    )
    if name:
        options = [*_flags(preset(name, framework)), *options]
    elif not initial:  # weights to begin from say themselves what they fit
        options = [*_flags(today(framework)), *options]
    return [*options, *given]


def defaults(given: list[str]) -> Args:
    """Return what the arguments are where the command line does not say; `out` it has to."""
    return Args(out=tyro.MISSING, model=model_defaults(given))


def model_defaults(given: list[str]) -> ModelConfig:
    """Return the defaults of the framework that a command line, a TOML file's settings included, chooses."""
    return model_config(_framework(given) or "csm")


def settled(args: AnySettings, words: list[str]) -> AnySettings:
    """Return parsed arguments that know which settings `words` gave: others may be chosen."""
    return dataclasses.replace(args, stated=_stated(words))


def _stated(words: list[str]) -> tuple[str, ...]:
    """Return the names of the settings that options give."""
    given = (word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--"))
    # A flag that is turned off, as by --train.no-plot, is stated as well.
    return tuple(sorted({name.replace(".no_", ".") for name in given}))


def _flags(settings: dict[str, Any]) -> list[str]:
    options: list[str] = []
    for key, value in settings.items():
        if key == "store":  # positional: see `pretrain_config`
            continue
        for name, item in value.items() if isinstance(value, dict) else [("", value)]:
            options += _flag(f"{key}.{name}" if name else key, item)
    return options


def pretrain_config(args: Settings) -> PretrainConfig:
    """Return the whole configuration of the run that the arguments ask for.

    Raises
    ------
    WrongUsage
        If no store is named or settings do not fit together.
    """
    store = args.store or (read_toml(args.config).get("store", "") if args.config else "")
    if not store:
        raise WrongUsage("store: none was named, expected one, as in `brainflow pretrain STORE --out RUN`")
    short = {key: value for key in ("init", "freeze") if (value := getattr(args, key)) is not None}
    try:
        model = args.model
        if args.framework is not None:
            model = dataclasses.replace(model, framework=args.framework)
        train = dataclasses.replace(args.train, **short)
        config = PretrainConfig(
            store=store, out=args.out, model=model, data=args.data, train=train, device=args.device
        )
        if _chooses(args):  # what is chosen may be what makes the others fit
            framework_spec(model.framework)
        else:
            check_framework(config)
    except ValueError as error:
        raise WrongUsage(str(error)) from error
    return config


def run(args: Args) -> int:
    """Train, print where the result is, and return the exit code."""
    config = pretrain_config(args)
    if args.stated is not None:
        config = _chosen(args, config)
    if args.submit:
        return _submit(args, config)
    if sys.__stderr__ is not None:  # a store that is cut short while it is mapped ends us with SIGBUS
        faulthandler.enable(sys.__stderr__)

    # torch costs seconds that --help and a wrong command line need not pay
    from brainflow.storage.text import counted
    from brainflow.training.interrupt import Preempted
    from brainflow.training.loop import pretrain
    from brainflow.training.metrics import explained, read_metrics, verdict
    from brainflow.training.parallel import from_environment

    first = from_environment().first  # under torchrun or srun one process speaks for all
    try:
        folder = pretrain(config, resume="auto" if args.resume or started_again() else "never")
    except Preempted as stopped:
        if first:
            print(f"brainflow pretrain: {stopped}", file=sys.stderr)
            if requeue(stopped.signal):
                print("brainflow pretrain: the job is back in SLURM's queue", file=sys.stderr)
        if args.json and first:
            print(json.dumps({"run": args.out, "stopped_by": stopped.signal, "step": stopped.step}))
        return stopped.exit_code
    if not first:
        return 0
    lines = read_metrics(folder)
    summary: dict[str, Any] = {"run": str(folder)}
    for kind in ("loss", "val_loss"):
        summary.update(next((line for line in reversed(lines) if kind in line), {}))
    summary.pop("val_network_correlation", None)  # one number a network: in metrics.jsonl
    if args.json:
        print(json.dumps(summary))
    else:
        found = ", ".join(f"{name} {value:.3f}" for name, value in explained(summary).items())
        print(
            f"{folder}: {counted(summary['step'], 'step')}, validation loss {summary['val_loss']:.4f}; "
            f"explained variance of held-out runs: {found}, the mean 0"
        )
    if against := verdict(summary):
        print(f"brainflow pretrain: warning: {against}", file=sys.stderr)
    return 0


def _chooses(args: Settings) -> bool:
    """Whether size or steps were left to us."""
    stated = args.stated
    if stated is None:
        return False
    return "train.steps" not in stated or not any(name in stated for name in SIZED_BY)


def _chosen(args: Args, config: PretrainConfig) -> PretrainConfig:
    """Choose a preset, steps and checkpoints where they were not stated, and say so on stderr."""
    from brainflow.devices import resolve_device
    from brainflow.storage import BoldStore
    from brainflow.training import sizing
    from brainflow.training.parallel import from_environment

    store, ranks = BoldStore.open(config.store), from_environment()
    cuda = args.slurm.gpus > 0 if args.submit else resolve_device(config.device).type == "cuda"
    resume: Literal["auto", "never"] = "auto" if args.resume or started_again() else "never"
    config, chosen = sizing.choose(config, store, args.stated or (), cuda=cuda, resume=resume)
    try:
        check_framework(config)
    except ValueError as error:
        raise WrongUsage(str(error)) from error
    if chosen and ranks.first:
        here = None if args.submit else resolve_device(config.device)
        print(sizing.explain(config, store, chosen, cuda=cuda), file=sys.stderr)
    if not set(chosen) <= set(sizing.CADENCE) and ranks.first:
        print(sizing.published_cost(config, store, here, ranks.world), file=sys.stderr)
    return config


def _submit(args: Args, config: PretrainConfig) -> int:
    """Hand the run in with its whole configuration, as it would be run here."""
    folder = Path(args.out) / "slurm"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # submitit unpickles the jobs that it keeps there
    words = [config.store, "--out", args.out, "--device", args.device]
    words += [] if args.resume else ["--no-resume"]
    for section in ("model", "data", "train"):
        for name, value in dataclasses.asdict(getattr(config, section)).items():
            words += _flag(f"{section}.{name}", value)
    job = submit(words, folder, args.slurm)
    said = {"job": job.job_id, "output": str(folder)}
    print(json.dumps(said) if args.json else f"job {said['job']}; its output goes to {said['output']}")
    if args.slurm.cluster == "local":
        # One exit code a process: the worst is that of the run.
        return max(job.results())
    return 0


def _flag(name: str, value: Any) -> list[str]:
    """Return the words that set a setting."""
    if not isinstance(value, bool):
        return [f"--{name}", str(value)]
    section, _, field = name.rpartition(".")
    return [f"--{section + '.' if section else ''}{'' if value else 'no-'}{field}"]


def _framework(given: list[str]) -> str | None:
    return _option(given, "--framework") or _option(given, "--model.framework")


def _option(given: list[str], name: str) -> str | None:
    """Return what the command line gives for an option, the last time, before it is parsed."""
    found = None
    for i, word in enumerate(given):
        if word == name and i + 1 < len(given):
            found = given[i + 1]
        elif word.startswith(f"{name}="):
            found = word.removeprefix(f"{name}=")
    return found


def _read_toml(path: Path, framework: str | None) -> dict[str, Any]:
    values = read_toml(path)
    try:
        check_settings(values, framework)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return values
