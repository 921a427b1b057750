"""Parcellations by name: DiFuMo and Schaefer, in the template of the images by TemplateFlow, or nilearn's.

nilearn has both in MNI152NLin6Asym only. fMRIPrep's images are in MNI152NLin2009cAsym, which TemplateFlow has
as well. Files are taken from TemplateFlow's folder; its client, if installed, downloads what is missing.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from brainflow.optional import need

Family = Literal["difumo", "schaefer"]
NILEARN_TEMPLATE = "MNI152NLin6Asym"
SIZES = {"difumo": (64, 128, 256, 512, 1024), "schaefer": tuple(range(100, 1001, 100))}
_TITLES = {"difumo": "DiFuMo", "schaefer": "Schaefer"}
_TEMPLATEFLOW = {
    "difumo": ("DiFuMo", "{}dimensions", "probseg"),
    "schaefer": ("Schaefer2018", "{}Parcels7Networks", "dseg"),
}


def label_of(family: Family, size: int) -> str:
    """Label of an atlas in file names, such as Schaefer400."""
    return f"{_TITLES[family]}{size}"


def find_named(family: Family, size: int, template: str) -> tuple[Path, str, Mapping[int, str] | None]:
    """Find an atlas in a template; 2 mm, Schaefer's with 7 networks.

    Parameters
    ----------
    template : of the images; "" for nilearn's copy, whatever template that is in

    Returns
    -------
    tuple : its image; the template that it is in; its names, or None if they lie beside it

    Raises
    ------
    ValueError : if there is no such size, or no copy in this template
    ConnectionError : if it cannot be downloaded
    """
    if size not in SIZES[family]:
        sizes = ", ".join(map(str, SIZES[family]))
        raise ValueError(f"atlas {family}-{size}: has no such size, expected one of {sizes}")
    if template in ("", NILEARN_TEMPLATE):
        return _from_nilearn(family, size)
    path = _from_templateflow(family, size, template)
    if path is None:
        raise ValueError(
            f"atlas {family}-{size}: nilearn has it in {NILEARN_TEMPLATE}, the images are in {template}, and "
            f"it is not in TemplateFlow's folder ({templateflow_home()}): the extra `bids` fetches it from "
            "TemplateFlow if that has it, TEMPLATEFLOW_HOME names another folder, --allow-space-mismatch "
            "takes nilearn's, as the published models did; for surfaces, give a file by path"
        )
    return path, template, None


def templateflow_home() -> Path:
    """Folder in which TemplateFlow's client keeps its files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("TEMPLATEFLOW_HOME", cache / "templateflow"))


def _from_templateflow(family: Family, size: int, template: str) -> Path | None:
    atlas, description, suffix = _TEMPLATEFLOW[family]
    description = description.format(size)
    name = f"tpl-{template}_res-02_atlas-{atlas}_desc-{description}_{suffix}.nii.gz"
    path = templateflow_home() / f"tpl-{template}" / name
    if not _is_fetched(path) and importlib.util.find_spec("templateflow") is not None:
        client = need("templateflow.api", "fetching an atlas", "bids")
        wanted = {"atlas": atlas, "desc": description, "suffix": suffix}
        try:
            client.get(template, resolution=2, extension=".nii.gz", **wanted)
            client.get(template, extension=".tsv", **wanted)
        except Exception as error:  # requests and the client raise many kinds when there is no network
            raise _not_downloaded(family, size, "TemplateFlow", "TEMPLATEFLOW_HOME", error) from error
    return path if _is_fetched(path) else None


def _is_fetched(path: Path) -> bool:
    """TemplateFlow puts empty files where it has not downloaded anything yet."""
    return path.is_file() and path.stat().st_size > 0


def _from_nilearn(family: Family, size: int) -> tuple[Path, str, Mapping[int, str]]:
    datasets = need("nilearn.datasets", "fetching an atlas", "bids")
    try:
        bunch: Any
        if family == "difumo":
            bunch = datasets.fetch_atlas_difumo(dimension=size, resolution_mm=2)
            names = [str(name) for name in bunch.labels["difumo_names"]]
        else:
            bunch = datasets.fetch_atlas_schaefer_2018(n_rois=size, resolution_mm=2)
            texts = [name.decode() if isinstance(name, bytes) else str(name) for name in bunch.labels]
            names = [text for text in texts if text.lower() != "background"]
    except Exception as error:  # nilearn, requests and urllib raise many kinds when there is no network
        raise _not_downloaded(family, size, "nilearn", "NILEARN_DATA", error) from error
    return Path(str(bunch.maps)), str(bunch.get("template", "")), dict(enumerate(names, 1))


def _not_downloaded(family: Family, size: int, who: str, variable: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"atlas {family}-{size}: {who} could not download it ({type(error).__name__}); fetch it where there "
        f"is internet and set {variable} to its folder, or give the path of its image"
    )
