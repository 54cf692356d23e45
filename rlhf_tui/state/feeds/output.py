"""Where every feed puts its updates: posts them until it is stopped, and each problem once."""

import threading
from collections.abc import Callable

from rlhf_tui.state.feeds.updates import SessionUpdate

Post = Callable[[SessionUpdate], object]
"""Called with an update, from another thread."""


class UpdateOutput:
    """Posts updates until the feed is stopped."""

    def __init__(self, post: Post) -> None:
        """`post` is called with each update."""
        self._post = post
        self._problem = ""
        self.stopped = threading.Event()
        """Set it to post nothing more."""

    def post(self, update: SessionUpdate) -> None:
        """Posts an update unless it is empty."""
        if update and not self.stopped.is_set():
            self._post(update)

    def report(self, problem: str) -> None:
        """Posts why the session cannot be read ("": it can), if that has changed."""
        if problem != self._problem:
            self._problem = problem
            self.post(SessionUpdate(problem=problem))
