"""The form of the lines that the processes of an engine write to engine.log."""

import logging
from typing import TextIO


def log_to(stream: TextIO, level: int = logging.INFO) -> None:
    """Writes the log of this process to a stream: time, level and text."""
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=level, format=form, stream=stream)
