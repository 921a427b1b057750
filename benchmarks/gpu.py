"""What is worth knowing first of a GPU, in at most eight minutes: `brainflow bench gpu --json gpu.json`.

Sections run one after the other, each in processes of its own: what a fault leaves of a process (after an
illegal access CUDA answers nothing any more) ends with it, and a new one takes the next case. A section that
is not done when its time is over is cut and says so; time that it leaves is the next one's. The rows are
written after each.

With `--dry` all of it runs at tiny sizes on the CPU, kernels in Triton's interpreter: it shows that the
script works, and its figures mean nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType

from brainflow.config import ModelConfig, PretrainConfig, TrainConfig
from brainflow.data import dali_installed, make_loader
from brainflow.data.sampler import WindowSampler
from brainflow.devices import begin_worker
from brainflow.frameworks import AutoencoderConfig, build, framework_names, framework_spec, model_config
from brainflow.kernels import conformance
from brainflow.recipes import pretraining, today
from brainflow.storage import BoldStore
from brainflow.storage.files import write_text
from brainflow.training.compute import allow_tf32, describe_compute, settle_precision
from brainflow.training.loop import pretrain
from brainflow.training.metrics import read_metrics
from brainflow.training.optimizer import autocast
from brainflow.training.parallel import Ranks
from brainflow.training.step import TrainingStep

from . import attention, kernels, roofline, show, timing
from .timing import Row, Timing, WrongResultError, attempt
from .training import PUBLISHED_SEQUENCES, count_work, loss_of, noise_store, random_batch, work_rows

Cases = dict[str, Callable[[], list[Row]]]
Section = Callable[[bool, str], Cases]
QUERY = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"


def ceilings(dry: bool, device: str) -> Cases:
    """Return cases of what the machine can do: copies and matrix products."""
    if dry:  # 128 MiB and large products take seconds on a small CPU
        return {"copy": lambda: _times("copy", {"copy": torch.ones(1000).clone}, 0.0, device)}
    return roofline.measurements(True, device)


def operators(dry: bool, device: str) -> Cases:
    """Return cases of every op, mask and element type, and the frameworks' gradients, against float64."""
    compared: dict[str, conformance.Comparison] = {}
    for name, config in _frameworks(_size(dry, 2, 128)):
        compared[name] = partial(_framework_errors, config, device)
    if dry:
        tiny: dict[str, Any] = {"lengths": (3, 1, 5), "networks": 20, "dtypes": (torch.float32,)}
        compared |= conformance.ops(device, impl="triton", masks=("time_points", "networks"), **tiny)
    else:
        for networks in (1024, conformance.NETWORKS):
            of_size = conformance.ops(device, networks=networks)
            compared |= {f"{name}/{networks}": compare for name, compare in of_size.items()}
    return {name: partial(_compared, name, compare) for name, compare in compared.items()}


def attentions(dry: bool, device: str) -> Cases:
    """Return cases of every attention backend, both streams, windows of up to 49 and 200, against float64."""
    sizes: dict[str, Any] = {"longest": (49, 200), "head_dims": (64, 128)}
    if dry:
        sizes = {"longest": (5,), "head_dims": (16,), "dtypes": (torch.float32,)}
    compared = conformance.attentions(device, **sizes)
    return {name: partial(_compared, name, compare) for name, compare in compared.items()}


def steps(dry: bool, device: str) -> Cases:
    """Return cases of a training step of every framework: host and device time, launches, where it waits."""
    sizes, windows = (((1, 16),), 3) if dry else (((4, 768), (12, 768)), 192)
    models = {
        f"{name}/{layers}x{width}": model
        for layers, width in sizes
        for name, model in _frameworks(_size(dry, layers, width))
    }
    given = [(name, model, "off") for name, model in models.items()]
    if not dry:
        given += [
            (f"{n}/published", _published(n, dry, Path("absent")).model, "off") for n in framework_names()
        ]
        given += [
            (f"{name}/compiled", model, "auto")
            for name, model in models.items()
            if framework_spec(model.framework).transformer  # no LSTM is compiled
        ]
    return {name: partial(_step, name, model, mode, windows, device) for name, model, mode in given}


def kernel_speeds(dry: bool, device: str) -> Cases:
    """Return cases of kernels over sizes, and of a race of the attention backends over lengths of windows."""
    sizes = [kernels.USUAL]
    sizes += [kernels.Sizes(192, 30), kernels.Sizes(192, 30, 400, 256), kernels.Sizes(1024, 30, 1024, 2048)]
    lengths: tuple[tuple[int, int, int], ...] = ((10, 49, 192), (50, 64, 96), (65, 128, 64), (129, 200, 32))
    seconds = 0.3
    if dry:
        sizes, lengths, seconds = [kernels.Sizes(4, 6, 16, 8)], ((2, 3, 2),), 0.0
    found: Cases = {}
    for dtype in (torch.float32,) if dry else (torch.bfloat16, torch.float32):
        for given in lengths:
            case = f"attention/{given[0]}-{given[1]}/{str(dtype)[6:]}"
            race = partial(attention.race, heads=1 if dry else attention.HEADS)
            found[case] = partial(race, *given, seconds, device, dtype)
    for kind, size in itertools.product(("fp32",) if dry else ("bf16", "fp32"), sizes):
        found |= kernels.of_size(size, kind, seconds, device)
    return found


def loaders(dry: bool, device: str) -> Cases:
    """Return cases of the loaders: equal batches while the GPU is busy, and batches a second."""
    kinds = ["host", "resident", *(["dali"] if dali_installed() else [])]
    batches, side = (3, 64) if dry else (60, 4096)
    return {
        "agree": partial(_loaders_agree, kinds, batches, side, device),
        "speed": partial(_loader_speed, kinds, batches, device),
    }


def pretrainings(dry: bool, device: str) -> Cases:
    """Return cases of the runs of 2022 by `pretrain`: steps a second, MFU, waiting for data, hours."""
    modes = ("off",) if dry else ("off", "auto")
    return {
        f"{name}/{'eager' if mode == 'off' else 'compiled'}": partial(_pretraining, name, mode, dry, device)
        for mode in modes
        for name in (["csm"] if dry else framework_names())
        if mode == "off" or framework_spec(name).transformer
    }


SECTIONS: dict[str, tuple[Section, int, int]] = {
    "ceilings": (ceilings, 15, 1),
    "operators": (operators, 90, 4),
    "attention": (attentions, 40, 4),
    "steps": (steps, 130, 1),
    "kernels": (kernel_speeds, 75, 1),
    "loaders": (loaders, 35, 1),
    "pretraining": (pretrainings, 75, 1),
}
"""Section → cases, seconds, processes. What is timed has the GPU to itself."""


def measure(
    dry: bool, device: str, *, env: Mapping[str, Any], json_file: Path | None = None
) -> tuple[list[Row], list[str]]:
    """Run all sections, print each, write its rows, and return rows and failures."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # a new process costs no import; none of CUDA is there yet
    rows, failures = [], []
    end = time.monotonic()
    for name, (_, seconds, _) in SECTIONS.items():
        # Not from now on: what the section before left of its time is added.
        end += seconds
        found, failed = run_section(name, end, dry, device)
        rows += found
        failures += [f"{name}: {failure}" for failure in failed]
        if json_file is not None:
            write_text(json_file, json.dumps([row.to_dict(env) for row in rows], indent=1) + "\n")
        show.print_rows(name, _worst(found))
    return rows, failures


def run_section(name: str, end: float, dry: bool, device: str) -> tuple[list[Row], list[str]]:
    """Run a section's cases in its processes until all are done or the clock says `end`.

    Returns
    -------
    tuple
        Rows, the last one about the section; what failed. A case that failed has a row that says why.
    """
    section, _, processes = SECTIONS[name]
    if dry:
        processes = 1  # each has to warm up
    began, rows, failures = time.monotonic(), [], []
    waiting = deque(section(dry, device))
    busy: dict[Connection, tuple[str, Any]] = {}
    idle: list[tuple[Connection, Any]] = []
    while waiting or busy:
        while waiting and len(busy) < processes:
            pipe, process = idle.pop() if idle else _start(section, dry, device)
            case = waiting.popleft()
            pipe.send(case)
            busy[pipe] = case, process
        ready: list[Any] = wait(list(busy), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            case, process = busy.pop(pipe)
            try:
                found, failure, usable = pipe.recv()
            # A fault of the GPU or too little memory ends it without a word.
            except EOFError:
                process.join()
                failure, usable = f"{case}: its process ended, code {process.exitcode}", False
                found = []
            if failure is not None:
                failures.append(failure)
                found = [_said(f"{name}/{case}", "failed", failure)]
            rows += found
            if usable:
                idle.append((pipe, process))
            else:
                pipe.close()
            sys.stderr.write(f"{name}: {case}: {time.monotonic() - began:.1f} s\n")
    # Not asked to end: it may hang in a kernel.
    for _, process in busy.values():
        process.kill()
    for pipe, process in idle:
        pipe.close()
        process.join(10)
        process.kill()
    left = [case for case, _ in busy.values()] + list(waiting)
    note = f"cut: not measured: {', '.join(left)}" if left else "complete"
    if left:
        sys.stderr.write(f"{name}: {note}\n")
    rows.append(
        Row(
            suite="gpu", case=name, metric="section", value=time.monotonic() - began, unit="s",
            note=f"{note}; {card() or 'no nvidia-smi'}",
        )
    )  # fmt: skip
    return rows, failures


def _worst(rows: list[Row]) -> list[Row]:
    """Return one row of those that say the same of an op: comparisons are hundreds."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        alike = row.metric in ("error", "not_here")
        groups.setdefault(
            (row.metric, row.case.split("/")[0] if alike else str(id(row)), row.note), []
        ).append(row)
    found = []
    for (metric, op, note), group in groups.items():
        worst = max(group, key=lambda row: row.value)
        if metric in ("error", "not_here"):
            said = note or f"the largest of {len(group)}: {worst.case}"
            worst = dataclasses.replace(worst, case=op, note=said)
        found.append(worst)
    return found


def card() -> str | None:
    """Return what nvidia-smi says of the GPUs: clocks, power, temperature; None where there is none."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(done.stdout.split("\n")).strip("; ")


def _start(section: Section, dry: bool, device: str) -> tuple[Connection, Any]:
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    given = (there, section, dry, device, torch.get_num_threads())
    # `daemon`: if this process is interrupted none of them stays on the GPU.
    process = context.Process(target=_work, args=given, daemon=True)
    process.start()
    # With our copy of its end open, the pipe of a dead process would never end.
    there.close()
    return here, process


def _work(pipe: Connection, section: Section, dry: bool, device: str, threads: int) -> None:
    """Measure the cases that are asked for, until the pipe is closed or the GPU answers no more."""
    begin_worker(threads)
    if dry:
        timing.TURN = 0.0  # a turn is one call
    cases, usable = section(dry, device), True
    while usable:
        try:
            case = pipe.recv()
        except EOFError:
            return
        rows, failure = attempt(case, cases[case])
        if failure is not None and device == "cuda":
            usable = _answers()
        pipe.send((rows, failure, usable))


def _answers() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    # The next case may need what the failed one had allocated.
    torch.cuda.empty_cache()
    return True


def _said(case: str, metric: str, note: str) -> Row:
    return Row(suite="gpu", case=case, metric=metric, value=1.0, unit="", note=note)


def _compared(case: str, compare: conformance.Comparison) -> list[Row]:
    """Return the error as a share of what is allowed."""
    try:
        share = compare()
    except conformance.NotHereError as reason:
        return [_said(case, "not_here", str(reason))]
    # Not `share > 1`: NaN is wrong, too.
    if not share <= 1:
        raise WrongResultError(f"error {share:.1e} of what rounding allows")
    return [Row(suite="gpu", case=case, metric="error", value=share, unit="of the bound")]


def _size(dry: bool, layers: int, width: int) -> dict[str, Any]:
    if dry:
        return {"layers": 1, "width": 16, "heads": 2, "networks": 12}
    return {"layers": layers, "width": width, "heads": width // 64, "networks": 1024}


def _frameworks(size: Mapping[str, Any]) -> Iterator[tuple[str, ModelConfig]]:
    """Yield name and model of every framework as trained by default; the autoencoder in both its ways."""
    for framework in framework_names():
        config = model_config(framework, **{**today(framework)["model"], **size})
        if not isinstance(config, AutoencoderConfig):
            yield framework, config
        else:
            for way, share in (("forced", 1.0), ("free", 0.0)):
                yield f"{framework}-{way}", dataclasses.replace(config, teacher_forcing=share)


def _framework_errors(config: ModelConfig, device: str) -> float:
    """Return the error of a loss and its gradients in float32, as a share of 1e-3."""
    torch.manual_seed(0)
    # TF32 rounds to about 1e-3, which is the whole bound.
    allow_tf32(False)
    # Each device would draw dropout of its own.
    module = build(dataclasses.replace(config, dropout=0.0))
    batch = random_batch(4, config.networks, pairs=framework_spec(config.framework).paired)
    results = []
    for on, dtype in ((device, torch.float32), ("cpu", torch.float64)):
        given = dataclasses.replace(batch.to(torch.device(on)), bold=batch.bold.to(on, dtype))
        module.to(on, dtype).zero_grad()
        loss = loss_of(module, given)
        loss.backward()
        # Parameters that only decoding reads have no gradient.
        found = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        results.append(torch.cat([loss.detach()[None], *found]).double().cpu())
    return conformance.error_ratio(*results) / 1e-3


def _step(case: str, model: ModelConfig, mode: Any, windows: int, device: str) -> list[Row]:
    config = PretrainConfig(
        store="absent", out="absent", model=model, train=TrainConfig(compile=mode, micro_batches=1)
    )
    config = settle_precision(config, Path("absent"), torch.device(device), resume="never")
    if mode != "off":
        torch._dynamo.reset()  # else the graphs of other cases count against this one's limit
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = TrainingStep(config, Ranks(), torch.device(device))
    batch = random_batch(windows, model.networks, pairs=framework_spec(model.framework).paired, device=device)
    numbers = itertools.count()

    def once() -> None:
        step(itertools.repeat(batch), next(numbers), 1e-4, stop=False)

    # The first ones compile, choose algorithms and allocate.
    warm, count = (1, 1) if device == "cpu" else (3, 10)
    for _ in range(warm):
        once()
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        once()
    # Before the GPU is done: what the host alone takes.
    host = (time.perf_counter() - began) / count
    _synchronize(device)
    timed = Timing(seconds=((time.perf_counter() - began) / count,))
    # Before what follows: profiling and counting run the model again.
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else float("nan")
    launches, busy = _profiled(once, device)
    with autocast(step.device, config.train.precision):
        work = count_work(step.module, model, batch)
    waits = _first_wait(once, device)
    row = partial(Row, suite="gpu", case=case)
    return [
        row(metric="step", value=1e3 * timed.p50, unit="ms", note=describe_compute(config, step.device)),
        row(metric="host", value=1e3 * host, unit="ms"),
        row(metric="device", value=1e3 * busy, unit="ms"),
        row(metric="launches", value=launches, unit=""),
        row(metric="waits", value=float(bool(waits)), unit="", note=waits),
        row(metric="peak_memory", value=peak, unit="MiB"),
        *work_rows(case, timed, work, config.train.precision, device),
    ]


def _profiled(function: Callable[[], None], device: str) -> tuple[int, float]:
    """Return how many kernels a function launches and the seconds in which the device is busy.

    On the CPU operators take the place of kernels.
    """
    kind = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    with torch.profiler.profile(acc_events=True) as profile:
        function()
        _synchronize(device)
    events = [
        event
        for event in profile.profiler.kineto_results.events()
        if event.device_type() == kind and not any(x in event.activity_type() for x in ("annotation", "sync"))
    ]
    # Copies keep the device busy, but are no launches.
    launched = [event for event in events if "mem" not in event.activity_type()]
    return len(launched), sum(event.duration_ns() for event in events) / 1e9


def _first_wait(function: Callable[[], None], device: str) -> str:
    """Return where a function first waits for the GPU, and for what; nothing if it does not."""
    if device == "cuda":
        # "error" raises where the host would wait, so that the traceback names the line.
        torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "brainflow" in f.filename]
        return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}: {error}"
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return ""


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _times(case: str, ways: Mapping[str, Callable[[], object]], seconds: float, device: str) -> list[Row]:
    times = timing.interleave(ways, repeats=3, seconds=seconds, device=device)
    return [
        row for way in ways for row in timing.speed_rows("gpu", f"{case}/{way}", {way: times[way]}, ours=way)
    ]


@contextmanager
def _opened(kinds: list[Any], networks: int, device: str) -> Iterator[dict[str, Any]]:
    """Yield kind → loader, all of one store and the same windows."""
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
        store = BoldStore.open(
            noise_store(Path(folder, "store"), runs=64 if networks > 100 else 4, networks=networks)
        )
        sampler = WindowSampler(store.runs, batch=64)
        found = {kind: make_loader(store, sampler, kind=kind, device=device) for kind in kinds}
        try:
            yield found
        finally:
            for loader in found.values():
                loader.close()


def _loaders_agree(kinds: list[str], batches: int, side: int, device: str) -> list[Row]:
    """Return whether loaders agree.

    A buffer that is used again too early shows where the GPU is far behind the host.
    """
    work = torch.randn(side, side, device=device)
    seen: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    with _opened(kinds, 1024 if batches > 3 else 8, device) as opened:
        for kind, loader in opened.items():
            seen[kind] = []
            for batch in itertools.islice(loader, batches):
                for _ in range(3):
                    work @ work
                seen[kind].append((batch.bold.clone(), batch.times.clone(), batch.cu_seqlens.clone()))
    for kind, number in itertools.product(kinds, range(batches)):
        if not all(map(torch.equal, seen[kind][number], seen["host"][number])):
            raise WrongResultError(f"{kind} gives another batch {number} than host")
    return [_said(f"loaders/{kind}", "agrees", "") for kind in kinds]


def _loader_speed(kinds: list[str], batches: int, device: str) -> list[Row]:
    with _opened(kinds, 1024 if batches > 3 else 8, device) as opened:

        def read(loader: Any) -> None:
            # More than a loader has ready: its speed, not its lead.
            for _ in range(batches):
                next(loader)

        ways = {kind: partial(read, loader) for kind, loader in opened.items()}
        times = timing.interleave(ways, repeats=3, seconds=0.0 if batches <= 3 else 6.0, device=device)
    found = []
    for kind in kinds:
        found += timing.speed_rows(
            "loader", f"{kind}/{device}", {kind: times[kind].per(batches)}, ours=kind, metric="windows_per_s",
            unit="windows/s", work=64,
        )  # fmt: skip
    return found


def _published(framework: str, dry: bool, folder: Path) -> PretrainConfig:
    config = pretraining(str(folder / "store"), str(folder / "run"), framework=framework)
    if not dry:
        return config
    tiny = dataclasses.replace(config.model, **_size(dry, 1, 16))
    data = dataclasses.replace(config.data, batch_size=4, loader="host")
    return dataclasses.replace(config, model=tiny, data=data)


def _pretraining(framework: str, mode: Any, dry: bool, device: Any) -> list[Row]:
    steps, every = (4, 2) if dry else (100, 20)
    if mode != "off":
        torch._dynamo.reset()
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as name:
        folder = Path(name)
        config = _published(framework, dry, folder)
        noise_store(folder / "store", networks=config.model.networks)
        train = dataclasses.replace(config.train, steps=steps, log_every=every, compile=mode, plot=False)
        # Validation is not what is timed.
        data = dataclasses.replace(config.data, validation_batches=1)
        config = dataclasses.replace(config, train=train, data=data, device=device)
        # The first line holds warming up and compiling.
        lines = [line for line in read_metrics(pretrain(config, quiet=True)) if "loss" in line][1:]
    speed = float(np.median([line["steps_per_s"] for line in lines]))
    hours = PUBLISHED_SEQUENCES / config.data.batch_size / speed / 3600
    row = partial(Row, suite="gpu", case=f"pretraining/{framework}/{mode}")
    return [
        row(metric="steps_per_s", value=speed, unit="steps/s"),
        row(metric="mfu", value=100 * float(np.median([line["mfu"] for line in lines])), unit="%"),
        row(
            metric="data_wait", value=100 * float(np.median([line["data_wait"] for line in lines])), unit="%"
        ),
        row(metric="published_run", value=hours, unit="h"),
    ]
