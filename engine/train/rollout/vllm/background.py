"""Generates responses in threads: on several engines at once, or during the training loop."""

import threading
from collections.abc import Callable, Mapping

from engine.progress import ReportProgress
from engine.train.rollout.vllm.client import raise_first

PROGRESS_INTERVAL = 0.2
"""Seconds between progress reports while waiting for the responses."""
Job = Callable[[Callable[[int], None]], None]
"""Generates on one engine; called with a function that reports the tokens done so far."""


class BackgroundGeneration:
    """Responses that threads of rank 0 wait for, one for each engine."""

    def __init__(self, jobs: Mapping[int, Job], total: int) -> None:
        """Starts the threads.

        Args:
            jobs: by engine.
            total: tokens of all jobs at most, for the progress.
        """
        self._total = total
        self._done = dict.fromkeys(jobs, 0)
        self.succeeded: set[int] = set()
        """Engines whose job has ended without an error."""
        self._errors: dict[int, Exception] = {}
        # Daemons, so that a run that ends or fails does not wait for unneeded responses.
        self._threads = [
            threading.Thread(
                target=self._run, args=(engine, job), name=f"rollout-{engine}", daemon=True
            )
            for engine, job in jobs.items()
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, engine: int, job: Job) -> None:
        def report(done: int) -> None:
            self._done[engine] = done

        try:
            job(report)
            self.succeeded.add(engine)
        except Exception as error:  # raised where the responses are asked for
            self._errors[engine] = error

    def wait(self, report: ReportProgress, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Waits until all jobs have ended, successfully or not.

        Args:
            report: called with the progress only when there is some, so that a hanging engine looks
                like one.
            meanwhile: called regularly.
        """
        last = -1
        for thread in self._threads:
            while thread.is_alive():
                thread.join(PROGRESS_INTERVAL)
                meanwhile()
                if (done := sum(self._done.values())) != last:
                    report(done, self._total)
                    last = done

    def check(self) -> None:
        """Raises the errors of failed jobs. Call it after :meth:`wait`.

        Raises:
            EngineLostError: engines were lost.
            Exception: another error that ended a job.
        """
        raise_first([self._errors[engine] for engine in sorted(self._errors)])
