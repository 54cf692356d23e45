"""The exceptions of this software.

::

    RlhfError                     base class; exit code 1
    ├── UserInputError            the user's input is wrong; exit code 2
    │   ├── ConfigError           a configuration key, its type or its range
    │   └── SessionNameError      the name of a session
    ├── SessionError              the session does not allow the operation
    │   ├── NoSuchSessionError    no such session or checkpoint, or no live engine; exit code 3
    │   ├── SessionLockedError    another engine holds the session
    │   └── JournalError          the journal cannot be read or written
    ├── CheckpointError           a checkpoint is missing or cannot be used or written
    │   └── DamagedCheckpointError    its files are not as they were written
    ├── RewardError               a reward source returned unusable rewards
    ├── LinkError                 a connection between two processes failed
    │   ├── RefusedByEngineError      an engine takes no client, or no further viewer
    │   └── AuthenticationError       the other machine does not know the secret of the run
    └── CommandRejectedError      an operator's command cannot be executed

Each message is one sentence that names the cause and a remedy. It is shown to the user unchanged.
"""

import traceback

MAX_CONFIG_ERROR = 600
"""Characters of the message of a :class:`ConfigError`."""
MAX_FIRST_LINE = 300
"""Characters of another library's message that one of ours repeats."""
MAX_MESSAGE = 2_000
"""Characters of somebody else's message that is reported whole."""
MAX_TRACEBACK = 20_000
"""Characters of a traceback, which repeats the message. Both go into a frame and the journal."""


class RlhfError(Exception):
    """Base class of all exceptions that this software raises."""

    exit_code = 1


def error_text(error: BaseException) -> str:
    """The message of an exception of somebody else's code, as text that can be sent and stored.

    Its `__str__` may itself raise, and its text may hold surrogates.
    """
    try:
        text = str(error)
    except Exception as problem:
        text = f"(its message cannot be shown: {type(problem).__name__})"
    return encodable(text)


def traceback_text(error: BaseException) -> str:
    """The traceback of an exception, as text that can be sent and stored.

    A long one, such as of a message with a whole reply in it, is cut in the middle.
    """
    text = encodable("".join(traceback.format_exception(error)))
    half = MAX_TRACEBACK // 2
    return text if len(text) <= MAX_TRACEBACK else f"{text[:half]}\n…\n{text[-half:]}"


def encodable(text: str) -> str:
    """Returns a text without subclass; halves of surrogate pairs, as JSON may have, are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """The first line of another library's message, cut to :data:`MAX_FIRST_LINE`."""
    lines = error_text(error).strip().splitlines() or [type(error).__name__]
    first = f"{error!r}" if isinstance(error, KeyError) else lines[0]
    return shortened(first, MAX_FIRST_LINE)


def shortened(text: str, limit: int) -> str:
    """The text, or its beginning and an ellipsis if it has more characters than `limit`."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


class UserInputError(RlhfError):
    """The user's input is wrong."""

    exit_code = 2


class ConfigError(UserInputError):
    """A configuration key, its type or its range is wrong.

    The message repeats what the user wrote, so it is cut in the middle if it is very long.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_CONFIG_ERROR:
            half = MAX_CONFIG_ERROR // 2
            text = f"{text[:half]} … {text[-half:]}"
        super().__init__(text)


class SessionNameError(UserInputError):
    """The name of a session is invalid or taken."""


class SessionError(RlhfError):
    """The session does not allow the operation."""


class NoSuchSessionError(SessionError):
    """There is no session of that name, or it has no such checkpoint or no live engine."""

    exit_code = 3


class SessionLockedError(SessionError):
    """Another engine holds the session."""


class JournalError(SessionError):
    """The journal cannot be read or written."""


class CheckpointError(RlhfError):
    """A checkpoint is missing or cannot be used or written."""


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint are not as they were written; an older checkpoint may be whole."""


class RewardError(RlhfError):
    """A reward source returned values that cannot be used as rewards."""


class LinkError(RlhfError):
    """A connection between a supervisor and a rank or a client failed."""


class RefusedByEngineError(LinkError):
    """An engine speaks another version of the protocol, or too many clients watch it already."""


class AuthenticationError(LinkError):
    """The other side of a connection does not know the secret of the run."""


class CommandRejectedError(RlhfError):
    """An operator's command cannot be executed; the message gives the reason."""
