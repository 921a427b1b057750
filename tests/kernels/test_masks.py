"""Masks: bits of the generator, the definition of every scheme in plain Python, statistics."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from brainflow.kernels import MaskSpec, blocks
from brainflow.kernels.loss.naive import dense_mask
from brainflow.kernels.random import philox, philox_ints


def words(seed, c0, c1, c2, c3):
    """Philox4x32-10 written down once more, in plain ints."""
    k0, k1 = seed % 2**32, seed // 2**32
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = b // 2**32 ^ c1 ^ k0, b % 2**32, a // 2**32 ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def masked(spec, window, position, length, network):
    """Whether one entry is masked, from the definition in masks.py."""
    tag = {"position": 1, "rows": 2, "columns": 3}.get(spec.kind, 0) << 24
    if spec.kind == "all":
        return True
    if spec.kind == "position":
        word = words(spec.seed, tag, 0, window // 4, spec.offset)[window % 4]
        return position == 1 + (word * (length - 1) >> 32)
    block = position
    if spec.span == 0:
        block = 0
    elif spec.span > 1:
        phase = words(spec.seed, 4 << 24, 0, window, spec.offset)[0] * spec.span >> 32
        block = (position + phase) // spec.span
    if spec.kind == "rows":
        word = words(spec.seed, tag, block, window, spec.offset)[0]
    else:
        column = network // 1024 * 256 + network % 256
        word = words(spec.seed, tag + column, block, window, spec.offset)[network % 1024 // 256]
    return word >> 8 < round(spec.p * 2**24)


SCHEMES = st.sampled_from(["time_points", "spans", "position", "networks", "tubes", "entries"])
SEEDS = st.integers(0, 2**64 - 1)


def build(scheme, p, span, seed, offset):
    keywords = {"seed": seed, "offset": offset}
    if scheme == "position":
        return MaskSpec.position(**keywords)
    if scheme in ("spans", "tubes"):
        return getattr(MaskSpec, scheme)(p, span, **keywords)
    return getattr(MaskSpec, scheme)(p, **keywords)


@settings(max_examples=25, deadline=None)
@given(
    SCHEMES,
    st.floats(0, 1),
    st.integers(1, 6),
    SEEDS,
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.sampled_from([1, 7, 300, 1030]),
)
def test_every_scheme_is_what_its_definition_says(scheme, p, span, seed, offset, lengths, networks):
    spec = build(scheme, p, span, seed, offset)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    dense = spec.dense(cu_seqlens, networks)
    columns = sorted({0, networks // 2, networks - 1})
    places = [(w, t, length) for w, length in enumerate(lengths) for t in range(length)]
    expected = [[masked(spec, w, t, length, n) for n in columns] for w, t, length in places]
    assert dense[:, columns].tolist() == expected
    if spec.by_rows:
        assert torch.equal(spec.rows(cu_seqlens), dense[:, 0].nonzero().squeeze(1))


@given(SEEDS, st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4))
def test_philox_in_tensors_and_ints(seed, counter):
    expected = words(seed, *counter)
    assert philox_ints(seed, [tuple(counter)])[0] == expected
    assert tuple(int(w) for w in philox(seed, torch.tensor(counter[0]), *counter[1:])) == expected


@given(st.lists(st.integers(0, 9), max_size=9), SEEDS, st.booleans(), st.integers(0, 2**32 - 1))
def test_the_rows_of_the_cpu_faces_are_those_of_the_mask(lengths, seed, padded, offset):
    """Positions of a few windows are drawn in plain ints there."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    for spec in (
        MaskSpec.position(seed=seed, offset=offset),
        MaskSpec.spans(0.5, 2, seed=seed, offset=offset),
    ):
        rows = spec.rows(cu_seqlens)
        if padded:
            window = torch.searchsorted(cu_seqlens, rows, right=True) - 1
            rows = rows - cu_seqlens[window] + window * 12
        bounds = tuple(lengths) if padded else tuple(cu_seqlens.tolist())
        assert torch.equal(blocks.rows_of(tuple(spec.code()), bounds, 12 if padded else 0), rows)


@given(
    st.lists(st.sampled_from([0, 1, 2, 2, 5, 9]), max_size=9),
    st.booleans(),
    st.sampled_from([0, 3]),
    st.sampled_from([0, 10, 1000]),
)
@example([9, 0, 2, 2, 2, 5], False, 0, 10)
def test_blocks_of_a_column_mask_are_its_rows(lengths, padded, span, most):
    """Windows of one length share a block, long ones are cut; what is not valid is in none."""
    period, networks = (12 if padded else 0), 3
    bounds = tuple(lengths) if padded else (0, *torch.tensor(lengths).cumsum(0).tolist())
    total = 12 * len(lengths) if padded else sum(lengths)
    spec = MaskSpec(kind="columns", p=0.5, span=span, seed=6)
    expected = dense_mask(
        torch.zeros(len(lengths), 12, networks) if padded else torch.zeros(total, networks),
        spec, torch.tensor(lengths if padded else bounds, dtype=torch.int32), period,
    ).view(-1, networks)  # fmt: skip
    rows = torch.zeros(total, networks, dtype=torch.bool)
    done = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", 4 * networks)
        blocks._pieces.cache_clear()
        for first, end, mask in blocks.column_blocks(spec.code(), bounds, period, networks, most=most):
            assert done <= first < end <= total
            size, done = end - first, end
            assert size <= 8 or (size <= most // networks and end + size <= total)
            blocks.as_windows(rows[first:end], mask)[:] = mask
    blocks._pieces.cache_clear()
    assert torch.equal(rows, expected)


def test_many_windows_draw_positions_with_tensors():
    cu_seqlens = torch.arange(0, 4001, 10, dtype=torch.int32)
    rows = MaskSpec.position(seed=3, offset=4).rows(cu_seqlens)
    few = MaskSpec.position(seed=3, offset=4).rows(cu_seqlens[:101])
    assert rows.numel() == 400
    assert torch.equal(rows[:100], few)
    assert torch.equal(torch.unique(rows % 10), torch.arange(1, 10))


@pytest.mark.parametrize(
    "spec",
    [
        MaskSpec.time_points(0.2, seed=2**35),
        MaskSpec.spans(0.2, 5, seed=2),
        MaskSpec.networks(0.2, seed=3),
        MaskSpec.tubes(0.2, 5, seed=4),
        MaskSpec.entries(0.2, seed=2**63),
    ],
    ids=lambda spec: f"{spec.kind}-{spec.span}",
)
def test_rate_and_independence(spec):
    cu_seqlens = torch.arange(0, 2001, 20, dtype=torch.int32)  # 100 windows
    dense = spec.dense(cu_seqlens, 64).double()
    independent = 2000 / max(1, spec.span or 20) * (1 if spec.by_rows else 64)
    assert abs(float(dense.mean()) - 0.2) < 5 * (0.16 / independent) ** 0.5
    for other in (
        replace(spec, seed=spec.seed + 1),
        replace(spec, offset=1),
        replace(spec, seed=spec.seed ^ 2**33),
    ):
        again = other.dense(cu_seqlens, 64).double()
        correlation = float(((dense - 0.2) * (again - 0.2)).mean() / 0.16)
        assert abs(correlation) < 5 / independent**0.5
    neighbours = float(((dense[:-20] - 0.2) * (dense[20:] - 0.2)).mean() / 0.16)
    assert abs(neighbours) < 5 / independent**0.5


def test_spans_are_contiguous():
    spec = MaskSpec.spans(0.3, 4, seed=8)
    mask = spec.dense(torch.tensor([0, 4000], dtype=torch.int32), 1).squeeze(1).int()
    edges = mask.diff().nonzero().squeeze(1)
    assert bool((edges[1:].diff() % 4 == 0).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MaskSpec.time_points(1.5, seed=0), "p: got 1.5"),
        (lambda: MaskSpec.tubes(0.2, 0, seed=0), "span: got 0"),
        (lambda: MaskSpec.position(seed=-1), "seed: got -1"),
        (lambda: MaskSpec.position(seed=0, offset=2**32), "offset: got"),
        (lambda: MaskSpec(kind="cubes"), "kind: got 'cubes'"),
        (lambda: MaskSpec.networks(0.2, seed=0).rows(torch.tensor([0, 3])), "mask: got one of kind"),
        (lambda: MaskSpec.all_valid().rows(torch.tensor([1, 3])), "cu_seqlens: got values"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
