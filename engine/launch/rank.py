"""Starts a rank or torchrun's agent: ``python -m engine.launch.rank MODULE ARGUMENT...``.

Importing torch takes seconds. This module does not import it, and first makes the kernel end the
process with its parent, so that a rank does not outlive a supervisor that is killed meanwhile.
"""

import atexit
import gc
import importlib
import sys

from engine.launch.parent_death import die_with_parent


def main() -> None:
    """Imports the module that the first argument names and calls its `main`."""
    die_with_parent()
    del sys.argv[0]
    # An import makes hundreds of thousands of objects and no garbage: the collector would look at
    # them again and again, during the import (a twentieth of its time) and in the whole run.
    gc.disable()
    module = importlib.import_module(sys.argv[0])
    gc.freeze()
    gc.enable()
    if "triton" in sys.modules:  # reports what is left at exit as leaked, in engine.log
        atexit.register(gc.unfreeze)
    module.main()


if __name__ == "__main__":
    main()
