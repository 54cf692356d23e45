"""Runs an engine in the background: ``python -m engine SESSION_FOLDER``.

$RLHF_TUI_START is a :class:`~engine.launch.start_options.StartOptions` in JSON. This module is
started by :mod:`engine.launch.background` in a new process session (setsid), with engine.log as its
output. The log is not sanitised; `rlhf-tui logs` and the dashboard sanitise what they show of it.
"""

import asyncio
import sys
from pathlib import Path

from engine.errors import RlhfError
from engine.launch.start_options import received_start
from engine.log_lines import log_to
from engine.session.folder import SessionFolder
from engine.supervisor.serve import supervise


def main() -> None:
    """Runs the session to its end and exits with the supervisor's exit code."""
    log_to(sys.stderr)
    session = SessionFolder(Path(sys.argv[1]))
    start = received_start()
    try:
        code = asyncio.run(supervise(session, start))
    except RlhfError as error:
        print(f"rlhf-tui: {error}", file=sys.stderr)  # noqa: T201 - to the log
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
