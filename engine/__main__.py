"""An engine in the background: ``python -m engine SESSION_FOLDER START``.

:mod:`engine.launch.background` starts it in a session of its own (setsid), with engine.log as its
output. The log is not sanitised; `rlhf-tui logs` and the dashboard sanitise what they show of it.
"""

import asyncio
import logging
import sys
from pathlib import Path

import msgspec

from engine.errors import RlhfError
from engine.launch.start import StartOptions
from engine.session.folder import Session
from engine.supervisor.supervisor import supervise


def main() -> None:
    """Runs the session to its end and exits with the supervisor's exit code."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    session = Session(Path(sys.argv[1]))
    start = msgspec.json.decode(sys.argv[2], type=StartOptions)
    try:
        code = asyncio.run(supervise(session, start))
    except RlhfError as error:
        print(f"rlhf-tui: {error}", file=sys.stderr)  # noqa: T201 - into the log
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
