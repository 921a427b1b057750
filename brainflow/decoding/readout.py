"""From the hidden states of a window to one vector: which layer is read, and what becomes of time.

States that carry a pattern in time lose it by averaging: `bins` cuts a window of any length into equal parts
and lays the means of the parts side by side. States that are regimes, which differ in variance, are kept by
`moments` and `spread`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from brainflow.batch import offsets, upload, window_of
from brainflow.frameworks.base import pool

if TYPE_CHECKING:
    from brainflow.batch import PackedBatch
    from brainflow.config import ModelConfig

Pooling = Literal["bins", "moments", "spread", "cls", "last", "mean", "first", "tokens"]
Layer = int | Literal["input", "both", "all"] | None
BINS = 10
MOST_BINS = 4_096
EMBEDDING = 0
Side = int | Literal["input"] | None
INPUT: Literal["input"] = "input"
BOTH: Literal["both"] = "both"
ALL: Literal["all"] = "all"
SIDES: dict[str, list[Side]] = {INPUT: [INPUT], BOTH: [EMBEDDING, None], ALL: [INPUT, EMBEDDING, None]}
SMALLEST_VARIANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Readout:
    """How one vector is made of a window's hidden states.

    Parameters
    ----------
    pooling
        `bins`: means of equal parts of the window, concatenated. `moments`: mean and log of the standard
        deviation over time. `spread`: that log alone. `mean`, `last`, `first` of the states. `cls`: the state
        of the appended CLS token. `tokens`: all of them, for a head that pools itself.
    bins
        Parts of `bins`.
    layer
        0: the embedded time points, without positions; 1, 2, …: after so many blocks; None: the last states,
        after the final norm; `input`: the BOLD itself. All but the last are normalised over their width at
        each time point, as the next block would read them (of BOLD that removes mean and SD over networks,
        but not for `spread`, which reads how much it varies). `both`: what 0 and None give, side by side;
        `all`: those and the input. `cls` is read from the last.

    Raises
    ------
    ValueError
        If there is no such pooling, or a number is out of range.
    """

    pooling: Pooling = "bins"
    bins: int = BINS
    layer: Layer = None

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling: got {self.pooling!r}, expected one of {', '.join(get_args(Pooling))}")
        if type(self.bins) is not int or not 1 <= self.bins <= MOST_BINS:
            raise ValueError(f"bins: got {self.bins!r}, expected a whole number from 1 to {MOST_BINS}")
        if self.layer not in (None, *SIDES) and (type(self.layer) is not int or self.layer < 0):
            raise ValueError(
                f"layer: got {self.layer!r}, expected 0 (the embedding), 1, 2, … or {', '.join(SIDES)}"
            )

    @property
    def name(self) -> str:
        """What is read, in words."""
        words: dict[Side, str] = {None: "last states", EMBEDDING: "embedding", INPUT: "BOLD"}
        of = " + ".join(words.get(side, f"states after block {side}") for side in _sides(self))
        return f"{self.pooling} of {of or 'the last block'}"

    @property
    def of_variance(self) -> bool:
        """Whether it is how much the BOLD varies, whatever `bins`: that reads no weight of a module."""
        return self.pooling == "spread" and self.layer == INPUT

    @property
    def times(self) -> int:
        """Parts of a window's time that the vector holds one after the other."""
        return self.bins if self.pooling == "bins" else 1

    def width(self, model: ModelConfig) -> int:
        """Return the length of the vector that is made of a model's states."""
        if self.pooling == "cls":
            return model.width
        each = sum(model.networks if side == INPUT else model.width for side in _sides(self))
        return each * {"bins": self.bins, "moments": 2}.get(self.pooling, 1)

    def __call__(self, module: Any, batch: PackedBatch) -> Tensor:
        """Return `[windows, self.width(module.config)]`; for `tokens` `[tokens, …]`."""
        return read(module, batch, [self])[0]


def read_line(read: Mapping[str, int]) -> str:
    """Return in words what the fits of a decoding read, from name → how many of them."""
    if len(read) == 1:
        return f"read: {next(iter(read))}"
    shown = ", ".join(f"{name} ({count})" for name, count in read.items())
    return f"read, as people left out of the training chose, by so many of {sum(read.values())} fits: {shown}"


SPREAD = Readout(pooling="spread", layer=INPUT)
"""The log-variance of the BOLD, which tells regimes apart."""


def layers(module: Any) -> list[int | None]:
    """Return what may be read of a module: the embedding, the states between blocks, the last ones."""
    blocks = getattr(getattr(module, "transformer", None), "blocks", ())
    # After the last block there is the final norm: that is None.
    return [EMBEDDING, *range(1, len(blocks)), None]


def read(module: Any, batch: PackedBatch, readouts: Sequence[Readout]) -> list[Tensor]:
    """Return the vectors of several readouts, `[windows, …]` each, from one pass through the module.

    Parameters
    ----------
    module
        Framework module.
    batch
        Windows.
    readouts
        How one vector is made of a window.

    Raises
    ------
    ValueError
        If the module has no such layer.
    """
    states = _states(module, batch, {layer for one in readouts for layer in _sides(one)})

    def vector(readout: Readout) -> Tensor:
        if readout.pooling == "cls":
            # By itself: the token is appended to each window.
            return module.features(batch, "cls")
        if readout.of_variance:  # of BOLD as it is: normalised over networks it loses what all vary by
            return _pooled(batch.bold.float(), batch.lengths, readout)
        sides = [states[layer] for layer in _sides(readout)]
        return _pooled(sides[0] if len(sides) == 1 else torch.cat(sides, dim=1), batch.lengths, readout)

    return [vector(readout) for readout in readouts]


def _sides(readout: Readout) -> list[Side]:
    """Return the layers whose vectors are laid side by side."""
    if readout.pooling == "cls":
        return []
    return SIDES[readout.layer] if isinstance(readout.layer, str) else [readout.layer]


def _states(module: Any, batch: PackedBatch, wanted: set[Side]) -> dict[Side, Tensor]:
    """Return the states `[tokens, width]` of some layers."""
    unknown = wanted.difference([INPUT, *layers(module)])
    if unknown:
        raise ValueError(
            f"layer: got {next(iter(unknown))}, expected 0 (the embedding) to "
            f"{len(layers(module)) - 2}, {', '.join(SIDES)}, or none for the last states of this model"
        )
    between = sorted(layer for layer in wanted if isinstance(layer, int) and layer)
    found: dict[Side, Tensor] = {}
    if INPUT in wanted:
        found[INPUT] = batch.bold.float()
    if EMBEDDING in wanted:
        found[EMBEDDING] = module.embedding(batch.bold)
    if between or None in wanted:
        with _watched(module, between, found):
            last = module.features(batch, "tokens")
    found = {layer: F.layer_norm(state, state.shape[1:]) for layer, state in found.items()}
    if None in wanted:
        found[None] = last
    return found


@contextmanager
def _watched(module: Any, between: Sequence[int], seen: dict[Side, Tensor]) -> Iterator[None]:
    """Put into `seen` what blocks give while the module runs, a row a time point of the batch."""
    rows: list[Tensor | None] = [None]

    def before(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        # BERT's sequences hold special tokens, too; the rows that it wants of them are the time points
        rows[0] = kwargs.get("rows")

    def keep(layer: int) -> Any:
        def after(_: Any, args: Any, output: Tensor) -> None:
            seen[layer] = output if rows[0] is None else output.index_select(0, rows[0])

        return after

    hooks = []
    if between:
        hooks.append(module.transformer.register_forward_pre_hook(before, with_kwargs=True))
        hooks += [module.transformer.blocks[i - 1].register_forward_hook(keep(i)) for i in between]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _pooled(hidden: Tensor, lengths: np.ndarray, readout: Readout) -> Tensor:
    if readout.pooling == "bins":
        return time_bins(hidden, lengths, readout.bins)
    if readout.pooling in ("moments", "spread"):
        both = moments(hidden, lengths)
        return both if readout.pooling == "moments" else both[:, hidden.shape[1] :]
    how: Any = readout.pooling
    return pool(hidden, lengths, how)


def time_bins(hidden: Tensor, lengths: np.ndarray, bins: int) -> Tensor:
    """Return the means of equal time bins of each window, laid side by side.

    A window of L time points is a step function on [0, L); bin b is [b L / bins, (b + 1) L / bins). A time
    point that lies in two bins counts in each by its share, so the mean over bins is the mean over time,
    also where there are fewer time points than bins.

    Parameters
    ----------
    hidden
        `[tokens, width]`, windows end to end.
    lengths
        Host int `[windows]`, time points of each window, all at least 1.
    bins
        Number of bins.

    Returns
    -------
    Tensor
        `[windows, bins · width]`, bin by bin.

    Examples
    --------
    >>> time_bins(torch.tensor([[1.0], [2.0], [6.0]]), np.array([3]), 2).tolist()
    [[1.3333333730697632, 4.666666507720947]]
    """
    token, place, share = _overlaps(np.asarray(lengths, dtype=np.int64), bins)
    sent = upload(hidden.device, token=token, place=place, share=share)
    pieces = hidden.index_select(0, sent["token"]) * sent["share"].to(hidden.dtype)[:, None]
    summed = hidden.new_zeros(len(lengths) * bins, hidden.shape[1]).index_add(0, sent["place"], pieces)
    return summed.view(len(lengths), bins * hidden.shape[1])


def _overlaps(lengths: NDArray[np.int64], bins: int) -> tuple[NDArray, NDArray, NDArray[np.float64]]:
    """Return which token lies in which bin (counted over all windows), and its share of that bin.

    In units of 1 / bins of a time point everything is a whole number: token t covers [t bins, (t + 1) bins),
    bin b covers [b L, (b + 1) L).
    """
    starts = offsets(lengths)[:-1]
    token, place, share = [], [], []
    for length in np.unique(lengths):
        windows = np.flatnonzero(lengths == length)
        whole = int(length) * bins
        cuts = np.union1d(np.arange(0, whole, bins), np.arange(0, whole, length))
        token.append((starts[windows][:, None] + cuts // bins).ravel())
        place.append((windows[:, None] * bins + cuts // length).ravel())
        share.append(np.tile(np.diff(np.append(cuts, whole)) / length, len(windows)))
    return np.concatenate(token), np.concatenate(place), np.concatenate(share)


def moments(hidden: Tensor, lengths: np.ndarray) -> Tensor:
    """Return mean and log standard deviation over the time of each window, `[windows, 2 · width]`.

    Parameters
    ----------
    hidden
        `[tokens, width]`, windows end to end.
    lengths
        Host int `[windows]`. The variance of one time point is 0; its log is that of a small constant.
    """
    mean = pool(hidden, lengths, "mean")
    window = upload(hidden.device, window=window_of(lengths))["window"]
    # In two passes: mean square less squared mean would cancel in float32.
    variance = pool((hidden - mean.index_select(0, window)).square(), lengths, "mean")
    return torch.cat((mean, (variance + SMALLEST_VARIANCE).log() / 2), dim=1)
