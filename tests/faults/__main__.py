"""Breaks runs in every way it knows, and prints what survived: ``python -m tests.faults``.

A run of all classes takes an hour or more; `--seconds` bounds the random kills.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.faults.corruption import corrupt_everything
from tests.faults.kills import Kills, kill_agents, undisturbed_run
from tests.faults.light import light_kills
from tests.faults.outside import OutsideFaults
from tests.faults.table import Table


def fail(error: Exception) -> None:
    """Raises an error, for a fault that is counted after it."""
    raise error


def main() -> int:
    """Runs the classes that are asked for; returns 1 if something was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of sessions and table")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of random kills")
    parser.add_argument("--steps", type=int, default=90, help="of each killed run")
    parser.add_argument(
        "--one-kill", action="store_true",
        help="kill each run once, at a random moment, so that there are as many ends as kills",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--light", type=int, default=200, help="kills around light ranks")
    parser.add_argument(
        "--only", choices=["kills", "agents", "outside", "corruption", "light"], action="append"
    )
    parser.add_argument("--fault", default="", help="a part of the names of faults or damages")
    options = parser.parse_args()
    root = options.out or Path(tempfile.mkdtemp(prefix="faults-"))
    root.mkdir(exist_ok=True)
    # Not those of whoever runs this.
    for variable in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        os.environ[variable] = str(root.resolve() / variable)
    table = Table(root / f"table-{options.seed}.json")
    rng = random.Random(options.seed)
    chosen = options.only or ["kills", "agents", "outside", "corruption", "light"]
    if "kills" in chosen:
        deadline = time.monotonic() + options.seconds
        whole = undisturbed_run(root, options.steps, name=f"undisturbed-{options.seed}")
        kills = Kills(root, table, rng)
        number = 0
        while time.monotonic() < deadline:
            name = f"killed-{options.seed}-{number}"
            try:
                if options.one_kill:
                    kills.run_with_one(name, whole, options.steps)
                else:
                    kills.run(name, whole, options.steps, deadline)
            except AssertionError as error:
                table.count("waits that took too long", name, partial(fail, error))
            print(time.strftime("%X"), table.text(), sep="\n", flush=True)
            number += 1
    if "agents" in chosen:
        kill_agents(root, table, rng, 6)
    if "light" in chosen:
        light_kills(root, table, rng, options.light)
    if "outside" in chosen:
        OutsideFaults(root, table, options.fault).all()
    if "corruption" in chosen:
        corrupt_everything(root, table, only=options.fault)
    print(table.text())
    if not table.rows:
        print(f"no fault of these has a name with {options.fault!r}")
        return 1
    for failure in table.failures:
        print(failure)
    return 1 if table.failures else 0


if __name__ == "__main__":
    sys.exit(main())
