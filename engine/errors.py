"""The error family.

::

    RlhfError                     anything this software raises on purpose
    ├── UserInputError            what the user gave is wrong; one line, exit code 2
    │   ├── ConfigError           a configuration key, its type or its range
    │   └── SessionNameError      a session's name
    ├── SessionError              the session is not in a state for this
    │   ├── NoSuchSessionError    no folder of that name; exit code 3
    │   ├── SessionLockedError    another engine has it
    │   └── JournalError          the journal cannot be read or written
    ├── CheckpointError           a checkpoint is missing, damaged or cannot be written
    ├── RewardError               a reward source returned something unusable
    ├── LinkError                 a rank and its supervisor lost each other
    └── CommandRejectedError      an operator's command cannot be carried out

Every message is one sentence that names the thing and says what would be right; it is shown to the
user as it stands.
"""


class RlhfError(Exception):
    """Anything this software raises on purpose."""

    exit_code = 1


class UserInputError(RlhfError):
    """What the user gave is wrong."""

    exit_code = 2


class ConfigError(UserInputError):
    """A configuration key, its type or its range is wrong."""


class SessionNameError(UserInputError):
    """A session's name cannot be used."""


class SessionError(RlhfError):
    """The session is not in a state for what was asked."""


class NoSuchSessionError(SessionError):
    """There is no session of that name, or no engine in it."""

    exit_code = 3


class SessionLockedError(SessionError):
    """Another engine holds the session."""


class JournalError(SessionError):
    """The journal cannot be read or written."""


class CheckpointError(RlhfError):
    """A checkpoint is missing, damaged or cannot be written."""


class RewardError(RlhfError):
    """A reward source returned something that cannot be used as rewards."""


class LinkError(RlhfError):
    """A rank and its supervisor lost each other."""


class CommandRejectedError(RlhfError):
    """An operator's command cannot be carried out; the message says why."""
