"""One thread for every test and every process that a test starts.

Several threads on few cores wait for each other (beside another process a step of a small model takes many
times as long), and sums of one thread are the same on every machine.
"""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch or numpy
os.environ["BRAINFLOW_CACHE"] = ""  # no test finds what another one, or a user, has computed

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--thorough",
        action="store_true",
        help="tests marked thorough: try every fault and race, not a sample of them (minutes each)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Let `-k cuda` take every test that needs a GPU, whatever its name."""
    for item in items:
        if "cuda" in getattr(item, "fixturenames", ()):
            item.extra_keyword_matches.add("cuda")


def pytest_collection_finish():
    """Let nobody look again at the 600,000 objects of what was imported: every training collects garbage.

    That took .4 s each time, and in a process that was forked it copies their pages, too.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def thorough(request):
    """Whether to try all and not a sample."""
    return request.config.getoption("thorough")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Each kind of device in turn; a comparison is run on the GPU where there is one."""
    return request.getfixturevalue("cuda") if request.param == "cuda" else "cpu"


@pytest.fixture
def cuda():
    """The GPU; without one the test is skipped, and says so."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is False")
    return "cuda"


@pytest.fixture
def two_gpus(cuda):
    """Two GPUs of this machine; without them the test is skipped, and says so."""
    import torch

    if (count := torch.cuda.device_count()) < 2:
        pytest.skip(f"needs 2 GPUs: torch.cuda.device_count() is {count}")


@pytest.fixture(scope="session")
def no_flushing():
    """Flushing to the disk takes most of the time of writing a small store, and no test cuts the power."""
    flush, os.fsync = os.fsync, lambda descriptor: None
    yield
    os.fsync = flush
