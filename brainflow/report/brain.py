"""Values of networks on the brain: back-projected by a nilearn masker, drawn by nilearn."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainflow.decoding.extra import requires_report
from brainflow.report.page import Picture

with requires_report("brain maps"):
    import matplotlib
    import matplotlib.figure
    from nilearn import plotting, surface
    from nilearn.datasets import load_fsaverage


def make_masker(*, mask: str | None = None, labels: str | None = None, maps: str | None = None) -> Any:
    """Return a fitted nilearn masker of one image: a mask (a voxel a network), labels, or maps.

    Raises
    ------
    ValueError
        If not exactly one image is given.
    """
    from nilearn.maskers import NiftiLabelsMasker, NiftiMapsMasker, NiftiMasker

    given = {"mask": mask, "labels": labels, "maps": maps}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(
            f"mask, labels, maps: got {', '.join(named) or 'none'}, expected exactly one of these images"
        )
    if mask is not None:
        masker = NiftiMasker(mask_img=mask, standardize=None)
    elif labels is not None:
        masker = NiftiLabelsMasker(labels_img=labels, standardize=None)
    else:
        masker = NiftiMapsMasker(maps_img=maps, standardize=None)
    return masker.fit()


def to_image(values: NDArray, masker: Any) -> Any:
    """Return values of networks, `[networks]` or `[maps, networks]`, as a NIfTI image.

    Raises
    ------
    ValueError
        If the masker has another number of networks.
    """
    rows = np.atleast_2d(np.asarray(values, dtype=np.float32))
    networks = getattr(masker, "n_elements_", rows.shape[1])
    if networks != rows.shape[1]:
        raise ValueError(
            f"masker: has {networks} networks, but there are values of {rows.shape[1]}; use the parcellation "
            "that the data were extracted with"
        )
    image = masker.inverse_transform(rows)
    return image if np.ndim(values) == 2 else _first(image)


def glass_brain(image: Any, *, title: str) -> bytes:
    """Draw a map as projections through a glass brain."""
    return _draw(lambda: plotting.plot_glass_brain(image, colorbar=True, plot_abs=False, title=title))


def on_surface(image: Any, *, title: str) -> bytes:
    """Draw a map on the left and right cortical surface (fsaverage5, which nilearn brings along)."""

    def draw() -> Any:
        average = load_fsaverage()
        mapped = surface.SurfaceImage.from_volume(average["pial"], image)
        top = float(max(np.nanmax(np.abs(part)) for part in mapped.data.parts.values())) or 1.0
        figure = matplotlib.figure.Figure(figsize=(8, 3.4), layout="constrained")
        axes = figure.subplots(1, 2, subplot_kw={"projection": "3d"})
        for side, one in zip(("left", "right"), axes, strict=True):
            plotting.plot_surf_stat_map(
                surf_mesh=average["inflated"],
                stat_map=mapped,
                hemi=side,
                axes=one,
                figure=figure,
                vmax=top,
                colorbar=side == "right",
                title=f"{title}, {side}",
            )
        return figure

    return _draw(draw)


def interactive(image: Any) -> str:
    """Return an interactive view of a map as a whole HTML page, with everything inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        view = plotting.view_img(image, bg_img=False, threshold=None, resampling_interpolation="nearest")
    return str(view.get_standalone())


def brain_pictures(name: str, title: str, values: NDArray, masker: Any) -> list[Picture]:
    """Return a glass brain of a map as a picture of a report."""
    image = to_image(values, masker)
    return [
        Picture(
            name=f"brain_{name}",
            png=glass_brain(image, title=title),
            alt=f"Glass brain: {title}",
            caption=f"{title}, back-projected from networks.",
        )
    ]


def _first(image: Any) -> Any:
    from nilearn.image import index_img

    return index_img(image, 0) if image.ndim == 4 else image


def _draw(make: Any) -> bytes:
    """Return the PNG of what nilearn draws, and leave no figure open."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            display = make()
            if hasattr(display, "savefig") and not isinstance(display, matplotlib.figure.Figure):
                display.frame_axes.figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
                display.close()
            else:
                FigureCanvasAgg(display)
                display.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    finally:
        matplotlib.use(backend)
    return buffer.getvalue()
