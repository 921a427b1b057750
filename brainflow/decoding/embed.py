"""From images, tables of time series and stores to embeddings: cleaned, compared with the model, embedded.

Images are prepared as the model's data were, by the machinery of `brainflow prepare`. One file that cannot be
used stops no other.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from brainflow.decoding.embeddings import ENTITIES, Embeddings
from brainflow.decoding.finetune import frozen_features
from brainflow.decoding.readout import BINS, SIDES, Pooling, Readout, layers
from brainflow.decoding.windows import ArrayWindows
from brainflow.devices import resolve_device
from brainflow.frameworks.registry import framework_spec
from brainflow.prepare.atlas import AtlasSpec, check_space, find_atlas
from brainflow.prepare.files import parse_name
from brainflow.prepare.parcels import networks_of
from brainflow.prepare.pool import prepare_runs
from brainflow.prepare.records import DONE, Unusable, parts_of, read_record
from brainflow.prepare.run import Job, jobs_for
from brainflow.prepare.settings import CleanSettings, Rules, Settings, Strategy
from brainflow.prepare.single import ENDINGS, fetch_file, files_of, job_of, kind_of, split_url
from brainflow.prepare.surfaces import read_parcels
from brainflow.prepare.timing import TOLERANCE, repetition_time
from brainflow.pretrained.compatibility import check_fits, differences, longest_window, signal_differences
from brainflow.pretrained.format import load_pretrained, read_config
from brainflow.pretrained.hub import fetch
from brainflow.progress import or_notebook
from brainflow.storage import BoldStore, StoreError
from brainflow.storage.ingest.limits import regular_size
from brainflow.storage.ingest.loading import load_array
from brainflow.storage.normalise import APPLIED, Kind, normalise
from brainflow.storage.normalise import kind_of as normalisation_kind
from brainflow.storage.parts import part_path, read_part
from brainflow.storage.remote import RemoteFiles, is_remote
from brainflow.storage.text import counted

LayerName = int | Literal["input", "both", "all", "last"]
Confounds = Literal["auto"] | Strategy
FILE, PREPARING = 100, 2_000
"""Units of work in progress: to embed a file; to prepare an image, which takes many times as long."""
TABLES = (".npy", ".npz", ".mat", ".csv", ".tsv", ".h5", ".hdf5", ".parquet", ".ptseries.nii")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """A whole run, normalised as the model's were: `bold` [time, networks]."""

    bold: NDArray
    t_r: float
    facts: dict[str, str]
    begin: float = 0.0  # seconds of the recording that were left out before it
    attributes: dict[str, Any] | None = None  # None if it has been compared with the model already
    share: float = 1.0  # of its file that is done with it


@dataclass(frozen=True, kw_only=True)
class _Model:
    """A model and its `config.json`."""

    folder: Path
    module: Any
    saved: dict[str, Any]
    readout: Readout
    device: torch.device

    @property
    def data(self) -> dict[str, Any]:
        """What its data were like."""
        return self.saved.get("data") or {}

    @property
    def networks(self) -> int:
        return int(self.module.config.networks)

    @property
    def recipe(self) -> dict[str, Any]:
        """How its data were cleaned, as far as that is recorded."""
        clean = (self.data.get("preprocessing") or {}).get("clean")
        return clean if isinstance(clean, dict) else {}

    @property
    def confounds(self) -> str:
        return str(self.recipe.get("confounds", CleanSettings().confounds))

    @property
    def normalise(self) -> Kind:
        return cast("Kind", normalisation_kind(self.data.get("normalisation")) or "zscore")


def embed(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    checkpoint: str | os.PathLike[str],
    *,
    atlas: str | None = None,
    t_r: float | None = None,
    confounds: Confounds = "auto",
    window: float | None = None,
    per: Literal["window", "run"] = "window",
    # Both: without labels nobody can say which of them reads better.
    layer: LayerName = "both",
    pooling: Pooling = "mean",
    bins: int = BINS,
    work: str | os.PathLike[str] | None = None,
    processes: int = 1,
    allow_mismatch: bool = False,
    device: str = "auto",
    prepare: Callable[[Sequence[Job], int], Iterable[Any]] = prepare_runs,
    progress: Callable[[int, int], None] | None = None,
) -> Embeddings:
    """Embed runs: NIfTI, CIFTI, GIFTI, tables of time series, and stores, by path or URL.

    Parameters
    ----------
    images
        Files or stores; URLs begin with s3://, gs://, hf:// or https://.
    checkpoint
        Folder of a pretrained model, or `owner/name` on the hub.
    atlas
        Parcellation of images, as for `brainflow prepare`; the model's.
    t_r
        Seconds between the time points of tables that have no JSON sidecar.
    confounds
        What is regressed out of images. `auto`: as for the model's data, or nothing where no table of
        confounds lies beside the image.
    window
        Longest window in seconds; a run is cut into equal ones of at most so much. By default the longest
        that the model was trained on.
    per
        One vector a window, or a run: the mean over its windows, weighted by their lengths.
    layer, pooling, bins
        How one vector is made of a window, see :class:`~brainflow.decoding.readout.Readout`; "last" are the
        states after the last block. By default the means over time of the embedding and of the last states,
        side by side.
    work
        Folder for prepared time series, which are not prepared again; by default none is kept.
    processes
        Worker processes that prepare images.
    allow_mismatch
        Go on where parcellation, network names, TR or normalisation are not those of the model's data.
    device
        auto, cpu or cuda.
    prepare
        Prepares runs in so many processes; jobs of a cluster, for example.
    progress
        Called with (work done, work in all): images prepared, files embedded. A notebook shows a bar without
        it.

    Raises
    ------
    ValueError
        If an argument cannot be used, or nothing could be embedded; the reasons are in the message.
    """
    names = [images] if isinstance(images, str | os.PathLike) else list(images)
    # A file that is named twice is embedded once.
    texts = list(dict.fromkeys(os.fspath(name) for name in names))
    if not texts:
        raise ValueError("images: got none, expected at least one file or store")
    model = _load(checkpoint, layer, pooling, bins, device)
    if window is not None and not 0 < window < math.inf:
        raise ValueError(f"window: got {window}, expected a positive number of seconds")
    failures: dict[str, str] = {}
    notes: list[str] = []
    told = or_notebook(progress, "embed")
    with tempfile.TemporaryDirectory(prefix="brainflow-") as temporary:
        # Absolute, since jobs of a cluster start elsewhere.
        folder = Path(temporary if work is None else work).absolute()
        jobs = plan(
            texts, checkpoint, atlas=atlas, confounds=confounds, work=folder, allow_mismatch=allow_mismatch,
            failures=failures, model=model,
        )  # fmt: skip
        todo = [job for job in jobs.values() if not job.is_done()]
        ready = PREPARING * len(todo)
        total = ready + FILE * len(texts)
        for done, _ in enumerate(prepare(todo, processes) if todo else (), 1):
            told(PREPARING * done, total)
        rows: list[dict[str, Any]] = []
        vectors: list[NDArray[np.float32]] = []
        for number, text in enumerate(texts):
            name, begun = text, ready + FILE * number
            try:
                runs = _runs(text, jobs.get(text), model, t_r, allow_mismatch, failures, notes)
                # Why it has no job stands there already.
                for run in runs if text not in failures else ():
                    name = f"{text}: {run.facts['key']}" if run.attributes is None else text
                    _check(run, model, allow_mismatch, notes)
                    facts, values = _embedded(run, model, window, per)
                    rows += facts
                    vectors.append(values)
                    told(begun + round(FILE * run.share), total)
            except (ValueError, OSError) as error:
                failures[name] = " ".join(str(error).split()) or type(error).__name__
            told(begun + FILE, total)
    if not rows:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(failures.items())[:5])
        raise ValueError(f"nothing could be embedded: {reasons or 'there are no runs'}")
    return Embeddings(
        rows=rows,
        vectors=np.concatenate(vectors),
        failures=failures,
        notes=list(dict.fromkeys(notes)),
        model={
            "model": os.fspath(checkpoint), "layer": layer, "pooling": pooling, "per": per,
            **({"bins": bins} if pooling == "bins" else {}),
        },
    )  # fmt: skip


def plan(
    images: Sequence[str],
    checkpoint: str | os.PathLike[str],
    *,
    atlas: str | None,
    confounds: Confounds,
    work: Path,
    allow_mismatch: bool,
    failures: dict[str, str],
    model: _Model | None = None,
) -> dict[str, Job]:
    """Return the jobs that prepare images; why one has none stands in `failures`."""
    model = model or _load(checkpoint, "last", "mean", BINS, "cpu")
    jobs: dict[str, Job] = {}
    specs: dict[str, AtlasSpec | Exception] = {}
    for image in images:
        if not is_remote(image) and not Path(image).exists():
            failures[image] = "no such file; check the path"
            continue
        # A .ptseries.nii is a table, though it ends like an image.
        kind = None if image.endswith(TABLES) else kind_of(image)
        try:
            if is_remote(image):
                split_url(image)  # what is behind a name would not be read
            if kind is None:
                continue
            if atlas is None:
                raise ValueError(
                    "atlas: images need the parcellation of the model, as in --atlas schaefer-400"
                )
            files = files_of(image)
            template = {"volume": files.space, "cifti": "fsLR", "gifti": ""}[kind]
            # Asked for once, also where it cannot be had, not for every image.
            if template not in specs:
                specs[template] = _checked_atlas(atlas, template, model, allow_mismatch)
            spec = specs[template]
            if isinstance(spec, Exception):
                raise spec
            chosen = _settings(model, confounds, bool(files.confounds), smooth=kind == "volume")
            [job] = jobs_for([files], kind=kind, settings=chosen, atlases=[spec], work=work)
            jobs[image] = job_of(image, files, job)
        except (ValueError, OSError) as error:
            # `prepare` calls the option otherwise.
            failures[image] = str(error).replace("--allow-space-mismatch", "--allow-mismatch")
    return jobs


def _checked_atlas(atlas: str, template: str, model: _Model, allow: bool) -> AtlasSpec | Exception:
    """Return the model's atlas in a template, or in another if that is allowed; or why it cannot be had."""
    try:
        try:
            spec = find_atlas(atlas, template)
            check_space(spec, template)
        except ValueError:
            if not allow:
                raise
            spec = find_atlas(atlas)
        networks = len(networks_of(spec))
        if networks != model.networks:
            raise ValueError(
                f"atlas {spec.label}: has {networks} networks, the model {model.folder} was trained on "
                f"{model.networks}; take its parcellation"
            )
    except (ValueError, OSError) as error:
        return error
    return spec


def _settings(model: _Model, confounds: Confounds, table: bool, *, smooth: bool) -> Settings:
    """Return how images are cleaned: as the model's data were, as far as that is recorded."""
    known = {one.name: model.recipe[one.name] for one in fields(CleanSettings) if one.name in model.recipe}
    try:
        clean = CleanSettings(**{**known, "normalise": model.normalise})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{model.folder}: preprocessing.clean of its config.json: {error}") from error
    strategy: Strategy = clean.confounds if confounds == "auto" else confounds
    if confounds == "auto" and not table:
        strategy = "none"
    fwhm = clean.smoothing_fwhm if smooth else None
    return Settings(clean=replace(clean, confounds=strategy, smoothing_fwhm=fwhm), rules=Rules(min_volumes=2))


def _load(checkpoint: Any, layer: LayerName, pooling: Pooling, bins: int, device: str) -> _Model:
    folder = fetch(checkpoint)
    if pooling == "tokens":
        raise ValueError("pooling: got 'tokens', expected one vector a window, as mean or bins")
    readout = Readout(pooling=pooling, bins=bins, layer=None if layer == "last" else layer)
    config, where = read_config(folder), resolve_device(device)
    module: Any = load_pretrained(folder)
    if readout.layer not in (*layers(module), *SIDES):
        raise ValueError(f"layer: got {layer}, but the model has {len(layers(module)) - 2} blocks between")
    return _Model(
        folder=folder,
        module=module.to(where).eval(),
        saved=config,
        readout=readout,
        device=where,
    )


def _runs(
    text: str,
    job: Job | None,
    model: _Model,
    t_r: float | None,
    allow: bool,
    failures: dict[str, str],
    notes: list[str],
) -> Iterator[_Run]:
    """Give the runs of a file or store."""
    if job is not None:
        yield _prepared(text, job, model, notes)
    elif text.endswith(TABLES):
        yield _of_table(text, model, t_r, notes)
    else:
        yield from _of_store(text, model, allow, failures)


def _prepared(text: str, job: Job, model: _Model, notes: list[str]) -> _Run:
    """Return what a worker made of an image."""
    record = read_record(job.work, job.files.key)
    if record is None or record["status"] != DONE:
        raise ValueError(str(record["reason"]) if record else "its record is missing; run the command again")
    spec = job.atlases[0]
    part = read_part(part_path(parts_of(job.work, spec.label), job.files.key))
    notes += [f"{text}: {note}" for note in record["notes"]]
    strategy = job.settings.clean.confounds
    if strategy == "none" and job.files.confounds is None and model.confounds != "none":
        notes.append(f"{text}: no table of confounds lies beside it, so nothing was regressed out")
    if job.kind == "volume" and spec.space and spec.space != job.files.space:
        template = job.files.space or "a template that its name does not say"
        notes.append(f"{text}: is in {template}, the atlas in {spec.space}")
    flat = record["flat_networks"].get(spec.label, 0)
    if flat:
        are = counted(flat, "network is", "networks are")
        notes.append(f"{text}: {are} constant (outside the recorded field of view)")
    entities = {name: str(part[name]) for name in ENTITIES}
    return _Run(
        bold=part["bold"],
        t_r=part["t_r"],
        facts={"path": text, "key": _stem(text), **entities, "confounds": strategy},
        begin=record["dropped"] * part["t_r"],
        attributes={
            "parcellation": spec.label,
            "network_names": networks_of(spec),
            "normalisation": APPLIED[model.normalise],
        },
    )


def _of_table(text: str, model: _Model, t_r: float | None, notes: list[str]) -> _Run:
    """Read a table of time series, already cleaned; it is normalised as the model's data were."""
    with tempfile.TemporaryDirectory(prefix="brainflow-") as temporary:
        path = _local(text, Path(temporary))
        names, seconds = _header(path), None
        if text.endswith(".ptseries.nii"):
            values, names, seconds = read_parcels(path)
        else:
            values = load_array(path)
        sidecar = path.with_name(f"{_stem(path.name)}.json")
        try:
            stated = repetition_time([sidecar] if sidecar.is_file() else [], seconds)
        except Unusable as error:
            if t_r is None:
                raise ValueError(f"{error}; give it with t_r (--t-r) in seconds") from error
        else:
            if t_r is not None and not math.isclose(t_r, stated.seconds, rel_tol=TOLERANCE):
                raise ValueError(
                    f"t_r: got {t_r:g} s, but its {stated.source} says {stated.seconds:g} s; correct one"
                )
            t_r = stated.seconds
    if not 0 < t_r < math.inf:
        raise ValueError(f"t_r: got {t_r}, expected a positive number of seconds")
    # A square table is taken as it is: nothing says which way it lies.
    if values.shape[1] != model.networks == values.shape[0]:
        values, names = values.T, []
        notes.append(f"{text}: was turned, its rows are networks")
    if values.shape[1] != model.networks:
        raise ValueError(f"has {values.shape[1]} networks, the model was trained on {model.networks}")
    bold = normalise(values, model.normalise)
    # Normalised, a constant network is 0 throughout.
    flat = int((~bold.any(axis=0)).sum()) if model.normalise != "none" else 0
    if flat:
        notes.append(f"{text}: {counted(flat, 'network is', 'networks are')} constant")
    # `parse_name` wants an ending.
    parsed = parse_name(Path(_stem(text) + ".x"))
    entities = parsed.entities if parsed else {}
    known = {"subject": "sub", "session": "ses", "task": "task", "run": "run"}
    facts = {name: entities.get(known.get(name, ""), "") for name in ENTITIES}
    return _Run(
        bold=bold,
        t_r=t_r,
        facts={"path": text, "key": _stem(text), **facts, "confounds": ""},
        attributes={"network_names": names, "normalisation": APPLIED[model.normalise]},
    )


def _local(text: str, folder: Path) -> Path:
    """Return where a file lies on this machine; its sidecar, if there is one, lies beside it."""
    if not is_remote(text):
        return Path(text)
    where, name = split_url(text)
    remote = RemoteFiles(where)
    fetch_file(remote, name, folder / name)
    sidecar = f"{_stem(name)}.json"
    if remote.exists(sidecar):
        remote.download(sidecar, folder / sidecar)
    return folder / name


def _header(path: Path) -> list[str]:
    """Return the names above the columns of a .csv or .tsv file, none if it has none."""
    if path.suffix not in (".csv", ".tsv"):
        return []
    regular_size(path)
    with open(path, encoding="utf-8-sig", newline="") as file:
        # Bounded: a file may have no end of line.
        first = next(csv.reader([file.readline(2**22)], delimiter="\t" if path.suffix == ".tsv" else ","), [])
    try:
        [float(cell) for cell in first]
    except ValueError:
        return first
    return []


def _of_store(text: str, model: _Model, allow: bool, failures: dict[str, str]) -> Iterator[_Run]:
    """Give the runs of a store that fits the model; one that is damaged is noted, and the others go on."""
    if not is_remote(text) and not Path(text).is_dir():
        raise ValueError(
            f"is of no kind that is read: an image ({', '.join(ENDINGS)}), a table "
            f"({', '.join(TABLES)}) or a store"
        )
    # Any of them, not the root's alone: what a damaged store lacks is said when it is opened.
    if not is_remote(text) and not any(Path(text).glob("**/zarr.json")):
        raise ValueError(
            f"is a folder, but no store; name the files in it, as in {text.rstrip('/')}/*_bold.nii.gz"
        )
    store = BoldStore.open(text)
    check_fits(model.folder, store, allow=allow)
    columns = {name: getattr(store.runs, name).tolist() for name in (*ENTITIES, "key", "t_r")}
    for number, key in enumerate(columns["key"]):
        try:
            bold = store.run(number)
        except StoreError as error:
            failures[f"{text}: {key}"] = str(error)
            continue
        facts = {name: columns[name][number] for name in ENTITIES}
        yield _Run(
            bold=bold,
            t_r=columns["t_r"][number],
            facts={"path": text, "key": key, **facts, "confounds": ""},
            share=(number + 1) / len(columns["key"]),
        )


def _stem(text: str) -> str:
    """Return the name of a file without what says its format."""
    name = text.rpartition("/")[2]
    endings = (".dtseries.nii", ".ptseries.nii", ".func.gii", ".nii.gz")
    return next((name.removesuffix(end) for end in endings if name.endswith(end)), name.rpartition(".")[0])


def _check(run: _Run, model: _Model, allow: bool, notes: list[str]) -> None:
    """Refuse a run that is not like what the model was trained on."""
    if run.attributes is None:
        return
    found = differences(model.data, run.attributes, [run.t_r])
    # Statistics of fewer time points are chance.
    if len(run.bold) >= 20:
        found += signal_differences(model.data, run.bold)
    if found and not allow:
        raise ValueError(
            f"does not fit the model: {'; '.join(found)}. Prepare it as the model's data were, or allow the "
            "mismatch (--allow-mismatch) if you know why this does not matter"
        )
    notes += [f"{run.facts['path']}: {line}" for line in found]


def _embedded(
    run: _Run, model: _Model, window: float | None, per: str
) -> tuple[list[dict[str, Any]], NDArray[np.float32]]:
    """Return rows and vectors of a run, one a window or one in all."""
    config = model.module.config
    longest = longest_window(model.saved, config, run.t_r)
    if window is not None:
        asked = round(window / run.t_r)
        limit = config.max_positions - framework_spec(config.framework).special_tokens
        if asked < 1 or (config.positions == "learned" and asked > limit):
            raise ValueError(
                f"window: {window:g} s are {asked} time points at a TR of {run.t_r:g} s, expected 1 to "
                f"{limit}"
            )
        longest = asked
    parts = math.ceil(len(run.bold) / longest)
    # Nearly equal parts: full ones would leave a rest, perhaps of a single time point.
    bounds = np.linspace(0, len(run.bold), parts + 1).round().astype(int)
    pieces = [run.bold[start:stop] for start, stop in itertools.pairwise(bounds)]
    source = ArrayWindows(pieces, t_r=run.t_r)
    [vectors] = frozen_features(model.module, source, [model.readout], device=model.device)
    if not np.isfinite(vectors).all():
        raise ValueError("the model gives values that are not finite")
    if per == "run":
        bounds = bounds[[0, -1]]
        vectors = np.average(vectors, axis=0, weights=source.lengths)[None].astype(np.float32)
    rows = [
        {
            **run.facts,
            "onset": run.begin + float(start * run.t_r),
            "duration": float((stop - start) * run.t_r),
            "t_r": run.t_r,
        }
        for start, stop in itertools.pairwise(bounds.tolist())
    ]
    return rows, vectors
