"""Waits for a reward source that failed to work again, while the run is paused."""

import threading

from engine.train.rewards.source import WorksAgain

FIRST_INTERVAL = 1.0
"""Seconds before the first try; each further interval is twice as long."""
MAX_INTERVAL = 30.0
"""Seconds between two tries at most."""


class Recovery:
    """Tries a source in a thread of its own, so that commands are executed meanwhile."""

    def __init__(self, works_again: WorksAgain) -> None:
        self._works_again = works_again
        self._cancelled = threading.Event()
        self._recovered = threading.Event()
        threading.Thread(target=self._wait, name="recovery", daemon=True).start()

    @property
    def recovered(self) -> bool:
        """Whether the source has worked again."""
        return self._recovered.is_set()

    def cancel(self) -> None:
        """Ends the tries; one that is under way ends by itself."""
        self._cancelled.set()

    def _wait(self) -> None:
        interval = FIRST_INTERVAL
        while not self._cancelled.wait(interval):
            try:
                works = self._works_again()
            except Exception:  # the repeated step raises it where it is reported
                works = True
            if works:
                self._recovered.set()
                return
            interval = min(2 * interval, MAX_INTERVAL)
