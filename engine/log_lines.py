"""The form of the lines that the processes of an engine write to engine.log."""

import logging
from typing import TextIO

NOTICED = {"noticed": True}
"""The `extra` of a record whose text is also a notice or the run's final message: in the foreground
it would be printed twice."""


def is_noticed(record: logging.LogRecord) -> bool:
    """Whether a record was logged with :data:`NOTICED`."""
    return getattr(record, "noticed", False)


def log_to(stream: TextIO, level: int = logging.INFO) -> None:
    """Writes the log of this process to a stream: time, level and text."""
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=level, format=form, stream=stream)
