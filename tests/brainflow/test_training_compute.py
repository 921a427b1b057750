"""Which precision and which attention kernel a run takes, and what it says; a GPU is only pretended."""

import dataclasses
import json
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from brainflow.cli import doctor
from brainflow.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from brainflow.kernels.varlen_attention import backends
from brainflow.models.transformer import Layout, Transformer
from brainflow.recipes import SIZES, pretraining
from brainflow.training.compute import compiles, describe_compute, settle_precision
from brainflow.training.run_dir import saved_config

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def h100(monkeypatch):
    """An H100 with nothing but torch and triton installed."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(backends, "_capability", lambda index: (9, 0))
    for name in ("fa2", "fa4"):
        monkeypatch.setattr(backends.BACKENDS[name], "installed", lambda: False)
    with FakeTensorMode():
        yield


def config_of(framework="csm", **changes):
    model = {key: changes.pop(key) for key in ("attention", "width", "heads") if key in changes}
    return PretrainConfig(
        store="store",
        out="out",
        data=DataConfig(seq_max=changes.pop("seq_max", 50)),
        model=ModelConfig(framework=framework, **model),
        train=TrainConfig(**changes),
    )


def settled(config, folder, device=GPU, resume="auto"):
    return settle_precision(config, folder, device, resume=resume)


def test_gpus_take_bf16_where_they_have_it_and_cpus_fp32(h100, tmp_path, monkeypatch):
    assert settled(config_of(), tmp_path).train.precision == "bf16"
    assert settled(config_of(), tmp_path, CPU).train.precision == "fp32"
    assert settled(config_of(precision="tf32"), tmp_path).train.precision == "tf32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert settled(config_of(), tmp_path).train.precision == "fp32"


def test_a_run_continues_in_the_precision_that_it_began_with(h100, tmp_path):
    (tmp_path / "train_config.json").write_text(json.dumps({"train": {"precision": "fp32"}}))
    assert settled(config_of(), tmp_path).train.precision == "bf16"  # it never took a step
    (tmp_path / "checkpoints").mkdir()
    assert settled(config_of(), tmp_path).train.precision == "fp32"
    assert settled(config_of(), tmp_path, resume="never").train.precision == "bf16"


@pytest.mark.parametrize(("switch", "setting"), [(False, "off"), (True, "on")])
def test_a_run_that_began_when_compiling_was_a_switch_continues(tmp_path, switch, setting):
    (tmp_path / "train_config.json").write_text(json.dumps({"train": {"compile": switch}}))
    assert saved_config(tmp_path)["train"]["compile"] == setting


@pytest.mark.parametrize("preset", [*SIZES, "published"])
@pytest.mark.parametrize("framework", ["csm", "seq-bert", "net-bert"])
def test_every_preset_reaches_a_kernel_for_gpus_with_nothing_but_torch(h100, tmp_path, preset, framework):
    config = settled(pretraining("store", "out", preset_name=preset, framework=framework), tmp_path)
    said = describe_compute(config, GPU)
    kernel = "torch" if preset == "1b" else "window"  # heads of 128
    assert said.startswith(f"NVIDIA H100 80GB HBM3, precision bf16, attention {kernel} (the first kernel")
    assert ("torch cannot drop attention weights, so dropout 0.1 is" in said) == (kernel == "torch")
    assert said.endswith("; blocks compiled")


def test_blocks_are_compiled_on_gpus_and_where_it_is_asked_for():
    assert [compiles(wanted, GPU) for wanted in ("auto", "on", "off")] == [True, True, False]
    assert [compiles(wanted, CPU) for wanted in ("auto", "on", "off")] == [False, True, False]


def test_long_windows_go_to_a_flash_kernel(h100):
    def said(framework, seq_max, **changes):
        return describe_compute(config_of(framework, seq_max=seq_max, **changes), GPU)

    # windows have up to seq_max - 1 time points
    assert "attention window" in said("csm", 65, precision="bf16")
    assert "attention torch" in said("csm", 66, precision="bf16")  # two streams
    assert "attention window" in said("seq-bert", 126, precision="bf16")  # and three special tokens
    assert "attention torch" in said("seq-bert", 127, precision="bf16")
    assert "attention window" in said("seq-bert", 62, precision="tf32")
    assert "attention window" in said("csm", 17, precision="fp32")
    assert "attention torch (as asked for)" in said("csm", 50, precision="bf16", attention="torch")


def test_the_autoencoder_has_no_attention(h100):
    said = describe_compute(config_of("autoencoder", precision="fp32"), GPU)
    assert said.endswith("not built of transformer blocks")
    assert (
        describe_compute(config_of(precision="fp32"), CPU)
        == "CPU, precision fp32, attention in plain PyTorch"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp32"}, r"no kernel for GPUs runs .*torch\.float32.*--train\.precision bf16"),
        ({"precision": "tf32"}, r"take --train\.precision bf16 if .* or --model\.attention fallback"),
        ({"precision": "bf16", "width": 768, "heads": 64, "seq_max": 200}, "got head_dim 12"),
        ({"precision": "bf16", "attention": "fa2"}, "model.attention: got fa2; .* not installed"),
        ({"precision": "fp32", "attention": "torch"}, "model.attention: got torch; q: got torch.float32"),
    ],
)
def test_the_fallback_on_a_gpu_has_to_be_asked_for(h100, changes, message):
    with pytest.raises(ValueError, match=message):
        describe_compute(config_of(**changes), GPU)
    asked = describe_compute(config_of(**(changes | {"attention": "fallback"})), GPU)
    assert "attention fallback (as asked for); it stops the GPU and is many times as slow" in asked


def test_an_old_gpu_is_named(h100, monkeypatch):
    monkeypatch.setattr(backends, "_capability", lambda index: (7, 0))
    with pytest.raises(ValueError, match=r"torch: it needs compute capability 8\.0, this GPU has 7\.0"):
        describe_compute(config_of(precision="fp16"), GPU)


def test_flash_attention_2_is_preferred_because_it_drops_weights(h100, monkeypatch):
    for name in ("fa2", "fa4"):
        monkeypatch.setattr(backends.BACKENDS[name], "installed", lambda: True)
    q = torch.empty(2, 12, 64, dtype=torch.bfloat16, device=GPU)
    assert backends.settle(q, 1, 129, 0.1, None) == ("fa2", 0.1)
    assert backends.settle(q, 1, 129, 0.0, None) == ("fa4", 0.0)
    assert backends.settle(q, 1, 129, 0.1, "fa4") == ("fa4", 0.0)
    assert backends.settle(q, 1, 129, 0.1, "fallback") == ("fallback", 0.1)
    with pytest.raises(ValueError, match="impl: got 'fa9', expected one of"):
        backends.settle(q, 1, 129, 0.1, "fa9")


def test_doctor_names_the_kernel_that_a_model_would_take(h100, monkeypatch):
    assert doctor._attention() == "plain PyTorch (no GPU)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor._attention() == "window up to 128 tokens, torch beyond, in bf16 and fp16"
    monkeypatch.setattr(backends.BACKENDS["fa2"], "installed", lambda: True)
    assert doctor._attention() == "window up to 128 tokens, fa2 beyond, in bf16 and fp16"
    monkeypatch.setattr(backends, "_capability", lambda index: (7, 5))
    said = doctor._attention()
    assert said.startswith("fallback (window: max_seqlen: got 129")
    assert "fa4: it is not installed; fa2: it needs compute capability 8.0, this GPU has 7.5" in said


def test_a_model_without_a_flash_kernel_warns_once_and_computes(h100):
    backends._warn.cache_clear()
    q = torch.empty(2, 12, 64, device=GPU)
    with pytest.warns(UserWarning, match=r"no kernel for GPUs can compute this.*torch\.float32"):
        assert backends.settle(q, 1, 129, 0.1, None) == ("fallback", 0.1)
    with warnings.catch_warnings(action="error"):
        backends.settle(q, 1, 129, 0.1, None)


def test_a_kernel_for_gpus_does_not_keep_a_model_from_running_on_the_cpu():
    config = ModelConfig(width=16, heads=2, layers=1, attention="fa4")
    layout = Layout(
        cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32),
        max_seqlen=3,
        positions=torch.tensor([0, 1, 0, 1, 2]),
    )
    torch.manual_seed(0)
    one = Transformer("gpt", config).eval()
    other = Transformer("gpt", dataclasses.replace(config, attention="auto")).eval()
    other.load_state_dict(one.state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(one(x, layout), other(x, layout))
