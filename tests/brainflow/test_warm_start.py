"""Where a training begins: presets, language-model weights, weights of an earlier model, frozen parts."""

import dataclasses
import sys
import types

import numpy as np
import pytest
import torch

from brainflow.cli import pretrain as command
from brainflow.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from brainflow.frameworks import build, framework_names, model_config
from brainflow.frameworks.base import PARTS, freeze
from brainflow.models.transformer import Layout
from brainflow.pretrained.format import load_pretrained, save_pretrained
from brainflow.pretrained.warm_start import load_initial
from brainflow.recipes import SIZES, preset, pretraining
from brainflow.storage import StoreWriter
from brainflow.training.loop import pretrain

SIZE = {"networks": 4, "width": 16, "layers": 2, "heads": 2, "max_positions": 12}


def parse(*words):
    import tyro

    given = command.arguments(["store", "--out", "run", *words])
    return command.pretrain_config(tyro.cli(command.Args, args=given, default=command.defaults(given)))


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_sets_sizes_and_the_command_line_wins(name):
    layers, width, heads, lr = SIZES[name]
    lr *= 2 if name == "tiny" else 1  # of csm
    config = parse("--preset", name)
    assert (config.model.layers, config.model.width, config.model.heads) == (layers, width, heads)
    assert config.train.lr == lr
    changed = parse("--preset", name, "--model.layers", "7", "--train.lr", "0.5")
    assert (changed.model.layers, changed.model.width, changed.train.lr) == (7, width, 0.5)


def test_the_largest_preset_has_a_billion_weights():
    with torch.device("meta"):
        model = build(model_config(**preset("1b")["model"]))
    assert 1.0e9 < sum(p.numel() for p in model.parameters()) < 1.1e9


@pytest.mark.parametrize(
    ("framework", "lr", "batch", "layers", "dropout"),
    [
        ("csm", 5e-4, 192, 4, 0.1),
        ("seq-bert", 1e-4, 96, 4, 0.1),
        ("net-bert", 1e-4, 96, 4, 0.1),
        ("autoencoder", 2e-4, 192, 2, 0.2),
    ],
)
def test_published_runs_are_whole_configurations(framework, lr, batch, layers, dropout):
    config = pretraining("store", "run", framework=framework)
    assert config == parse("--preset", "published", "--framework", framework)
    assert (config.train.lr, config.data.batch_size) == (lr, batch)
    assert (config.model.layers, config.model.dropout) == (layers, dropout)


def test_a_preset_takes_the_framework_of_the_toml_file(tmp_path):
    (tmp_path / "run.toml").write_text('[model]\nframework = "autoencoder"\nwidth = 96\n')
    config = parse("--preset", "published", "--config", str(tmp_path / "run.toml"))
    assert (config.model.layers, config.model.width, config.train.lr) == (2, 96, 2e-4)


def test_wrong_presets_are_named():
    with pytest.raises(ValueError, match="got 'huge', expected one of tiny"):
        preset("huge")
    with pytest.raises(ValueError, match="expected one of csm"):
        preset("tiny", "gan")
    with pytest.raises(ValueError, match="got 1b for autoencoder, expected one of tiny, small, base, pub"):
        preset("1b", "autoencoder")


def language_model(kind, folder, places=20, **changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    if kind == "gpt2":
        sizes = {"vocab_size": 5, "n_positions": places, "n_embd": 16, "n_layer": 2, "n_head": 2, **changes}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    else:
        sizes = {
            "vocab_size": 5, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 64, "max_position_embeddings": places, **changes,
        }  # fmt: skip
        model = transformers.BertForPreTraining(transformers.BertConfig(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(("kind", "framework"), [("gpt2", "csm"), ("bert", "seq-bert"), ("bert", "net-bert")])
def test_language_model_weights_give_the_language_models_states(tmp_path, kind, framework):
    model = language_model(kind, tmp_path)
    module = build(ModelConfig(framework=framework, **SIZE)).eval()
    before = module.embedding.project.weight.clone()
    load_initial(module, str(tmp_path))
    x = torch.randn(7, 16)
    layout = Layout(
        cu_seqlens=torch.tensor([0, 7], dtype=torch.int32), max_seqlen=7, positions=torch.arange(7)
    )
    body = model.transformer if kind == "gpt2" else model.bert
    expected = body(inputs_embeds=x[None]).last_hidden_state[0]
    torch.testing.assert_close(module.transformer(x, layout), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(module.embedding.project.weight, before)
    if kind == "bert":
        assert torch.equal(module.is_next.pooler.weight, body.pooler.dense.weight)


def test_old_names_of_layer_norms_are_known(tmp_path):
    from safetensors.torch import load_file, save_file

    model = language_model("bert", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    save_file(old, tmp_path / "model.safetensors")
    module = build(ModelConfig(framework="seq-bert", **SIZE))
    load_initial(module, str(tmp_path))
    assert torch.equal(module.transformer.norm.weight, model.bert.embeddings.LayerNorm.weight)


def test_weights_that_do_not_fit_say_which_settings_do(tmp_path):
    language_model("gpt2", tmp_path / "gpt", places=8)
    with pytest.raises(
        ValueError, match=r"need --model\.layers 2 --model\.width 16 --model\.max-positions 8$"
    ):
        load_initial(build(ModelConfig(**{**SIZE, "layers": 3, "width": 32})), str(tmp_path / "gpt"))
    with pytest.raises(ValueError, match=r"need .*--model\.norm layer"):
        load_initial(build(ModelConfig(**{**SIZE, "max_positions": 8}, norm="rms")), str(tmp_path / "gpt"))
    with pytest.raises(ValueError, match=r"is a 'gpt2' model, but model\.framework=seq-bert"):
        load_initial(build(ModelConfig(framework="seq-bert", **SIZE)), str(tmp_path / "gpt"))
    with pytest.raises(FileNotFoundError, match=r"init: .*nowhere: no config\.json there"):
        load_initial(build(ModelConfig(**SIZE)), str(tmp_path / "nowhere"))


def test_a_mistyped_folder_is_named_where_the_hub_has_it_neither(monkeypatch):
    def absent(name, **_):
        raise OSError("404")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=absent))
    with pytest.raises(FileNotFoundError, match="init: mistyped is neither a model's folder here nor"):
        load_initial(build(ModelConfig(**SIZE)), "mistyped")


def test_pickles_are_not_read(tmp_path):
    language_model("gpt2", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin, are not"):
        load_initial(build(ModelConfig(**SIZE)), str(tmp_path))


@pytest.mark.parametrize("framework", framework_names())
def test_every_parameter_belongs_to_a_part(framework):
    model = build(ModelConfig(framework=framework, **SIZE))
    for part in PARTS:
        model.requires_grad_(True)
        freeze(model, part)
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen
        assert frozen != set(dict(model.named_parameters()))
    model.requires_grad_(True)
    freeze(model, "embedder, decoder-without-heads,unembedder")
    left = {
        name.split(".")[0] + "." + name.split(".")[1]
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    heads = {"csm": set(), "autoencoder": {"encoder.pooler"}}
    assert left == heads.get(framework, {"is_next.pooler", "is_next.output"})
    freeze(model, "decoder")
    assert not any(p.requires_grad for p in model.parameters())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("initial") / "store")
    rng = np.random.default_rng(0)
    places = rng.uniform(-60, 60, (4, 3))
    with StoreWriter.create(path, networks=4, dtype="float32", network_coordinates=places) as writer:
        for run in range(4):
            bold = rng.standard_normal((40, 4)).astype(np.float32)
            writer.append(bold, t_r=2.0, dataset="noise", subject=str(run), task="rest", run="1")
    return path


def run_config(store, out, train, **model):
    return PretrainConfig(
        store=store,
        out=str(out),
        device="cpu",
        model=ModelConfig(**{**SIZE, "networks": 1024}, **model),
        data=DataConfig(batch_size=4, seq_min=6, seq_max=9, loader="host", validation_batches=1),
        train=TrainConfig(steps=3, log_every=1, validate_every=3, checkpoint_every=3, plot=False, **train),
    )


def test_training_begins_at_the_weights_and_leaves_frozen_parts_alone(store, tmp_path):
    first = build(ModelConfig(**SIZE))
    save_pretrained(first, tmp_path / "first")
    train = {"init": str(tmp_path / "first"), "freeze": "embedder,decoder", "lr": 0.1}
    folder = pretrain(run_config(store, tmp_path / "run", train), quiet=True)
    trained = load_pretrained(folder).state_dict()
    changed = {name for name, value in first.state_dict().items() if not torch.equal(value, trained[name])}
    assert changed == {"unembedding.weight", "unembedding.bias"}
    with pytest.raises(ValueError, match="leaves nothing to train"):
        pretrain(run_config(store, tmp_path / "none", {"freeze": "embedder,decoder,unembedder"}), quiet=True)
    with pytest.raises(ValueError, match=r"train\.freeze: got 'head'"):
        TrainConfig(freeze="head")


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ("z-scored per run and network", ""),
        ("", ""),
        ("spatial", "normalisation: the model saw"),
    ],
)
def test_initial_weights_of_data_that_were_normalised_otherwise_are_named(tmp_path, caplog, theirs, said):
    path = str(tmp_path / "store")
    with StoreWriter.create(
        path, networks=4, dtype="float32", normalisation="z-scored per run and network"
    ) as writer:
        for run in range(4):
            bold = np.random.default_rng(run).standard_normal((40, 4)).astype(np.float32)
            writer.append(bold, t_r=2.0, dataset="noise", subject=str(run), task="rest", run="1")
    save_pretrained(build(ModelConfig(**SIZE)), tmp_path / "first", {"data": {"normalisation": theirs}})
    config = run_config(path, tmp_path / "run", {"init": str(tmp_path / "first")})
    pretrain(config, quiet=True)
    assert said in caplog.text
    assert bool(said) == ("normalisation" in caplog.text)
    caplog.clear()
    pretrain(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3)), quiet=True)
    assert "normalisation" not in caplog.text  # it continues: these weights are not read any more


def test_coordinates_come_from_the_store_and_are_trained(store, tmp_path):
    folder = pretrain(run_config(store, tmp_path / "run", {"lr": 0.1}, coordinates=True), quiet=True)
    module = load_pretrained(folder)
    assert module.embedding.places.abs().sum() > 0
    assert module.embedding.place.weight.abs().sum() > 0
    assert dataclasses.asdict(module.config)["coordinates"] is True


def test_coordinates_that_are_not_there_are_asked_for(tmp_path):
    path = str(tmp_path / "store")
    with StoreWriter.create(path, networks=4, dtype="float32") as writer:
        for run in range(4):
            bold = np.random.default_rng(run).standard_normal((40, 4)).astype(np.float32)
            writer.append(bold, t_r=2.0, dataset="noise", subject=str(run), task="rest", run="1")
    with pytest.raises(ValueError, match="no network coordinates"):
        pretrain(run_config(path, tmp_path / "run", {}, coordinates=True), quiet=True)
    with pytest.raises(ValueError, match=r"expected \[4, 3\] in mm"):
        build(ModelConfig(**SIZE, coordinates=True)).embedding.set_coordinates(np.zeros((5, 3)))


def test_adapting_leaves_frozen_parts_alone():
    from brainflow.decoding.fit import AdaptConfig, fit_decoder
    from brainflow.decoding.windows import ArrayWindows

    bold = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    source = ArrayWindows(np.split(bold, 6), t_r=2.0, labels=np.arange(6) % 2)
    module = build(ModelConfig(**SIZE))
    config = AdaptConfig(published=True, steps=3, batch_size=6, lr=0.1, freeze="embedder")
    decoder, _ = fit_decoder(module, source, np.arange(6), config, classes=2, device=torch.device("cpu"))
    for name, value in decoder.module.named_parameters():
        same = torch.equal(value, dict(module.named_parameters())[name])
        assert same or name.startswith("transformer."), name
        assert not (same and name.startswith("transformer.blocks")), name
    with pytest.raises(ValueError, match="freeze: got 'embedder' with mode lora"):
        AdaptConfig(mode="lora", freeze="embedder")
