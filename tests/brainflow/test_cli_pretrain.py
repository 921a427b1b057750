"""`brainflow pretrain` and `brainflow plot`: settings from file and command line, summaries, pictures."""

import json
import sys

import numpy as np
import pytest

from brainflow.cli.main import main
from brainflow.storage import StoreWriter

TOML = """
store = "{store}"
out = "{out}"
device = "cpu"

[model]
framework = "seq-bert"
width = 24
heads = 3
layers = 1

[data]
batch_size = 4
seq_min = 8
seq_max = 20
loader = "host"
validation_batches = 1

[train]
steps = 4
lr = 1e-3
log_every = 2
validate_every = 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a store, a run of csm made from the TOML file, and the file."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    with StoreWriter.create(folder / "store", networks=6, dtype="float32", parcellation="none") as writer:
        for run in range(6):
            bold = rng.standard_normal((50, 6)).astype(np.float32)
            writer.append(bold, t_r=2.0, dataset="noise", subject=str(run), session="", task="rest", run="1")
    (folder / "run.toml").write_text(TOML.format(store=folder / "store", out=folder / "run"))
    arguments = ["--config", str(folder / "run.toml"), "--framework", "csm", "--model.heads", "2"]
    assert main(["pretrain", *arguments]) == 0
    return folder


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(folder):
    config = json.loads((folder / "run" / "train_config.json").read_text())
    assert config["model"]["framework"] == "csm"
    assert (config["model"]["heads"], config["model"]["width"]) == (2, 24)
    assert config["train"]["lr"] == 1e-3
    assert config["train"]["weight_decay"] == 0.1


def test_json_is_all_that_stdout_holds(folder, capsys):
    arguments = ["--config", str(folder / "run.toml"), "--out", str(folder / "json"), "--json"]
    assert main(["pretrain", *arguments, "--framework", "csm"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith(
        "chose train.checkpoint_every 1, for a run of 4 steps\n"
        "computing on CPU, precision fp32, attention in plain PyTorch\n"
    )
    summary = json.loads(printed.out)
    assert summary["run"] == str(folder / "json")
    assert summary["step"] == 4
    assert {"loss", "val_loss", "val_mean_l1", "val_last_l1"} <= summary.keys()


def test_another_configuration_is_an_error_of_one_line(folder, capsys):
    assert main(["pretrain", "--config", str(folder / "run.toml"), "--train.lr", "2e-3"]) == 1
    error = capsys.readouterr().err
    assert "model.framework is 'seq-bert', was 'csm'" in error
    assert "train.lr is 0.002, was 0.001" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nwidht = 3\n", "unknown setting 'model.widht'; did you mean 'model.width'"),
        ("[model\n", "bad.toml: "),
        ("model = 3\n", "model: got 3, expected a table"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, capsys, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    assert main(["pretrain", "store", "--out", "run", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert message in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nwidth = 'x'\n", "model.width: got 'x', expected a whole number"),
        ("[model]\nwidth = 100\n", "not divisible"),
    ],
)
def test_a_wrong_value_in_a_file_is_a_usage_error(tmp_path, capsys, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    assert main(["pretrain", "store", "--out", "run", f"--config={path}"]) == 2
    assert message in capsys.readouterr().err


def test_no_file_and_no_store(tmp_path, capsys):
    assert main(["pretrain", "--out", str(tmp_path), "--config", str(tmp_path / "absent.toml")]) == 2
    assert "absent.toml" in capsys.readouterr().err
    assert main(["pretrain", "--out", str(tmp_path)]) == 2
    assert "brainflow pretrain STORE --out RUN" in capsys.readouterr().err
    assert main(["pretrain", str(tmp_path / "absent"), "--out", str(tmp_path / "run")]) == 1
    assert "absent" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["store", "run.toml"])
def test_a_run_neither_goes_into_a_store_nor_onto_a_file(folder, capsys, out):
    before = sorted((folder / "store").iterdir())
    arguments = ["--config", str(folder / "run.toml"), "--out", str(folder / out)]
    assert main(["pretrain", *arguments]) == 1
    assert "choose another --out" in capsys.readouterr().err
    assert sorted((folder / "store").iterdir()) == before


def test_plot_overlays_runs(folder, capsys):
    picture = folder / "loss.png"
    assert main(["plot", str(folder / "run"), str(folder / "run"), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{picture}\n"


def test_plot_makes_a_page_that_holds_everything(folder, capsys):
    page = folder / "runs.html"
    assert main(["plot", str(folder / "run"), "--out", str(page)]) == 0
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 2  # curves, and a reconstruction of each run
    assert "L1 of the last value" in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text


def test_a_reconstruction_is_drawn_at_each_validation(folder):
    drawn = list((folder / "run" / "reconstructions").iterdir())
    assert [path.name for path in drawn] == ["step-00000004.png"]
    assert drawn[0].read_bytes().startswith(b"\x89PNG")


def test_a_toml_file_may_switch_settings_on_and_off(folder, tmp_path):
    text = (folder / "run.toml").read_text().replace("log_every = 2", "log_every = 2\nplot = false")
    text = text.replace("layers = 1", "layers = 1\nrecompute = true").replace(
        str(folder / "run"), str(tmp_path)
    )
    (tmp_path / "run.toml").write_text(text)
    assert main(["pretrain", "--config", str(tmp_path / "run.toml")]) == 0
    config = json.loads((tmp_path / "train_config.json").read_text())
    assert config["model"]["recompute"] is True
    assert config["train"]["plot"] is False
    assert not (tmp_path / "reconstructions").exists()


def test_plot_of_a_folder_that_is_no_run(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 1
    assert "brainflow pretrain" in capsys.readouterr().err


def test_plot_without_matplotlib_names_the_extra(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", str(folder / "run")]) == 1
    assert "brainflow-fmri[report]" in capsys.readouterr().err
