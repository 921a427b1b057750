"""scikit-learn estimators: decode states or read numbers with `fit` and `predict`, or take embeddings.

Windows come as an array `[samples, networks]` (one time point each), an array `[windows, time, networks]`,
a list of arrays `[time, networks]`, or as whole runs with a table of events each (onset, duration, trial_type
in seconds); runs may be NIfTI images where a nilearn masker turns them into networks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray

from brainflow.batch import PackedBatch, Windows
from brainflow.config import ModelConfig
from brainflow.data.splits import Split
from brainflow.decoding.finetune import frozen_features, probabilities
from brainflow.decoding.fit import AdaptConfig, Mode, fit_decoder
from brainflow.decoding.people_decoders import cut_runs, states_of_people
from brainflow.decoding.persist import load_decoder, save_decoder
from brainflow.decoding.readout import BINS, Layer, Pooling, Readout
from brainflow.decoding.ridge import fit_numbers
from brainflow.decoding.windows import ArrayWindows, as_windows, cut_events
from brainflow.frameworks import build
from brainflow.optional import requires
from brainflow.pretrained.compatibility import check_checkpoint, check_windows, longest_window
from brainflow.pretrained.format import load_pretrained, read_config
from brainflow.pretrained.hub import base_model, fetch
from brainflow.storage.normalise import Kind, kind_of, normalise

with requires("decoding", "report"):
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, TransformerMixin, clone
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_array, check_is_fitted, check_X_y

Checkpoint = str | os.PathLike[str] | None
UNSAVED = {"masker", "device", "split"}
TOGETHER = 8_192
"""Time points of runs that are read at once."""
FRESH: dict[str, Any] = {"width": 64, "layers": 2, "heads": 4}
"""Size of the model with fresh weights that stands in where no checkpoint is given."""


class _OnWindows(BaseEstimator):
    """What decoder and encoder share: parameters of the model, and the many forms of X."""

    checkpoint: Checkpoint
    t_r: float
    hrf_shift: float
    normalise: bool
    masker: Any
    allow_mismatch: bool
    split: str | os.PathLike[str] | None
    device: Literal["cpu", "cuda"]
    random_state: int
    whole_runs = False
    _owner: NDArray[np.int64] | None

    def _module(self, windows: list[NDArray]) -> Any:
        """Return the checkpoint's module if windows fit it, or a small one with fresh weights."""
        networks = self.n_features_in_
        if self.checkpoint is not None:
            folder = fetch(self.checkpoint)
            module: Any = load_pretrained(folder)
            if module.config.networks != networks:
                raise ValueError(
                    f"X: got {networks} networks, but the checkpoint {self.checkpoint} was trained on "
                    f"{module.config.networks}; use the parcellation of the model"
                )
            self.trained_on_ = read_config(folder).get("data") or {}
            self._check(windows)
            if self.split is not None:
                check_checkpoint(folder, Split.load(self.split))
        else:
            self.trained_on_ = {}
            torch.manual_seed(self.random_state)
            # scikit-learn makes estimators without arguments, and fits them so.
            module = build(ModelConfig(networks=networks, **FRESH))
        return module.to(self.device).eval()

    def _check(self, windows: list[NDArray]) -> None:
        """Refuse windows that are not like what the checkpoint was trained on."""
        masker = getattr(self, "masker_", None)
        named = getattr(masker, "region_names_", None) if getattr(masker, "labels", None) else None
        names = list(named.values()) if named else None
        check_windows(self.trained_on_, windows, t_r=self.t_r, network_names=names, allow=self.allow_mismatch)

    def _runs(self, X: Any, *, fit: bool) -> Any:
        """Turn images into arrays if there is a masker."""
        if self.masker is None:
            return X
        if fit:
            # A clone: scikit-learn's estimators leave their parameters as they are.
            self.masker_ = clone(self.masker)
            # Without a mask of its own it finds one in the images.
            self.masker_.fit(X if getattr(self.masker, "mask_img", None) is None else None)
        return [np.asarray(self.masker_.transform(image)) for image in X]

    def _normalised(self, runs: Any, *, fit: bool) -> list[NDArray]:
        """Normalise whole runs as those of the model were."""
        if not fit:
            data = self.trained_on_
        else:
            data = read_config(fetch(self.checkpoint)).get("data") if self.checkpoint is not None else None
        kind = kind_of((data or {}).get("normalisation"))
        if kind is None:
            raise ValueError(
                "normalise: got True, but the checkpoint does not say how its data were normalised; leave it "
                "out and give runs as the model's were"
            )
        return [normalise(np.asarray(run), cast("Kind", kind)) for run in runs]

    def _windows(self, X: Any, events: Any, *, fit: bool) -> tuple[list[NDArray], Any]:
        """Return windows `[time, networks]` and their labels, None where there are none."""
        if _is_table(events):  # of one run
            X, events = [X], [events]
        X = self._runs(X, fit=fit)
        if _are_tables(events):
            if self.normalise:
                X = self._normalised(X, fit=fit)
            windows, labels, self._owner = cut_events(X, events, t_r=self.t_r, hrf_shift=self.hrf_shift)
            X = windows
        elif self.normalise and self.whole_runs:
            X, labels, self._owner = self._normalised(X, fit=fit), events, None
        elif self.normalise:
            raise ValueError(
                "normalise: got True with windows, expected whole runs with a table of events each: single "
                "windows do not tell mean and standard deviation of their runs"
            )
        else:
            labels, self._owner = events, None
        if isinstance(X, (list, tuple)) and X and all(np.ndim(window) == 2 for window in X):
            windows = as_windows(X)
            if not all(map(len, windows)):
                raise ValueError("X: one window has no time point, expected at least one each")
            if any(window.shape[1] != windows[0].shape[1] for window in windows):
                raise ValueError("X: windows have different numbers of networks, expected one number")
            if not all(np.isfinite(window).all() for window in windows):
                raise ValueError("X: contains NaN or infinity, expected finite values")
            if fit:
                self.n_features_in_ = windows[0].shape[1]
        else:
            X = check_array(X, allow_nd=True, dtype=np.float32, estimator=self)
            if fit:
                self.n_features_in_ = X.shape[-1]
            windows = as_windows(X)
        # In scikit-learn's words, which its checks of estimators look for.
        if not fit and windows[0].shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {windows[0].shape[1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        if not fit:
            self._check(windows)
        return windows, labels

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags


class MentalStateDecoder(ClassifierMixin, _OnWindows):
    """Decode mental states with a pretrained model.

    Parameters
    ----------
    checkpoint
        Folder of a pretrained model, or `owner/name` on the hub. None: a small model with fresh weights,
        whose features are random ones.
    mode
        How it is adapted: `finetune` or `lora` from a fitted head, or a probe on frozen weights: `linear`
        (ridge in closed form), `attentive`, `mlp`, `knn`.
    published
        `finetune`, `lora`: as published, from a random head on the CLS token.
    pooling, bins, layer
        How one vector is made of a window, see :class:`~brainflow.decoding.fit.AdaptConfig`; by default the
        means of equal time bins of the layer that reads left-out people best, or the BOLD's log-SD.
    steps, batch_size, lr
        Optimizer steps (None: 60 from a fitted head, else 500), windows a step, peak learning rate (None:
        1e-4; 3e-4 if `published`; 1e-3 for `lora` and `attentive`) of `finetune`, `lora` and `attentive`.
    balance
        Weigh windows by the inverse of their class's frequency.
    label_smoothing
        Share of each label spread over all classes; `finetune`, `lora` and `attentive` only.
    t_r
        Seconds between time points.
    hrf_shift
        Seconds by which windows begin after their event, where tables of events are given.
    normalise
        Normalise whole runs (given with tables of events) as those of the checkpoint were; else X must be so.
    masker
        nilearn masker that turns images into `[time, networks]`; X is then a list of images.
    allow_mismatch
        Go on where TR, normalisation or the masker's labels are not what the checkpoint was trained on.
    split
        File of `brainflow split`: refused are a checkpoint that has seen its test people, and, where `groups`
        names the people as "dataset/subject", windows of theirs in `fit`.
    device
        Where to compute.
    random_state
        Seeds fresh weights, dropout and the order of the windows.

    Attributes
    ----------
    classes_
        Classes, sorted.
    n_features_in_
        Number of networks.
    decoder_
        The fitted torch module.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> windows = rng.normal(size=(20, 6, 8)).astype("float32")
    >>> names = np.array(["face", "house"] * 10)
    >>> windows[names == "face", :, :4] += 2
    >>> MentalStateDecoder().fit(windows, names).predict(windows[:2]).tolist()
    ['face', 'house']
    """

    def __init__(
        self,
        checkpoint: Checkpoint = None,
        *,
        mode: Mode = "linear",
        published: bool = False,
        pooling: Pooling | None = None,
        bins: int = BINS,
        layer: Layer = None,
        steps: int | None = None,
        batch_size: int = 32,
        lr: float | None = None,
        balance: bool = False,
        label_smoothing: float = 0.0,
        t_r: float = 2.0,
        hrf_shift: float = 0.0,
        normalise: bool = False,
        masker: Any = None,
        allow_mismatch: bool = False,
        split: str | os.PathLike[str] | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
        random_state: int = 0,
    ) -> None:
        # As scikit-learn has it: parameters are kept as given, and looked at in `fit`.
        self.checkpoint = checkpoint
        self.mode = mode
        self.published = published
        self.pooling = pooling
        self.bins = bins
        self.layer = layer
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.balance = balance
        self.label_smoothing = label_smoothing
        self.t_r = t_r
        self.hrf_shift = hrf_shift
        self.normalise = normalise
        self.masker = masker
        self.allow_mismatch = allow_mismatch
        self.split = split
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Fit to labelled windows, or to runs and their tables of events.

        Parameters
        ----------
        X
            Windows or runs, see the module's first lines.
        y
            One label a window, or a table of events for each run (for a single run, its table).
        groups
            Person (or run) of each window, or of each run: penalty, layer and steps are chosen by leaving
            these out. By default runs with tables of events are left out, else single windows.
        """
        windows, labels = self._windows(X, y, fit=True)
        # In scikit-learn's words, which its checks of estimators look for.
        if labels is None:
            raise ValueError("requires y to be passed, but the target y is None")
        # scikit-learn's checks of y, and that there is one each; windows are checked by themselves.
        _, labels = check_X_y(np.zeros((len(windows), 1)), labels, dtype=None)
        check_classification_targets(labels)
        self.classes_, named = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y: got one class, {self.classes_[0]!r}; the classifier needs windows of at least 2 classes"
            )
        owner = self._owner
        if groups is not None:
            groups = np.asarray(groups)[owner] if owner is not None else np.asarray(groups)
            if len(groups) != len(windows):
                raise ValueError(f"groups: got {len(groups)} for {len(windows)} windows, expected one each")
            if self.split is not None:
                Split.load(self.split).check_training(groups)
        source = ArrayWindows(windows, t_r=self.t_r, labels=named, groups=owner if groups is None else groups)
        self.config_ = config = AdaptConfig(
            mode=self.mode,
            published=self.published,
            bins=self.bins,
            layer=self.layer,
            pooling=self.pooling,
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            balance=self.balance,
            label_smoothing=self.label_smoothing,
            seed=self.random_state,
        )
        self.decoder_, _ = fit_decoder(
            self._module(windows),
            source,
            np.arange(len(windows)),
            config,
            classes=len(self.classes_),
            device=torch.device(self.device),
        )
        return self

    def predict_proba(self, X: Any, events: Any = None) -> NDArray[np.float32]:
        """Return class probabilities `[windows, classes]`; `events` cuts runs into windows."""
        check_is_fitted(self, "decoder_")
        return self._chances(self._windows(X, events, fit=False)[0])

    def predict(self, X: Any, events: Any = None) -> NDArray:
        """Return the class of each window; `events` cuts runs into windows."""
        chances = self.predict_proba(X, events)
        return self.classes_[chances.argmax(axis=1)]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy over windows, or over the events of runs."""
        check_is_fitted(self, "decoder_")
        windows, labels = self._windows(X, y, fit=False)
        hits = self.classes_[self._chances(windows).argmax(axis=1)] == np.asarray(labels)
        return float(np.average(hits, weights=sample_weight))

    def _chances(self, windows: list[NDArray]) -> NDArray[np.float32]:
        source = ArrayWindows(windows, t_r=self.t_r)
        everything = np.arange(len(windows))
        return probabilities(self.decoder_, source, everything, device=torch.device(self.device))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the fitted decoder: safetensors and JSON, no pickle. Masker and device are not saved."""
        check_is_fitted(self, "decoder_")
        parameters = {k: v for k, v in self.get_params(deep=False).items() if k not in UNSAVED}
        parameters["checkpoint"] = None if self.checkpoint is None else os.fspath(self.checkpoint)
        facts: dict[str, Any] = {"estimator": parameters, "data": self.trained_on_}
        facts |= base_model(self.checkpoint)
        # JSON knows no scalars of NumPy.
        classes = tuple(name.item() for name in self.classes_)
        save_decoder(
            self.decoder_, folder, mode=self.mode, kind=self.config_.head, classes=classes, facts=facts
        )

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        masker: Any = None,
        device: Literal["cpu", "cuda"] = "cpu",
        **download: Any,
    ) -> Self:
        """Return a decoder that :meth:`save` or `brainflow adapt --save` wrote.

        Parameters
        ----------
        folder
            Folder, or `owner/name` on the hub.
        masker
            Fitted nilearn masker of the model's parcellation, if X will be images.
        device
            Where to compute.
        **download
            `revision` and what :func:`brainflow.from_pretrained` takes, for a repository of the hub.
        """
        decoder, config = load_decoder(fetch(folder, **download))
        section = config["decoder"]
        data, estimator = config.get("data") or {}, config.get("estimator")
        if estimator is None:  # from `brainflow adapt --save`
            estimator = {
                "t_r": (data.get("t_r") or [2.0])[0],
                "hrf_shift": (config.get("decoding") or {}).get("hrf_shift", 0.0),
            }
        # What another version wrote besides is left.
        names = set(cls().get_params()) - UNSAVED
        known = {name: value for name, value in estimator.items() if name in names}
        known |= {"mode": section["mode"], "pooling": section["pooling"]}
        known |= {name: section[name] for name in ("bins",) if name in section}
        result = cls(**known, masker=masker, device=device)
        result.trained_on_ = data
        result.decoder_ = decoder.to(result.device)
        result.classes_ = np.array(section["classes"])
        result.n_features_in_ = int(config["model"]["networks"])
        if masker is not None:
            result.masker_ = masker
        return result

    save_pretrained, from_pretrained = save, load


class BoldEncoder(TransformerMixin, _OnWindows):
    """Embeddings of a pretrained model, as a scikit-learn transformer.

    Parameters
    ----------
    checkpoint, t_r, hrf_shift, normalise, masker, allow_mismatch, split, device, random_state
        See :class:`MentalStateDecoder`.
    pooling, bins, layer
        How one vector is made of a window, see :class:`~brainflow.decoding.readout.Readout`.

    Examples
    --------
    >>> BoldEncoder().fit_transform(np.zeros((5, 10, 8), dtype="float32")).shape
    (5, 64)
    """

    def __init__(
        self,
        checkpoint: Checkpoint = None,
        *,
        pooling: Pooling = "mean",
        bins: int = BINS,
        layer: Layer = None,
        t_r: float = 2.0,
        hrf_shift: float = 0.0,
        normalise: bool = False,
        masker: Any = None,
        allow_mismatch: bool = False,
        split: str | os.PathLike[str] | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
        random_state: int = 0,
    ) -> None:
        self.checkpoint = checkpoint
        self.pooling = pooling
        self.bins = bins
        self.layer = layer
        self.t_r = t_r
        self.hrf_shift = hrf_shift
        self.normalise = normalise
        self.masker = masker
        self.allow_mismatch = allow_mismatch
        self.split = split
        self.device = device
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []  # embeddings are float32
        return tags

    def fit(self, X: Any, y: Any = None) -> Self:
        """Load the model; nothing is fitted to X but the masker."""
        if self.pooling == "tokens":
            raise ValueError("pooling: got 'tokens', expected one vector a window, as bins or mean")
        readout = Readout(pooling=self.pooling, bins=self.bins, layer=self.layer)
        # A pipeline hands on labels, too, which nothing is fitted to here.
        windows, _ = self._windows(X, y if _is_table(y) or _are_tables(y) else None, fit=True)
        self.module_ = self._module(windows)
        self._n_features_out = readout.width(self.module_.config)
        return self

    def transform(self, X: Any, events: Any = None) -> NDArray[np.float32]:
        """Return one embedding a window, `[windows, width]`; `events` cuts runs into windows."""
        check_is_fitted(self, "module_")
        windows, _ = self._windows(X, events, fit=False)
        source = ArrayWindows(windows, t_r=self.t_r)
        readout = Readout(pooling=self.pooling, bins=self.bins, layer=self.layer)
        return frozen_features(self.module_, source, [readout], device=torch.device(self.device))[0]


class BoldRegressor(RegressorMixin, _OnWindows):
    """Read a number, as age, from runs: mean and log-SD of a frozen model's states, and ridge in closed form.

    Parameters
    ----------
    checkpoint
        Folder of a pretrained model, or `owner/name` on the hub. None: a small model with fresh weights,
        whose features are random ones.
    layer
        Which states are read, see :class:`~brainflow.decoding.readout.Readout`; None: those that read best
        who is left out.
    normalise
        Normalise each run as those of the checkpoint were; else X must be so.
    t_r, masker, allow_mismatch, split, device, random_state
        See :class:`MentalStateDecoder`.

    Attributes
    ----------
    n_features_in_
        Number of networks.
    ridge_
        The fitted ridge.
    readout_
        Which states it reads.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> age = rng.uniform(20, 80, 40)
    >>> runs = [years / 40 * rng.normal(size=(60, 1)) + rng.normal(size=(60, 8)) for years in age]
    >>> bool(BoldRegressor().fit(runs[:30], age[:30]).score(runs[30:], age[30:]) > 0.5)
    True
    """

    hrf_shift = 0.0
    whole_runs = True

    def __init__(
        self,
        checkpoint: Checkpoint = None,
        *,
        layer: Layer = None,
        t_r: float = 2.0,
        normalise: bool = False,
        masker: Any = None,
        allow_mismatch: bool = False,
        split: str | os.PathLike[str] | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
        random_state: int = 0,
    ) -> None:
        self.checkpoint = checkpoint
        self.layer = layer
        self.t_r = t_r
        self.normalise = normalise
        self.masker = masker
        self.allow_mismatch = allow_mismatch
        self.split = split
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Fit to runs and their numbers.

        Parameters
        ----------
        X
            One run for each number, of any length: a list of `[time, networks]`, an array `[runs, time,
            networks]` or `[samples, networks]`, or images where there is a masker.
        y
            Numbers, `[runs]`.
        groups
            Person, family or site of each run: penalty and layer are chosen by leaving these out. By default
            single runs.
        """
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        runs, _ = self._windows(X, None, fit=True)
        _, targets = check_X_y(np.zeros((len(runs), 1)), y, dtype=None, y_numeric=True)
        if groups is not None:
            groups = np.asarray(groups)
            if len(groups) != len(runs):
                raise ValueError(f"groups: got {len(groups)} for {len(runs)} runs, expected one each")
            if self.split is not None:
                Split.load(self.split).check_training(groups)
        self.module_ = self._module(runs)
        config = AdaptConfig(mode="linear", pooling="moments", layer=self.layer)
        readouts = config.readouts(self.module_)
        together = max(1, TOGETHER // max(map(len, runs)))
        states = self._states(runs, readouts, together=together)
        fits = [fit_numbers(x, targets, groups=groups) for x in states]
        best = int(np.argmin([one.loss for one in fits]))
        self.readout_, self.ridge_ = readouts[best], fits[best]
        return self

    def predict(self, X: Any) -> NDArray[np.float64]:
        """Return the number of each run, `[runs]`."""
        check_is_fitted(self, "ridge_")
        runs, _ = self._windows(X, None, fit=False)
        # one by one: rounding in float32 depends on what is read together, and nobody shall depend on others
        states = self._states(runs, [self.readout_], together=1)[0]
        return self.ridge_.logits(states)[:, 0]

    def _states(
        self, runs: list[NDArray], readouts: Sequence[Readout], *, together: int
    ) -> list[NDArray[np.float64]]:
        """Return states of runs, so many of which are read at once."""
        saved = {} if self.checkpoint is None else read_config(fetch(self.checkpoint))
        longest = longest_window(saved, self.module_.config, self.t_r)
        owner, lengths = cut_runs(np.array([len(run) for run in runs]), longest)
        where = torch.device(self.device)

        def batches() -> Iterator[PackedBatch]:
            for begin in range(0, len(runs), together):
                end = begin + together
                first, last = np.searchsorted(owner, [begin, end])
                windows = Windows.end_to_end(lengths[first:last], t_r=self.t_r)
                yield PackedBatch.pack(
                    torch.from_numpy(np.concatenate(runs[begin:end])), windows, device=where
                )

        return states_of_people(self.module_, batches(), owner, readouts)


def _are_tables(y: Any) -> bool:
    """Whether y holds tables of events instead of labels."""
    if not isinstance(y, (list, tuple, Sequence)) or isinstance(y, str) or not len(y):
        return False
    return all(_is_table(table) for table in y)


def _is_table(y: Any) -> bool:
    return hasattr(y, "keys") and "onset" in y
