"""Training steps of every framework by size and precision, and what the training loop costs beside them.

A step is forward, backward and AdamW on random windows of 10 to 49 time points.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from brainflow.batch import PackedBatch, Windows
from brainflow.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from brainflow.data import make_loader
from brainflow.data.sampler import WindowSampler
from brainflow.frameworks import build, framework_names, framework_spec, model_config
from brainflow.frameworks.base import Framework
from brainflow.kernels.varlen_attention.backends import choose
from brainflow.models.transformer import Transformer
from brainflow.recipes import preset
from brainflow.storage import BoldStore, StoreWriter
from brainflow.training.compute import allow_tf32
from brainflow.training.loop import pretrain
from brainflow.training.meters import matrix_weights, peak_flops
from brainflow.training.metrics import read_metrics

from . import timing
from .roofline import matmul_rate
from .timing import Row, Timing, peak_bytes, speed_rows

NETWORKS, T_R = 1024, 0.72
PUBLISHED_SEQUENCES = 300_000 * 192
"""Sequences that the pretraining of 2022 reads: optimizer steps × batch."""
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRESETS = {
    "cpu": ("tiny", "small", "published"),
    "cuda": ("tiny", "small", "published", "base", "large", "1b"),
}


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return name → what measures it: FRAMEWORK/PRESET, and the loop."""
    found: dict[str, Callable[[], list[Row]]] = {}
    for size in PRESETS[device][:1] if quick else PRESETS[device]:
        for framework in framework_names():
            try:
                model = preset(size, framework)["model"]
            except ValueError:  # the framework has none of that size
                continue
            config = model_config(framework, **model | {"networks": NETWORKS, "dropout": 0.0})
            windows = _windows(size, device)
            name = f"{framework}/{size}"
            found[name] = partial(_throughput, name, config, windows, 1.0 if quick else 3.0, device)
    return found | {"loop_overhead": lambda: _loop(2 if quick else 3, 20 if quick else 60, device)}


def _windows(size: str, device: str) -> int:
    if device == "cpu":
        return 16
    return 64 if size == "1b" else 192  # weights, AdamW's state and activations stay below 80 GB


def random_batch(
    windows: int,
    networks: int,
    *,
    shortest: int = 10,
    longest: int = 50,
    pairs: bool = False,
    device: str = "cpu",
) -> PackedBatch:
    """Return normally distributed windows of `shortest` to `longest` − 1 time points.

    Parameters
    ----------
    windows, networks
        Sizes of the batch; with `pairs` each window is cut into two halves.
    shortest, longest
        Range of the windows' lengths in time points, `longest` exclusive.
    pairs
        Also draw for each window whether its second half follows the first.
    device
        Where the tensors are.
    """
    random = np.random.default_rng(0)
    whole = random.integers(shortest, longest, windows)
    first = random.integers(3, whole - 2)
    lengths = np.stack([first, whole - first], 1).reshape(-1) if pairs else whole
    generator = torch.Generator().manual_seed(0)
    bold = torch.randn(int(lengths.sum()), networks, generator=generator)
    is_next = random.integers(0, 2, windows) if pairs else None
    return PackedBatch.pack(bold, Windows.end_to_end(lengths, t_r=T_R, is_next=is_next), device=device)


def train_step(
    module: nn.Module,
    loss: Callable[[], Tensor],
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    clip: float | None = None,
) -> Callable[[], None]:
    """Return forward, backward and AdamW as one function; with `clip` gradients are clipped before.

    Parameters
    ----------
    module
        Whose parameters AdamW changes.
    loss
        Gives the loss of a step.
    autocast
        Within which the loss is computed.
    clip
        Norm that gradients are clipped to.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            value = loss()
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()

    return step


def loss_of(module: nn.Module, batch: PackedBatch) -> Tensor:
    """Return the loss of a framework on a batch."""
    loss: Tensor = module(batch, seed=0).loss
    return loss


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a training step does: sequences, time points, tokens that the model runs, operations."""

    sequences: int
    time_points: int
    targets: int
    tokens: int
    flops: float


def _throughput(name: str, config: ModelConfig, windows: int, seconds: float, device: str) -> list[Row]:
    """Measure speed, memory and share of the machine's in every precision, with one model and one optimizer.

    Cases are FRAMEWORK/PRESET/PRECISION/BACKEND, the backend that the model itself chooses (dropout is off,
    so that all can run); a ratio is tokens a second over those of the first precision.
    """
    torch.manual_seed(0)
    module = build(config).to(device)
    batch = random_batch(
        windows, config.networks, pairs=framework_spec(config.framework).paired, device=device
    )
    work = count_work(module, config, batch)
    step = train_step(module, partial(loss_of, module, batch))
    ways = {
        f"{precision}/{_backend(config, precision, windows, device)}": partial(
            _in_precision, step, precision, device
        )
        for precision in _precisions(config, windows, device)
    }
    if not ways:
        print(f"frameworks: {name} is left out, only attention's fallback is installed", file=sys.stderr)
        return []
    times = timing.interleave(ways, repeats=3, device=device, seconds=seconds)
    first, found = next(iter(ways)), []
    for way, call in ways.items():
        case, precision = f"{name}/{way}", way.partition("/")[0]
        found += work_rows(case, times[way], work, precision, device)
        found += speed_rows(
            "frameworks", case, times, ours=way, baselines=() if way == first else (first,),
            metric="tokens_per_s", unit="tokens/s", work=work.tokens,
        )  # fmt: skip
        peak = peak_bytes(call, device) / 2**20
        found.append(Row(suite="frameworks", case=case, metric="peak_memory", value=peak, unit="MiB"))
    return found


def _in_precision(step: Callable[[], None], precision: str, device: str) -> None:
    half = precision in ("bf16", "fp16")
    with _products(precision), torch.autocast(device, DTYPES[precision] if half else None, enabled=half):
        step()


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Let float32 products, cuDNN's too, be rounded to TF32, or not."""
    allow_tf32(precision == "tf32")
    try:
        yield
    finally:
        allow_tf32(False)


def _precisions(config: ModelConfig, windows: int, device: str) -> list[str]:
    """Return the precisions that somebody would train in.

    That is not bf16 on a CPU without units for it, nor, on a GPU, what a large model could compute only by
    the fallback of attention.
    """
    if device == "cpu":
        slow = 2 * matmul_rate(device, torch.bfloat16) < matmul_rate(device)
        return ["fp32"] if slow else ["fp32", "bf16"]
    large = config.layers * config.width >= 24 * 1024  # presets large and 1b
    return [p for p in DTYPES if not (large and _backend(config, p, windows, device) == "fallback")]


def _backend(config: ModelConfig, precision: str, windows: int, device: str) -> str:
    """Return the attention backend that the models choose, or "lstm"."""
    if not framework_spec(config.framework).transformer:
        return "lstm"
    q = torch.empty(
        windows, config.heads, config.width // config.heads, device=device, dtype=DTYPES[precision]
    )
    return choose(q, windows, 2 * 49 + 3, 0.0, None)  # two streams, or two windows and their special tokens


def count_work(module: Framework, config: ModelConfig, batch: PackedBatch) -> Work:
    """Count what a step on a batch does; runs the model twice."""
    time_points = batch.tokens
    tokens = _tokens(module, batch)
    with torch.no_grad():
        values, rows = module.reconstruct(batch, seed=0)
    # Net-BERT predicts some networks of every time point; its targets are counted in whole time points, too.
    targets = round(int((~values.isnan()).sum()) / config.networks)
    # The output weights, networks × width, multiply only the rows that are predicted.
    unused = 6.0 * config.networks * config.width * (time_points - len(rows))
    return Work(
        sequences=batch.windows // (2 if batch.is_next is not None else 1),
        time_points=time_points,
        targets=targets,
        tokens=tokens,
        flops=matrix_weights(module).flops(tokens, time_points) - unused,
    )


def _tokens(module: nn.Module, batch: PackedBatch) -> int:
    """Return the tokens that pass the transformer, special and mask tokens included."""
    seen = []
    hooks = [
        part.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:-1].numel()))
        for part in module.modules()
        if isinstance(part, Transformer)
    ]
    with torch.no_grad():
        module(batch, seed=0)
    for hook in hooks:
        hook.remove()
    return sum(seen) if hooks else batch.tokens  # LSTMs read a token a time point


def work_rows(case: str, timed: Timing, work: Work, precision: str, device: str) -> list[Row]:
    """Return a step's work a second, share of the machine's peak, and hours of the published run.

    Parameters
    ----------
    case
        Name of the rows.
    timed, work
        Time and work of a step.
    precision, device
        Which peak the step is compared with.
    """
    rows = partial(speed_rows, "frameworks", case, {"ours": timed})
    found = rows(metric="sequences_per_s", unit="sequences/s", work=work.sequences)
    found += rows(metric="trs_per_s", unit="TRs/s", work=work.time_points)
    found += rows(metric="targets_per_s", unit="targets/s", work=work.targets)
    # A tf32 product is not among the measured ceilings: it has the data sheet's peak alone.
    measured = None if precision == "tf32" else matmul_rate(device, DTYPES[precision])
    lowest = None if measured is None else work.flops / measured
    found += rows(metric="flops_per_s", unit="GFLOP/s", work=work.flops / 1e9, floor=lowest)
    peak = measured if device == "cpu" else peak_flops(torch.device(device), precision)
    assert peak is not None  # tf32 is for CUDA only
    used = 100 * work.flops / timed.p50 / peak
    hours = PUBLISHED_SEQUENCES / work.sequences * timed.p50 / 3600
    return [
        *found,
        Row(suite="frameworks", case=case, metric="mfu", value=used, unit="%"),
        Row(suite="frameworks", case=case, metric="published_run", value=hours, unit="h"),
    ]


def _loop(rounds: int, steps: int, device: str) -> list[Row]:
    """Measure what `brainflow pretrain` costs beside the bare step, and its waiting for data.

    A round is a short training with the default loader, then as many bare steps (forward, backward, clipping,
    AdamW) on batches of the same sampler. The loop's time a step is what its own log says.
    """
    loop, bare, waits = [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
            config = _loop_config(Path(folder), steps, device)
            lines = [line for line in read_metrics(pretrain(config, quiet=True)) if "loss" in line]
            # The first line holds the warm-up.
            loop.append(float(np.median([1 / line["steps_per_s"] for line in lines[1:]])))
            waits.append(float(np.median([100 * line["data_wait"] for line in lines[1:]])))
            bare.append(_bare_step(config, steps, device).p50)
    times = {"loop": Timing(seconds=tuple(loop)), "bare_step": Timing(seconds=tuple(bare))}
    wait = float(np.median(waits))
    return [
        *speed_rows("frameworks", "loop_overhead", times, ours="loop"),
        Row(suite="frameworks", case="loop_data_wait", metric="data_wait", value=wait, unit="%"),
    ]


def _bare_step(config: PretrainConfig, steps: int, device: str) -> Timing:
    store = BoldStore.open(config.store)
    data = config.data
    sampler = WindowSampler(store.runs, batch=data.batch_size, seq_min=data.seq_min, seq_max=data.seq_max)
    loader = make_loader(store, sampler, kind="host", device=device)
    module = build(config.model).to(device)
    held: list[PackedBatch] = []

    def fetch() -> None:
        held[:] = [next(loader)]

    step = train_step(module, lambda: loss_of(module, held[0]), clip=1.0)
    ways, before = {"bare_step": step}, {"bare_step": fetch}
    timed = timing.interleave(ways, repeats=steps, device=device, before=before)["bare_step"]
    loader.close()
    return Timing(seconds=timed.seconds[len(timed.seconds) // 3 :])  # the first ones warm up


def noise_store(path: Path, *, runs: int = 8, networks: int = NETWORKS) -> str:
    """Write runs of 300 time points of noise as a store and return its path."""
    rng = np.random.default_rng(0)
    with StoreWriter.create(path, networks=networks, dtype="float16", parcellation="none") as writer:
        for run in range(runs):
            bold = rng.standard_normal((300, networks)).astype(np.float32)
            writer.append(bold, t_r=2.0, dataset="noise", subject=str(run), session="", task="rest", run="1")
    return str(path)


def _loop_config(folder: Path, steps: int, device: str) -> PretrainConfig:
    return PretrainConfig(
        store=noise_store(folder / "store", networks=NETWORKS),
        out=str(folder / "run"),
        device="cuda" if device == "cuda" else "cpu",
        model=ModelConfig(width=128, layers=2, heads=2, networks=NETWORKS),
        data=DataConfig(validation_batches=1),
        # More steps than there are: what is compared are the steps alone.
        train=TrainConfig(
            steps=steps, validate_every=10 * steps, checkpoint_every=10 * steps, plot=False, log_every=5
        ),
    )
