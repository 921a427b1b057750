"""Models, decoders, checkpoints and runs of strangers: refused by name, no memory, nothing outside.

Run as a program, this file goes through the cases that ask for much memory under a limit of it.
"""

import json
import math
import os
import pickle  # noqa: TID251 - what must not be unpickled
import resource
import shutil
import struct
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import brainflow
from brainflow.config import ModelConfig
from brainflow.decoding.finetune import Decoder
from brainflow.decoding.heads import make_head
from brainflow.decoding.persist import HEAD, load_decoder, save_decoder
from brainflow.decoding.readout import Readout
from brainflow.frameworks import CSMConfig, build
from brainflow.pretrained.format import CONFIG, WEIGHTS, load_pretrained, save_pretrained
from brainflow.pretrained.legacy import export_checkpoint, import_checkpoint
from brainflow.pretrained.warm_start import load_initial
from brainflow.storage.files import replacing
from brainflow.training import checkpoint
from brainflow.training.metrics import METRICS, RunLog
from brainflow.training.run_dir import exclusive

SIZES = {"networks": 6, "width": 8, "layers": 1, "heads": 2, "max_positions": 16, "max_seconds": 30.0}
DATA = {
    "parcellation": "six",
    "t_r": [2.0],
    "network_names": list("abcdef"),
    "datasets": {"d": 3},
    "training_subjects": ["d/1", "d/2"],
    "preprocessing": {"filter": "none"},
    "fingerprint": {"length": [10, 20], "variance": 1.0, "spectrum": 0.5, "correlation": 0.1},
}
MORE_MEMORY = 512 * 2**20


def make_decoder(folder, mode="linear"):
    torch.manual_seed(0)
    module = build(ModelConfig(**SIZES))
    head = make_head(mode, width=8, classes=2, examples=5)
    pooling = "tokens" if mode == "attentive" else "mean"
    facts = {"data": DATA, "step": 3, "pretrain": {"store": "/nowhere/store", "out": "/nowhere/run"}}
    decoder = Decoder(module, head, Readout(pooling=pooling))
    return save_decoder(decoder, folder, mode=mode, kind=mode, classes=("a", "b"), facts=facts)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return make_decoder(tmp_path_factory.mktemp("decoder") / "d")


@pytest.fixture
def folder(decoder, tmp_path):
    return Path(shutil.copytree(decoder, tmp_path / "d"))


def edit(folder, change):
    """Change config.json; without digests, so that what the weights themselves say is looked at."""
    config = json.loads((folder / CONFIG).read_text())
    config.pop("sha256", None)
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def put(section, name, value):
    return lambda folder: edit(folder, lambda config: config[section].__setitem__(name, value))


def tensors(change):
    def damage(folder):
        edit(folder, lambda config: None)
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return damage


def header(change):
    """Change the JSON header of the weights, the length before it fitting."""

    def damage(folder):
        edit(folder, lambda config: None)
        data = (folder / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        found = change(json.loads(data[8 : 8 + size]))
        text = found if isinstance(found, bytes) else json.dumps(found).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return damage


def entry(change):
    """Change what the header says of one tensor."""

    def damaged(found):
        name = min(name for name in found if name != "__metadata__")
        return {**found, name: {**found[name], **change(found[name])}}

    return header(damaged)


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def instead(name, make):
    def damage(folder):
        (folder / name).unlink()
        make(folder / name)

    return damage


class Gadget:
    """A pickle that would leave a file behind."""

    def __reduce__(self):
        return (os.system, ("touch executed",))


ODD = {"none": None, "text": "evil", "list": [], "table": {}, "nan": math.nan, "10**400": 10**400}
CONFIGS = {
    f"model.{field.name}={name}": put("model", field.name, value)
    for field in fields(CSMConfig)
    for name, value in ODD.items()
}
CONFIGS |= {
    f"model.{name}={value!r}": put("model", name, value)
    for name, values in {
        "width": [-2, 0, 1.5, True, 9],
        "layers": [-1, 0, True],
        "heads": [0, 3, 10**9],
        "networks": [0, -1],
        "max_seconds": [-1, 0, math.inf],
        "time_resolution": [0, -1, math.inf],
        "dropout": [1.0, -0.1],
        "unknown": [1],
        "__class__": ["x"],
    }.items()
    for value in values
}
CONFIGS |= {
    f"{section}.{name}={value!r}": put(section, name, value)
    for section, names in {
        "data": {
            "t_r": [["x"], [0], 2.0, [math.nan]],
            "parcellation": [5, ["six"]],
            "network_names": [5, [1, 2]],
            "datasets": [[1], {"d": "x"}, {"d": -1}],
            "training_subjects": ["d/1", [None]],
            "preprocessing": ["x", [1]],
            "fingerprint": [1, {"length": 3}, {"variance": "x"}],
        },
        "decoder": {
            "mode": ["evil", 5, None, "mlp", "attentive", ["linear"]],
            "pooling": ["evil", None, 5, "tokens"],
            "classes": [[], 5, ["a"], ["a", "a"], [{}, {}], ["a", 1], None],
            "examples": [-1, "x", None],
        },
        "pretrain": {"store": [5], "data": [[1]], "train": ["x"]},
    }.items()
    for name, values in names.items()
    for value in values
}
CONFIGS |= {
    f"{section} is a list": lambda folder, section=section: edit(
        folder, lambda config: config.__setitem__(section, [1])
    )
    for section in (
        "model",
        "data",
        "decoder",
        "pretrain",
        "legacy",
        "decoding",
        "estimator",
        "sha256",
        "step",
    )
}
CONFIGS |= {
    f"config.json: {name}": content(CONFIG, data)
    for name, data in {
        "empty": b"",
        "cut": b"{",
        "list": b"[]",
        "deep": b"[" * 200_000,
        "deep in model": b'{"format":1,"model":{"width":' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
        "not UTF-8": b"\xff\xfe",
        "5,000 digits": b'{"format":1,"model":{"width":' + b"9" * 5000 + b"}}",
        "no model": b'{"format":1,"model":NaN}',
        "another format": b'{"format":[1],"model":{}}',
        "pickle": pickle.dumps(Gadget()),
    }.items()
}
CONFIGS |= {
    "config.json: pipe": instead(CONFIG, os.mkfifo),
    "config.json: folder": instead(CONFIG, os.mkdir),
    "head: gone": lambda folder: (folder / HEAD).unlink(),
}
FLOAT = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
STATES = {
    "extra": tensors(lambda t: {**t, "x": torch.zeros(1)}),
    "missing": tensors(lambda t: {name: t[name] for name in sorted(t)[1:]}),
    "other shape": tensors(lambda t: {**t, min(t): torch.zeros(1)}),
    **{
        f"one {name}": tensors(lambda t, v=v: {**t, min(t): torch.full_like(t[min(t)], v)})
        for name, v in FLOAT.items()
    },
    **{
        str(kind): tensors(lambda t, kind=kind: {name: one.to(kind) for name, one in t.items()})
        for kind in (torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    },
    "type lies": entry(lambda one: {"dtype": "F64"}),
    "type unknown": entry(lambda one: {"dtype": "OBJECT"}),
    "shape negative": entry(lambda one: {"shape": [-1]}),
    "shape huge": entry(lambda one: {"shape": [2**62, 2**62]}),
    "offsets beyond": entry(lambda one: {"data_offsets": [0, 2**40]}),
    "offsets reversed": entry(lambda one: {"data_offsets": one["data_offsets"][::-1]}),
    "header deep": header(lambda found: b"[" * 100_000),
    "header list": header(lambda found: b"[]"),
    "header not UTF-8": header(lambda found: b"\xff\xfe"),
    **{
        name: content(WEIGHTS, data)
        for name, data in {
            "empty": b"",
            "header longer than 2**62": struct.pack("<Q", 2**63) + b"{}",
            "pickle": pickle.dumps(Gadget()),
            "zeros": bytes(100),
        }.items()
    },
    "cut": lambda folder: os.truncate(folder / WEIGHTS, 1000),
    "pipe": instead(WEIGHTS, os.mkfifo),
    "folder": instead(WEIGHTS, os.mkdir),
}
# Each asks for much more memory than there is, or for endless reading.
HUGE = {
    **{
        f"model.{name}={value}": put("model", name, value)
        for name, values in {
            "width": [10**6, 10**12],
            "layers": [10**5, 10**9, 2**62],
            "networks": [10**9, 10**12],
            "max_positions": [10**9, 10**12],
            "feedforward": [10**9],
            "max_seconds": [1e18, 1e300],
            "time_resolution": [1e-12, 1e-300],
        }.items()
        for value in values
    },
    "knn of 10**12 windows": lambda folder: edit(
        folder, lambda config: config["decoder"].update(mode="knn", examples=10**12)
    ),
    "knn of 2**62 windows": lambda folder: edit(
        folder, lambda config: config["decoder"].update(mode="knn", examples=2**62)
    ),
    "a layer that is not there": put("decoder", "layer", 7),
    "more bins than memory": put("decoder", "bins", 2**40),
    "no bins": put("decoder", "bins", 0),
    "a head of another mode": put("decoder", "head", "attentive"),
    "a million classes": put("decoder", "classes", [str(i) for i in range(10**6)]),
    "a header of 10 GB": content(WEIGHTS, struct.pack("<Q", 10**10) + b"{}"),
    "config.json: 64 MiB": lambda folder: os.truncate(folder / CONFIG, 2**26),
    "config.json: ten million lists": content(CONFIG, b"[" + b"[]," * 10**7 + b"[]]"),
    "config.json: /dev/zero": instead(CONFIG, lambda path: path.symlink_to("/dev/zero")),
    "weights: /dev/zero": instead(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
    "head: /dev/zero": instead(HEAD, lambda path: path.symlink_to("/dev/zero")),
}


def files_below(folder):
    """Name → bytes of a folder; links and pipes by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        for path in folder.rglob("*")
    }


def refused(folder, act):
    """Do what must be refused: by an error that names a file of the folder, which stays as it is."""
    before = files_below(folder)
    with pytest.raises((ValueError, OSError)) as caught:
        act()
    text = str(caught.value)
    assert folder.name in text, text
    assert files_below(folder) == before
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_lies(folder, name):
    CONFIGS[name](folder)
    refused(folder, lambda: load_decoder(folder))


@pytest.mark.parametrize("name", STATES)
def test_weights_that_do_not_fit(folder, name):
    STATES[name](folder)
    refused(folder, lambda: load_pretrained(folder))
    module = build(ModelConfig(**SIZES))
    refused(folder, lambda: load_initial(module, str(folder)))


@pytest.mark.parametrize("mode", ["linear", "mlp", "knn", "attentive", "finetune"])
def test_a_head_that_does_not_fit(tmp_path, mode):
    folder = make_decoder(tmp_path / "d", mode)
    assert load_decoder(folder)[1]["decoder"]["mode"] == mode
    edit(folder, lambda config: None)
    good = load_file(folder / HEAD)
    for damaged in (
        {**good, "x": torch.zeros(1)},
        {name: one[..., :1].clone() for name, one in good.items()},
        {name: one.int() for name, one in good.items()},
        {name: torch.full_like(one, math.nan) for name, one in good.items()},
    ):
        save_file(damaged, folder / HEAD)
        refused(folder, lambda: load_decoder(folder))


def test_what_asks_for_memory_gets_none(decoder, tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(decoder), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes.keys() == HUGE.keys() | LEGACY_HUGE.keys()
    assert {name: said for name, said in outcomes.items() if not said.startswith("refused")} == {}


def test_every_flipped_bit_of_the_weights_is_named(folder):
    rng = np.random.default_rng(0)
    for name in (WEIGHTS, HEAD):
        good = (folder / name).read_bytes()
        for _ in range(40):
            data = bytearray(good)
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            (folder / name).write_bytes(data)
            with pytest.raises(ValueError, match=name):
                load_decoder(folder)
        (folder / name).write_bytes(good)
    load_decoder(folder)


def test_a_model_of_an_older_version_has_no_digest_and_loads(folder):
    edit(folder, lambda config: None)
    assert load_decoder(folder)[0].training is False
    half = {name: one.half() for name, one in load_file(folder / WEIGHTS).items()}
    save_file(half, folder / WEIGHTS)
    assert {one.dtype for one in load_pretrained(folder).state_dict().values()} == {torch.float32}


def test_a_save_that_is_killed_between_two_files_leaves_a_model_that_loads(folder, monkeypatch):
    """Weights new or old, whichever rename was the last."""
    module = load_pretrained(folder)
    with torch.no_grad():
        module.mask_token += 1
    real, left = os.replace, 0

    def killed(source, target):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    for renames in range(3):
        left = renames
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(module, folder)
        load_pretrained(folder)
        assert not list(folder.glob(".*.tmp"))


# What an import must refuse: name → the object that was saved.
def published(change=lambda state: state):
    """A state of 2022 with the names of our tiny model's, changed."""

    def make(folder):
        export_checkpoint(folder, folder / "bin")
        return change(torch.load(folder / "bin", weights_only=True))

    return make


WPE = "decoder.transformer.wpe.weight"
LEGACY = {
    "gadget": lambda folder: {"a": Gadget()},
    "number": lambda folder: {"a": 1},
    "no names": lambda folder: {1: torch.zeros(2)},
    "list": lambda folder: [torch.zeros(2)],
    "empty": lambda folder: {},
    "unknown": lambda folder: {"a": torch.zeros(2)},
    "sparse": published(lambda s: {**s, WPE: s[WPE].to_sparse()}),
    "complex": published(lambda s: {**s, WPE: s[WPE].to(torch.complex64)}),
    "integers": published(lambda s: {**s, WPE: s[WPE].int()}),
    "nan": published(lambda s: {**s, WPE: s[WPE] * math.nan}),
    "scalar": published(lambda s: {**s, WPE: torch.tensor(1.0)}),
    "embedding of one dimension": published(
        lambda s: {**s, "embedder.embed_model.model.0.weight": torch.zeros(8)}
    ),
    "another width": published(lambda s: {**s, WPE: torch.zeros(16, 9)}),
    "no first block": published(lambda s: {n: v for n, v in s.items() if "h.0.mlp" not in n}),
}
LEGACY_HUGE = {
    "one value 10**9 times": published(lambda s: {**s, WPE: torch.zeros(1, 8).expand(10**9, 8)}),
    "10**6 x 10**6 of one value": published(
        lambda s: {**s, "decoder.transformer.h.0.mlp.c_fc.weight": torch.zeros(1).expand(10**6, 10**6)}
    ),
    "200 names of 10 MB": published(
        lambda s: s | dict.fromkeys(map(str, range(200)), torch.zeros(2_500_000))
    ),
    "a width of 10**6": published(
        lambda s: {**s, "embedder.embed_model.model.0.weight": torch.zeros(10**6, 1)}
    ),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", LEGACY)
def test_a_checkpoint_of_2022_that_lies(folder, tmp_path, name, zipped):
    torch.save(LEGACY[name](folder), tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"x\.bin|checkpoint|decoder\."):
        import_checkpoint(tmp_path / "x.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not Path("executed").exists()


def test_a_file_that_is_no_checkpoint_of_2022(tmp_path):
    for data in (b"", b"text", b"PK\x03\x04" + bytes(50), pickle.dumps(Gadget())):
        (tmp_path / "x.bin").write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.bin: not a file of plain tensors"):
            import_checkpoint(tmp_path / "x.bin", tmp_path / "out")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: is no regular file"):
        import_checkpoint(tmp_path / "pipe", tmp_path / "out")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "legacy", [{"dtype": "load"}, {"dtype": ["float32"]}, {"names": 5}, {"missing": [1]}, [1], "x"]
)
def test_an_export_of_what_lies(folder, legacy):
    edit(folder, lambda config: config.__setitem__("legacy", legacy))
    refused(folder, lambda: export_checkpoint(folder, folder / "x.bin"))


def test_planted_pickles_are_not_looked_at(folder):
    for name in (".metadata", "pytorch_model.bin", "optimizer.pt", "__init__.py", "modeling_brainflow.py"):
        (folder / name).write_bytes(pickle.dumps(Gadget()))
    load_decoder(folder)
    brainflow.load(folder)
    assert not Path("executed").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    found = checkpoint.save(root, 4, {"a": torch.zeros(3, 2)}, {"best": math.inf, "stale": 0}, keep=1)
    assert checkpoint.read_state(found)["best"] == math.inf
    return found


def shard(change):
    """Change the header of a checkpoint's shard, and COMPLETE with it."""

    def damage(folder):
        path = next(folder.glob("shard-*"))
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        found = json.loads(data[8 : 8 + size])
        found["__metadata__"]["DCP_SHARDING_INFO"] = change
        text = json.dumps(found).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        sealed(folder)

    return damage


def sealed(folder):
    files = {one.name: checkpoint._measure(one) for one in folder.iterdir() if one.name != "COMPLETE"}
    (folder / "COMPLETE").write_text(json.dumps(files))


def state(text):
    def damage(folder):
        (folder / "state.json").write_text(text)
        sealed(folder)

    return damage


def listed(name):
    """List a file outside of the checkpoint in COMPLETE, as it is."""

    def damage(folder):
        outside = folder.parent / "outside"
        outside.write_text("abc")
        files = json.loads((folder / "COMPLETE").read_text())
        (folder / "COMPLETE").write_text(json.dumps({**files, name(outside): checkpoint._measure(outside)}))

    return damage


CHECKPOINTS = {
    **{
        f"COMPLETE {name}": content("COMPLETE", data)
        for name, data in {
            "empty": b"",
            "without files": b"{}",
            "list": b"[]",
            "deep": b"[" * 100_000,
            "text": b'{"state.json": ["x", 0]}',
        }.items()
    },
    "COMPLETE outside": listed(lambda path: f"../{path.name}"),
    "COMPLETE absolute": listed(str),
    "state list": state("[]"),
    "state text": state("x"),
    "state without numbers": state('{"step": "x"}'),
    "state best": state('{"step": 1, "stale": 0, "best": "x"}'),
    "sharding cut": shard('{"x":'),
    "sharding code": shard("__import__('os').system('touch executed')"),
    "sharding huge": shard('{"a": {"saved_offsets": [1000000000000, 0]}}'),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_lies(saved, tmp_path, name):
    folder = Path(shutil.copytree(saved, tmp_path / saved.name))
    CHECKPOINTS[name](folder)

    def read():
        checkpoint.read_state(folder)
        checkpoint.load(folder)

    refused(folder, read)


# Links: nothing is written through them.
def test_a_lock_that_is_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("years of work")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(victim)
    with pytest.raises(ValueError, match=r"\.lock is a link"), exclusive(tmp_path / "run"):
        pass
    assert victim.read_text() == "years of work"
    (tmp_path / "run/.lock").unlink()
    with exclusive(tmp_path / "run"):
        (tmp_path / "run/.lock").write_text("kept")
    with exclusive(tmp_path / "run"):
        assert (tmp_path / "run/.lock").read_text() == "kept"


def test_a_model_is_saved_beside_links_not_through_them(folder, tmp_path):
    module = load_pretrained(folder)
    names = (CONFIG, WEIGHTS, HEAD, f"{WEIGHTS}.tmp", f"{CONFIG}.tmp", f"{CONFIG}.partial")
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / f"victim-{name}")
        (tmp_path / f"victim-{name}").write_text("years of work")
    save_pretrained(module, folder, {}, {HEAD: {"a": torch.zeros(1)}})
    assert {(tmp_path / f"victim-{name}").read_text() for name in names} == {"years of work"}
    load_pretrained(folder)


def test_logs_are_not_written_through_links(tmp_path):
    for there in (True, False):
        run, victim = tmp_path / f"run-{there}", tmp_path / f"victim-{there}"
        run.mkdir()
        if there:
            victim.write_text('{"step": 1}\n')
        (run / METRICS).symlink_to(victim)
        (run / f"{METRICS}.partial").symlink_to(victim)
        with nullcontext() if there else pytest.raises(OSError, match=METRICS):
            RunLog(run, step=0).write({"step": 1, "loss": 1.0, "lr": 0.1})
        assert victim.exists() is there
        assert not there or victim.read_text() == '{"step": 1}\n'


def test_a_link_that_is_in_the_way_is_replaced(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / "x").symlink_to(victim)
    with replacing(tmp_path / "x") as file:
        file.write(b"new")
    assert (victim.read_text(), (tmp_path / "x").read_text()) == ("kept", "new")
    assert not (tmp_path / "x").is_symlink()


def test_a_file_is_as_it_was_where_writing_fails(tmp_path):
    (tmp_path / "x").write_text("old")

    def fill():
        with replacing(tmp_path / "x") as file:
            file.write(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="/x'") as caught:
        fill()
    assert caught.value.filename == str(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "nowhere" / "x"):
        pass
    assert caught.value.filename == str(tmp_path / "nowhere" / "x")


def _under_a_limit(decoder, scratch):
    """Go through the cases that ask for memory, with little more than the imports took."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MORE_MEMORY
    outcomes = {}
    for name, damage in {**HUGE, **LEGACY_HUGE}.items():
        shutil.rmtree(scratch / "d", ignore_errors=True)
        folder = Path(shutil.copytree(decoder, scratch / "d"))
        legacy = name in LEGACY_HUGE
        if legacy:
            torch.save(damage(folder), folder / "x.bin")
        else:
            damage(folder)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        try:
            import_checkpoint(folder / "x.bin", scratch / "out") if legacy else load_decoder(folder)
            outcomes[name] = "accepted"
        except (ValueError, OSError) as error:
            asked = "allocate" in str(error)  # a limit was hit, which is not everywhere
            outcomes[name] = f"{'out of memory' if asked else 'refused'}: {error}"
        except BaseException as error:
            outcomes[name] = f"{type(error).__name__}: {error}"
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps(outcomes))


if __name__ == "__main__":
    _under_a_limit(Path(sys.argv[1]), Path(sys.argv[2]))
