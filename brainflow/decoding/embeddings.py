"""The table of embeddings: a row a window or run, in memory and on disk."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainflow.optional import need
from brainflow.storage.files import replacing
from brainflow.storage.text import csv_cell

ENTITIES = ("dataset", "subject", "session", "task", "run")
FACTS = ("path", "key", *ENTITIES, "onset", "duration", "t_r", "confounds")
OUTPUTS = (".parquet", ".csv", ".tsv", ".npz")


@dataclass(frozen=True, kw_only=True, eq=False)
class Embeddings:
    """One vector a window, or a run.

    Attributes
    ----------
    rows
        For each vector: path or URL, key of the run, its entities, onset and duration in seconds, repetition
        time in seconds, and what was regressed out here ("" for tables and stores, which come cleaned).
    vectors
        float32 `[rows, width]`.
    failures
        File (or file and run) → why nothing of it is here.
    notes
        What a reader of the rows should know.
    model
        Name of the model, and how its states were read: JSON values.
    """

    rows: list[dict[str, Any]]
    vectors: NDArray[np.float32]
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)

    def columns(self) -> dict[str, NDArray]:
        """Return the table by columns: facts, then the vectors as `e0000`, `e0001` and so on."""
        facts = {name: np.array([row[name] for row in self.rows]) for name in FACTS}
        return facts | {f"e{i:04d}": self.vectors[:, i] for i in range(self.vectors.shape[1])}

    def to_frame(self) -> Any:
        """Return the table as a pandas DataFrame."""
        return need("pandas", "a DataFrame", "bids").DataFrame(self.columns())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as its suffix says: .parquet, .csv, .tsv, or .npz with the columns as arrays."""
        target = Path(path)
        check_output(target)
        columns = self.columns()
        with replacing(target) as file:
            if target.suffix == ".parquet":
                pyarrow = need("pyarrow", "writing Parquet", "arrays")
                table = pyarrow.table(columns, metadata={"brainflow": json.dumps(self.model)})
                need("pyarrow.parquet", "writing Parquet", "arrays").write_table(table, file)
            elif target.suffix == ".npz":
                arrays: dict[str, Any] = {name: columns[name] for name in FACTS}
                np.savez(file, embeddings=self.vectors, model=np.array(json.dumps(self.model)), **arrays)
            else:
                # Nothing may wait in the wrapper, which is detached below.
                text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
                writer = csv.writer(text, delimiter="\t" if target.suffix == ".tsv" else ",")
                writer.writerow(columns)
                for row in zip(*(values.tolist() for values in columns.values()), strict=True):
                    writer.writerow(csv_cell(one) if isinstance(one, str) else one for one in row)
                # The wrapper must not close the file, which is still to be flushed and renamed.
                text.detach()


def check_output(path: Path) -> None:
    """Refuse a file that :meth:`Embeddings.save` cannot write.

    Raises
    ------
    ValueError
        If it ends otherwise, or is a folder.
    ImportError
        If it takes a package that is not installed.
    """
    if path.suffix not in OUTPUTS:
        raise ValueError(f"out: got {path}, expected a file that ends in {', '.join(OUTPUTS)}")
    if path.suffix == ".parquet":
        need("pyarrow", "writing Parquet", "arrays")
    if path.is_dir():
        raise ValueError(f"out: {path} is a folder, expected a file")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"out: {path.absolute().parent} is no folder; make it first")
