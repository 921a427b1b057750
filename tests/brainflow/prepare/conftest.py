"""A BIDS dataset with fMRIPrep's names and sidecars, from the real Haxby BOLD that ships with the package."""

import json
from dataclasses import dataclass
from importlib.resources import as_file, files
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tyro

SPACE = "MNI152NLin2009cAsym"
MOTION = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")


@dataclass(frozen=True)
class Tree:
    """Writes runs into a raw dataset at `root` and its derivatives."""

    root: Path
    bold: np.ndarray  # [x, y, 1, volumes] of the real data
    affine: np.ndarray
    mask: np.ndarray

    @property
    def fmriprep(self) -> Path:
        return self.root / "derivatives" / "fmriprep"

    def name(self, sub, task, ses="", run="", acq=""):
        parts = [("sub", sub), ("ses", ses), ("task", task), ("acq", acq), ("run", run)]
        return "_".join(f"{key}-{value}" for key, value in parts if value)

    def func(self, sub, ses="", derived=True):
        base = self.fmriprep if derived else self.root
        folder = base / f"sub-{sub}" / (f"ses-{ses}" if ses else "") / "func"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def run(
        self,
        sub,
        task,
        *,
        ses="",
        run="",
        index=0,
        volumes=121,
        t_r=2.5,
        sidecar_t_r=None,
        confounds=True,
        events=None,
        affine=None,
        data=None,
        outliers=0,
        fd=0.1,
        moved=(),
    ):
        """Write one run: volumes `index * 121 …` of the real BOLD; returns the path of the image."""
        func, name = self.func(sub, ses), self.name(sub, task, ses, run)
        if data is None:
            data = self.bold[..., index * 121 : index * 121 + volumes]
        image = nibabel.Nifti1Image(data, self.affine if affine is None else affine)
        if data.ndim == 4:
            image.header.set_zooms((*image.header.get_zooms()[:3], t_r))
        image.header.set_xyzt_units("mm", "sec")
        stem = func / f"{name}_space-{SPACE}_desc-preproc_bold"
        path = stem.with_name(stem.name + ".nii.gz")
        nibabel.save(image, path)
        sidecar = {"RepetitionTime": t_r if sidecar_t_r is None else sidecar_t_r, "SkullStripped": False}
        stem.with_name(stem.name + ".json").write_text(json.dumps(sidecar))
        if confounds:
            write_confounds(
                func / f"{name}_desc-confounds_timeseries.tsv", data.shape[-1], index, outliers, fd, moved
            )
        if events:
            raw = self.func(sub, ses, derived=False) / f"{name}_events.tsv"
            raw.write_text(
                "onset\tduration\ttrial_type\n" + "".join(f"{o}\t{d}\t{t}\n" for o, d, t in events)
            )
        return path

    def blank_column(self, sub, name):
        """Let a column of a participant's confounds hold no numbers."""
        [table] = (self.fmriprep / f"sub-{sub}").rglob("*confounds_timeseries.tsv")
        rows = [line.split("\t") for line in table.read_text().splitlines()]
        column = rows[0].index(name)
        for row in rows[1:]:
            row[column] = "n/a"
        table.write_text("\n".join(map("\t".join, rows)) + "\n")

    def atlas(self, name="atlas-grid_dseg.nii.gz", labels=12):
        """A label image on the grid of the data: stripes of the mask, with names beside it."""
        order = np.argsort(np.argwhere(self.mask) @ (1, 7, 0), kind="stable")
        values = np.zeros(int(self.mask.sum()), np.int16)
        values[order] = 1 + np.arange(len(order)) * labels // len(order)
        data = np.zeros(self.mask.shape, np.int16)
        data[self.mask] = values
        path = self.root.parent / name
        nibabel.save(nibabel.Nifti1Image(data, self.affine), path)
        table = "index\tname\n" + "".join(f"{i}\tstripe {i}\n" for i in range(1, labels + 1))
        path.with_name(path.name.replace(".nii.gz", ".tsv")).write_text(table)
        return path

    def maps(self, name="atlas-soft_probseg.nii.gz", maps=5):
        """Overlapping soft maps, on the grid of the data."""
        rng = np.random.default_rng(0)
        weights = rng.gamma(0.3, size=(*self.mask.shape, maps)) * self.mask[..., None]
        path = self.root.parent / name
        nibabel.save(nibabel.Nifti1Image(weights.astype(np.float32), self.affine), path)
        return path


def write_confounds(path, volumes, seed, outliers=0, fd=0.1, moved=()):
    rng = np.random.default_rng(seed)
    columns = {name: rng.normal(size=volumes).cumsum() * 0.01 for name in MOTION}
    for name in MOTION:
        first = np.r_[np.nan, np.diff(columns[name])]
        columns |= {f"{name}_derivative1": first, f"{name}_power2": columns[name] ** 2}
        columns[f"{name}_derivative1_power2"] = first**2
    for name in ("csf", "white_matter", "global_signal"):
        values = 500 + rng.normal(size=volumes)
        first = np.r_[np.nan, np.diff(values)]
        columns |= {name: values, f"{name}_derivative1": first, f"{name}_power2": values**2}
        columns[f"{name}_derivative1_power2"] = first**2
    columns["framewise_displacement"] = np.r_[np.nan, fd * rng.uniform(0.5, 1.5, volumes - 1)]
    columns["framewise_displacement"][list(moved)] = 2.0
    columns["std_dvars"] = np.r_[np.nan, rng.uniform(0.8, 1.2, volumes - 1)]
    for i in range(2):
        columns[f"cosine{i:02d}"] = np.cos(np.pi * (i + 1) * (np.arange(volumes) + 0.5) / volumes)
        columns[f"a_comp_cor_{i:02d}"] = rng.normal(size=volumes)
    for i in range(outliers):
        columns[f"non_steady_state_outlier{i:02d}"] = (np.arange(volumes) == i).astype(float)
    rows = np.column_stack(list(columns.values()))
    lines = ["\t".join(columns)]
    lines += ["\t".join("n/a" if np.isnan(v) else f"{v:.10g}" for v in row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    meta = {
        f"a_comp_cor_{i:02d}": {"Method": "aCompCor", "Mask": "combined", "Retained": True} for i in range(2)
    }
    path.with_suffix(".json").write_text(json.dumps(meta))


@pytest.fixture(scope="session", autouse=True)
def unflushed(no_flushing):
    """Every test here takes it."""


@pytest.fixture(scope="session")
def haxby():
    with as_file(files("brainflow") / "demo_data" / "haxby2001") as folder:
        image = nibabel.load(folder / "bold.nii.gz")
        mask = np.asarray(nibabel.load(folder / "mask.nii.gz").dataobj).reshape(image.shape[:3]) > 0
        return np.asarray(image.dataobj, np.float32), image.affine, mask


def build(folder, haxby):
    bold, affine, mask = haxby
    root = folder / "bids"
    root.mkdir()
    (root / "dataset_description.json").write_text(
        '{"Name": "Test", "BIDSVersion": "1.9.0", "DatasetDOI": "doi:10.18112/openneuro.ds000105.v3.0.0"}'
    )
    made = Tree(root=root, bold=bold, affine=affine, mask=mask)
    made.fmriprep.mkdir(parents=True)
    (made.fmriprep / "dataset_description.json").write_text(
        '{"Name": "fMRIPrep", "DatasetType": "derivative", "SourceDatasets": [{"DOI": "", "URL": 7}],'
        ' "GeneratedBy": [{"Name": "fMRIPrep", "Version": "25.2.0", "Container": {"Tag": "x"}}]}'
    )
    return made


def six_runs(tree):
    """Two participants, two sessions, two tasks, two repetition times."""
    blocks = [(30 * i, 22.5, name) for i, name in enumerate(("face", "house", "cat"))]
    sessions = (("a", "objects", 2.5), ("b", "objects", 2.5), ("b", "rest", 2.0))
    for i, (sub, (ses, task, t_r)) in enumerate(product(("01", "02"), sessions)):
        tree.run(sub, task, ses=ses, index=i, t_r=t_r, events=blocks if task == "objects" else None)
    tree.atlas()
    return tree


@pytest.fixture
def tree(tmp_path, haxby):
    return build(tmp_path, haxby)


@pytest.fixture
def dataset(tree):
    """Six runs that a test may change."""
    return six_runs(tree)


@pytest.fixture(scope="module")
def kept(tmp_path_factory, haxby):
    """The same six runs, for tests that only read them."""
    return six_runs(build(tmp_path_factory.mktemp("kept"), haxby))


def command(module, *words):
    """Run a verb with words of a command line, in this process."""
    return module.run(tyro.cli(module.Args, args=[str(word) for word in words]))


@pytest.fixture
def run_verb():
    return command


@pytest.fixture
def confounds_table():
    return write_confounds
