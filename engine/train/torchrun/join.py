"""Joins a machine to a run.

``python -m engine.train.torchrun.join HOST:PORT PROCESSES SECONDS SECRET_FILE [scheduled]``

`rlhf-tui join` and `rlhf-tui launch` execute this module. It reads the :class:`JoinInfo` from the
store of the first machine, starts the ranks of this machine, and repeats this when the run
restarts, until it ends. The secret comes from SECRET_FILE, or from the environment if that is `-`.
"""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from engine import __version__
from engine.config.sections.launch import LaunchConfig
from engine.errors import AuthenticationError, LinkError, UserInputError
from engine.examined import examined
from engine.launch.environment import (
    JOINED_VARIABLE,
    STORE_VARIABLE,
    leave_deleted_folder,
    rank_command,
    rank_environment,
    ranks_per_node,
)
from engine.launch.secret import SECRET_VARIABLE, read_secret
from engine.protocol.machines.store_client import StoreClient
from engine.protocol.machines.store_messages import AddToKey, CheckKeys, SetKeys
from engine.protocol.rank_messages import (
    COMING_KEY,
    JOIN_INFO_KEY,
    LEAVING_KEY,
    STARTED_KEY,
    WAITING_KEY,
    JoinInfo,
)

RETRY = 2.0
"""Seconds between two attempts to reach the first machine, and between two checks of its store."""
GRACE = 30.0
"""Seconds in which ranks can end by themselves after the first machine's store is gone."""
JOIN_INFO_TIMEOUT = 10.0
"""Seconds to wait until a store has its :class:`JoinInfo`."""
SCHEDULED = "scheduled"
"""The last argument under a scheduler, which signals all machines of a job at once. This machine
then informs the first one, and stays until that has saved."""
OTHER_VERSION = "the first machine runs another version of rlhf-tui: install the same on all"
DONE, INVALID, TIMED_OUT, STOPPED_EARLY = 0, 2, 4, 75
"""Exit codes."""


class LeavingError(Exception):
    """A scheduler is about to take this machine away while it runs no ranks."""


@dataclass(frozen=True)
class JoinableStart:
    """A start of the ranks that can be joined."""

    store: StoreClient
    info: JoinInfo
    secret: str
    started: bool = False
    """Whether the ranks have started, so that no further machine can join this start."""


def main() -> None:
    """Runs until the run ends (exit code 0), cannot be joined (2), or cannot be reached (4)."""
    address, wait = sys.argv[1], float(sys.argv[3])
    processes = int(sys.argv[2]) if sys.argv[2] != "auto" else None
    file = Path(sys.argv[4]) if sys.argv[4] != "-" else None
    # When a user or a scheduler ends this process, its ranks are killed with it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    leaving = threading.Event()
    if SCHEDULED in sys.argv[5:]:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: leaving.set())
    print_status(f"waiting for a run at {address}")
    previous_start = ""
    while True:
        try:
            found = find_run(address, file, wait, previous_start, leaving)
        except UserInputError as error:
            exit_with(str(error), INVALID)
        except LeavingError:
            exit_with("the scheduler ends this machine", STOPPED_EARLY)
        except LinkError as error:
            exit_with(f"no run to join: {error}", TIMED_OUT)
        # `launch.gpus` selects GPUs of the first machine, not of this one.
        launch = msgspec.structs.replace(found.info.launch, gpus=[])
        count = processes or ranks_per_node(launch)
        ranks = "1 rank" if count == 1 else f"{count} ranks"
        print_status(f"joining {Path(found.info.folder).name} at {address} with {ranks}")
        if run_agent(found, address, launch, count, leaving) == 0:
            exit_with("the run is over", DONE)
        print_status("the ranks ended before the run did; waiting for a restart")
        previous_start = found.info.start


def find_run(
    address: str,
    file: Path | None,
    wait: float,
    previous_start: str,
    leaving: threading.Event | None = None,
) -> JoinableStart:
    """Polls the first machine until it has a start of the ranks that this machine can join.

    Args:
        address: `HOST:PORT` of its store.
        file: holds the secret. It is read again each time, because each run has its own. None if
            the environment has the secret.
        wait: seconds without a response from the store before this gives up.
        previous_start: `JoinInfo.start` of the ranks that this machine has lost, or "". That start
            is never returned: its remaining ranks accept no new peers, and torchrun would restart
            them without the supervisor's knowledge.
        leaving: set when a scheduler is about to take this machine away.

    Raises:
        LeavingError: `leaving` is set.
        UserInputError: this machine cannot join, or there is no usable secret.
        LinkError: nothing to join was found in time.
    """
    deadline = time.monotonic() + wait
    problem = ""
    while time.monotonic() < deadline:
        if leaving is not None and leaving.is_set():
            raise LeavingError
        secret = read_secret(file)
        if secret is None and file is None:
            raise UserInputError(
                f"no secret: export {SECRET_VARIABLE} as on the first machine, or give "
                "--secret-file"
            )
        try:
            found = look_up(address, secret) if secret is not None else None
        except AuthenticationError as error:
            problem = f"{address}: {error}; give the same on all machines"
            if file is None:  # the file of an earlier run may still be there
                raise UserInputError(problem) from error
        except LinkError as error:
            problem = str(error)
        else:
            if found is None:
                problem = f"there is no file {file}: the run has ended or not started"
            elif found.info.start == previous_start:
                deadline = time.monotonic() + wait
            elif not found.started:
                return found
            else:
                deadline = time.monotonic() + wait
                previous_start = found.info.start
                if found.info.launch.min_nodes is not None:
                    with contextlib.suppress(LinkError):  # it has ended in the meantime
                        found.store.request(SetKeys(values={WAITING_KEY: b""}))
                print_status("the run has started; waiting for its next start")
        time.sleep(RETRY)
    raise LinkError(problem)


def look_up(address: str, secret: str) -> JoinableStart:
    """Connects to the first machine and reads what it runs.

    Raises:
        UserInputError: this machine cannot join.
        AuthenticationError: the first machine has another secret.
        LinkError: it cannot be reached, or has not started its ranks.
    """
    store = StoreClient(address, secret.encode(), patience=0.0)
    reply = store.wait([JOIN_INFO_KEY], JOIN_INFO_TIMEOUT, values=True)
    if reply.missing is not None:
        raise LinkError(f"the run at {address} has not started its ranks")
    started = bool(store.request(CheckKeys(keys=[STARTED_KEY])).number)
    return JoinableStart(store, decode_join_info(reply.values[0]), secret, started)


def decode_join_info(content: bytes) -> JoinInfo:
    """Decodes and checks a :class:`JoinInfo`. Raises UserInputError if this machine cannot join."""
    try:
        info = msgspec.json.decode(content, type=examined(JoinInfo))
    except msgspec.DecodeError:
        raise UserInputError(OTHER_VERSION) from None
    if info.software != __version__:
        raise UserInputError(OTHER_VERSION)
    if not Path(info.folder).is_dir():
        raise UserInputError(
            f"the session's folder {info.folder} does not exist here: all machines need it under "
            "the same path, on a file system they share"
        )
    return info


def run_agent(
    found: JoinableStart, address: str, launch: LaunchConfig, count: int, leaving: threading.Event
) -> int:
    """Starts this machine's agent and returns its exit status.

    Kills the agent and its ranks once the store has not been reachable for :data:`GRACE` seconds.
    Ranks that wait in a NCCL collective do not notice that the first machine is gone, and would
    keep this machine from joining the next start.

    If `leaving` is set, the first machine is informed, so that the run saves and ends.
    """
    variables = {
        STORE_VARIABLE: f"tcp:{address}",
        JOINED_VARIABLE: "1",
        SECRET_VARIABLE: found.secret,
    }
    try:
        found.store.request(AddToKey(key=COMING_KEY, amount=1))
    except LinkError:  # the run has ended or starts again
        return 1
    leave_deleted_folder(Path(found.info.folder))
    process = subprocess.Popen(  # noqa: S603 - our own module
        rank_command(launch, found.info.folder, count),
        env=rank_environment(launch, count) | variables,
        stdin=subprocess.DEVNULL,
    )
    last_seen = time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(RETRY)
        if found.store.is_alive(JOIN_INFO_KEY):
            last_seen = time.monotonic()
            if leaving.is_set():
                with contextlib.suppress(LinkError):  # the run has ended in the meantime
                    found.store.request(SetKeys(values={LEAVING_KEY: b""}))
        elif time.monotonic() - last_seen > GRACE:
            process.kill()  # its ranks are killed with it


def print_status(text: str) -> None:
    """Prints a line for the user of this machine."""
    sys.stdout.write(f"rlhf-tui: {text}\n")
    sys.stdout.flush()


def exit_with(text: str, code: int) -> NoReturn:
    """Prints a line and ends the process."""
    print_status(text)
    sys.exit(code)


if __name__ == "__main__":
    main()
