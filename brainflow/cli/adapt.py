r"""Adapt a pretrained model to labelled segments or traits of people; score it beside what has to be beaten.

Every decoder is fitted and tested in the same folds: the model, the same network from random weights, and
decoders without a model. Intervals are 95 %, over subjects, or over runs where there is one subject.

Examples
--------
  brainflow adapt store --from run --target condition --out decoding
  brainflow adapt store --from story-small --target segment --split split.json --out decoding
  brainflow adapt store --from run --target state --split leave-one-subject-out --mode lora --out decoding
  brainflow adapt store --from run --target state --split split.json --out decoding
  brainflow adapt store --from run --target state --n-train-subjects 48 --n-test-subjects 20 --out decoding
  brainflow adapt store --from run --target state --learning-curve 1,2,4,8 --draws 10 --out curve
  brainflow adapt store --from run --target condition --mode all --out decoding --json
  brainflow adapt store --from run --target age --level subject --out age
  brainflow adapt store --from run --target diagnosis --level subject --participants participants.tsv \
    --confounds age,sex,mean_fd --split-by site --out diagnosis
  brainflow adapt runs.toml --from run --target condition --hrf-shift 5 --mode all --report \
    --attribute integrated-gradients --mask mask.nii.gz --out decoding
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from brainflow.cli.score_tables import curve_table, gain_line, narrow, scores_table, shift_line
from brainflow.cli.usage import WrongUsage
from brainflow.progress import progress_bar

Modes = Literal["finetune", "lora", "attentive", "linear", "mlp", "knn", "all"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow adapt`."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store with labelled segments; or the TOML file of `brainflow ingest arrays`, whose runs are then
    written to OUT/store-from-arrays first."""
    from_: Annotated[str, tyro.conf.arg(name="from", metavar="CKPT")]
    """Pretrained model: the directory of a `brainflow pretrain` run, `owner/name` on the hub, or
    `story-small`, which ships with the package."""
    target: Annotated[str, tyro.conf.arg(metavar="COLUMN")]
    """Label column to decode; of people a column of their table: numbers are regressed, text is classes."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Folder for scores, predictions and the confusion matrix."""
    level: Literal["segment", "subject"] = "segment"
    """`subject`: the target is one of people, as age or diagnosis; all their runs are read."""
    participants: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Table of people (BIDS' participants.tsv); by default participants.tsv in the folder of the store."""
    confounds: Annotated[str | None, tyro.conf.arg(metavar="COLUMN,…")] = None
    """Columns of the table that are regressed out, fitted to the training people of each fold."""
    split_by: Annotated[str | None, tyro.conf.arg(metavar="COLUMN")] = None
    """Column of the table, as site or family, of which each value is left out in turn; with --split k-fold
    they are dealt into parts."""
    mode: Modes | None = None
    """`finetune` (default) all weights or `lora`: low-rank changes, both from a head fitted in closed form;
    on frozen weights `attentive` (attention over time points), `linear` (ridge in closed form), `mlp`, `knn`;
    `all` judges each of them, the files are fine-tuning's. Of people `linear` alone."""
    published: bool = False
    """`finetune`, `lora`: as published, a random head on the CLS token, 500 steps."""
    split: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE")] = None
    """What is left out of training and tested in turn: `leave-one-run-out`, `leave-one-subject-out`,
    `k-fold`, which keeps subjects (or runs) whole, or `subject-wise`, which deals subjects once to training,
    validation and test, as published. Or a file of `brainflow split`: its test people test, the others train;
    a model that has seen them is refused. By default `subject-wise` where numbers of subjects are given, else
    `leave-one-run-out`. Of people `k-fold` (default), `leave-one-subject-out` or a file."""
    folds: int = 5
    """Number of parts of `k-fold`."""
    n_train_subjects: int | None = None
    """Training subjects of `subject-wise`; by default all that neither validate nor test."""
    n_val_subjects: int | None = None
    """Validation subjects of `subject-wise`: they choose among the weights of a fit; by default none."""
    n_test_subjects: int | None = None
    """Test subjects of `subject-wise`; by default a fifth of all."""
    split_seed: int = 0
    """Deals subjects in `subject-wise`, and draws the training subjects of a learning curve."""
    learning_curve: Annotated[str | None, tyro.conf.arg(metavar="N,N,…")] = None
    """Also judge decoders trained on so many subjects (runs where there is one subject) of each fold."""
    draws: int = 1
    """How often the training subjects of a point of the learning curve are drawn; intervals then hold for
    other draws, too."""
    hrf_shift: float = 0.0
    """Seconds by which segments are moved later, to where their BOLD response is (about 3 to 6). Refused
    where `brainflow prepare` has moved them already, which it does by 3 s unless told otherwise."""
    classes: Annotated[str | None, tyro.conf.arg(metavar="N|NAME,NAME,…")] = None
    """Number or names of the classes that the column must hold; by default what is found there is taken."""
    new_classes: bool = False
    """Go on where the checkpoint is a decoder of other classes than the column holds."""
    allow_seen: bool = False
    """Go on where the model has seen people whom the split file keeps for the test."""
    allow_mismatch: bool = False
    """Go on where the store's parcellation, TR or normalisation is not what the model was trained on, or
    where segments are moved twice."""
    scratch: bool = False
    """Take the checkpoint's architecture with fresh weights alone (they stand beside the model anyhow)."""
    pooling: Literal["bins", "moments", "spread", "cls", "last", "mean", "first"] | None = None
    """How one vector is made of a window (not with attentive, all): `bins`, the means of equal time bins side
    by side; `moments`, mean and log-SD over time; `spread`, the log-SD alone; `cls`, the default of
    --published. Else `bins`, or what the BOLD itself varies where that clearly reads people better who are
    left out of the training."""
    bins: int = 10
    """Number of time bins."""
    layer: int | Literal["input", "both", "all"] | None = None
    """States that are read: 0 the embedding, 1, 2, … after so many blocks, `input` the BOLD normalised over
    networks, `both` embedding and last side by side, `all` these and the input; by default chosen by leaving
    people out within the training windows."""
    freeze: Annotated[str, tyro.conf.arg(metavar="PART,…")] = ""
    """`finetune`: pretrained parts that stay as they are: embedder, decoder, decoder-without-heads,
    unembedder."""
    steps: int | None = None
    """Optimizer steps a fold; by default 60 from a fitted head (fewer where training people who are left out
    say so), 500 from a random one."""
    batch_size: int = 32
    """Windows a step."""
    lr: float | None = None
    """Peak learning rate of AdamW; by default 1e-4 for `finetune` (3e-4 if published), 1e-3 for `lora` and
    `attentive`."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    dropout: float = 0.1
    """Dropout of a random head."""
    rank: int = 8
    """Rank of the changes of `lora`."""
    balance: bool = False
    """Weigh windows by the inverse of their class's frequency."""
    label_smoothing: float = 0.0
    """Share of each label spread over all classes (not with linear, mlp, knn)."""
    seed: int = 0
    """Seeds fresh weights, dropout and the order of the windows."""
    seeds: int = 1
    """Fit everything with so many seeds; scores are means over them."""
    save: bool = False
    """Also fit a decoder to all labelled windows and write it to OUT/decoder, ready to be shared."""
    attribute: Literal["integrated-gradients", "occlusion"] | None = None
    """Explain each test window by its fold's decoder, by networks and time: OUT/attributions.npz."""
    report: bool = False
    """Also make the page of `brainflow report`, OUT/report/index.html."""
    mask: Annotated[str | None, tyro.conf.arg(metavar="NIFTI")] = None
    """Mask whose voxels are the networks: the page shows attributions on the brain."""
    labels: Annotated[str | None, tyro.conf.arg(metavar="NIFTI")] = None
    """Image of labels that are the networks, in place of --mask."""
    maps: Annotated[str | None, tyro.conf.arg(metavar="NIFTI")] = None
    """4-D image of maps that are the networks, in place of --mask."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    cache: bool = True
    """Decoders without a model are fitted once for the same windows and folds, and read from
    ~/.cache/brainflow/baselines from then on; --no-cache fits them again."""
    json: bool = False
    """Print the scores as one JSON object on stdout; no progress on stderr."""

    @property
    def class_names(self) -> int | tuple[str, ...] | None:
        """What `classes` says."""
        if self.classes is None:
            return None
        names = tuple(name.strip() for name in self.classes.split(","))
        return int(names[0]) if len(names) == 1 and names[0].isdigit() else names

    @property
    def recorded(self) -> dict[str, Any]:
        """What results keep of the command line."""
        return {name: value for name, value in vars(self).items() if name not in ("json", "out")}


def run(args: Args) -> int:
    """Adapt, write the results, print the scores, and return the exit code."""
    # torch and scikit-learn cost seconds that --help and a wrong command line need not pay
    from brainflow.cli.adapt_people import check_level, run_people
    from brainflow.decoding.adapt import adapt
    from brainflow.decoding.attribution import HeldOut
    from brainflow.decoding.cache import cache_folder
    from brainflow.decoding.curve import curve_dict, learning_curve, write_curve
    from brainflow.decoding.doctor import examine
    from brainflow.decoding.persist import check_decoder_classes, save_for_task
    from brainflow.decoding.readout import read_line
    from brainflow.decoding.result import baselines, gains, within_subject, write_results
    from brainflow.decoding.task import load_task
    from brainflow.pretrained.hub import fetch
    from brainflow.storage.files import output_folder
    from brainflow.storage.text import printable

    check_level(args)
    if args.level == "subject":
        return run_people(args, _open(args, Path(args.out)), _tell)
    counts = _numbers(args.learning_curve)
    if args.draws < 1 or (args.draws > 1 and not counts):
        raise WrongUsage(f"draws: got {args.draws}, expected at least 1; more go with --learning-curve")
    if not args.report and (args.mask or args.labels or args.maps):
        raise WrongUsage("mask, labels, maps: draw on the brain in a report; add --report")
    masker = None
    if args.mask or args.labels or args.maps:
        from brainflow.report.brain import make_masker

        masker = make_masker(mask=args.mask, labels=args.labels, maps=args.maps)
    out, checkpoint = Path(args.out), fetch(args.from_)
    task_config = _task_config(args)
    configs = [_adapt_config(args, mode) for mode in _modes(args, checkpoint)]
    # Before the work: a folder that cannot be written to is told at once.
    output_folder(out, "decoding")
    task = load_task(_open(args, out), task_config, allow_mismatch=args.allow_mismatch)
    if not args.new_classes:
        check_decoder_classes(checkpoint, task)
    rows = examine(task.store, checkpoint, windows=task.lengths)
    doubts = _tell(rows)  # before the fits, which take long
    explain = HeldOut(task, args.attribute) if args.attribute else None
    settings: dict[str, Any] = {
        # Shared: features of frozen weights are computed once for all ways to adapt.
        "known": {},
        "seeds": args.seeds,
        "device": args.device,
        "allow_mismatch": args.allow_mismatch,
        "allow_seen": args.allow_seen,
    }
    pair = [configs[-1]] if args.scratch else [configs[-1], replace(configs[-1], scratch=True)]
    tasks, folds = 1 + len(counts) * args.draws, len(task.folds)
    # of the decoders without a model all together count as one fit in each fold
    total = folds * (args.seeds * (len(configs) - 1 + len(pair) * tasks) + tasks)
    cache = cache_folder() if args.cache else None
    with progress_bar("fits", quiet=args.json) as progress:
        done = 0

        def step(fits: int) -> None:
            nonlocal done
            done += fits
            progress(done, total)

        def without_model(part: Any) -> list[Any]:
            found = baselines(part, cache=cache)
            step(folds)
            return found

        settings["progress"] = lambda *_: step(1)
        results = [adapt(task, checkpoint, config, **settings) for config in configs[:-1]]
        result = adapt(task, checkpoint, configs[-1], explain=explain, **settings)
        fresh = [adapt(task, checkpoint, config, **settings) for config in pair[1:]]
        without = without_model(task)
        others = [*results, *fresh, *without]
        extra: dict[str, Any] = {"command": args.recorded, "doctor": doubts}
        if fresh:
            extra["gains"] = gains(task, result, fresh[0], without)
        if counts:
            curve = learning_curve(
                task,
                counts,
                lambda part: [
                    *(adapt(part, checkpoint, one, **settings) for one in pair),
                    *without_model(part),
                ],
                draws=args.draws,
                seed=args.split_seed,
            )
            extra["learning_curve"] = curve_dict(task, curve, draws=args.draws, pair=bool(fresh))
            write_curve(extra["learning_curve"], out / "learning_curve.csv")
    write_results(task, result, others, out, extra)
    if args.save:
        save_for_task(task, checkpoint, configs[-1], out / "decoder", result, device=args.device)
    if explain is not None:
        explain.average().save(out / "attributions.npz")
    page = None
    if args.report:
        from brainflow.report.run_page import write_report

        page = write_report(out, masker=masker)
    if args.json:
        # The file itself, so that stdout says the same.
        print((out / "scores.json").read_text(encoding="utf-8"), end="")
        return 0
    title = (
        f"{args.target}: {len(task.classes)} classes, {len(task.tested)} tested windows, {task.split_name}"
    )
    Console().print(scores_table([result, *others], title=escape(printable(title))))
    print(f"chance {result.scores.chance:.3f}; classes: {printable(', '.join(task.classes))}")
    groups = len(set(task.groups[task.tested]))
    print(f"intervals: 95 %, bootstrap over {groups} {task.group_kind}s{narrow(groups)}")
    print(shift_line(task))
    for name, gain in extra.get("gains", {}).items():
        print(gain_line(name, gain))
    if within_subject(task):
        print("decoding within subjects: other runs of the tested subjects train")
    print(read_line(result.details["read"]))
    saw = result.details.get("pretraining_saw")
    if saw:
        count = len(set(task.subjects[task.tested]))
        print(f"the model has seen {len(saw)} of the {count} tested subjects (the warning above says how)")
    if counts:
        Console().print(curve_table(extra["learning_curve"]))
    print(printable(f"written to {args.out}" + (f"; page: {page}" if page else "")))
    return 0


def _open(args: Args, out: Path) -> Any:
    """Open the store; write it first if runs are still in array files."""
    from brainflow.storage import BoldStore
    from brainflow.storage.ingest.arrays import ingest_arrays

    if not args.store.endswith(".toml"):
        return BoldStore.open(args.store)
    path = out / "store-from-arrays"
    with progress_bar("files", quiet=args.json) as progress:
        report = ingest_arrays(args.store, path, overwrite=True, progress=progress)
    if not report.ok:
        raise ValueError(f"store: {'; '.join(report.failures.values())}")
    return BoldStore.open(str(path))


def _tell(rows: list[Any]) -> list[dict[str, Any]]:
    """Print what `brainflow doctor` has doubts about, and return it."""
    from brainflow.storage.text import printable

    doubts = [vars(row) for row in rows if row.verdict in ("differs", "look")]
    for row in doubts:
        told = f"{row['what']}: the model saw {row['model']}, the store has {row['store']}; {row['advice']}"
        print(printable(f"brainflow adapt: warning: {told}"), file=sys.stderr)
    return doubts


def _modes(args: Args, checkpoint: Path) -> list[str]:
    """Return the ways to adapt, the one whose files are written last."""
    from brainflow.decoding.fit import NAMES
    from brainflow.decoding.lora import has_blocks
    from brainflow.pretrained.format import load_pretrained

    if args.mode != "all":
        return [args.mode or "finetune"]
    blocks = has_blocks(load_pretrained(checkpoint))
    return [mode for mode in reversed(NAMES) if mode != "lora" or blocks]


def _task_config(args: Args) -> Any:
    from brainflow.decoding.task import TaskConfig

    dealt = (args.n_train_subjects, args.n_val_subjects, args.n_test_subjects) != (None, None, None)
    split = args.split or ("subject-wise" if dealt else "leave-one-run-out")
    if dealt and split != "subject-wise":
        raise WrongUsage(
            f"split: got {split} with numbers of subjects, which only subject-wise deals; leave one out"
        )
    return TaskConfig(
        target=args.target,
        split=split,
        folds=args.folds,
        train_subjects=args.n_train_subjects,
        validation_subjects=args.n_val_subjects or 0,
        test_subjects=args.n_test_subjects,
        split_seed=args.split_seed,
        hrf_shift=args.hrf_shift,
        classes=args.class_names,
    )


def _adapt_config(args: Args, mode: str) -> Any:
    from brainflow.decoding.fit import PROBES, AdaptConfig

    shared = ("scratch", "pooling", "bins", "layer", "steps", "batch_size", "lr", "weight_decay", "dropout")
    chosen: Any = {name: getattr(args, name) for name in (*shared, "rank", "balance")}
    # With `all` each mode takes the options that it knows.
    published = args.published and (args.mode != "all" or mode in ("finetune", "lora"))
    if args.mode == "all" and args.pooling:
        raise WrongUsage(
            f"pooling: got {args.pooling} with mode all, where each mode has its own; leave it out"
        )
    smoothing = 0.0 if args.mode == "all" and mode in PROBES else args.label_smoothing
    known: Any = mode
    frozen = args.freeze if args.mode != "all" or mode == "finetune" else ""
    chosen |= {"freeze": frozen, "published": published, "seed": args.seed}
    return AdaptConfig(mode=known, label_smoothing=smoothing, **chosen)


def _numbers(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise WrongUsage(
            f"learning_curve: got {text!r}, expected whole numbers with commas, as in 1,3,6"
        ) from None
