"""CIFTI and GIFTI: the means of nilearn's surface masker, on real BOLD laid out on surfaces."""

import json
from types import SimpleNamespace

import nibabel
import numpy as np
import pandas
import pytest
from nibabel.cifti2 import BrainModelAxis, LabelAxis, SeriesAxis
from nilearn import signal
from nilearn.maskers import SurfaceLabelsMasker
from nilearn.surface import InMemoryMesh, PolyMesh, SurfaceImage

from brainflow.prepare import CleanSettings, Query, Settings, find_atlas, find_runs
from brainflow.prepare.parcels import coordinates, networks_of
from brainflow.prepare.records import parts_of
from brainflow.prepare.run import jobs_for, prepare_run
from brainflow.prepare.timing import repetition_time
from brainflow.storage.parts import part_path, read_part

VERTICES = 250


@pytest.fixture
def series(haxby):
    """Real BOLD [121, 530] of one run."""
    bold, _, mask = haxby
    return np.ascontiguousarray(bold[mask][:, :121].T)


def prepare(root, kind, atlas, **clean):
    settings = Settings(clean=CleanSettings(**{"confounds": "none", "smoothing_fwhm": None} | clean))
    spec = find_atlas(str(atlas))
    work = root / "work"
    runs = find_runs(root, Query(kind=kind))
    records = [
        prepare_run(job) for job in jobs_for(runs, kind=kind, settings=settings, atlases=[spec], work=work)
    ]
    [record] = records
    if record["status"] != "done":
        return record, None
    return record, SimpleNamespace(**read_part(part_path(parts_of(work, spec.label), record["key"])))


def brain_models():
    left = BrainModelAxis.from_surface(np.arange(10, 10 + VERTICES), 32_492, "CORTEX_LEFT")
    right = BrainModelAxis.from_surface(np.arange(VERTICES), 32_492, "CORTEX_RIGHT")
    voxels = np.zeros((5, 6, 1), bool)
    voxels.flat[:30] = True
    return left, right, BrainModelAxis.from_mask(voxels, "THALAMUS_LEFT", np.eye(4))


def write_cifti(tmp_path, series, unit="SECOND"):
    models = brain_models()
    func = tmp_path / "sub-01" / "func"
    func.mkdir(parents=True, exist_ok=True)
    axis = SeriesAxis(0, 2.5, 121, unit=unit)
    image = nibabel.Cifti2Image(series, header=(axis, models[0] + models[1] + models[2]))
    path = func / "sub-01_task-objects_space-fsLR_den-91k_bold.dtseries.nii"
    nibabel.save(image, path)
    return path


def write_dlabel(tmp_path, extra=0):
    """A dlabel of the left cortex and the voxels only, in another order than the run, with a medial wall."""
    _, _, thalamus = brain_models()
    models = thalamus + BrainModelAxis.from_surface(np.arange(12 + VERTICES), 32_492, "CORTEX_LEFT")
    values = np.r_[np.full(30, 7), np.zeros(10), np.arange(VERTICES) // 100 + 1, 0, extra].astype(np.float32)
    table = {0: ("???", (0, 0, 0, 0)), 1: ("A", (1, 0, 0, 1)), 2: ("B", (0, 1, 0, 1))}
    table |= {3: ("C", (0, 0, 1, 1)), 7: ("thalamus", (1, 1, 0, 1)), 9: ("lost", (1, 1, 1, 1))}
    path = tmp_path / "atlas-cifti.dlabel.nii"
    axis = LabelAxis(["parcels"], [table])
    nibabel.save(nibabel.Cifti2Image(values[None], header=(axis, models)), path)
    return path


def test_cifti_equals_means_cleaned_by_nilearn(tmp_path, series):
    write_cifti(tmp_path, series)
    record, part = prepare(tmp_path, "cifti", write_dlabel(tmp_path))
    assert networks_of(find_atlas(str(tmp_path / "atlas-cifti.dlabel.nii"))) == ["A", "B", "C", "thalamus"]
    assert (record["t_r"], record["t_r_source"]) == (2.5, "header")
    means = np.column_stack(
        [
            series[:, a:b].mean(axis=1, dtype=np.float64)
            for a, b in ((0, 100), (100, 200), (200, 250), (500, 530))
        ]
    )
    expected = signal.clean(means, standardize="zscore_sample", high_pass=0.008, t_r=2.5)
    np.testing.assert_allclose(part.bold, expected, atol=1e-5)


def write_mesh(path, points):
    array = nibabel.gifti.GiftiDataArray(
        points.astype(np.float32), intent="NIFTI_INTENT_POINTSET", datatype="NIFTI_TYPE_FLOAT32"
    )
    nibabel.save(nibabel.GiftiImage(darrays=[array]), path)


def test_coordinates_of_a_dlabel_come_from_meshes_and_voxels(tmp_path, monkeypatch):
    atlas = write_dlabel(tmp_path)
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "tf"))
    assert coordinates(find_atlas(str(atlas))) is None
    points = np.random.default_rng(0).normal(size=(2, 32_492, 3)).astype(np.float32) * 50
    meshes = [tmp_path / f"{side}.surf.gii" for side in "LR"]
    for path, side in zip(meshes, points, strict=True):
        write_mesh(path, side)
    found = coordinates(find_atlas(str(atlas), surfaces=meshes))
    assert found.shape == (4, 3)
    for i, (start, stop) in enumerate(((12, 112), (112, 212), (212, 262))):
        members = points[0, start:stop]
        nearest = ((members - members.mean(axis=0)) ** 2).sum(axis=1).argmin()
        np.testing.assert_allclose(found[i], members[nearest], atol=1e-4)
    assert found[3].tolist() in np.argwhere(np.ones((5, 6, 1))).tolist()  # thalamus: a voxel
    folder = tmp_path / "tf" / "tpl-fsLR"
    folder.mkdir(parents=True)
    for path, side in zip(meshes, "LR", strict=True):
        path.rename(folder / f"tpl-fsLR_den-32k_hemi-{side}_midthickness.surf.gii")
    np.testing.assert_array_equal(coordinates(find_atlas(str(atlas))), found)
    write_mesh(meshes[0], points[0, :9])
    with pytest.raises(ValueError, match=r"L.surf.gii has 9 vertices, atlas atlascifti has 32492"):
        coordinates(find_atlas(str(atlas), surfaces=[meshes[0]] * 2))


def test_coordinates_on_fsaverage5_need_no_files(tmp_path):
    values = np.zeros(10_242, np.int32)
    values[:10], values[100] = 1, 2
    path = write_gifti_labels(tmp_path, "L", values, ["L1", "L2"])
    write_gifti_labels(tmp_path, "R", values, ["L1", "L2"])
    found = coordinates(find_atlas(str(path)))
    assert found.shape == (2, 3)
    assert np.abs(found).max() < 120


def test_a_label_that_the_run_lacks_is_named(tmp_path, series):
    write_cifti(tmp_path, series)
    record, _ = prepare(tmp_path, "cifti", write_dlabel(tmp_path, extra=9))
    assert "1 of 5 labels are not in the run (lost)" in record["reason"]


def test_a_series_in_other_units_has_no_repetition_time(tmp_path, series):
    write_cifti(tmp_path, series, unit="HERTZ")
    record, _ = prepare(tmp_path, "cifti", write_dlabel(tmp_path))
    assert "no repetition time" in record["reason"]


def test_a_truncated_cifti_fails(tmp_path, series):
    path = write_cifti(tmp_path, series)
    path.write_bytes(path.read_bytes()[:150_000])
    record, _ = prepare(tmp_path, "cifti", write_dlabel(tmp_path))
    assert record["status"] == "failed"
    assert "truncated or damaged" in record["reason"]


def write_gifti(tmp_path, series):
    func = tmp_path / "sub-01" / "func"
    func.mkdir(parents=True)
    for hemi, data in (("L", series[:, :265]), ("R", series[:, 265:])):
        arrays = [nibabel.gifti.GiftiDataArray(row, datatype="NIFTI_TYPE_FLOAT32") for row in data]
        stem = func / f"sub-01_task-objects_hemi-{hemi}_space-fsaverage5_bold"
        nibabel.save(nibabel.GiftiImage(darrays=arrays), f"{stem}.func.gii")
        stem.with_name(stem.name + ".json").write_text(json.dumps({"RepetitionTime": 2.5}))


def write_gifti_labels(tmp_path, hemi, values, names):
    table = nibabel.gifti.GiftiLabelTable()
    for key, name in enumerate(("???", *names)):
        label = nibabel.gifti.GiftiLabel(key=key)
        label.label = name
        table.labels.append(label)
    array = nibabel.gifti.GiftiDataArray(values.astype(np.int32), datatype="NIFTI_TYPE_INT32")
    path = tmp_path / f"atlas-surf_hemi-{hemi}.label.gii"
    nibabel.save(nibabel.GiftiImage(darrays=[array], labeltable=table), path)
    return path


def test_gifti_equals_nilearns_surface_masker(tmp_path, series):
    write_gifti(tmp_path, series)
    left = np.arange(265) // 89  # 0 (background), 1, 2
    right = np.arange(265) // 67  # 0 to 3; counts from 1 again, with names of its own
    path = write_gifti_labels(tmp_path, "L", left, ["L1", "L2"])
    write_gifti_labels(tmp_path, "R", right, ["R1", "R2", "R3"])
    _, part = prepare(tmp_path, "gifti", path)
    assert networks_of(find_atlas(str(path))) == ["L1", "L2", "R1", "R2", "R3"]
    rng = np.random.default_rng(0)
    faces = np.array([[i, i + 1, i + 2] for i in range(263)])
    mesh = PolyMesh(*[InMemoryMesh(rng.normal(size=(265, 3)), faces) for _ in range(2)])
    labels = {"left": left, "right": np.where(right > 0, right + 2, 0)}
    image = SurfaceImage(mesh, {"left": series[:, :265].T, "right": series[:, 265:].T})
    masker = SurfaceLabelsMasker(
        SurfaceImage(mesh, labels), detrend=True, standardize="zscore_sample", high_pass=0.008, t_r=2.5
    )
    np.testing.assert_allclose(part.bold, masker.fit_transform(image), atol=1e-4)  # nilearn works in float32


@pytest.mark.parametrize("kind", ["cifti", "gifti"])
def test_confounds_of_fmriprep_are_regressed_out_of_surfaces(tmp_path, series, kind, confounds_table):
    if kind == "cifti":
        write_cifti(tmp_path, series)
        atlas = write_dlabel(tmp_path)
        parcels = [series[:, a:b] for a, b in ((0, 100), (100, 200), (200, 250), (500, 530))]
    else:
        write_gifti(tmp_path, series)
        atlas = write_gifti_labels(tmp_path, "L", np.arange(265) // 200, ["L1"])
        write_gifti_labels(tmp_path, "R", np.arange(265) // 200, ["R1"])
        parcels = [series[:, 200:265], series[:, 465:530]]
    table = tmp_path / "sub-01" / "func" / "sub-01_task-objects_desc-confounds_timeseries.tsv"
    confounds_table(table, 121, 0)
    record, part = prepare(tmp_path, kind, atlas, confounds="published")
    columns = [f"{move}_{axis}" for move in ("trans", "rot") for axis in "xyz"]
    columns += ["csf", "white_matter", "global_signal"]
    assert sorted(record["confounds"]) == sorted(columns)
    means = np.column_stack([parcel.mean(axis=1, dtype=np.float64) for parcel in parcels])
    values = pandas.read_csv(table, sep="\t")[columns].to_numpy()
    expected = signal.clean(means, standardize="zscore_sample", high_pass=0.008, t_r=2.5, confounds=values)
    np.testing.assert_allclose(part.bold, expected, atol=1e-5)


def test_volumes_and_surfaces_are_not_mixed(tmp_path, series):
    write_gifti(tmp_path, series)
    write_dlabel(tmp_path)
    with pytest.raises(ValueError, match="does not fit --input gifti"):
        prepare(tmp_path, "gifti", tmp_path / "atlas-cifti.dlabel.nii")


def test_gifti_takes_its_repetition_time_from_the_sidecar_only():
    with pytest.raises(ValueError, match="no repetition time"):
        repetition_time([], None)
