"""Stores behind a URL: an S3 server on loopback, a proxy before it that fails, and the cache."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from brainflow.storage import BoldStore, Segment, StoreError, StoreWriter, publish, remote, verify
from brainflow.storage.cache import ChunkCache

pytest.importorskip("obstore", reason="obstore (extra `remote`) is not installed")
object_server = pytest.importorskip("object_server", reason="moto[server] is not installed")
Proxy, environment_variables = object_server.Proxy, object_server.environment_variables
boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")

NETWORKS, CHUNK, SHARD = 6, 4, 32
PATIENCE = 3.0  # seconds that a client waits for a stalled answer
names = itertools.count()


@pytest.fixture(scope="module")
def proxy():
    with object_server.running() as url:
        yield url


@pytest.fixture(autouse=True)
def environment(proxy, tmp_path, monkeypatch):
    for name, value in environment_variables(proxy).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BRAINFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.002)
    Proxy.faults, Proxy.everything, Proxy.seen = [], False, []


@pytest.fixture(scope="module")
def bucket(proxy):
    host, port = Proxy.backend
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    client.create_bucket(Bucket="runs")
    allow = {"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::runs/*"}
    client.put_bucket_policy(
        Bucket="runs", Policy=json.dumps({"Version": "2012-10-17", "Statement": [allow]})
    )
    return client


def write(path, runs=7, **options):
    rng = np.random.default_rng(0)
    with StoreWriter.create(
        path, networks=NETWORKS, chunk_rows=CHUNK, shard_rows=SHARD, overwrite=True, **options
    ) as writer:
        for i in range(runs):
            add(writer, rng, i)
    return BoldStore.open(path)


def add(writer, rng, i):
    segments = [Segment(onset=1, length=3, labels={"state": "face"})]
    bold = rng.standard_normal((int(rng.integers(10, 30)), NETWORKS))
    writer.append(bold, t_r=2.0, dataset="d", subject=f"{i:02d}", segments=segments)


@pytest.fixture(scope="module")
def published(tmp_path_factory, bucket):
    store = write(tmp_path_factory.mktemp("published") / "s")
    url = "s3://runs/published"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment_variables(f"http://{Proxy.backend[0]}:{Proxy.backend[1]}").items():
            patch.setenv(name, value)
        assert publish(store.path, url) > 0
    return store, url


@pytest.fixture
def pair(published):
    """A local store and its URL."""
    return published


def all_windows(store):
    return store.runs.start + 2, np.minimum(store.runs.length - 2, 9)


@pytest.mark.parametrize("options", [None, {"dtype": "int8"}, {"compression": "zstd"}])
def test_a_published_store_reads_as_the_local_one(tmp_path, pair, options):
    local, url = pair
    if options is not None:
        local, url = write(tmp_path / "s", **options), f"memory://{next(names)}"
        publish(local.path, url)
    there = BoldStore.open(url)
    assert there.snapshot == local.snapshot
    assert there.runs.key.tolist() == local.runs.key.tolist()
    assert there.segments.columns["state"].tolist() == local.segments.columns["state"].tolist()
    for _ in range(2):  # the second time from the cache
        assert np.array_equal(there.windows(*all_windows(local)), local.windows(*all_windows(local)))
    assert np.array_equal(there.run(3), local.run(3))
    assert np.array_equal(there.statistics(5)["std"], local.statistics(5)["std"])
    assert np.array_equal(there.bold[:20], local.bold[:20])
    report = verify(url)
    assert report.ok
    assert report.chunks == verify(local.path).chunks
    with pytest.raises(ValueError, match="window 0 "):
        there.windows([0], [31])
    assert there.rows is None


def test_other_schemes(pair, proxy, tmp_path, monkeypatch):
    local, url = pair
    web = BoldStore.open(url.replace("s3:/", proxy))
    assert np.array_equal(web.run(2), local.run(2))
    publish(local.path, "memory://x/y")
    assert np.array_equal(BoldStore.open("memory://x/y").run(2), local.run(2))
    for call in (BoldStore.open, verify_error):
        with pytest.raises(StoreError, match="unknown scheme"):
            call("ftp://host/store")
    with pytest.raises(StoreError, match=r"^s3:/?: is no URL that can be opened"):
        BoldStore.open("s3://")
    for path in ("datasets/../x/s", "a/b@../s", "a/b/../../c/s"):
        with pytest.raises(StoreError, match=r"expected hf://datasets/owner/name"):
            BoldStore.open(f"hf://{path}")
    with pytest.raises(StoreError, match=r"s3://runs/none/zarr.json: does not exist"):
        BoldStore.open("s3://runs/none")
    for call in (lambda: StoreWriter.create(url, networks=3), lambda: StoreWriter.append_to(url)):
        with pytest.raises(ValueError, match="publish"):
            call()
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StoreError, match=r"brainflow-fmri\[remote\]"):
        BoldStore.open(url)


def verify_error(path):
    raise StoreError(verify(path).errors[0])


def test_only_the_chunks_that_are_needed_are_read_and_once(pair):
    local, url = pair
    store = BoldStore.open(url)
    Proxy.seen.clear()
    start = int(local.runs.start[1])
    store.windows([start + 1, start + 2], [2, 2])
    size = CHUNK * NETWORKS * 2
    first = (start + 1) // CHUNK
    last = (start + 3) // CHUNK
    asked = [re.search(r"bytes=(\d+)-(\d+)", line) for line in Proxy.seen]
    assert sum(int(m[2]) - int(m[1]) + 1 for m in asked) == (last - first + 1) * size
    Proxy.seen.clear()
    store.windows([start + 1], [3])
    BoldStore.open(url).windows([start + 1], [3])
    assert not any("/c/0/0 bytes" in line and "bold" in line for line in Proxy.seen)
    store.advise([start + 6], [2])
    assert np.array_equal(store.windows([start + 6], [2]), local.windows([start + 6], [2]))


@pytest.mark.parametrize("cache", ["cache", ""])
def test_faults_are_outlasted_and_never_give_wrong_data(pair, monkeypatch, tmp_path, cache):
    monkeypatch.setattr(remote, "TIMEOUT", PATIENCE)
    monkeypatch.setenv("BRAINFLOW_CACHE", cache and str(tmp_path / cache))
    local, url = pair
    expected = local.windows(*all_windows(local))
    store = BoldStore.open(url)
    Proxy.faults = ["500", "stall", "truncate", "corrupt", "drop", "500", "truncate", "500"]
    assert np.array_equal(store.windows(*all_windows(local)), expected)
    assert Proxy.faults == []
    Proxy.everything = True
    Proxy.faults = ["500", "truncate", "drop", "500"]
    assert BoldStore.open(url).snapshot == local.snapshot  # metadata and index too
    assert Proxy.faults == []


def test_a_server_that_never_recovers_is_named(pair, monkeypatch):
    local, url = pair
    monkeypatch.setenv("BRAINFLOW_CACHE", "")
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    for fault in ("500", "truncate", "drop"):
        store = BoldStore.open(url)
        Proxy.faults = [fault] * 1000
        with pytest.raises(StoreError, match=rf"{url}/bold/c/0/0: gave up after 3 attempts"):
            store.windows(local.runs.start[:1], [4])
        Proxy.faults = []
        assert np.array_equal(store.run(0), local.run(0))  # a failure is not remembered
    store = BoldStore.open(url)
    Proxy.faults = ["corrupt"] * 1000
    with pytest.raises(StoreError, match=r"run ds-d_sub-00: chunk 0 .*damaged"):
        store.windows(local.runs.start[:1], [4])


def test_publishing_outlasts_faults_and_commits_last(pair, bucket, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", PATIENCE)
    local, _ = pair
    url = f"s3://runs/{next(names)}"
    Proxy.everything = True
    Proxy.faults = ["500", "", "", "stall", "", "500", "drop"]
    publish(local.path, url)
    assert Proxy.faults == []
    puts = [line.split()[1] for line in Proxy.seen if line.startswith("PUT")]
    assert puts[-1].split("?")[0] == f"/{url[5:]}/zarr.json"
    assert verify(url).ok


def test_publishing_again_sends_what_is_new(tmp_path, monkeypatch):
    local, url = write(tmp_path / "s"), f"memory://{next(names)}"
    publish(local.path, url)
    assert publish(local.path, url) == 0
    reader = BoldStore.open(url)
    with StoreWriter.append_to(local.path) as writer:
        add(writer, np.random.default_rng(5), 99)
    sent = []
    put = remote.RemoteFiles.write

    def write_some(self, relative, data):
        if len(sent) == 20:
            raise StoreError("the network is gone")
        sent.append(relative)
        put(self, relative, data)

    with monkeypatch.context() as patch:
        patch.setattr(remote.RemoteFiles, "write", write_some)
        with pytest.raises(StoreError, match="network is gone"):
            publish(local.path, url)
    assert "bold/c/0/0" not in sent, "a committed shard was sent again"
    assert len(BoldStore.open(url).runs) == 7
    seen = []
    assert publish(local.path, url, lambda done, total: seen.append(done / total)) > 0
    assert seen[-1] == 1.0
    newer = BoldStore.open(url)
    assert len(newer.runs) == 8
    assert np.array_equal(newer.run(7), BoldStore.open(local.path).run(7))
    assert np.array_equal(reader.run(6), local.run(6))  # an open reader keeps its generation
    assert verify(url).ok
    with pytest.raises(StoreError, match="another store"):
        publish(write(tmp_path / "other", runs=2).path, url)


def test_damage_on_the_server_is_found_and_can_be_left_out(pair):
    local, _ = pair
    url = "memory://damaged"
    publish(local.path, url)
    files = remote.RemoteFiles(url)
    data = bytearray(files.read("bold/c/0/0", 2**20).tobytes())
    data[3 * CHUNK * NETWORKS * 2 + 5] ^= 4
    files.write("bold/c/0/0", bytes(data))
    store = BoldStore.open(url)
    starts, lengths = store.runs.start, store.runs.length
    touched = (starts < 4 * CHUNK) & (store.runs.end > 3 * CHUNK)
    assert np.array_equal(store.intact(starts, lengths), ~touched)
    assert verify(url).bad_chunks == [3]
    with pytest.raises(StoreError, match="chunk 3 "):
        store.windows(starts, lengths)


def test_the_cache_has_a_limit_and_heals(tmp_path):
    chunks = [np.full(1000, i, np.uint8) for i in range(40)]
    cache = ChunkCache(tmp_path / "c", "s", 10_000)
    for i, data in enumerate(chunks):
        cache.put("bold", i, remote_crc(data), data)
        if i >= 1:
            assert (
                cache.get("bold", 0, remote_crc(chunks[0])) is not None
            )  # the one that is always read stays
    held = [path for path in (tmp_path / "c").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in held) <= 11_000
    assert len(held) >= 8
    path = tmp_path / "c" / "s" / "bold" / f"0-{remote_crc(chunks[0]):08x}"
    path.write_bytes(b"x" * 1000)
    assert cache.get("bold", 0, remote_crc(chunks[0])) is None
    assert not path.exists()


def remote_crc(data):
    from brainflow.storage.layout import crc32c

    return crc32c(data)


def test_several_processes_share_a_small_cache(pair, tmp_path):
    local, url = pair
    code = (
        "import sys, numpy as np; from brainflow.storage import BoldStore\n"
        "there, here = BoldStore.open(sys.argv[1]), BoldStore.open(sys.argv[2])\n"
        "for _ in range(5):\n"
        "  for i in range(7): assert np.array_equal(there.run(i), here.run(i))\n"
    )
    environment = {**os.environ, "BRAINFLOW_CACHE_GB": "5e-7"}
    command = [sys.executable, "-c", code, url, local.path]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert process.wait(60) == 0, process.stderr.read().decode()
        process.stderr.close()
    held = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file())
    assert 0 < held <= 700
    shutil.rmtree(tmp_path / "cache")
