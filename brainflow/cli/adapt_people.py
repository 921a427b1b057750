"""`brainflow adapt --level subject`: targets of people instead of segments."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from brainflow.cli.score_tables import gain_line, narrow, people_table
from brainflow.cli.usage import WrongUsage
from brainflow.decoding.doctor import examine
from brainflow.decoding.people import PeopleConfig, load_people
from brainflow.decoding.people_decoders import (
    adapt_people,
    people_baselines,
    people_gains,
    write_people,
)
from brainflow.pretrained.hub import fetch
from brainflow.progress import progress_bar
from brainflow.storage.files import output_folder
from brainflow.storage.text import counted, printable

TOGETHER = {"store", "from_", "target", "level", "out", "mode", "split", "folds", "classes", "layer", "seed"}
TOGETHER |= {"allow_seen", "allow_mismatch", "scratch", "device", "json", "report"}
OWN = ("participants", "confounds", "split_by")
"""Options that go with people alone."""


def check_level(args: Any) -> None:
    """Refuse options of people where segments are decoded, and the other way round.

    `args` are those of `brainflow adapt`.
    """
    given = [field.name for field in fields(args) if getattr(args, field.name) != field.default]
    if args.level == "segment":
        wrong = [name for name in given if name in OWN]
        expected = "--level subject with them"
    else:
        wrong = [name for name in given if name not in TOGETHER and name not in OWN]
        expected = "them with --level segment alone: a person's target is read by ridge from frozen states"
        if args.mode not in (None, "linear"):
            wrong.append("mode")
    if wrong:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        raise WrongUsage(f"level: got {args.level} with {options}, expected {expected}")


def run_people(args: Any, store: Any, told: Any) -> int:
    """Judge decoders of people, write the results, print the scores, and return the exit code.

    `told` prints what `brainflow doctor` would say, and returns it.
    """
    out, checkpoint = Path(args.out), fetch(args.from_)
    output_folder(out, "decoding")
    names = tuple(name.strip() for name in (args.confounds or "").split(",") if name.strip())
    task = load_people(
        store,
        PeopleConfig(
            target=args.target,
            participants=args.participants,
            confounds=names,
            split=args.split,
            split_by=args.split_by,
            folds=args.folds,
            classes=args.class_names,
        ),
    )
    # runs are cut into windows as long as those of pretraining: of their length there is no doubt
    doubts = told(examine(store, checkpoint, windows=np.zeros(0, dtype=np.int64)))
    settings: dict[str, Any] = {
        "layer": args.layer,
        "seed": args.seed,
        "device": args.device,
        "allow_mismatch": args.allow_mismatch,
        "allow_seen": args.allow_seen,
    }
    with progress_bar("decoders", quiet=args.json) as progress:
        result = adapt_people(task, checkpoint, scratch=args.scratch, **settings)
        progress(1, 3)
        fresh = [] if args.scratch else [adapt_people(task, checkpoint, scratch=True, **settings)]
        progress(2, 3)
        without = people_baselines(task)
        progress(3, 3)
    extra: dict[str, Any] = {"command": args.recorded, "doctor": doubts}
    if fresh:
        extra["gains"] = people_gains(task, result, fresh[0], without)
    others = [*fresh, *without]
    write_people(task, result, others, out, extra)
    page = None
    if args.report:
        from brainflow.report.run_page import write_report  # matplotlib costs a second

        page = write_report(out)
    if args.json:
        print((out / "scores.json").read_text(encoding="utf-8"), end="")
        return 0
    what = f"{len(task.classes)} classes" if task.classes else "numbers"
    title = f"{args.target}: {what}, {len(task.tested)} tested people, {task.split_name}"
    Console().print(people_table([result, *others], title=escape(printable(title))))
    if task.classes:
        print(f"classes: {printable(', '.join(task.classes))}; chance is 0.5 and {1 / len(task.classes):.3f}")
    units = len(set(task.units[task.tested]))
    print(f"intervals: 95 %, bootstrap over {units} {printable(task.unit)}s{narrow(units)}")
    for why, count in task.left_out.items():
        print(printable(f"left out: {counted(count, 'person', 'people')}, {why}"))
    if task.confound_kinds:
        kinds = ", ".join(f"{name} ({kind})" for name, kind in task.confound_kinds.items())
        print(printable(f"confounds regressed out within folds: {kinds}"))
    for name, gain in extra.get("gains", {}).items():
        print(gain_line(name, gain))
    print(printable(f"written to {args.out}" + (f"; page: {page}" if page else "")))
    return 0
