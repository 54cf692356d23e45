"""Starts the rollout engine: ``python -P start.py SOCKET_FD SESSION_FOLDER``.

This file is run by path, with the Python of vLLM's environment, where this package is not
installed. Adding our site-packages to the path would shadow that environment's transformers, so
only the package `engine` is made importable. Processes that vLLM spawns run this file again, as
`__mp_main__`, and so also find the package.
"""

import importlib.util
import sys
from pathlib import Path


def make_engine_importable() -> None:
    """Makes `import engine` find the package that this file is part of."""
    folder = Path(__file__).resolve().parents[4]
    spec = importlib.util.spec_from_file_location(
        "engine", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} is not a package")
    module = importlib.util.module_from_spec(spec)
    sys.modules["engine"] = module
    spec.loader.exec_module(module)


make_engine_importable()

if __name__ == "__main__":
    from engine.launch.parent_death import die_with_parent

    die_with_parent()
    from engine.train.rollout.vllm.process.engine_process import main

    main(int(sys.argv[1]))
