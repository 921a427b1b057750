"""Normalisation of runs: what each kind takes away, what it leaves, and what it refuses."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainflow.cli.main import main
from brainflow.storage import BoldStore, Segment, StoreError, StoreWriter
from brainflow.storage.ingest.arrays import ingest_arrays
from brainflow.storage.ingest.session import IngestSession
from brainflow.storage.ingest.stores import ingest_store
from brainflow.storage.ingest.webdataset import ingest_tar
from brainflow.storage.normalise import (
    APPLIED,
    KINDS,
    kind_of,
    left_to_remove,
    normalise,
    spatially_normalised,
)

DOING = ("zscore", "spatial", "gsr")


def run_of(seed=0, time=60, networks=8, common=2.0):
    """A run with a global signal, networks of different scales and means."""
    rng = np.random.default_rng(seed)
    bold = rng.standard_normal((time, networks)) + common * rng.standard_normal((time, 1))
    return bold * rng.uniform(0.1, 50, networks) + rng.uniform(-300, 300, networks)


def zscored(bold):
    return (bold - bold.mean(0)) / bold.std(0, ddof=1)


def expected(bold, kind):
    """The definition, in float64 and without a thought for what may go wrong."""
    z = zscored(bold)
    if kind == "spatial":
        z = z - z.mean(1, keepdims=True)
        z = zscored(z / z.std(1, keepdims=True))
    if kind == "gsr":
        design = np.column_stack([np.ones(len(z)), z.mean(1)])
        z = zscored(z - design @ np.linalg.lstsq(design, z, rcond=None)[0])
    return z


@pytest.mark.parametrize("kind", DOING)
def test_each_kind_is_what_its_name_says(kind):
    bold = run_of()
    got = normalise(bold, kind)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected(bold, kind), atol=2e-5)
    assert normalise(bold, "none") is bold


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    time=st.integers(4, 70),
    networks=st.integers(3, 9),
    dtype=st.sampled_from(["f4", "f8", "i2"]),
    scale=st.sampled_from([1e-280, 1e-30, 1.0, 1e30, 1e280]),
    kind=st.sampled_from(DOING),
)
def test_scale_and_offset_of_networks_do_not_matter_and_nothing_overflows(
    seed, time, networks, dtype, scale, kind
):
    bold = run_of(seed, time, networks).astype(dtype)
    got = normalise(bold, kind)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got.mean(0), 0, atol=1e-5)
    varies = got.any(0)
    np.testing.assert_allclose(got[:, varies].std(0, ddof=1), 1, atol=1e-4)
    if dtype == "f8":
        np.testing.assert_allclose(normalise(bold * scale, kind), got, atol=1e-4)


@pytest.mark.parametrize("kind", DOING)
@pytest.mark.parametrize("constant", [0.0, 7.0, 1e4 + 0.1])
def test_a_network_that_does_not_vary_becomes_0_and_harms_no_other(kind, constant):
    bold = run_of()
    wider = np.insert(bold, 3, constant, axis=1)
    wider[:, 3] += np.random.default_rng(1).standard_normal(len(bold)) * constant * 1e-17
    got = normalise(wider, kind)
    assert not got[:, 3].any()
    np.testing.assert_array_equal(np.delete(got, 3, axis=1), normalise(bold, kind))
    flat = wider - wider.mean(0)  # and when its mean has been taken away
    flat[:, 3] = np.random.default_rng(1).standard_normal(len(bold)) * 1e-13
    assert not normalise(flat, kind)[:, 3].any()


def test_what_rounding_makes_of_a_constant_does_not_vary():
    bold = run_of().astype(np.float32)
    bold[:, 3] = np.float32(1e4) + np.random.default_rng(0).choice([0, np.float32(1e-3)], len(bold))
    assert np.ptp(bold[:, 3]) > 0
    assert not normalise(bold, "spatial")[:, 3].any()
    assert normalise(bold.astype(np.float64), "spatial")[:, 3].any()  # there it is what was measured


def test_what_all_networks_share_is_gone():
    bold = run_of(time=300, networks=40)
    assert left_to_remove(zscored(bold), "gsr") > 0.3
    for kind in ("spatial", "gsr"):
        assert left_to_remove(zscored(bold), kind) > 0.1
        assert left_to_remove(normalise(bold, kind), kind) < 0.005
        windows = normalise(bold, kind)[40:60]
        assert left_to_remove(windows, kind) < 0.01
    assert left_to_remove(normalise(bold, "gsr"), "spatial") > left_to_remove(
        normalise(bold, "spatial"), "spatial"
    )
    assert left_to_remove(np.zeros((5, 4)), "spatial") == 0.0


def test_networks_that_say_the_same_leave_nothing_not_noise():
    one = np.random.default_rng(0).standard_normal((50, 1))
    same = np.repeat(one, 5, axis=1) * [1, 2, 3, 4, 5]
    for kind in ("spatial", "gsr"):
        assert not normalise(same, kind).any()
    opposite = np.concatenate([one, -one, one, -one], axis=1)  # no global signal at all
    np.testing.assert_allclose(normalise(opposite, "gsr"), normalise(opposite, "zscore"), atol=1e-6)
    assert spatially_normalised(np.full((3, 4), 2.5)).tolist() == [[0.0] * 4] * 3


def test_a_spike_stays_one_and_is_bounded_only_by_its_volume():
    bold = run_of(time=200, common=0.0)
    bold[50, 2] += 1e4
    assert normalise(bold, "zscore")[50, 2] > 13
    assert normalise(bold, "spatial")[50].argmax() == 2


def test_censored_time_points_take_no_part():
    bold, censor = run_of(), np.zeros(60, bool)
    censor[[5, 6, 30]] = True
    for kind in DOING:
        got = normalise(bold, kind, censor=censor)
        np.testing.assert_allclose(got[~censor], normalise(bold[~censor], kind), atol=1e-5)
        other = bold.copy()
        other[censor] = 1e6
        np.testing.assert_array_equal(normalise(other, kind, censor=censor)[~censor], got[~censor])
        assert np.isfinite(normalise(other, kind, censor=censor)).all()


@pytest.mark.parametrize(
    ("bold", "kind", "reason"),
    [
        (run_of(networks=1), "spatial", "spatial needs 3 networks that vary over time, the run has 1"),
        (
            np.insert(run_of(networks=2), 0, 5, axis=1),
            "gsr",
            "the run has 2; take zscore",
        ),
        (np.ones((9, 4)), "zscore", "no network of the run varies"),
        (run_of(time=1), "zscore", "1 time points that are not censored, expected at least 2"),
        (run_of(), "psc", "normalise: got 'psc', expected one of none, zscore, spatial, gsr"),
        (run_of()[0], "zscore", r"expected real numbers \[time, networks\]"),
        (run_of() > 0, "zscore", "got bool"),
        (np.where(np.arange(8) == 4, np.nan, run_of()), "gsr", "network 4, time point 0: the value nan"),
        (
            np.where(np.arange(60)[:, None] == 7, -np.inf, run_of()),
            "spatial",
            "network 0, time point 7",
        ),
    ],
)
def test_what_cannot_be_normalised_is_refused_by_name(bold, kind, reason):
    with pytest.raises(ValueError, match=reason):
        normalise(bold, kind)


def test_words_of_stores_name_their_kind():
    assert [kind_of(APPLIED[kind]) for kind in DOING] == list(DOING)
    assert [kind_of(text) for text in ("", None, "percent signal change", 3)] == [None] * 4
    assert set(APPLIED) == set(KINDS) - {"none"}


# Ingestion


def write_arrays(folder, runs, **store):
    folder.mkdir(exist_ok=True)
    for i, bold in enumerate(runs):
        np.save(folder / f"sub-{i}_task-rest.npy", bold)
    lines = [f"{name} = {json.dumps(value)}" for name, value in store.items()]
    entries = ["[defaults]", 'dataset = "d"', "t_r = 2.0", "[[files]]", 'glob = "*.npy"']
    (folder / "runs.toml").write_text("\n".join(["[store]", *lines, *entries]))
    return folder / "runs.toml"


@pytest.mark.parametrize("kind", DOING)
def test_ingestion_normalises_and_the_store_says_so(tmp_path, kind):
    runs = [run_of(seed) for seed in range(3)]
    report = ingest_arrays(
        write_arrays(tmp_path / "in", runs, normalise=kind, dtype="float32"), tmp_path / "s"
    )
    assert report.ok
    store = BoldStore.open(tmp_path / "s")
    assert store.attributes["normalisation"] == APPLIED[kind]
    for i, run in enumerate(runs):
        np.testing.assert_array_equal(store.run(i), normalise(run, kind))
    assert report.scale.normalised == kind
    assert report.scale.zscored == 0  # as they were given
    assert APPLIED[kind] in report.scale.said(store.attributes["normalisation"])


def test_a_run_that_cannot_be_normalised_harms_only_itself(tmp_path):
    runs = [run_of(0), np.ones((20, 8)), run_of(2)]
    report = ingest_arrays(write_arrays(tmp_path / "in", runs, normalise="spatial"), tmp_path / "s")
    assert len(report.runs) == 2
    assert [reason.rpartition(".npy: ")[2] for reason in report.failures.values()] == [
        "normalise: no network of the run varies over time; drop the run"
    ]


def test_runs_are_added_in_the_normalisation_of_the_store_or_not_at_all(tmp_path):
    made = write_arrays(tmp_path / "in", [run_of(0)], normalise="spatial")
    ingest_arrays(made, tmp_path / "s")
    before = BoldStore.open(tmp_path / "s").snapshot
    for store, reason in (
        ({}, "normalise: got none, but the runs of the store .* are mean and SD over networks .* 'spatial'"),
        ({"normalise": "gsr"}, "normalisation: got 'global signal .* but the store .* has 'mean and SD"),
        ({"normalisation": "other"}, "normalisation: got 'other', but the store"),
    ):
        with pytest.raises(StoreError, match=reason):
            ingest_arrays(write_arrays(tmp_path / "in", [run_of(1)], **store), tmp_path / "s")
    with pytest.raises(StoreError, match="normalise: got none"):
        ingest_tar([], tmp_path / "s")
    assert BoldStore.open(tmp_path / "s").snapshot == before
    for name, store in (("7", {"normalise": "spatial"}), ("8", {"normalisation": APPLIED["spatial"]})):
        toml = write_arrays(tmp_path / name, [], **store)
        np.save(tmp_path / name / f"sub-{name}_task-rest.npy", run_of(7))
        assert ingest_arrays(toml, tmp_path / "s").ok
    store = BoldStore.open(tmp_path / "s")
    np.testing.assert_allclose(store.run(1), normalise(run_of(7), "spatial"), atol=2e-3)
    np.testing.assert_allclose(store.run(2), run_of(7), rtol=1e-3)  # said to be so already
    # a store of which nothing is said takes what comes, but not what is normalised now
    raw = write_arrays(tmp_path / "raw", [run_of(3)])
    ingest_arrays(raw, tmp_path / "r")
    with pytest.raises(StoreError, match="normalisation: got 'z-scored per run and network', but the store"):
        ingest_arrays(write_arrays(tmp_path / "raw", [run_of(4)], normalise="zscore"), tmp_path / "r")


def test_stating_and_doing_at_once_is_refused(tmp_path):
    toml = write_arrays(tmp_path / "in", [run_of()], normalise="zscore", normalisation="psc")
    with pytest.raises(StoreError, match="normalisation, normalise: got both, expected one"):
        ingest_arrays(toml, tmp_path / "s")
    with pytest.raises(StoreError, match="normalise: got 'scaled', expected one of none, zscore"):
        ingest_arrays(write_arrays(tmp_path / "in", [], normalise="scaled"), tmp_path / "s")
    with pytest.raises(StoreError, match="normalisation: got 'psc' beside normalise 'gsr'"):
        ingest_tar([], tmp_path / "s", normalise="gsr", normalisation="psc")
    with pytest.raises(StoreError, match="normalise: got 'x'"):
        IngestSession(tmp_path / "s", {}, overwrite=False, normalise="x")


def test_what_was_and_was_not_scaled_is_said(tmp_path):
    rng = np.random.default_rng(0)
    odd = rng.standard_normal((200, 5)) * [1, 1, 1, 1, 900]
    odd[:, 1] += 40
    odd[:, 2] = 3
    odd[77, 3] = -60
    runs = [zscored(rng.standard_normal((200, 5))), odd]
    scale = ingest_arrays(write_arrays(tmp_path / "in", runs), tmp_path / "s").scale
    assert (scale.runs, scale.zscored, list(scale.notes)) == (2, 1, ["ds-d_sub-1_task-rest"])
    (note,) = scale.notes.values()
    assert "1 of 5 networks are constant (first: network 2)" in note
    assert "differ in scale: standard deviations from 0.899 (network" in note
    assert "(network 4)" in note
    assert "not centred: network 1 has mean 39.9" in note
    assert "network 3 is 13" in note
    assert "time point 77; nothing was clipped" in note
    assert "1 of 2 runs are z-scored by network; normalise = zscore, spatial or gsr" in scale.said("")
    assert "though the store says" in scale.said(APPLIED["zscore"])
    done = ingest_arrays(write_arrays(tmp_path / "in", runs, normalise="zscore"), tmp_path / "z").scale
    (note,) = done.notes.values()
    assert "constant" in note
    assert "nothing was clipped" in note
    assert "centred" not in note  # it is now
    again = ingest_store(tmp_path / "z", tmp_path / "copy").scale
    assert again.zscored == 2
    good = ingest_arrays(write_arrays(tmp_path / "good", runs[:1]), tmp_path / "g").scale
    assert "all 1 run is z-scored by network already; to record that" in good.said("")
    assert good.said(APPLIED["zscore"]).endswith("already")


# From one store to another


def labelled_store(path, **options):
    with StoreWriter.create(
        path, networks=4, network_names=list("abcd"), parcellation="four", preprocessing={"x": 1}, **options
    ) as writer:
        for i in range(3):
            bold, censor = run_of(i, networks=4), np.zeros(60, bool)
            censor[:2] = True
            writer.append(
                bold,
                t_r=1.5 + i,
                dataset="d",
                subject=str(i),
                session="s",
                key=f"key {i}",
                censor=censor if i else None,
                segments=[
                    Segment(onset=3, length=4, labels={"a": "é", "n": 2}),
                    Segment(onset=8, length=1, labels={"x": 0.5} if i == 2 else {"a": "b"}),
                ],
            )
    return path


def test_a_store_becomes_another_with_all_that_it_says(tmp_path):
    source = BoldStore.open(labelled_store(tmp_path / "raw", dtype="float32"))
    report = ingest_store(tmp_path / "raw", tmp_path / "new", normalise="spatial")
    assert report.ok
    store = BoldStore.open(tmp_path / "new")
    for i in range(3):
        censor = source.runs.censor(i)
        expected = normalise(source.run(i), "spatial", censor=censor)
        np.testing.assert_array_equal(store.run(i), expected)
        np.testing.assert_array_equal(
            np.zeros(0) if store.runs.censor(i) is None else store.runs.censor(i),
            np.zeros(0) if censor is None else censor,
        )
    for name in ("t_r", "length", "dataset", "subject", "session", "key"):
        assert getattr(store.runs, name).tolist() == getattr(source.runs, name).tolist()
    for name in ("run", "onset", "length"):
        assert getattr(store.segments, name).tolist() == getattr(source.segments, name).tolist()
    for name, values in source.segments.columns.items():
        np.testing.assert_array_equal(store.segments.columns[name], values)
    for name in ("network_names", "parcellation", "preprocessing", "dtype", "chunk_rows"):
        assert store.attributes[name] == source.attributes[name]
    assert store.attributes["provenance"]["copied_from"] == source.snapshot
    plain = ingest_store(tmp_path / "raw", tmp_path / "plain")
    assert plain.ok
    copy = BoldStore.open(tmp_path / "plain")
    assert all(np.array_equal(copy.run(i), source.run(i)) for i in range(3))


def test_what_is_done_is_not_done_twice_nor_undone(tmp_path):
    labelled_store(tmp_path / "raw")
    ingest_store(tmp_path / "raw", tmp_path / "gsr", normalise="gsr")
    with pytest.raises(StoreError, match=r"is global signal regressed out, .* already; leave normalise out"):
        ingest_store(tmp_path / "gsr", tmp_path / "b", normalise="gsr")
    with pytest.raises(StoreError, match=r"which cannot be undone; .* normalise 'spatial'"):
        ingest_store(tmp_path / "gsr", tmp_path / "b", normalise="spatial")
    assert not (tmp_path / "b").exists()
    with pytest.raises(StoreError, match="is the store to read and the one to write"):
        ingest_store(tmp_path / "gsr", tmp_path / "gsr", overwrite=True)
    ingest_store(tmp_path / "gsr", tmp_path / "b")  # a copy stays what it is
    assert BoldStore.open(tmp_path / "b").attributes["normalisation"] == APPLIED["gsr"]
    ingest_store(tmp_path / "raw", tmp_path / "z", normalise="zscore")
    ingest_store(tmp_path / "z", tmp_path / "zs", normalise="spatial")
    first = BoldStore.open(tmp_path / "zs").run(0)
    np.testing.assert_allclose(first, normalise(run_of(0, networks=4), "spatial"), atol=0.03)  # float16 twice


def test_the_command_says_what_it_scaled(tmp_path, capsys):
    labelled_store(tmp_path / "raw")
    raw, new = str(tmp_path / "raw"), str(tmp_path / "new")
    assert main(["ingest", "store", raw, new, "--normalise", "gsr"]) == 0
    said = capsys.readouterr()
    assert "scale: gsr (global signal regressed out, z-scored per run and network); as given, " in said.out
    assert main(["ingest", "store", raw, new, "--json", "--overwrite"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scale"]["normalised"] == "none"
    assert len(found["scale"]["notes"]) == 3  # networks are not centred
    assert main(["ingest", "store", new, new, "--normalise", "gsr"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    tars = ["ingest", "tar", raw, str(tmp_path / "t"), "--normalise", "zscore"]
    assert main([*tars, "--normalisation", "psc"]) == 2
    assert "--normalisation, --normalise: got both, expected one" in capsys.readouterr().err
    assert main([*tars[:-1], "scaled"]) == 2


def test_a_damaged_run_of_a_store_is_named_and_the_others_are_copied(tmp_path, capsys):
    path = labelled_store(tmp_path / "raw", dtype="float32", chunk_rows=4, shard_rows=64)
    shard = next((path / "bold" / "c" / "0").iterdir())
    data = bytearray(shard.read_bytes())
    data[3] ^= 1  # the first run
    shard.write_bytes(data)
    assert main(["ingest", "store", str(path), str(tmp_path / "new"), "--normalise", "gsr"]) == 1
    assert "run key 0: chunk 0" in capsys.readouterr().out
    assert BoldStore.open(tmp_path / "new").runs.key.tolist() == ["key 1", "key 2"]
