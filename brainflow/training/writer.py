"""Writes checkpoints while training goes on."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

from .checkpoint import save

PATIENCE = 900.0  # seconds that rank 0 waits for the files of other ranks
GRACE = 10.0  # the same in a run that is failing


class Writer:
    """Writes checkpoints in a thread, one at a time; an error comes up at the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._until = math.inf

    def save(self, *args: Any, **options: Any) -> None:
        """Do :func:`checkpoint.save` in the background; nobody may change the tensors until it is done."""
        self.wait()
        self._until = time.monotonic() + PATIENCE
        self._thread = threading.Thread(target=self._run, args=(args, options), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when this process's part of the last checkpoint is safe on disk; on rank 0, all of it.

        Raises
        ------
        OSError
            If it could not be written; those before it are intact.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Finish a checkpoint that was begun, whatever went wrong; other ranks get a moment to do theirs."""
        self._until = min(self._until, time.monotonic() + GRACE)
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _patient(self) -> bool:
        return time.monotonic() < self._until

    def _run(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        try:
            save(*args, **options, patience=self._patient)
        except BaseException as error:
            self._error = error
