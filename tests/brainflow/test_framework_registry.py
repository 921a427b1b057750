"""Frameworks that others bring: registered here, trained through the public API."""

import dataclasses
import subprocess
import sys
import tomllib
from typing import ClassVar

import pytest
from ranks import assert_close, curve, on_ranks
from tiny_training import FLAGS, tiny, write_store
from torch import nn

import brainflow
from brainflow import frameworks
from brainflow.batch import upload
from brainflow.cli.main import main
from brainflow.config import ModelConfig
from brainflow.frameworks import registry
from brainflow.frameworks.base import Framework, StepOutput, drawn_rows, pool
from brainflow.kernels import MaskSpec
from brainflow.recipes import SIZES, preset
from brainflow.training.loop import pretrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoregressionConfig(ModelConfig):
    """Architecture and objective of the autoregression."""

    framework: str = "autoregression"
    lag: int = 1
    """Time points from the one that is read to the one that is predicted."""

    def __post_init__(self):
        super().__post_init__()
        if self.lag < 1:
            raise ValueError(f"model.lag: got {self.lag}, expected at least 1")


class Autoregression(Framework):
    """Predicts half of the time points, each linearly from one before."""

    seen: ClassVar[list] = []
    drawn_for: ClassVar[list] = []

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.networks, config.networks)

    def mask(self, batch, *, seed):
        if self.training:
            self.drawn_for.append((batch.step, seed))
        return drawn_rows(MaskSpec.time_points(0.5, seed=seed, offset=batch.step), batch.lengths)

    def num_targets(self, batch):
        return len(batch.mask)

    def forward(self, batch, *, seed):
        values, rows = self.reconstruct(batch, seed=seed)
        loss = (values - batch.bold[rows]).abs().mean()
        if self.training:
            self.seen.append((loss.item(), len(rows)))
        return StepOutput(loss=loss)

    def reconstruct(self, batch, *, seed):
        rows = upload(batch.bold.device, rows=self.drawn(batch, seed))["rows"]
        return self.linear(batch.bold[(rows - self.config.lag).clamp(min=0)]), rows

    def features(self, batch, pooling="last"):
        return pool(self.linear(batch.bold), batch.lengths, pooling)


@pytest.fixture(autouse=True)
def a_registry_of_its_own(monkeypatch):
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))


@pytest.fixture
def autoregression():
    frameworks.register_framework("autoregression", config=AutoregressionConfig)(Autoregression)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("registry") / "store")


def test_a_fifth_framework_trains_in_four_microbatches_on_two_ranks(store, tmp_path, autoregression):
    settings = {"framework": "autoregression", "micro_batches": 4, "steps": 6}
    Autoregression.seen.clear()
    Autoregression.drawn_for.clear()
    one = pretrain(tiny(store, tmp_path / "one", **settings), quiet=True)
    first = Autoregression.seen[1:5]  # the rehearsal comes before the microbatches of the first step
    assert len({count for _, count in first}) > 1
    mean = sum(loss * count for loss, count in first) / sum(count for _, count in first)
    assert curve(one)[0]["loss"] == pytest.approx(mean, rel=1e-6)
    drawn = Autoregression.drawn_for[1:]
    assert len(drawn) == len(set(drawn)) == 6 * 4  # once a microbatch, each from a seed of its own
    on_ranks(2, lambda: pretrain(tiny(store, tmp_path / "two", **settings), quiet=True), tmp_path)
    assert_close(curve(tmp_path / "two"), curve(one))
    assert curve(one)[-1]["val_loss"] < curve(one)[0]["loss"]


def test_a_fifth_framework_has_a_setting_of_its_own(store, tmp_path, autoregression, capsys):
    ours = ["--framework", "autoregression"]
    assert main(["pretrain", *ours, "--help"]) == 0
    assert "--model.lag INT" in (text := " ".join(capsys.readouterr().out.split()))
    assert "from the one that is read" in text
    assert "--model.masking" not in text
    toml = tmp_path / "run.toml"
    assert main(["init", str(toml), *ours]) == 0
    assert "from the one that is read to the one that is predicted.\n# lag = 1\n" in toml.read_text()
    toml.write_text(toml.read_text().replace("# lag = 1", "lag = 3"))
    assert tomllib.loads(toml.read_text())["model"] == {"framework": "autoregression", "lag": 3}

    train = ["pretrain", store, "--train.steps", "3", *FLAGS]
    for number, words in ((3, ["--config", str(toml)]), (2, [*ours, "--model.lag", "2"]), (1, ours)):
        run = tmp_path / f"lag-{number}"
        assert main([*train, "--out", str(run), *words]) == 0
        module = brainflow.load(run)
        assert isinstance(module.config, AutoregressionConfig)
        assert module.config.lag == number
    assert curve(tmp_path / "lag-1") != curve(tmp_path / "lag-2") != curve(tmp_path / "lag-3")

    capsys.readouterr()
    for words in (["--framework", "csm"], ["--config", str(toml), "--framework", "seq-bert"]):
        again = ["--model.lag", "2"] if "csm" in words else []
        assert main([*train, "--out", str(tmp_path / "no"), *words, *again]) == 2
        said = capsys.readouterr().err
        assert f"model.lag: is a setting of autoregression, not of {words[-1]}; leave it out" in said
    assert main([*train, "--out", str(tmp_path / "no"), *ours, "--model.lag", "0"]) == 2
    assert "model.lag: got 0, expected at least 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"model\.lag: got 'two', expected a whole number"):
        frameworks.model_config("autoregression", lag="two")


def test_a_framework_without_transformer_blocks_has_the_presets_unless_it_names_its_own():
    frameworks.register_framework("recurrent", transformer=False)(Autoregression)
    for name, (layers, width, *_) in SIZES.items():
        found = preset(name, "recurrent")["model"]
        assert (found["layers"], found["width"]) == (layers, width)
    frameworks.register_framework("shallow", transformer=False, layers={"tiny": 1})(Autoregression)
    assert preset("tiny", "shallow")["model"]["layers"] == 1
    with pytest.raises(ValueError, match=r"got small for shallow, expected one of tiny$"):
        preset("small", "shallow")


def test_a_setting_that_could_not_be_read_back_is_refused_at_once():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Listed(ModelConfig):
        lags: tuple = (1, 2)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Needed(ModelConfig):
        lag: int

    for config, name in ((Listed, r"Listed\.lags"), (Needed, r"Needed\.lag")):
        with pytest.raises(
            ValueError, match=f"config: got {name}: .* expected a bool, int, .* with a default"
        ):
            frameworks.register_framework("odd", config=config)


def test_an_entry_point_brings_a_framework_that_is_imported_when_it_is_used(tmp_path, monkeypatch):
    facts = tmp_path / "plug-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1\n")
    (facts / "entry_points.txt").write_text("[brainflow.frameworks]\nplug = plug_in\nbroken = plug_out\n")
    (tmp_path / "plug_in.py").write_text(
        "from brainflow.frameworks import register_framework\n"
        "from brainflow.frameworks.csm import CSM\n"
        "from brainflow.frameworks import CSMConfig\n"
        "@register_framework('plug', config=CSMConfig)\n"
        "class Plug(CSM): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {"csm", "plug", "broken"} <= set(frameworks.framework_names())
    assert "plug_in" not in sys.modules
    module = frameworks.build(ModelConfig(framework="plug", networks=4, width=8, layers=1, heads=2))
    assert type(module).__name__ == "Plug"
    assert module.config.masking == "dense"
    brainflow.save_pretrained(module, tmp_path / "model")
    assert brainflow.load(tmp_path / "model").config == module.config
    with pytest.raises(ValueError, match="'broken' is brought by plug_out, which cannot be imported"):
        frameworks.build(ModelConfig(framework="broken"))


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="name: 'csm' is a registered framework already"):
        frameworks.register_framework("csm")(Autoregression)


def test_what_is_no_framework_is_refused(store, tmp_path):
    frameworks.register_framework("linear")(lambda config: nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model\.framework: linear builds a Linear, expected a subclass"):
        pretrain(tiny(store, tmp_path / "run", framework="linear"), quiet=True)


def test_a_framework_has_to_count_its_targets():
    class Forgetful(Autoregression):
        num_targets = Framework.num_targets

    with pytest.raises(TypeError, match="num_targets"):
        Forgetful(ModelConfig(networks=2))


def test_the_command_line_names_the_nearest_framework(tmp_path, capsys):
    assert main(["pretrain", "store", "--out", str(tmp_path / "run"), "--framework", "seqbert"]) == 2
    assert "did you mean 'seq-bert'?" in capsys.readouterr().err


def test_names_are_known_without_torch():
    code = "import sys, brainflow.frameworks as f; f.framework_names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
