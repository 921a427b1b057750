"""Every measurement follows the clock: what is slower has a smaller ratio, and nothing is a constant.

No clock is read. Each suite runs twice at tiny sizes; the second time each way is said to take a factor of
its own as long (2, 3, 5, …). A row's value then tells which factor ours has, and its ratio must have changed
by the baseline's factor over ours. A ratio turned round or a number that does not come from the clock fails.
"""

import itertools
import json
import os
import shutil
from functools import cache, partial

import numpy as np
import pytest
import torch

from brainflow.benchmarks import (
    attention,
    command,
    kernels,
    loader,
    prepare,
    race,
    recipe,
    roofline,
    scaling,
    show,
    storage,
    timing,
    training,
)
from brainflow.benchmarks.timing import Timing

PRIMES = [n for n in range(2, 200) if all(n % k for k in range(2, n))]
RATES, TIMES = {"mfu"}, {"published_run"}
"""Metrics that follow the clock although they have no percentiles."""
EXPECTED = {
    "kernels": {
        "masked_loss/time": {"naive", "compile", "compile_weighted"},
        "masked_loss/network": {"naive"},
        "masked_loss/position": {"naive"},
        "linear_masked_loss/time": {"project_all"},
        "linear_masked_loss/position": {"project_all"},
        "mask_tokens/time": {"naive"},
        "gather_windows": {"naive"},
        "varlen_attention": {"padded", "block_diagonal"},
    },
    "loader": {
        "reader": {"memmap", "zarr", "webdataset"},
        "host": {"memmap", "zarr", "webdataset"},
        "reader_cold": {"memmap"},
        "runs_1e6_over_1e3": {"1e3_runs"},
        "float16/zstd": {"float16/raw", "zarr"},
    },
    "frameworks": {
        "csm": {"published", "single"},
        "csm-single": {"published"},
        "seq-bert": {"published"},
        "net-bert": {"published"},
        "autoencoder": {"published"},
        "loop_overhead": {"bare_step"},
    },
    "scaling": {"batch/16": {"batch/4"}, "threads/2": {"threads/1"}},
    "prepare": {"labels/100": {"nilearn"}, "maps/16": {"nilearn"}},
}


TINY = {"width": 8, "layers": 1, "heads": 1}
SIZES = recipe.Sizes(**TINY, networks=8, batch=3)


class Clock:
    """Stands in for every reading of a clock: a way takes 1 s, or its factor of seconds."""

    def __init__(self, *fixed: str) -> None:
        self.fixed = fixed
        self.factors: dict[str, int] = {}
        self.running = False

    def seconds(self, name: str) -> float:
        name = name.split()[0]  # "ours 0" and "ours 1" are two halves of one step
        if name in self.fixed:
            return 1.0
        factor = self.factors.setdefault(name, PRIMES[len(self.factors)])
        return float(factor) if self.running else 1.0

    def interleave(self, functions, *, before=None, repeats=7, **_):
        for name, function in functions.items():  # what is timed must still run
            if before is not None:
                before[name]()
            function()
        return {name: Timing(seconds=(self.seconds(name),) * 3) for name in functions}


@cache
def measured(suite):
    """Return the rows of a suite on both clocks, and the factors."""
    clock = Clock(*() if suite == "ceilings" else ("copy", "matmul"))  # the machine itself stays
    with pytest.MonkeyPatch.context() as patch:
        _make_tiny(patch)
        patch.setattr(timing, "interleave", clock.interleave)
        patch.setattr(training, "pretrain", lambda config, quiet: config)
        patch.setattr(training, "read_metrics", partial(_log, clock))
        passes = []
        for running in (False, True):
            clock.running = running
            for known in (roofline._copy, roofline._matmul):
                known.cache_clear()
            failures: list[str] = []
            found = command.measure(suite, True, "cpu", None, failures)
            assert not failures
            passes.append([row for rows in found.values() for row in rows])
        for known in (roofline._copy, roofline._matmul):
            known.cache_clear()
    return *passes, clock.factors


def _make_tiny(patch):
    sizes = {
        kernels: {"USUAL": kernels.Sizes(windows=4, time=6, networks=16, width=8)},
        attention: {"HEADS": 2, "HEAD_DIM": 8, "WINDOWS": 4, "STORE": (200, 8)},
        loader: {"NETWORKS": 8, "QUICK_RUNS": 3},
        storage: {"COPIES": 1, "MANY": 2_000, "DTYPES": ("float16", "int8")},
        roofline: {"COPY_BYTES": 1000},
        recipe: {"Sizes": lambda **_: SIZES},
        training: {"NETWORKS": 16, "preset": lambda *_: {"model": TINY}},
        scaling: {"NETWORKS": 8, "WINDOWS": 2, "WIDTH": 8, "LAYERS": 1, "HEADS": 1},
        prepare: {"GRID": (20, 21, 22)},
    }
    for module, values in sizes.items():
        for name, value in values.items():
            patch.setattr(module, name, value)
    bold = np.random.default_rng(0).standard_normal((12 * 60, 5))
    patch.setattr(storage, "bold_from_nifti", lambda *_: (bold, None))
    patch.setattr(
        torch, "compile", lambda function: function
    )  # what is compiled is timed by the suite itself
    for module in (recipe, training):
        patch.setattr(module, "peak_bytes", lambda step, device: step() or 1)
    patch.setattr(training, "_windows", lambda *_: 3)
    patch.setattr(race, "race", lambda *_: {"single": [(0, 3.0), (9, 2.0)], "dense": [(0, 3.0), (3, 2.0)]})
    patch.setitem(loader._SLOW, "memmap", 1)
    patch.setattr(loader, "_FAST", 1)


def _log(clock, config):
    """Return the lines of a training that waits a tenth of its time."""
    line = {"loss": 1.0, "steps_per_s": 1 / clock.seconds("loop"), "data_wait": 0.1}
    return [{**line, "steps_per_s": 1e9, "data_wait": 0.9}, line, {"val_loss": 1.0}, line]


@pytest.mark.parametrize("suite", ["ceilings", *EXPECTED])
def test_rows_follow_the_clock(suite):
    first, second, factors = measured(suite)
    assert [(r.case, r.metric, r.baseline) for r in first] == [(r.case, r.metric, r.baseline) for r in second]
    counted = 0
    for a, b in zip(first, second, strict=True):
        if a.p50 is None and a.metric not in RATES | TIMES:
            continue
        counted += 1
        slower = a.unit.endswith("/s") or a.metric in RATES
        ours = a.value / b.value if slower else b.value / a.value
        assert round(ours, 6) in factors.values(), f"{a.case} {a.metric} does not come from the clock"
        if a.ratio is not None:
            theirs = factors[a.baseline]
            assert theirs != pytest.approx(ours)
            assert b.ratio / a.ratio == pytest.approx(theirs / ours), f"{a.case} {a.metric} over {a.baseline}"
    assert counted


@pytest.mark.parametrize("suite", EXPECTED)
def test_rows_have_the_names_that_others_read(suite):
    found: dict[str, set[str]] = {}
    for row in measured(suite)[0]:
        if row.ratio is not None:
            found.setdefault(row.case, set()).add(row.baseline)
    expected = {case: set(others) for case, others in EXPECTED[suite].items()}
    if shutil.which("g++") is None and suite == "kernels":
        expected["masked_loss/time"] = {"naive"}
    if len(os.sched_getaffinity(0)) < 2:
        expected.pop("threads/2", None)
    assert {case: found.get(case, set()) & others for case, others in expected.items()} == expected


def test_every_floor_is_the_floor_of_a_row():
    rows = list(itertools.chain.from_iterable(measured(suite)[0] for suite in EXPECTED))
    names = {(r.suite, r.case, r.metric, r.baseline) for r in rows if r.ratio is not None}
    floors = [
        (f["suite"], f["case"], f["metric"], f["baseline"]) for f in json.loads(show.FLOORS.read_text())
    ]
    assert set(floors) <= names
    assert len(set(floors)) == len(floors)


def test_waiting_and_time_to_loss_come_from_the_run():
    by = {row.case: row for row in measured("frameworks")[0]}
    assert by["loop_data_wait"].value == pytest.approx(10), "not of the first line, which warms up"
    assert (by["csm_time_to_loss"].value, by["csm_time_to_loss"].ratio) == (3, 3)


def test_memory_over_the_recipe_is_theirs_over_ours(monkeypatch):
    monkeypatch.setattr(timing, "interleave", Clock().interleave)
    peaks = iter([100, 300])
    monkeypatch.setattr(recipe, "peak_bytes", lambda step, device: next(peaks))
    rows = recipe._against_recipe("seq-bert", SIZES, "cpu")
    (memory,) = (row for row in rows if row.metric == "peak_memory")
    assert (memory.value, memory.ratio) == (100 / 2**20, 3)
