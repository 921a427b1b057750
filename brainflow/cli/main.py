"""The `brainflow` command: a table of verbs; a verb's module is imported only once it is asked for."""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import logging
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from brainflow.cli.usage import WrongUsage, check_words, refuse

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("brainflow.cli.demo", "see all of it work on real fMRI, in minutes, on two CPU cores"),
    "prepare": ("brainflow.cli.prepare", "turn fMRIPrep's derivatives into a store, as a BIDS App"),
    "atlases": ("brainflow.cli.atlases", "list the parcellations that are known by name"),
    "ingest": ("brainflow.cli.ingest", "turn recorded runs into a store"),
    "recipes": ("brainflow.cli.recipes", "say how to get public data, and what it takes"),
    "simulate": ("brainflow.cli.simulate", "write a simulated cohort, whose truth is known, as a store"),
    "split": ("brainflow.cli.split", "keep people out of pretraining, to test on them"),
    "info": ("brainflow.cli.info", "say what a store holds"),
    "verify": ("brainflow.cli.verify", "read all of a store and name every damaged chunk and run"),
    "init": ("brainflow.cli.init", "write a commented run.toml: every setting of `pretrain`"),
    "pretrain": ("brainflow.cli.pretrain", "train a model on a store with one of the learning frameworks"),
    "sweep": ("brainflow.cli.sweep", "search over settings: many runs, any number of machines, one study"),
    "adapt": ("brainflow.cli.adapt", "adapt a pretrained model to decode mental states"),
    "embed": ("brainflow.cli.embed", "embed images, tables and stores with a pretrained model"),
    "report": ("brainflow.cli.report", "make one HTML page of a run or a decoding"),
    "doctor": ("brainflow.cli.doctor", "say how far a store is from what a model saw, and what to do"),
    "publish": ("brainflow.cli.publish", "put a model with its card, or a store, on the hub or in a bucket"),
    "bench": ("brainflow.benchmarks.command", "measure loader, kernels and training steps on this machine"),
    "import-checkpoint": ("brainflow.cli.import_checkpoint", "read the released weights of 2022"),
    "export-checkpoint": ("brainflow.cli.export_checkpoint", "write weights under the names of 2022"),
    "export": ("brainflow.cli.export", "write a store's runs as files that other tools read"),
    "plot": ("brainflow.cli.plot", "draw the loss curves of one or more runs"),
}
FORMER = {"share": "publish"}
"""Verb of an older version → today's."""
SHELLS = ("bash", "zsh", "fish")
NEXT = """\
Pretrain sequence models on fMRI and decode mental states with them.

See it work:
  brainflow demo --open                from recordings to a decoder, in minutes
  brainflow doctor                     what this installation can do

With your data:
  brainflow prepare BIDS_DIR out participant group --atlas schaefer-400
                                       fMRIPrep's output to a store; or
  brainflow ingest arrays runs.toml --store store
                                       .npy, .mat, .csv, ... to a store
  brainflow split store --test 0.2 --out split.json
                                       people whom pretraining never reads
  brainflow pretrain store --data.split split.json --out run
  brainflow adapt store --from run --target COLUMN --split split.json \\
      --out decoding --report

`brainflow --help` lists all verbs, `brainflow VERB --help` explains one."""
EXAMPLES = """\
Examples:
  brainflow demo
  brainflow ingest tar runs/*.tar store
  brainflow pretrain store --framework csm --out run
  brainflow plot run --out loss.png

`brainflow VERB --help` explains a verb. `-v` logs more and shows the traceback of an error.
`brainflow --print-completion bash` prints a completion script; also for zsh and fish."""


def usage() -> str:
    """Return the text of `brainflow --help`."""
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {verb:<{width}}{line}" for verb, (_, line) in VERBS.items())
    return (
        "usage: brainflow [-h] [--version] [-v] VERB ...\n\n"
        "Pretrain sequence models on fMRI and decode mental states with them.\n\n"
        f"Verbs:\n{verbs}\n\n{EXAMPLES}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code.

    0: done; 1: the verb failed; 2: the command line is wrong; 130: Ctrl-C; 143: stopped by SIGTERM or SIGUSR1
    after a checkpoint.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path that is not UTF-8 must not end what has been done
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        # Here: at exit nobody would notice that the reader has left.
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left, as in `brainflow info STORE | head -1`
        # What Python flushes at exit would raise once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _main(args: list[str]) -> int:
    # rich obeys NO_COLOR; tyro, which prints --help, obeys only its own variable, which it reads on import
    if os.environ.get("NO_COLOR"):
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")
    verbose = _take_verbose(args)
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(message)s"
    )
    if not args or args[0] in ("-h", "--help"):
        print(usage() if args else NEXT)
        return 0
    if args[0] == "--version" or (args[0] in VERBS and args[1:] == ["--version"]):
        print(f"brainflow {importlib.import_module('brainflow').__version__}")
        return 0
    if args[0] == "--print-completion":
        return _print_completion(args[1:])
    verb, rest = FORMER.get(args[0], args[0]), args[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`brainflow --help` lists the verbs"
        kind = "option" if verb.startswith("-") else "verb"
        print(f"brainflow: error: unknown {kind} {verb!r}; {hint}", file=sys.stderr)
        return 2
    return _dispatch(verb, rest, verbose)


def _dispatch(verb: str, rest: list[str], verbose: bool) -> int:
    prog = f"brainflow {verb}"
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, prog, warnings.showwarning)
            module = importlib.import_module(VERBS[verb][0])
            return int(module.run(_parse(module, prog, rest)) or 0)
    except SystemExit as stop:  # tyro: 0 after --help, 2 after a wrong command line
        return _exit_code(stop)
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # No error of the verb: `main` ends quietly.
        raise
    except Exception as error:
        if verbose:
            traceback.print_exc()
        print(f"{prog}: error: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, WrongUsage) else 1


def _show_warning(
    prog: str, usual: Callable[..., None], message: Warning, category: type[Warning], *where: Any
) -> None:
    """Print a warning of ours on one line; the place in the code that others have says nothing to a user."""
    if category.__module__.startswith("brainflow."):
        from brainflow.storage.text import printable

        print(f"{prog}: warning: {printable(' '.join(str(message).split()))}", file=sys.stderr)
    else:
        usual(message, category, *where)


def _parse(module: Any, prog: str, rest: list[str]) -> Any:
    """Return a verb's arguments."""
    import tyro  # 0.2 s that `brainflow --help` need not pay

    try:
        given = rest
        check_words(prog, module.Args, given)
        if hasattr(module, "arguments"):  # a verb whose arguments come from a file, too
            rest = module.arguments(rest)
        parse = partial(tyro.cli, module.Args, prog=prog, args=rest, description=module.__doc__)
        if hasattr(module, "defaults"):  # a verb whose options depend on its arguments
            parse = partial(parse, default=module.defaults(rest))
        parsed, unknown = parse(return_unknown_args=True)
        if unknown and not unknown[0].startswith("-"):
            refuse(prog, module.Args, given, unknown[0])
        if unknown:
            parse()  # says which option may be meant, and exits
        return module.settled(parsed, rest) if hasattr(module, "settled") else parsed
    except BrokenPipeError:  # the reader of --help left
        raise
    except (ValueError, OSError) as error:
        raise WrongUsage(_said(error)) from error


def _exit_code(stop: SystemExit) -> int:
    if isinstance(stop.__context__, BrokenPipeError):  # rich's answer to a reader that left
        return 0
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _one_line(error: Exception) -> str:
    """Return what went wrong and what to do, without what could steer a terminal."""
    from brainflow.storage.text import printable  # numpy comes with it, which `brainflow --help` need not pay

    return printable(" ".join(_said(error).split())) or type(error).__name__


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.errno is not None:
        return _file_error(error)
    if isinstance(error, ValueError | OSError | ImportError):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        return f"out of memory ({error or 'no more to be had'}); take smaller batches, or a larger machine"
    if isinstance(error, RecursionError):
        return "an input is nested too deeply; BRAINFLOW_DEBUG=1 shows where"
    return (
        f"{type(error).__name__}: {error}. This is a fault of brainflow: please report it with what "
        "BRAINFLOW_DEBUG=1 before the same command shows"
    )


def _file_error(error: OSError) -> str:
    """Return an error of the operating system: file first, and for the common ones what to do."""
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full{_free(error.filename)}; free space, then run the same command again"
    remedies = {
        errno.ENOENT: "check the path",
        errno.EACCES: "ask its owner for access, or choose another path",
        errno.EROFS: "choose a path on a disk that can be written to",
        errno.EMFILE: "raise the limit on open files (ulimit -n)",
        errno.EIO: "the disk or the network failed; check it, then run the same command again",
    }
    remedy = remedies.get(error.errno or 0)
    return f"{where}{error.strerror}" + (f"; {remedy}" if remedy else "")


def _free(name: object) -> str:
    """Return how much space is left beside a file, nothing where that cannot be told."""
    if not isinstance(name, str):
        return ""
    try:
        return f" ({shutil.disk_usage(os.path.dirname(name) or '.').free / 2**20:.1f} MiB free)"
    except OSError:
        return ""


def _take_verbose(args: list[str]) -> bool:
    """Remove `-v` and `--verbose` wherever they stand before a `--`; BRAINFLOW_DEBUG=1 does the same."""
    end = args.index("--") if "--" in args else len(args)
    kept = [a for a in args[:end] if a not in ("-v", "--verbose")]
    found = len(kept) < end
    args[:end] = kept
    return found or os.environ.get("BRAINFLOW_DEBUG", "") not in ("", "0")


def _print_completion(args: list[str]) -> int:
    if len(args) != 1 or args[0] not in SHELLS:
        got = " ".join(args) or "nothing"
        print(
            f"brainflow: error: --print-completion: got {got}, expected one of {', '.join(SHELLS)}",
            file=sys.stderr,
        )
        return 2
    from tyro.extras import subcommand_cli_from_dict

    verbs: dict[str, Any] = {verb: importlib.import_module(name).Args for verb, (name, _) in VERBS.items()}
    try:
        subcommand_cli_from_dict(verbs, prog="brainflow", args=["--tyro-print-completion", args[0]])
    except SystemExit as stop:
        return _exit_code(stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
