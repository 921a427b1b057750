"""Say how far a store is from what a model saw and what to do about it, or what this installation can do.

Examples
--------
  brainflow doctor
  brainflow doctor store --for run
  brainflow doctor store --for run --json
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import tyro

from brainflow.cli.usage import WrongUsage

NAMESAKE = (
    "the brain–computer-interface library `brainflow` is installed too and has the same import name; keep "
    "one of them in an environment: pip uninstall brainflow, then install brainflow-fmri again"
)
OPTIONAL = {
    "triton": "kernels on a GPU",
    "flash-attn": "attention on Ampere and later: extra flash",
    "flash-attn-4": "attention on Hopper and Blackwell: extra flash4",
    "nvidia-dali-cuda130": "DALI pipeline: extra dali",
    "nvidia-dali-cuda120": "DALI pipeline for older drivers: extra dali-cuda12",
    "scikit-learn": "decoding: extra report",
    "nilearn": "decoding, reports, preparation: extra report",
    "huggingface_hub": "sharing: extra hub",
    "obstore": "remote stores: extra remote",
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow doctor`."""

    store: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")] = None
    """Store to compare; without it only the installation is looked at."""
    for_: Annotated[str | None, tyro.conf.arg(name="for", metavar="CKPT")] = None
    """Pretrained model."""
    json: bool = False
    """Print one JSON object."""


def run(args: Args) -> int:
    """Print the table; 1 if something must be repaired."""
    if (args.store is None) != (args.for_ is None):
        raise WrongUsage("store, --for: got one of them, expected both (or none: the installation alone)")
    rows = []
    if args.store is not None and args.for_ is not None:
        from brainflow.decoding.doctor import examine
        from brainflow.storage import BoldStore

        rows = examine(BoldStore.open(args.store), args.for_)
    namesake = namesake_installed()
    bad = namesake or any(row.verdict == "differs" for row in rows)
    facts = environment()
    if args.json:
        found = {"rows": [vars(row) for row in rows], "environment": facts, "namesake": namesake}
        print(json.dumps({**found, "ok": not bad}, indent=1))
        return int(bad)
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from brainflow.storage.text import printable

    if rows:
        table = Table(
            title=escape(printable(f"{args.store} for {args.for_}")), title_justify="left", title_style="bold"
        )
        for name in ("what", "the model saw", "the store has", "", "what to do"):
            table.add_column(name)
        for row in rows:
            cells = (row.what, row.model, row.store, row.verdict, row.advice)
            table.add_row(*(escape(printable(cell)) for cell in cells))
        Console().print(table)
    else:
        for name, value in facts.items():
            print(f"{name + ':':<22}{value}")
    print(f"{'installation:':<22}{NAMESAKE if namesake else 'fine'}")
    return int(bad)


def environment() -> dict[str, str]:
    """Return what a bug report needs: versions, devices, and which optional packages are there."""
    import torch

    import brainflow

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "brainflow": f"{_version('brainflow-fmri') or 'not installed'} in {Path(brainflow.__file__).parent}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
        "GPUs": ", ".join(gpus) or "none",
        # Not those of the machine: a job or a container may have been given fewer.
        # macOS has no affinity.
        "CPU cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}"
        f", torch uses {torch.get_num_threads()} threads",
    }
    facts["attention"] = _attention()
    for package, use in OPTIONAL.items():
        found = _version(package)
        facts[package] = found or f"not installed ({use})"
    return facts


def _attention() -> str:
    """Return the kernel that a model of common size would take here, in training with dropout."""
    import torch

    from brainflow.kernels.varlen_attention import backends

    if not torch.cuda.is_available():
        return "plain PyTorch (no GPU)"
    q = torch.empty(2, 12, 64, dtype=torch.bfloat16, device="cuda")
    short = backends.BACKENDS["window"].longest(q.dtype)
    reasons = backends.no_kernel(q, 1, short + 1, 0.0)
    long = f"fallback ({reasons})" if reasons else backends.settle(q, 1, short + 1, 0.1, None)[0]
    if backends.why_not("window", q, 1, short, 0.1) is None:
        return f"window up to {short} tokens, {long} beyond, in bf16 and fp16"
    return long


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def namesake_installed() -> bool:
    """Whether the distribution `brainflow` of the same import name is installed, or left files in ours."""
    import brainflow

    # Installed together both lie in one folder; board_shim.py is the namesake's alone.
    return _version("brainflow") is not None or (Path(brainflow.__file__).parent / "board_shim.py").exists()
