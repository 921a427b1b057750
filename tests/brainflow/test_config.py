"""Configuration: defaults, ranges, combinations, names."""

import json

import pytest

from brainflow.config import (
    DataConfig,
    ModelConfig,
    PretrainConfig,
    TrainConfig,
    to_dict,
)
from brainflow.frameworks import (
    AutoencoderConfig,
    CSMConfig,
    NetBERTConfig,
    SeqBERTConfig,
    build,
    check_framework,
    model_config,
)
from brainflow.frameworks.settings import check_settings, pretrain_config


def test_defaults_are_the_published_training():
    train, data = TrainConfig(), DataConfig()
    assert (train.lr, train.weight_decay, train.beta1, train.beta2, train.clip) == (
        1e-4,
        0.1,
        0.9,
        0.999,
        1.0,
    )
    assert (train.steps, train.warmup) == (300_000, 0.01)
    assert (data.seq_min, data.seq_max) == (10, 50)


def run(framework="csm", *, data=None, train=None, **model):
    config = PretrainConfig(
        store="s",
        out="r",
        model=model_config(framework, **model),
        data=data or DataConfig(),
        train=train or TrainConfig(),
    )
    check_framework(config)
    return config


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ModelConfig(width=100, heads=12), "model.width"),
        (lambda: ModelConfig(dropout=1.0), "model.dropout"),
        (lambda: DataConfig(seq_min=50), "data.seq_min"),
        (lambda: DataConfig(validation_fraction=1.0), "data.validation_fraction"),
        (lambda: DataConfig(validation_batches=0), "data.validation_batches"),
        (lambda: DataConfig(weights="hcp"), "data.weights: got 'hcp'"),
        (lambda: DataConfig(weights="hcp=1,=2"), "data.weights: got '=2'"),
        (lambda: DataConfig(weights="hcp=two"), "data.weights: got 'hcp=two'"),
        (lambda: TrainConfig(steps=0), "train.steps"),
        (lambda: TrainConfig(lr=float("nan")), "train.lr"),
        (lambda: TrainConfig(clip=0.0), "train.clip"),
        (lambda: TrainConfig(beta2=1.0), "train.beta2"),
        (lambda: TrainConfig(weight_decay=-1.0), "train.weight_decay"),
        (lambda: TrainConfig(permanent_every=150, checkpoint_every=100), "train.permanent_every"),
        (lambda: TrainConfig(schedule="wsd", warmup=0.95), "train.warmup"),
        (lambda: TrainConfig(ema=1.0), "train.ema"),
        (lambda: TrainConfig(patience=-1), "train.patience"),
        (lambda: TrainConfig(weight_decay=float("nan")), "train.weight_decay"),
        (lambda: TrainConfig(lr=float("inf")), "train.lr"),
        (lambda: ModelConfig(max_seconds=0.0), "model.max_seconds"),
        (lambda: ModelConfig(heads=0), "model.heads"),
        (lambda: run(data=DataConfig(seq_max=600)), "data.seq_max"),
        (lambda: run("seq-bert", data=DataConfig(seq_max=511)), "data.seq_max: .* 3 special tokens"),
        (lambda: run("net-bert", data=DataConfig(seq_min=5)), "data.seq_min: .* 6 .*net-bert"),
        (lambda: run(train=TrainConfig(micro_batches=5)), "train.micro_batches"),
        (lambda: run("autoencoder", train=TrainConfig(compile="on")), "train.compile: got on"),
        (lambda: run("autoencoder", recompute=True), "model.recompute"),
        (lambda: SeqBERTConfig(mask_rate=0.0), "model.mask_rate: got 0.0"),
        (lambda: NetBERTConfig(mask_span=-1), "model.mask_span: got -1"),
        (lambda: AutoencoderConfig(teacher_forcing=1.5), "model.teacher_forcing: got 1.5"),
        (
            lambda: run("seq-bert", masking="single"),
            "model.masking: is a setting of csm, not of seq-bert; leave",
        ),
        (
            lambda: run("csm", mask_rate=0.5),
            "model.mask_rate: is a setting of seq-bert and net-bert, not of csm",
        ),
        (lambda: build(CSMConfig(framework="net-bert")), "model: got CSMConfig .*expected NetBERTConfig"),
        (
            lambda: check_framework(PretrainConfig(store="s", out="r", model=SeqBERTConfig(framework="csm"))),
            "model: got SeqBERTConfig .*expected CSMConfig",
        ),
        (lambda: run("seqbert"), "model.framework: got 'seqbert', .*autoencoder; did you mean 'seq-bert'"),
    ],
)
def test_a_wrong_value_is_refused_by_name(make, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        make()


@pytest.mark.parametrize(
    ("section", "name", "value", "expected"),
    [
        ("model", "width", "768", "a whole number"),
        ("model", "width", True, "a whole number"),
        ("model", "width", 10**30, "a whole number"),
        ("model", "norm", "evil", "one of layer, rms"),
        ("model", "coordinates", 1, "true or false"),
        ("train", "lr", "1e-4", "a finite number"),
        ("train", "lr", 10**400, "a finite number"),
        ("train", "init", None, "text"),
        ("data", "batch_size", [64], "a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(section, name, value, expected):
    with pytest.raises(ValueError, match=f"^{section}.{name}: got .*, expected {expected}"):
        pretrain_config({"store": "s", "out": "r", section: {name: value}})
    pretrain_config({"store": "s", "out": "r", "train": {"lr": 1}})  # a whole number is a number


def test_round_trip_through_json():
    config = PretrainConfig(
        store="s", out="r", model=SeqBERTConfig(width=24, heads=2, mask_span=3), train=TrainConfig(seed=7)
    )
    assert pretrain_config(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("values", "suggestion"),
    [
        ({"model": {"widht": 3}}, "'model.widht'; did you mean 'model.width'"),
        ({"steps": 3}, "'steps'; did you mean 'train.steps'"),
        ({"stor": "s"}, "'stor'; did you mean 'store'"),
        ({"train": {"batch_size": 3}}, "'train.batch_size'; did you mean 'data.batch_size'"),
        ({"train": 3}, "train: got 3, expected a table"),
        ({"train": {"lr": {"peak": 3}}}, "train.lr: got .* expected a single value"),
        ({"zzz": 1}, "known: store, out"),
    ],
)
def test_an_unknown_setting_names_the_nearest(values, suggestion):
    with pytest.raises(ValueError, match=suggestion):
        check_settings(values)
