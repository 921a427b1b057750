"""`publish` of stores: what is said first, that all of it arrives, and what is refused."""

import inspect
import types
from pathlib import Path

import numpy as np
import pytest

from brainflow.cli.main import main
from brainflow.sharing import push_store
from brainflow.storage import BoldStore, StoreWriter

pytest.importorskip("obstore", reason="obstore (extra `remote`) is not installed")


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    told = {"preprocessing": {"mask": "/home/ann/mask.nii.gz"}, "parcellation": "/home/ann/four.nii.gz"}
    with StoreWriter.create(tmp_path / "store", networks=4, **told) as writer:
        for i in range(3):
            writer.append(rng.standard_normal((20, 4)), t_r=2.0, dataset="d", subject=f"0{i % 2}", run=str(i))
    return tmp_path / "store"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of data sets in a folder, with the real client's signatures."""
    real = pytest.importorskip("huggingface_hub")
    theirs, root = real.HfApi, tmp_path / "hub"
    there = types.SimpleNamespace(root=root, private={}, commits=[])

    def checked(name, *arguments, **options):
        inspect.signature(getattr(theirs, name)).bind(None, *arguments, **options)
        assert options["repo_type"] == "dataset"

    class HfApi:
        def create_repo(self, name, **options):
            checked("create_repo", name, **options)
            there.private.setdefault(name, options["private"])

        def repo_info(self, name, **options):
            checked("repo_info", name, **options)
            return types.SimpleNamespace(private=there.private[name])

        def create_commit(self, name, **options):
            checked("create_commit", name, **options)
            there.commits.append(name)
            for part in options["operations"]:
                what, path = part.path_or_fileobj, root / name / part.path_in_repo
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(what if isinstance(what, bytes) else Path(what).read_bytes())

    def download(name, file, **options):
        inspect.signature(real.hf_hub_download).bind(name, file, **options)
        path = root / name / file
        if not path.exists():
            raise real.errors.EntryNotFoundError(file)
        return str(path)

    monkeypatch.setattr(real, "HfApi", HfApi)
    monkeypatch.setattr(real, "hf_hub_download", download)
    return there


def test_a_store_goes_to_a_bucket(store, capsys):
    assert main(["publish", str(store), "memory://bucket/s", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for words in (
        "3 runs",
        "people: 2, by the names",
        "parcellation, preprocessing.mask",
        "would be uploaded",
    ):
        assert words in said
    with pytest.raises(ValueError, match="does not exist"):
        BoldStore.open("memory://bucket/s")
    assert main(["publish", str(store), "memory://bucket/s"]) == 0
    there = BoldStore.open("memory://bucket/s")
    assert np.array_equal(there.run(2), BoldStore.open(store).run(2))


def test_a_store_goes_to_the_hub_and_grows_there(store, hub, capsys):
    url = "hf://datasets/me/store"
    assert main(["publish", str(store), url, "--license", "cc0-1.0"]) == 0
    assert hub.private == {"me/store": True}
    there = hub.root / "me/store"
    assert BoldStore.open(there).snapshot == BoldStore.open(store).snapshot
    card = (there / "README.md").read_text()
    for words in (
        'license: "cc0-1.0"',
        "3 of 2 people",
        f'BoldStore.open("{url}")',
        "2 s",
        "| four.nii.gz |",
    ):
        assert words in card
    for words in ("/home", "ann"):
        assert words not in card
    with StoreWriter.append_to(store) as writer:
        writer.append(np.ones((20, 4)), t_r=2.0, dataset="d", subject="07")
    assert main(["publish", str(store), url]) == 0
    assert len(BoldStore.open(there).runs) == 4
    assert hub.commits == ["me/store"] * 2


def test_what_a_store_would_overwrite_is_refused(store, hub, tmp_path):
    push_store(store, "me/store")
    with StoreWriter.create(tmp_path / "other", networks=4) as writer:
        writer.append(np.ones((20, 4)), t_r=2.0, dataset="d", subject="1")
    with pytest.raises(ValueError, match="holds another store or a newer generation"):
        push_store(tmp_path / "other", "me/store")
    hub.private["me/open"] = False
    with pytest.raises(ValueError, match="is public"):
        push_store(store, "me/open")
    assert hub.commits == ["me/store"]


def test_what_cannot_be_published(store, hub, tmp_path, capsys):
    for arguments, words in (
        ([store, "memory://b/t", "--subjects", "hash"], "ingest the runs under other names"),
        ([store, "me/store"], "expected hf://datasets/owner/name"),
        ([store, "hf://me/store"], "expected owner/name or hf://datasets/owner/name"),
        ([tmp_path, "me/model"], "holds neither a model (config.json) nor a store (zarr.json)"),
        (["story-small", "s3://bucket/model"], "a model goes to the hub"),
    ):
        assert main(["publish", *map(str, arguments)]) in (1, 2), arguments
        assert words in capsys.readouterr().err
    shard = next(path for path in (store / "bold").rglob("*") if path.is_file() and path.name != "zarr.json")
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    assert main(["publish", str(store), "memory://b/damaged"]) == 1
    assert "is damaged, so it is not published" in capsys.readouterr().err
    assert hub.commits == []
