"""Each framework × preset × precision × attention backend: speed, share of the machine's, memory, energy.

A step is forward, backward and AdamW on random windows of 10 to 49 time points, 1,024 networks. Dropout is
off, so that every backend can run. All precisions and backends of a framework are timed interleaved; a ratio
is tokens a second over those of the first of them. Cases are framework/preset/precision/backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import nn

from brainflow.config import ModelConfig
from brainflow.data.batch import PackedBatch
from brainflow.frameworks import FRAMEWORKS, build
from brainflow.kernels import attention
from brainflow.kernels.varlen_attention.backends import BACKENDS
from brainflow.models.transformer import Transformer
from brainflow.recipes import preset
from brainflow.training.flops import matrix_weights, peak_flops

from .ceilings import matmul_rate
from .energy import joules
from .frameworks import peak_bytes
from .timing import Row, Timing, interleave, speed_rows
from .training_step import random_batch, train_step

NETWORKS = 1024
PUBLISHED_SEQUENCES = 300_000 * 192
"""Sequences that the pretraining of 2022 reads: optimizer steps × batch."""
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16", "fp16")}
WINDOWS = {"cpu": 16, "cuda": 192}
PRESETS = {
    "cpu": ("tiny", "small", "published"),
    "cuda": ("tiny", "small", "published", "base", "large", "1b"),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step and what it does: sequences, tokens that the model runs, floating-point operations."""

    run: Callable[[], None]
    sequences: int
    time_points: int
    targets: int
    tokens: int
    flops: float


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return framework/preset → what measures it; on a CPU only presets that end in minutes."""
    found: dict[str, Callable[[], list[Row]]] = {}
    for name in PRESETS[device][:1] if quick else PRESETS[device]:
        for framework in FRAMEWORKS:
            try:
                model = preset(name, framework)["model"]
            except ValueError:  # the framework has none of that size
                continue
            config = ModelConfig(**model | {"framework": framework, "networks": NETWORKS, "dropout": 0.0})
            found[f"{framework}/{name}"] = partial(_measure, f"{framework}/{name}", config, quick, device)
    return found


def _measure(name: str, config: ModelConfig, quick: bool, device: str) -> list[Row]:
    steps = {
        f"{precision}/{backend}": _step(config, precision, backend, device)
        for precision in _precisions(device)
        for backend in _backends(config, precision, device)
    }
    calls = {way: step.run for way, step in steps.items()}
    times = interleave(calls, repeats=3 if quick else 9, device=device, seconds=0.0 if quick else 5.0)
    first, found = next(iter(steps)), []
    for way, step in steps.items():
        case, precision = f"{name}/{way}", way.partition("/")[0]
        found += _speed(case, times[way], step, precision, device)
        others = () if way == first else (first,)
        work = {other: step.tokens for other, step in steps.items()}
        found += speed_rows(
            "frameworks", case, times, ours=way, baselines=others, metric="tokens_per_s", unit="tokens/s",
            work=work,
        )  # fmt: skip
        found += _resources(case, step, device)
    return found


def _precisions(device: str) -> list[str]:
    """Return the precisions that somebody would train in: not bf16 on a CPU that has no units for it."""
    found = list(PRECISIONS[device])
    if device == "cpu" and 2 * matmul_rate(device, torch.bfloat16) < matmul_rate(device):
        found.remove("bf16")
    return found


def _speed(case: str, timing: Timing, step: Step, precision: str, device: str) -> list[Row]:
    found = []
    for metric, unit, work in (
        ("sequences_per_s", "sequences/s", step.sequences),
        ("trs_per_s", "TRs/s", step.time_points),
        ("targets_per_s", "targets/s", step.targets),
    ):
        found += speed_rows("frameworks", case, {"ours": timing}, metric=metric, unit=unit, work=work)
    measured = matmul_rate(device, DTYPES[precision]) if precision != "tf32" else None
    found += speed_rows(
        "frameworks", case, {"ours": timing}, metric="flops_per_s", unit="GFLOP/s", work=step.flops / 1e9,
        floor=None if measured is None else step.flops / measured,
    )  # fmt: skip
    peak = peak_flops(torch.device(device), precision) if device == "cuda" else measured
    assert peak is not None  # tf32 is for CUDA only
    utilisation = 100 * step.flops / timing.p50 / peak
    found.append(Row(suite="frameworks", case=case, metric="mfu", value=utilisation, unit="%"))
    hours = PUBLISHED_SEQUENCES / step.sequences * timing.p50 / 3600
    found.append(Row(suite="frameworks", case=case, metric="published_run", value=hours, unit="h"))
    return found


def _resources(case: str, step: Step, device: str) -> list[Row]:
    peak = peak_bytes(step.run, device) / 2**20
    found = [Row(suite="frameworks", case=case, metric="peak_memory", value=peak, unit="MiB")]
    if device == "cuda" and (used := joules(step.run)) is not None:
        each = 1e3 * used / step.sequences
        found.append(Row(suite="frameworks", case=case, metric="energy", value=each, unit="mJ/sequence"))
    return found


def _step(config: ModelConfig, precision: str, backend: str, device: str) -> Step:
    torch.manual_seed(0)
    module = build(config).to(device)
    batch = random_batch(WINDOWS[device], config.networks, pairs="bert" in config.framework, device=device)
    half = DTYPES[precision] if precision in ("bf16", "fp16") else None
    step = train_step(
        module, lambda: torch.autocast(device, dtype=half or torch.bfloat16, enabled=half is not None)
    )

    def run() -> None:
        with _only(backend), _products(precision):
            step(batch)

    tokens, time_points = _tokens(module, batch, run), batch.tokens
    targets = _targets(config, batch)
    projected = time_points if config.framework == "net-bert" else targets
    # The output weights, networks × width, multiply only what is predicted.
    unused = 6.0 * config.networks * config.width * (time_points - projected)
    return Step(
        run=run,
        sequences=WINDOWS[device],
        time_points=time_points,
        targets=targets,
        tokens=tokens,
        flops=matrix_weights(module).flops(tokens, time_points) - unused,
    )


def _targets(config: ModelConfig, batch: PackedBatch) -> int:
    """Return the predicted time points of a batch (Net-BERT's: predicted values over networks)."""
    if config.framework == "autoencoder":
        return batch.tokens
    if config.framework == "csm":
        return batch.windows if config.masking == "single" else batch.tokens - batch.windows
    return round(config.mask_rate * batch.tokens)


def _tokens(module: nn.Module, batch: PackedBatch, run: Callable[[], None]) -> int:
    """Run a step and return the tokens that passed the transformer, special and mask tokens included."""
    seen = []
    hooks = [
        part.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:-1].numel()))
        for part in module.modules()
        if isinstance(part, Transformer)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return sum(seen) if hooks else batch.tokens  # LSTMs read a token a time point


def _backends(config: ModelConfig, precision: str, device: str) -> list[str]:
    """Return the attention backends that run here in a precision, or "lstm"."""
    if config.framework == "autoencoder":
        return ["lstm"]
    q = torch.randn(8, config.heads, config.width // config.heads, device=device, dtype=DTYPES[precision])
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    found = []
    for name in BACKENDS:
        try:
            attention(q, q, q, bounds, 5, causal=True, impl=name)
        except (ValueError, TypeError):  # not installed, or it says that it cannot
            continue
        found.append(name)
    return found


@contextmanager
def _only(backend: str) -> Iterator[None]:
    """Leave the models no choice of the attention backend."""
    if backend == "lstm":
        yield
    else:
        with mock.patch.dict(BACKENDS, {backend: BACKENDS[backend]}, clear=True):
            yield


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Let float32 products be rounded to TF32, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
