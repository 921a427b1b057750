"""The page of embeddings: a picture of them in two dimensions, the runs, and what could not be used."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from brainflow.decoding.embeddings import Embeddings
from brainflow.optional import need
from brainflow.report.figures import scatter
from brainflow.report.page import Page, Picture, Section, Table, write_page
from brainflow.storage.text import counted

MOST_ROWS = 500
"""Runs of the table on the page; the file has them all."""
FEWEST = 4
"""Rows that a picture takes."""


def write_embedding_page(embeddings: Embeddings, folder: Path) -> Path:
    """Write `index.html` and the picture into a folder; return the page's path."""
    rows = embeddings.rows
    runs: dict[tuple[str, str], list[dict[str, object]]] = {}
    for row in rows:
        runs.setdefault((row["path"], row["key"]), []).append(row)
    subjects = {(row["dataset"], row["subject"]) for row in rows} - {("", "")}
    minutes = sum(row["duration"] for row in rows) / 60
    header = ["run", "subject", "session", "task", "TR (s)", "seconds", "rows", "regressed out"]
    names = ("key", "subject", "session", "task")
    table = [
        [
            *(str(own[0][name]) or "–" for name in names),
            f"{own[0]['t_r']:g}",
            f"{sum(float(str(one['duration'])) for one in own):.0f}",
            str(len(own)),
            str(own[0]["confounds"]) or "–",
        ]
        for own in list(runs.values())[:MOST_ROWS]
    ]
    more = len(runs) - len(table)
    failures = [[name, reason] for name, reason in embeddings.failures.items()]
    sections = [
        _picture(embeddings),
        Section(
            title="Runs",
            table=Table(header=header, rows=table, prose=(0,)),
            notes=[f"And {more} more."] if more else [],
        ),
    ]
    if failures:
        left_out = Table(header=["file", "reason"], rows=failures, prose=(0, 1))
        sections.insert(0, Section(title="Could not be used", table=left_out))
    if embeddings.notes:
        sections.append(Section(title="Notes", notes=embeddings.notes[:MOST_ROWS]))
    model = embeddings.model
    page = Page(
        title="brainflow embed",
        lead=f"{counted(len(rows), 'vector')} of {counted(len(runs), 'run')}, by the model "
        f"{model.get('model', '')}.",
        facts=[
            (str(len(runs)), "runs"),
            (str(len(subjects)) if subjects else "–", "people"),
            (f"{minutes:.0f} min", "of BOLD"),
            (str(embeddings.vectors.shape[1]), "numbers a row"),
            (str(len(failures)), "files that could not be used"),
        ],
        sections=sections,
        footer=[
            f"One row a {model.get('per')}: layer {model.get('layer')}, over time {model.get('pooling')}.",
            "Made by brainflow embed; the page holds everything itself and fetches nothing.",
        ],
    )
    return write_page(page, folder)


def _picture(embeddings: Embeddings) -> Section:
    if len(embeddings.rows) < FEWEST:
        return Section(
            title="Picture", text=[f"{counted(len(embeddings.rows), 'row is', 'rows are')} too few for one."]
        )
    points, how, names, told = in_plane(embeddings.vectors)
    column = next(
        (
            name
            for name in ("subject", "task", "session", "key")
            if len({r[name] for r in embeddings.rows}) > 1
        ),
        "key",
    )
    picture = Picture(
        name="embeddings",
        png=scatter(points, [str(row[column]) for row in embeddings.rows], names),
        alt=f"Embeddings in two dimensions by {how}, coloured by {column}",
        caption=f"{how} of {counted(len(points), 'row')}, coloured by {column}. {told}",
    )
    return Section(title="Picture", pictures=[picture])


def in_plane(vectors: NDArray) -> tuple[NDArray, str, tuple[str, str], str]:
    """Return places of vectors `[rows, width]` in two dimensions, by what, names of the axes, and a sentence.

    UMAP (McInnes et al. 2018) if the package `umap-learn` is installed and there are enough rows, else the
    first two principal components.
    """
    # UMAP looks at 15 neighbours of each row.
    if importlib.util.find_spec("umap") is not None and len(vectors) > 15:
        umap = need("umap", "UMAP", "report")
        if hasattr(umap, "UMAP"):  # another package has the same import name
            # With a seed UMAP has one job anyhow, and warns unless it is told so.
            points = umap.UMAP(random_state=0, n_jobs=1).fit_transform(vectors)
            return np.asarray(points), "UMAP", ("UMAP 1", "UMAP 2"), "Distances between groups mean little."
    points, share = principal_components(vectors)
    names = (f"component 1 ({share[0]:.0%} of variance)", f"component 2 ({share[1]:.0%})")
    told = "Principal components, since the package umap-learn is not installed or rows are few."
    return points, "PCA", names, told


def principal_components(vectors: NDArray) -> tuple[NDArray, NDArray]:
    """Return the first two principal components, float64 `[rows, 2]`, and their shares of variance."""
    values = np.asarray(vectors, np.float64)
    centred = values - values.mean(axis=0)
    left, spread, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(values), 2))
    count = min(2, len(spread))
    points[:, :count] = left[:, :count] * spread[:count]
    share = np.zeros(2)
    # Equal rows have no variance to divide by.
    share[:count] = np.square(spread[:count]) / max(float(np.square(spread).sum()), 1e-30)
    return points, share
