"""Worker processes: a pool that outlives them, and how much memory each needs.

If a worker is killed, its run fails and the others go on. `concurrent.futures` gives up all work when one
process dies, and clusters kill processes that take too much memory.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from brainflow.optional import need
from brainflow.prepare.run import Job, failed_record, prepare_run
from brainflow.prepare.volumes import BLOCK_BYTES

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_NEEDED = ("nibabel", "nilearn", "pandas", "scipy", "threadpoolctl")
"""What every run takes; scikit-learn comes with nilearn."""
_PRELOADED = [
    "nibabel",
    "nilearn.image",
    "nilearn.interfaces.fmriprep",
    "nilearn.signal",
    "scipy.sparse",
    __name__,
]
"""Imported once, by the process that workers are forked from: that takes seconds, and memory is shared."""
PROGRAM_BYTES = 300 * 2**20
"""Python with nilearn, scipy, pandas and nibabel."""
_BLOCKS = 4
"""Copies of a block of volumes that are alive at once: read, smoothed, made finite, in nilearn's hands."""
_RESAMPLING = 800
"""Bytes a voxel while the matrix is made that resamples maps."""
_MAP_SHARE = 0.1
"""Share of the voxels that one map covers, stored as 12 bytes each; DiFuMo's maps cover less."""


def prepare_runs(jobs: Sequence[Job], processes: int) -> Iterator[dict[str, Any]]:
    """Prepare runs and give their records as they come.

    Parameters
    ----------
    jobs
        Runs to prepare.
    processes
        Worker processes, one thread each; 1 works in this process.

    Raises
    ------
    ValueError
        If `processes` is less than 1.
    ImportError
        If an optional package is missing.
    """
    if processes < 1:
        raise ValueError(f"nprocs: got {processes}, expected at least 1")
    _check_installed()
    if processes == 1 or len(jobs) < 2:
        yield from map(prepare_run, jobs)
        return
    waiting = list(reversed(jobs))
    workers: list[_Worker] = []
    try:
        for _ in range(min(processes, len(jobs))):
            workers.append(_Worker())
            workers[-1].give(waiting.pop())
        while any(worker.job for worker in workers):
            for ready in wait([worker.pipe for worker in workers if worker.job]):
                worker = next(worker for worker in workers if worker.pipe is ready)
                record, alive = worker.take()
                if not alive:
                    workers.remove(worker)
                    if waiting:
                        workers.append(worker := _Worker())
                if waiting and (alive or worker.job is None):
                    worker.give(waiting.pop())
                yield record
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process and the run that it works on."""

    def __init__(self) -> None:
        # Not forked from this process, whose threads (of BLAS, of torch) would not come along.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        with _one_thread():
            self.process.start()
        # With our copy of its end open, the pipe of a dead worker would never end.
        theirs.close()
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        """Hand over a run; a worker that has died meanwhile is noticed by `take`."""
        self.job = job
        with suppress(OSError):
            self.pipe.send(job)

    def take(self) -> tuple[dict[str, Any], bool]:
        """Return the record of its run, and whether the worker still lives."""
        job, self.job = self.job, None
        assert job is not None
        try:
            return self.pipe.recv(), True
        except (EOFError, OSError):
            self.process.join()
            self.pipe.close()
            return failed_record(job, _cause(self.process.exitcode)), False

    def stop(self) -> None:
        """End the process."""
        if self.process.is_alive():
            self.process.terminate()
        self.process.join()
        self.pipe.close()


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        memory = ", perhaps for lack of memory (use fewer --nprocs)" if -code == signal.SIGKILL else ""
        return f"its process was killed by signal {-code}{memory}; run the command again"
    return f"its process ended with exit code {code}; run the command again"


def _work(pipe: Connection) -> None:
    try:
        while True:
            pipe.send(prepare_run(pipe.recv()))
    except (EOFError, OSError, KeyboardInterrupt):  # the parent is gone, or wants to stop
        return


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let processes started inside use one thread: BLAS reads these variables when it is first loaded."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check_installed() -> None:
    """Refuse to begin without the packages that every run needs, rather than fail run by run."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"prepare needs {', '.join(missing)}; pip install 'brainflow-fmri[bids]'")


def worker_bytes(jobs: Sequence[Job]) -> int:
    """Return the memory that one worker needs for the largest of some runs, in bytes; an upper estimate.

    Volumes are read in blocks. Surfaces are read whole: their size counts twice.
    """
    nibabel = need("nibabel", "reading images", "bids")
    job = max(jobs, key=_file_size)
    try:
        shapes = [nibabel.load(path).shape for path in job.files.images]
    except Exception:  # a damaged image is reported when it is prepared
        return PROGRAM_BYTES + _BLOCKS * BLOCK_BYTES
    if job.kind != "volume":
        size = 4 * max(math.prod(shape) for shape in shapes) if shapes[0] else 0
        return PROGRAM_BYTES + 4 * size
    voxels = math.prod(shapes[0][:3])
    block = min(8 * math.prod(shapes[0]), max(BLOCK_BYTES, 8 * voxels))
    atlases = 0
    for atlas in (piece for joined in job.atlases for piece in joined.pieces):
        own = nibabel.load(atlas.paths[0]).shape
        if atlas.kind == "labels":
            atlases += 32 * max(voxels, math.prod(own[:3]))
        else:
            block_of_maps = 16 * 16 * math.prod(own[:3])
            atlases += _RESAMPLING * voxels + block_of_maps + int(12 * _MAP_SHARE * voxels * own[3])
    return PROGRAM_BYTES + _BLOCKS * block + atlases


def _file_size(job: Job) -> int:
    return sum(path.stat().st_size for path in job.files.images if path.is_file())
