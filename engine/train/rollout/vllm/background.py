"""Responses that the engine generates while the training loop continues."""

import threading
from collections.abc import Callable

from engine.protocol.rollout_messages import Generated
from engine.train.rollout.rollout import ReportProgress

PROGRESS_INTERVAL = 0.2
"""Seconds between two reports of progress to whoever waits for the responses."""


class BackgroundGeneration:
    """Responses that a thread of rank 0 waits for, while the training loop continues."""

    def __init__(self, generate: Callable[[ReportProgress], list[Generated]]) -> None:
        """Starts the thread, which calls `generate` with a function for its progress."""
        self._progress = (0, 0)
        self._results: list[Generated] = []
        self._error: Exception | None = None
        # A daemon: a run that ends, or fails, does not wait for responses that nobody needs.
        self._thread = threading.Thread(
            target=self._run, args=(generate,), name="rollout-ahead", daemon=True
        )
        self._thread.start()

    def _run(self, generate: Callable[[ReportProgress], list[Generated]]) -> None:
        try:
            self._results = generate(self._report)
        except Exception as error:  # raised where the responses are asked for
            self._error = error

    def _report(self, done: int, total: int) -> None:
        self._progress = done, total

    def wait(self, report: ReportProgress) -> None:
        """Waits for the end of the generation, however it ends."""
        while self._thread.is_alive():
            self._thread.join(PROGRESS_INTERVAL)
            report(*self._progress)

    def results(self) -> list[Generated]:
        """The replies; raises the error that ended the generation. Call it after :meth:`wait`."""
        if self._error is not None:
            raise self._error
        return self._results
