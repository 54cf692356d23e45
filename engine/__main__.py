"""An engine in the background: ``python -m engine SESSION_FOLDER START``.

Started in a session of its own (setsid), with the log file for its output; see
:mod:`engine.launch.background`.
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
    """Runs to the end; the exit code is the contract's."""
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
