"""Values of networks on the brain: back-projected by a nilearn masker, drawn by nilearn."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainflow.optional import requires
from brainflow.report.page import Picture, Section, View

with requires("brain maps", "report"):
    import matplotlib
    import matplotlib.figure
    from nilearn import plotting, surface
    from nilearn.datasets import load_fsaverage
    from nilearn.image import index_img, resample_img

FINEST = 4.0
"""Smallest voxel of an interactive view in millimetres: finer maps are resampled, or a page gets huge."""
COLOURS, GREYS = "RdBu_r", "gray"
PLACE = (
    "Maps are drawn at the coordinates that the image of the networks has; the outlines of glass brain and "
    "surface fit where these are MNI coordinates."
)


def make_masker(*, mask: str | None = None, labels: str | None = None, maps: str | None = None) -> Any:
    """Return a fitted nilearn masker of one image: a mask (a voxel a network), labels, or maps.

    Parameters
    ----------
    mask
        Image whose voxels that are not 0 are a network each.
    labels
        Image of labels.
    maps
        4-D image of maps.

    Raises
    ------
    ValueError
        If not exactly one image is given, or it cannot be read.
    """
    from nibabel.filebasedimages import ImageFileError
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
    try:
        return masker.fit()
    except ImageFileError as error:
        raise ValueError(f"{named[0]}: got {given[named[0]]}, expected a NIfTI image ({error})") from error


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


def glass_brain(image: Any, *, title: str, cmap: str = COLOURS) -> bytes:
    """Draw a map as projections through a glass brain."""
    return _draw(
        # plot_abs, which nilearn has on, would draw negative values as positive ones.
        lambda: plotting.plot_glass_brain(image, colorbar=True, plot_abs=False, title=title, cmap=cmap)
    )


def on_surface(image: Any, *, title: str, cmap: str = COLOURS) -> bytes:
    """Draw a map on the left and right cortical surface (fsaverage5, which nilearn brings along)."""

    def draw() -> Any:
        average = load_fsaverage()
        mapped = surface.SurfaceImage.from_volume(average["pial"], image)
        # A map of zeros has no range to draw.
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
                cmap=cmap,
                colorbar=side == "right",
                title=f"{title}, {side}",
            )
        return figure

    return _draw(draw)


def interactive(image: Any, *, title: str = "", cmap: str = COLOURS) -> str:
    """Return an interactive view of a map as a whole HTML page, with everything inside."""
    size = np.abs(np.linalg.norm(image.affine[:3, :3], axis=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if size.min() < FINEST:
            # Not interpolated: a value belongs to a whole parcel.
            image = resample_img(
                image, target_affine=np.diag(np.maximum(size, FINEST)), interpolation="nearest"
            )
        view = plotting.view_img(
            image,
            bg_img=False,
            threshold=None,
            resampling_interpolation="nearest",
            title=title or None,
            cmap=cmap,
        )
    page = re.sub(r"<link[^>]*icon[^>]*>", "", view.get_standalone())  # the only thing that it would fetch
    # it reads its canvases back, of which Chromium complains unless they are made for that
    return page.replace('getContext("2d")', 'getContext("2d", {willReadFrequently: true})')


def brain_section(
    title: str,
    names: Sequence[str],
    values: NDArray,
    masker: Any,
    *,
    prefix: str,
    errors: NDArray | None = None,
    notes: Sequence[str] = (),
    grey: bool = False,
) -> Section:
    """Return maps on the brain: of each a glass brain, the surface, an interactive view, and NIfTI images.

    Parameters
    ----------
    title, notes
        Of the section.
    names
        What each map shows.
    values, errors
        `[maps, networks]`; errors are saved as images of their own. Maps with NaN are left out.
    masker
        Fitted nilearn masker.
    prefix
        First part of the names of files.
    grey
        Draw without colour what is not to be believed.
    """
    cmap = GREYS if grey else COLOURS
    pictures, views, volumes = [], [], {}
    for number, (name, row) in enumerate(zip(names, values, strict=True)):
        if not np.isfinite(row).all():
            continue
        file = f"{prefix}_{number:02d}_{re.sub(r'[^A-Za-z0-9-]+', '-', name)[:40]}"
        image = volumes[f"{file}.nii.gz"] = to_image(row, masker)
        if errors is not None and np.isfinite(errors[number]).all():
            volumes[f"{file}_error.nii.gz"] = to_image(errors[number], masker)
        for kind, draw in (("glass", glass_brain), ("surface", on_surface)):
            looks = {"glass": "Glass brain", "surface": "Cortical surface"}[kind]
            pictures.append(
                Picture(
                    name=f"{file}_{kind}",
                    png=draw(image, title=name, cmap=cmap),
                    alt=f"{looks}: {name}",
                    caption=name,
                )
            )
        views.append(
            View(title=f"{name}: click to move through the volume", html=interactive(image, cmap=cmap))
        )
    saved = f"Back-projected by the masker's inverse_transform, saved beside the page as {prefix}_….nii.gz."
    notes = [*notes, saved, PLACE]
    return Section(title=title, notes=notes, pictures=pictures, views=views, volumes=volumes)


def _first(image: Any) -> Any:
    return index_img(image, 0) if image.ndim == 4 else image


def _draw(make: Any) -> bytes:
    """Return the PNG of what nilearn draws, and leave no figure open."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # nilearn draws through pyplot, by which a window might open.
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            display = make()
            if hasattr(display, "savefig") and not isinstance(display, matplotlib.figure.Figure):
                display.frame_axes.figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
                # pyplot keeps figures until they are closed.
                display.close()
            else:
                FigureCanvasAgg(display)
                display.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    finally:
        matplotlib.use(backend)
    return buffer.getvalue()
