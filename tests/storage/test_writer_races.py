"""Writers of one store exclude each other, and none touches what is not its own."""

import os
import stat
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from brainflow.storage import BoldStore, StoreError, StoreWriter, verify

SHAPE = {"networks": 2, "chunk_rows": 4, "shard_rows": 16}


def bold_of(number):
    return np.random.default_rng(number).standard_normal((5, 2)).astype(np.float32)


def write(writer, number):
    writer.append(bold_of(number), t_r=1.0, dataset="d", subject=str(number))


def made(path, *numbers, **options):
    with StoreWriter.create(path, **SHAPE, **options) as writer:
        for number in numbers:
            write(writer, number)
    return path


def append(path, number):
    with StoreWriter.append_to(path) as writer:
        write(writer, number)


def overwrite(path, number):
    made(path, number, overwrite=True)


def started(gate, work, path, number, delay):
    """Do `work` in a fork as soon as `gate` opens; the fork ends with 0, or 1 if refused, or 2."""
    child = os.fork()
    if child:
        return child
    code = 2
    try:
        os.read(gate, 1)
        time.sleep(delay)
        try:
            work(path, number)
            code = 0
        except StoreError as error:
            code = 1 if "another process is writing" in str(error) and str(path.parent) in str(error) else 2
            if code == 2:
                print(error)
        except BaseException as error:
            print(repr(error))
    finally:
        os._exit(code)


@pytest.fixture
def in_memory():
    """A folder where flushing takes no time, if there is one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.thorough
def test_races_of_append_overwrite_and_append_break_nothing(in_memory, thorough):
    races = 200 if thorough else 24
    path, rng = in_memory / "s", np.random.default_rng(0)
    expected, outcomes = {1}, {0: 0, 1: 0, 2: 0}
    made(path, 1)
    for race in range(races):
        number = 10 * (race + 1)
        gate, opener = os.pipe()
        jobs = {number: append, number + 1: overwrite, number + 2: append}
        delays = rng.uniform(0, 0.01, 3) * (race % 2)  # at once, or some milliseconds apart
        children = {
            started(gate, work, path, key, delay): key
            for (key, work), delay in zip(jobs.items(), delays, strict=True)
        }
        os.write(opener, b"...")
        won = set()
        for child, key in children.items():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            outcomes[code] += 1
            won |= {key} if code == 0 else set()
        os.close(gate)
        os.close(opener)
        store = BoldStore.open(path)
        held = {int(subject) for subject in store.runs.subject}
        assert verify(path).ok
        assert all(
            np.array_equal(store.run(i), bold_of(int(n)).astype(np.float16))
            for i, n in enumerate(store.runs.subject)
        )
        # Who reported success is in the store, but for appends before an overwrite that succeeded, too.
        assert won, "nobody won"
        if number + 1 in won:
            assert number + 1 in held
            assert held <= won
        else:
            assert held == expected | won
        expected = held
    assert outcomes[2] == 0, outcomes
    assert outcomes[0] >= races
    assert outcomes[1] > races / 10, "they hardly met"
    assert os.listdir(in_memory) == ["s"]


def test_an_overwriting_writer_excludes_appending_ones_until_it_is_done(tmp_path):
    path = made(tmp_path / "s", 1)
    with StoreWriter.create(path, **SHAPE, overwrite=True) as writer:
        write(writer, 2)
        with pytest.raises(StoreError, match="another process is writing"):
            StoreWriter.append_to(path)
        writer.commit()
        with pytest.raises(StoreError, match="another process is writing"):
            StoreWriter.append_to(path)
    append(path, 3)
    assert BoldStore.open(path).runs.subject.tolist() == ["2", "3"]


def test_an_appending_writer_excludes_overwriting_ones(tmp_path):
    path = made(tmp_path / "s", 1)
    with StoreWriter.append_to(path) as writer:
        write(writer, 2)
        with pytest.raises(StoreError, match="another process is writing"):
            StoreWriter.create(path, **SHAPE, overwrite=True)
    assert BoldStore.open(path).runs.subject.tolist() == ["1", "2"]
    assert os.listdir(tmp_path) == ["s"]


def test_a_store_that_appeared_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "s"
    writer = StoreWriter.create(path, **SHAPE)
    write(writer, 1)
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="File exists"):
        writer.commit()
    assert os.listdir(path) == ["thesis.tex"]
    assert os.listdir(tmp_path) == ["s"]


def strangers_link(place, victim):
    place.symlink_to(victim)


def strangers_folder(place, victim):
    place.mkdir()
    (place / "notes").write_text("mine")


def strangers_file(place, victim):
    place.write_text("mine")


def strangers_owner(place, victim):
    place.mkdir()
    (place / ".brainflow-partial").touch()
    os.chown(place, 12345, -1)


@pytest.mark.parametrize("plant", [strangers_link, strangers_folder, strangers_file, strangers_owner])
@pytest.mark.parametrize("exists", [False, True])
def test_a_staging_place_that_is_not_ours_is_refused_and_left_alone(plant, exists, tmp_path):
    if plant is strangers_owner and os.geteuid() != 0:
        pytest.skip("only root may give a folder away")
    victim, folder = tmp_path / "home", tmp_path / "shared"
    victim.mkdir()
    folder.mkdir()
    (victim / "thesis.tex").write_text("years of work")
    path = folder / "s"
    if exists:
        made(path, 1)
    place = folder / ".s.partial"
    plant(place, victim)
    before = sorted(os.walk(place)), os.lstat(place).st_ino
    with pytest.raises(StoreError, match=r"\.s\.partial: is in the way"):
        made(path, 2, overwrite=exists)
    assert (sorted(os.walk(place)), os.lstat(place).st_ino) == before
    assert (victim / "thesis.tex").read_text() == "years of work"
    assert path.exists() == exists


def test_what_killed_writers_of_ours_left_is_cleared(tmp_path):
    path = tmp_path / "s"
    for left in ((), (".brainflow-partial", "bold"), (".brainflow-partial", "zarr.json")):
        place = tmp_path / ".s.partial"
        place.mkdir()
        for name in left:
            (place / name).touch()
        made(path, 1, overwrite=True)
        assert os.listdir(tmp_path) == ["s"]
        assert verify(path).ok


def test_a_store_is_private_while_it_is_built_and_has_the_usual_mode_then(tmp_path):
    path = tmp_path / "s"
    with StoreWriter.create(path, **SHAPE) as writer:
        write(writer, 1)
        assert stat.S_IMODE((tmp_path / ".s.partial").stat().st_mode) == 0o700
    (tmp_path / "usual").mkdir()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_link_to_a_store_stays_a_link_when_it_is_overwritten(tmp_path):
    (tmp_path / "disk").mkdir()
    made(tmp_path / "disk" / "s", 1)
    (tmp_path / "s").symlink_to("disk/s")
    made(tmp_path / "s", 2, overwrite=True)
    assert (tmp_path / "s").is_symlink()
    assert BoldStore.open(tmp_path / "disk" / "s").runs.subject.tolist() == ["2"]


def test_a_writer_whose_disk_failed_is_closed_and_says_what_it_left(tmp_path, monkeypatch):
    path = made(tmp_path / "s", 1)
    writer = StoreWriter.append_to(path)
    write(writer, 2)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"bold/c/1/0: could not be written \(No space left") as error:
            writer.commit()
    assert f"{path} is as it was before; make room" in str(error.value)
    with pytest.raises(StoreError, match="this writer is closed"):
        write(writer, 3)
    append(path, 2)
    assert BoldStore.open(path).runs.subject.tolist() == ["1", "2"]


def test_what_readers_would_refuse_is_not_committed(tmp_path):
    path = tmp_path / "s"
    with pytest.raises(StoreError, match="shorten provenance"):
        made(path, 1, provenance={"notes": "x" * 2**25})
    assert os.listdir(tmp_path) == []
