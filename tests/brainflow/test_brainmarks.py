"""The plug-in for Brainmarks, by Brainmarks' own smoke test and by what that cannot see."""

import importlib.util
from pathlib import Path

import pytest
import torch

from brainflow.config import ModelConfig
from brainflow.frameworks import build, framework_names
from brainflow.pretrained.format import save_pretrained

ROOT = Path(__file__).parents[2]
DATA = {"parcellation": "Schaefer400n17", "normalisation": "z-scored per run and network", "t_r": [2.0]}

SCALED = {"length": [100, 100], "variance": 900.0, "spectrum": 0.5, "correlation": 0.2}


def make(folder, framework="csm", data=DATA, networks=400):
    torch.manual_seed(0)
    model = ModelConfig(framework=framework, networks=networks, width=8, layers=1, heads=2, max_positions=64)
    return save_pretrained(build(model), folder, {"data": data})


@pytest.fixture
def plugin(monkeypatch):
    """The plug-in, loaded from its file: the checkout is no place that an installed package looks in."""
    pytest.importorskip("brainmarks.models.base", reason="brainmarks is not installed (see docs/sharing.md)")
    path = ROOT / "brainmarks" / "models" / "brainflow_fmri.py"
    spec = importlib.util.spec_from_file_location("brainflow_in_brainmarks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sample(time, t_r=2.0, networks=400):
    bold = torch.randn(time, networks, generator=torch.Generator().manual_seed(time))
    return {"bold": bold, "tr": t_r, "mean": torch.zeros(1, networks), "std": torch.ones(1, networks)}


@pytest.mark.parametrize("framework", framework_names())
def test_their_smoke_test_passes(plugin, tmp_path, monkeypatch, framework):
    from brainmarks.models.test_models import test_model as smoke_test

    monkeypatch.setenv("BRAINFLOW_MODEL", str(make(tmp_path / "m", framework)))
    for time in (16, 160):  # as `python -m brainmarks.models.test_models brainflow` calls it
        smoke_test("brainflow", time)


def test_embeddings_are_those_of_the_package(plugin, tmp_path):
    folder = make(tmp_path / "m")
    transform, model = plugin.brainflow(str(folder))
    assert model.__space__ == "schaefer400"
    runs = [transform(sample(time)) for time in (40, 40)]
    runs[1]["bold"] = runs[1]["bold"] * 2
    batch = {"bold": torch.stack([run["bold"] for run in runs]), "tr": torch.tensor([2.0, 2.0])}
    found = model(batch)
    width = model.module.config.width
    assert found.patch_embeds.shape == (2, 40, 2 * width)
    last = model.module.embed(batch["bold"], 2.0)  # the mean over time of the last states
    assert torch.allclose(found.cls_embeds[:, 0, width:], last, atol=1e-5)
    # a run longer than any window of training is cut: its first half is embedded as if it stood alone
    long = transform(sample(100))["bold"][None]
    whole = model({"bold": long, "tr": torch.tensor([2.0])}).patch_embeds
    half = model({"bold": long[:, :50], "tr": torch.tensor([2.0])}).patch_embeds
    assert torch.allclose(whole[:, :50], half, atol=1e-5)


def test_data_are_brought_to_what_the_model_saw(plugin, tmp_path):
    gsr = {**DATA, "normalisation": "global signal regressed out, z-scored per run and network"}
    transform, _ = plugin.brainflow(str(make(tmp_path / "m", data=gsr)))
    once = sample(200, t_r=1.0)
    once["bold"] += torch.randn(200, 1)
    done = transform(once)
    assert done["tr"] == 2.0
    assert len(done["bold"]) == 100
    assert done["bold"].mean(dim=1).abs().max() < 0.05
    assert torch.allclose(done["bold"].std(dim=0), torch.ones(400), atol=1e-3)
    scaled = {"parcellation": "Schaefer400n17", "fingerprint": SCALED}
    transform, _ = plugin.brainflow(str(make(tmp_path / "raw", data=scaled)))
    with pytest.raises(ValueError, match="does not fit the model: normalisation"):
        transform(sample(40))


def test_parcels_in_another_order_are_refused(plugin, tmp_path, monkeypatch):
    monkeypatch.delenv("BRAINFLOW_MODEL", raising=False)
    with pytest.raises(ValueError, match="set BRAINFLOW_MODEL"):
        plugin.brainflow()
    folder = str(make(tmp_path / "m", data={**DATA, "parcellation": "Schaefer400"}))
    with pytest.raises(ValueError, match="400 networks of 'Schaefer400', expected one of Schaefer400n17"):
        plugin.brainflow(folder)
    assert plugin.brainflow(folder, space="schaefer400")[1].__space__ == "schaefer400"
