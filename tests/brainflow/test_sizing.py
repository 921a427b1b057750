"""Where no size or number of steps is given, data and machine choose; what is stated stays."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from brainflow.cli import pretrain as command
from brainflow.cli.main import main
from brainflow.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig, to_dict
from brainflow.frameworks import CSMConfig, build, framework_names
from brainflow.recipes import FEWEST_STEPS, FITTING, MOST_STEPS, SIZES, WINDOWS, preset
from brainflow.storage import StoreWriter
from brainflow.training import sizing
from brainflow.training.meters import matrix_weights

PLAIN = PretrainConfig(store="store", out="/nowhere/run", model=CSMConfig())


class Length:
    """As much of a store as the choice looks at."""

    networks = 6

    def __init__(self, points):
        self.runs = self
        self.length = np.array([points], np.int64)


def chosen(points, *stated, config=PLAIN, cuda=False, resume="auto"):
    return sizing.choose(config, Length(points), stated, cuda=cuda, resume=resume)[0]


@pytest.mark.parametrize("kind", FITTING)
def test_more_data_never_choose_a_smaller_model_or_fewer_steps(kind):
    sizes, steps = [], []
    for points in (10, 5_000, 100_000, 500_000, 3_000_000, 10**9):
        config = chosen(points, cuda=kind == "cuda")
        sizes.append(config.model.layers * config.model.width)
        steps.append(config.train.steps)
        name = sizing.fitting(Length(points), cuda=kind == "cuda")
        layers, width, heads, _ = SIZES[name]
        assert (config.model.layers, config.model.width, config.model.heads) == (layers, width, heads)
        assert config.train.lr == preset(name)["train"]["lr"]
        assert 0 <= config.train.validate_every * sizing.VALIDATIONS - config.train.steps < sizing.VALIDATIONS
        assert config == chosen(points, cuda=kind == "cuda")  # and the same again
    assert sizes == sorted(sizes)
    assert steps == sorted(steps)
    assert steps[0] == FEWEST_STEPS
    assert len(set(sizes)) == len(FITTING[kind])


@settings(max_examples=50, deadline=None)
@given(points=st.integers(1, 10**10), batch=st.integers(1, 512))
def test_steps_read_the_windows_that_so_many_time_points_ask_for(points, batch):
    config = dataclasses.replace(PLAIN, data=DataConfig(batch_size=batch))
    steps = chosen(points, config=config).train.steps
    assert FEWEST_STEPS <= steps <= MOST_STEPS
    if FEWEST_STEPS < steps < MOST_STEPS:
        wanted = WINDOWS[0] * (points / WINDOWS[1]) ** 0.5
        assert (steps - 1) * batch < wanted * (1 + 1e-9)
        assert steps * batch >= wanted * (1 - 1e-9)


def parse(*words):
    words = command.arguments(["store", "--out", "/nowhere/run", *words])
    args = command.settled(tyro.cli(command.Args, args=words, default=command.defaults(words)), words)
    return sizing.choose(command.pretrain_config(args), Length(7_200), args.stated, cuda=False, resume="auto")


def test_what_is_stated_stays_also_where_it_is_the_default(tmp_path):
    plain, names = parse()
    assert {"model.layers", "model.width", "model.heads", "train.lr", "train.steps"} <= set(names)
    for section, values in preset("tiny").items():  # all of it
        assert {name: getattr(getattr(plain, section), name) for name in values} == values
    default = ModelConfig()
    for words in (["--model.width", "768"], ["--model.layers=4"], ["--init", "w"], ["--train.init", "w"]):
        config, names = parse(*words)
        assert (config.model.layers, config.model.width) == (default.layers, default.width)
        assert config.train.lr == TrainConfig().lr
        assert "train.steps" in names
    config, names = parse("--train.steps", str(TrainConfig().steps), "--train.lr", str(TrainConfig().lr))
    assert (config.train.steps, config.train.lr) == (TrainConfig().steps, TrainConfig().lr)
    assert config.train.validate_every == TrainConfig().validate_every
    assert not {"train.lr", "train.steps", *sizing.CADENCE} & set(names)
    assert plain.model.linear  # of the preset
    assert not parse("--model.no-linear")[0].model.linear
    assert parse("--model.masking=dense")[0].model.masking == "dense"
    assert parse("--train.checkpoint-every", "7")[0].train.checkpoint_every == 7
    assert parse("--train.permanent_every", "2000")[0].train.checkpoint_every == 1_000  # its divisor
    assert parse("--preset", "small")[0].model.width == SIZES["small"][1]
    published, names = parse("--preset", "published")
    assert names == []
    assert published.train.steps == 300_000
    (tmp_path / "run.toml").write_text("[model]\nwidth = 768\n[train]\nsteps = 9\n")
    config, names = parse("--config", str(tmp_path / "run.toml"))
    assert (config.model.width, config.train.steps, names) == (768, 9, list(sizing.CADENCE))


def test_a_short_run_is_saved_before_its_end_though_its_steps_are_stated():
    """A run of 200 steps that saves every 1,000 has nothing when it is killed."""
    config, names = parse("--train.steps", "200")
    assert (config.train.validate_every, config.train.checkpoint_every) == (20, 20)
    assert set(sizing.CADENCE) <= set(names)
    said = sizing.explain(config, Length(10), sizing.CADENCE, cuda=False)
    assert said == "chose train.validate_every 20, train.checkpoint_every 20, for a run of 200 steps"
    assert parse("--train.steps", "7")[0].train.checkpoint_every == 1
    for often in ("50", "1000"):  # what is stated stays
        config, names = parse("--train.steps", "200", "--train.checkpoint-every", often)
        assert (config.train.validate_every, config.train.checkpoint_every) == (20, int(often))
        assert "train.checkpoint_every" not in names
    config, names = parse("--train.steps", "200", "--train.permanent-every", "1000")
    assert config.train.checkpoint_every == 1_000  # its divisor
    assert not set(sizing.CADENCE) & set(parse("--train.steps", "1000")[1])


def test_arguments_that_never_saw_a_command_line_are_taken_as_they_are():
    args = command.Args(store="/nowhere/store", out="/nowhere/run")
    assert not command._chooses(args)
    assert command._chooses(command.settled(args, []))
    assert command._chooses(command.settled(args, ["--train.steps=1"]))
    assert not command._chooses(command.settled(args, ["--model.width", "1", "--train.steps=1"]))


def test_a_run_that_has_begun_keeps_what_it_began_with(tmp_path):
    config = dataclasses.replace(PLAIN, out=str(tmp_path))
    first = chosen(7_200, config=config)
    (tmp_path / "train_config.json").write_text(json.dumps(to_dict(first)))
    other = chosen(10**8, config=config, cuda=True)
    assert other.model.width > first.model.width  # not a step was made: nothing to keep
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    again, names = sizing.choose(config, Length(10**8), (), cuda=True, resume="auto")
    assert (again, names) == (first, [])
    assert chosen(10**8, config=config, cuda=True, resume="never") == other
    stated = dataclasses.replace(config, train=TrainConfig(lr=0.5))
    assert chosen(10**8, "train.lr", config=stated, cuda=True).train.lr == 0.5
    sized = chosen(10**8, "model.width", config=config, cuda=True)
    assert (sized.model, sized.train.steps) == (config.model, first.train.steps)


@pytest.mark.parametrize("framework", framework_names()[:4])
def test_the_cost_of_a_run_is_its_steps_times_the_operations_of_one(framework):
    model = ModelConfig(framework=framework, networks=6, width=16, layers=1, heads=2)
    data = DataConfig(batch_size=4, seq_min=9, seq_max=12)
    config = dataclasses.replace(PLAIN, model=model, data=data, train=TrainConfig(steps=7))
    special = 3 if "bert" in framework else 0
    per_step = matrix_weights(build(model)).flops(4 * (10 + special), 4 * 10)
    assert sizing.operations(config) == pytest.approx(7 * per_step)
    said = sizing.published_cost(config, Length(10), None)
    assert "300,000 steps of" in said
    assert "width 768" in said
    assert "e+1" in said
    assert "(an estimate, at 50%" in sizing.published_cost(config, Length(10), torch.device("cpu"))


def test_the_command_says_what_it_chose_and_trains_it(tmp_path, capsys):
    rng = np.random.default_rng(0)
    with StoreWriter.create(tmp_path / "store", networks=6, dtype="float32") as writer:
        for run in range(6):
            writer.append(rng.standard_normal((50, 6)), t_r=2.0, dataset="d", subject=str(run), task="rest")
    words = [str(tmp_path / "store"), "--out", str(tmp_path / "run"), "--device", "cpu", "--train.steps", "2"]
    data = ["--data.batch-size", "4", "--data.validation-batches", "1", "--data.loader", "host"]
    assert main(["pretrain", *words, *data, "--json"]) == 0
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} >= {"step-00000001"}
    said = capsys.readouterr()
    json.loads(said.out)
    first, second = said.err.splitlines()[:2]
    (layers, width, *_), lr = SIZES["tiny"], preset("tiny")["train"]["lr"]
    assert first.startswith(
        f"chose preset tiny ({layers} layers of width {width}, peak learning rate {lr:g}), for"
    )
    assert "for 300 time points on a CPU" in first
    assert second.startswith("--preset published (4 layers of width 768, 300,000 steps of 192 windows)")
    saved = json.loads((tmp_path / "run" / "train_config.json").read_text())
    assert (saved["model"]["layers"], saved["model"]["width"], saved["train"]["steps"]) == (layers, width, 2)
    wide = [*words[:1], *words[3:], *data, "--data.seq-max", "700"]  # too long for learned positions
    assert main(["pretrain", *wide, "--out", str(tmp_path / "wide")]) == 0
    capsys.readouterr()
    assert main(["pretrain", *wide, "--out", str(tmp_path / "bad"), "--model.positions", "learned"]) == 2
    assert "data.seq_max: got 700" in capsys.readouterr().err
    assert main(["pretrain", *words, *data]) == 0  # it continues, though nothing is stated
    assert "chose" not in capsys.readouterr().err
