"""What all tests share."""

import gc
import os
import signal
import sys

import pytest
from hypothesis import settings

from engine.launch.environment import mkl_settings

# Tests that compute in this process do so as a rank does; MKL reads this when torch loads it.
for name, value in mkl_settings().items():
    os.environ.setdefault(name, value)

# Every test of a run starts processes of Python; without compiled files each of them compiles some
# two hundred modules of ours again, and every process of pytest rewrites all assertions.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


# A shell starts a job in the background with this signal ignored, and processes inherit that: what
# a test interrupts would go on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# On a busy machine an example takes as long as it takes.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def own_user_folders(tmp_path_factory):
    """Live sessions, preferences and tokens of prompts are not those of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
            patch.setenv(variable, str(folder / variable))
        yield


def pytest_collection_finish():
    """Has the garbage collector leave out what the test modules have imported.

    Torch, transformers and Textual are some million objects that live until the end; looking at
    them again and again takes a tenth of the tests' time.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Has what was left out freed at exit: triton prints a list of what is left."""
    if "triton" in sys.modules:
        gc.unfreeze()
