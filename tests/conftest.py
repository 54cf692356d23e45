"""What all tests share."""

import os

from engine.launch.environment import mkl_settings

# Tests that compute in this process do so as a rank does; MKL reads this when torch loads it.
for name, value in mkl_settings().items():
    os.environ.setdefault(name, value)

# Every test of a run starts processes of Python; without compiled files each of them compiles some
# two hundred modules of ours again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
