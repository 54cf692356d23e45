"""What all tests share."""

import os

from engine.launch.environment import mkl_settings

# Tests that compute in this process do so as a rank does; MKL reads this when torch loads it.
for name, value in mkl_settings().items():
    os.environ.setdefault(name, value)
