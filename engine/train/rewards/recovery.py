"""Waits until a failed reward source works again while the run is paused."""

import threading

from engine.train.rewards.source import WorksAgain

FIRST_INTERVAL = 1.0
"""Seconds before the first try; doubled for each further interval."""
MAX_INTERVAL = 30.0
"""Most seconds between two tries."""


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
        """Stops trying; a try in progress ends by itself."""
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
