"""What the benchmarks run: random batches, steps that train, the work of a step, baselines, precisions."""

import numpy as np
import pytest
import torch

from brainflow.benchmarks import baselines, kernels, loader, race, scaling, training
from brainflow.benchmarks.recipe import padded
from brainflow.benchmarks.timing import WrongResultError
from brainflow.benchmarks.training import loss_of, random_batch, train_step
from brainflow.config import ModelConfig
from brainflow.frameworks import build, model_config

SMALL, LARGE = {"width": 768, "layers": 12, "heads": 12}, {"width": 1024, "layers": 24, "heads": 16}


def _tiny(framework="csm", **changes):
    sizes = {"networks": 16, "width": 8, "layers": 1, "heads": 1}
    return model_config(framework, dropout=0.0, **sizes, **changes)


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


def test_the_recipe_gets_the_same_values_padded():
    batch = random_batch(4, 3, pairs=True)
    bold, seconds, attention, types = padded(batch, 4)
    assert bold.shape == (4, 50, 3)
    assert torch.equal(bold[attention.bool()], batch.bold)
    halves = batch.lengths.reshape(4, 2)
    assert attention.sum(1).tolist() == halves.sum(1).tolist()
    assert (types * attention).sum(1).tolist() == halves[:, 1].tolist()
    assert seconds[0, 1] == pytest.approx(0.72)


def test_a_step_changes_the_weights():
    module, batch = build(_tiny()), random_batch(3, 16)
    before = [p.detach().clone() for p in module.parameters()]
    train_step(module, lambda: loss_of(module, batch))()
    changed = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)


@pytest.mark.parametrize(
    ("framework", "tokens_of", "rows_of"),
    [
        ("csm", lambda n, w: 2 * n, lambda n, w: n - w),  # time points and queries; each but a window's first
        ("seq-bert", lambda n, w: n + 3 * w, lambda n, w: round(0.2 * n)),  # CLS and two SEP a sequence
        ("net-bert", lambda n, w: n + 3 * w, lambda n, w: n),
    ],
)
def test_what_a_step_is_counted_to_do(framework, tokens_of, rows_of):
    config = _tiny(framework)
    windows, width, networks = 3, 8, 16
    batch = random_batch(windows, networks, pairs="bert" in framework)
    work = training.count_work(build(config), config, batch)
    n, tokens = work.time_points, tokens_of(work.time_points, windows)
    assert work.sequences == windows
    assert work.tokens == tokens
    block = 12 * width * width  # q, k, v, out: 4; feed-forward: 2 · 4
    least = 6 * (block * tokens + networks * width * (n + rows_of(n, windows)))
    small = 6 * n * (2 * width * width + 512)  # heads; a row of Net-BERT's mask token for each position
    assert least <= work.flops <= least + small


def test_targets_of_the_published_csm():
    config = _tiny(masking="single")
    assert training.count_work(build(config), config, random_batch(3, 16)).targets == 3


def test_a_gpu_is_measured_at_every_preset_and_the_largest_without_fallback(monkeypatch):
    found = set(training.measurements(quick=False, device="cuda"))
    assert {f"csm/{name}" for name in ("tiny", "small", "published", "base", "large", "1b")} < found
    assert "autoencoder/1b" not in found
    monkeypatch.setattr(
        training, "_backend", lambda config, precision, *_: "fa2" if precision == "bf16" else "fallback"
    )
    small, large = ModelConfig(networks=4, **SMALL), ModelConfig(networks=4, **LARGE)
    assert training._precisions(small, 3, "cuda") == ["fp32", "tf32", "bf16", "fp16"]
    assert training._precisions(large, 3, "cuda") == ["bf16"]
    monkeypatch.setattr(training, "_precisions", lambda *_: [])
    assert training._throughput("csm/large", _tiny(), 3, 0.0, "cpu") == []


def test_bf16_is_left_out_where_the_cpu_has_no_units_for_it(monkeypatch):
    monkeypatch.setattr(training, "matmul_rate", lambda device, dtype=torch.float32: dtype.itemsize)
    assert training._precisions(_tiny(), 3, "cpu") == ["fp32", "bf16"]
    monkeypatch.setattr(training, "matmul_rate", lambda device, dtype=torch.float32: dtype.itemsize**2)
    assert training._precisions(_tiny(), 3, "cpu") == ["fp32"]


def test_throughput_holds_one_model(monkeypatch):
    """All precisions step the same weights and the same optimizer."""
    made = []
    monkeypatch.setattr(training, "build", lambda config: made.append(build(config)) or made[-1])
    monkeypatch.setattr(training, "matmul_rate", lambda device, dtype=torch.float32: 1e9)
    rows = training._throughput("csm/tiny", _tiny(), 3, 0.0, "cpu")
    assert {row.case for row in rows} == {"csm/tiny/fp32/fallback", "csm/tiny/bf16/fallback"}
    assert len(made) == 1


def test_powers_of_two():
    assert [scaling._powers_of_two(n) for n in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2], [1, 2, 4, 8]]


SIZES = kernels.Sizes(windows=4, time=6, networks=16, width=8)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(kernels, "USUAL", SIZES)
    monkeypatch.setattr(kernels, "floor", lambda *_: 1.0)
    monkeypatch.setattr(kernels, "roofline_rows", lambda *_: [])


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("operator", ["masked_loss", "linear_masked_loss", "mask_tokens"])
def test_an_operator_that_is_wrong_has_no_speed(small, monkeypatch, operator, kind):
    """In bf16, too, which is timed on CUDA: what is right passes, two in a hundred off does not."""
    case = f"{operator}/time" if kind == "fp32" else f"{operator}/time/bf16"
    measure = kernels.of_size(SIZES, kind, 0.0, "cpu")[case]
    assert {row.case for row in measure()} == {case}
    right = getattr(kernels, operator)
    monkeypatch.setattr(kernels, operator, lambda *a, **k: right(*a, **k) * 1.02)
    with pytest.raises(WrongResultError, match=f"{case}: error"):
        measure()


def test_a_compiled_form_that_is_wrong_has_no_speed(small, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: lambda: function() * 1.001)
    with pytest.raises(WrongResultError, match="masked_loss/time"):
        kernels.of_size(SIZES, "fp32", 0.0, "cpu", compiled=["time"])["masked_loss/time"]()


def test_the_mask_as_a_factor_is_the_naive_loss():
    pred, target = torch.randn(2, 6, 5).unbind()
    mask = (torch.rand(6, 5) < 0.4).long()
    mask[0, 0] = 1
    torch.testing.assert_close(
        kernels.weighted_loss(pred, target, mask), kernels.naive_loss(pred, target, mask)
    )


def test_a_reader_that_is_wrong_has_no_speed(monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "NETWORKS", 8)
    path, npy, urls = loader._prepare(tmp_path, runs=3)
    flat = np.lib.format.open_memmap(npy, "r+")
    flat[:, 3] += 1
    flat.flush()
    with pytest.raises(WrongResultError, match="reader"):
        loader._warm(path, npy, urls, "cpu", repeats=1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", ""),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise RuntimeError('another torch')", "RuntimeError: another torch"),
    ],
)
def test_a_package_that_does_not_import_is_named_with_its_reason(tmp_path, monkeypatch, text, reason):
    name = f"package_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert baselines.missing(name) == (reason and f"cannot be imported ({reason})")


def test_the_race_gives_both_the_same_start(monkeypatch):
    """And its losses do not depend on whose turn it is."""
    monkeypatch.setattr(race, "MODEL", {"width": 8, "layers": 1, "heads": 1, "dropout": 0.5})
    monkeypatch.setattr(race, "DENSE_STEPS", 1)
    curves = []
    for checks in (2, 4):
        monkeypatch.setattr(race, "CHECKS", checks)
        curves.append(race.race(8, "cpu"))
        assert len(curves[-1]["single"]) == 1 + checks
        assert curves[-1]["single"][0] == curves[-1]["dense"][0], "the same weights at first"
    few, many = ([loss for _, loss in found["single"]] for found in curves)
    assert few == many[::2]
    ends = [[loss for _, loss in found["dense"]] for found in curves]
    shared = min(map(len, ends))
    assert shared > 1
    assert ends[0][:shared] == ends[1][:shared]
