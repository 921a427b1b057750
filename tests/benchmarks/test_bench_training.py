"""Random batches, what a step is counted to do, waiting for data, scaling, energy."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from brainflow.benchmarks import data_wait, energy, scaling, throughput
from brainflow.benchmarks.timing import Timing
from brainflow.benchmarks.training_step import csm, random_batch, train_step
from brainflow.config import ModelConfig
from brainflow.frameworks import build


@pytest.mark.parametrize("pairs", [False, True])
def test_random_batch_is_packed_and_not_zero(pairs):
    batch = random_batch(7, 5, pairs=pairs)
    assert batch.windows == (14 if pairs else 7)
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(batch.lengths).tolist()]
    assert batch.bold.shape == (batch.lengths.sum(), 5)
    assert batch.times.shape == (batch.tokens,)
    assert batch.max_seqlen == batch.lengths.max()
    whole = batch.lengths.reshape(7, -1).sum(1)
    assert whole.min() >= 10
    assert whole.max() < 50
    assert batch.lengths.min() >= 3
    assert (batch.bold != 0).all()
    assert (batch.is_next is not None) == pairs


def test_a_step_changes_the_weights():
    module = csm(5, "cpu")
    before = [p.detach().clone() for p in module.parameters()]
    train_step(module)(random_batch(3, 5))
    changed = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)


def test_growth_is_a_ratio_of_tokens_a_second():
    times = {"batch/8": Timing(seconds=(1.0, 1.0)), "batch/32": Timing(seconds=(2.0, 2.0))}
    first, second = scaling.growth_rows(times, {"batch/8": 100, "batch/32": 400})
    assert (first.case, first.value, first.baseline, first.ratio) == ("batch/8", 100, "", None)
    assert (second.case, second.value, second.baseline, second.ratio) == ("batch/32", 200, "batch/8", 2)


def test_what_grows_is_measured_and_threads_are_put_back(monkeypatch):
    monkeypatch.setattr(scaling, "WINDOWS", 2)
    monkeypatch.setattr(scaling, "NETWORKS", 8)
    model = {"width": 8, "layers": 1, "heads": 1}
    monkeypatch.setattr(scaling, "csm", lambda networks, _: build(ModelConfig(networks=networks, **model)))
    before = torch.get_num_threads()
    rows = scaling._threads([1, 2], 1)
    assert torch.get_num_threads() == before
    rows += scaling._grow("length", (10, 400), 1, "cpu")
    assert [r.case for r in rows] == ["threads/1", "threads/2", "length/10", "length/400"]
    assert all(r.value > 0 for r in rows)
    assert [r.baseline for r in rows] == ["", "threads/1", "", "length/10"]


def test_powers_of_two():
    assert [scaling._powers_of_two(n) for n in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2], [1, 2, 4, 8]]


def _tiny(framework="csm", **changes):
    sizes = {"networks": 16, "width": 8, "layers": 1, "heads": 1}
    return ModelConfig(framework=framework, dropout=0.0, **sizes, **changes)


@pytest.fixture(autouse=True)
def three_windows(monkeypatch):
    monkeypatch.setitem(throughput.WINDOWS, "cpu", 3)


@pytest.mark.parametrize(
    ("framework", "tokens_of", "rows_of"),
    [
        ("csm", lambda n, w: 2 * n, lambda n, w: n - w),  # time points and queries; each but a window's first
        ("seq-bert", lambda n, w: n + 3 * w, lambda n, w: round(0.2 * n)),  # CLS and two SEP a sequence
        ("net-bert", lambda n, w: n + 3 * w, lambda n, w: n),
    ],
)
def test_what_a_step_is_counted_to_do(framework, tokens_of, rows_of):
    step = throughput._step(_tiny(framework), "fp32", "fallback", "cpu")
    n, windows, width, networks = step.time_points, 3, 8, 16
    tokens = tokens_of(n, windows)
    assert step.sequences == windows
    assert step.tokens == tokens
    block = 12 * width * width  # q, k, v, out: 4; feed-forward: 2 · 4
    least = 6 * (block * tokens + networks * width * (n + rows_of(n, windows)))
    small = 6 * n * (2 * width * width + 512)  # heads; a row of Net-BERT's mask token for each position
    assert least <= step.flops <= least + small


def test_targets_of_the_published_csm():
    assert throughput._step(_tiny(masking="single"), "fp32", "fallback", "cpu").targets == 3


def test_a_gpu_is_measured_at_every_preset():
    found = set(throughput.measurements(quick=False, device="cuda"))
    assert {f"csm/{name}" for name in ("tiny", "small", "published", "base", "large", "1b")} < found
    assert "autoencoder/1b" not in found


def test_bf16_is_left_out_where_the_cpu_has_no_units_for_it(monkeypatch):
    monkeypatch.setattr(throughput, "matmul_rate", lambda device, dtype=torch.float32: dtype.itemsize)
    assert throughput._precisions("cpu") == ["fp32", "bf16"]
    monkeypatch.setattr(throughput, "matmul_rate", lambda device, dtype=torch.float32: dtype.itemsize**2)
    assert throughput._precisions("cpu") == ["fp32"]


def test_rows_of_every_way(monkeypatch):
    monkeypatch.setattr(throughput, "matmul_rate", lambda device, dtype=torch.float32: 1e9)
    rows = throughput._measure("csm/tiny", _tiny(), quick=True, device="cpu")
    cases = {f"csm/tiny/{precision}/fallback" for precision in ("fp32", "bf16")}
    assert {row.case for row in rows} == cases
    metrics = [row.metric for row in rows if row.case == "csm/tiny/fp32/fallback"]
    speeds = [f"{what}_per_s" for what in ("sequences", "trs", "targets", "tokens", "flops")]
    assert sorted(metrics) == sorted([*speeds, "mfu", "published_run", "peak_memory"])
    by = {row.metric: row for row in rows if row.case == "csm/tiny/fp32/fallback"}
    assert by["published_run"].value * 3600 * by["sequences_per_s"].value == pytest.approx(300_000 * 192)
    assert by["mfu"].value == pytest.approx(100 * by["flops_per_s"].floor_share)
    assert all(row.value > 0 for row in rows)


def test_waiting_is_a_share_of_the_time(monkeypatch):
    for name, size in (("NETWORKS", 16), ("RUNS", 2), ("TIME_POINTS", 80)):
        monkeypatch.setattr(data_wait, name, size)
    (row,) = data_wait._wait("seq-bert", 4, 2, "cpu")
    assert (row.case, row.metric, row.unit) == ("seq-bert", "data_wait", "%")
    assert 0 <= row.value < 100


class _NVML(ModuleType):
    """A strict stand-in for pynvml: a counter of millijoules that each step raises by 500."""

    class NVMLError(Exception):
        pass

    def __init__(self, works: bool) -> None:
        super().__init__("pynvml")
        self.works, self.millijoules, self.open = works, 7_000, 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert self.open
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        if not self.works:
            raise self.NVMLError("not supported")
        return self.millijoules


@pytest.mark.parametrize("works", [True, False])
def test_energy_of_a_step(monkeypatch, works):
    nvml = _NVML(works)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(energy, "_calls", lambda step: 4)

    def step() -> None:
        nvml.millijoules += 500

    assert energy.joules(step) == (0.5 if works else None)
    assert nvml.open == 0


def test_no_nvml_no_energy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.joules(lambda: None) is None
