"""Starts a rank or torchrun's agent: ``python -m engine.launch.rank MODULE ARGUMENT...``.

Importing torch takes seconds. This module imports none of it and first has the kernel end the
process with its parent, so that a rank does not outlive a supervisor that is killed meanwhile.
"""

import runpy
import sys

from engine.launch.parent import die_with_parent


def main() -> None:
    """Becomes the module that the first argument names."""
    die_with_parent()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
