"""The figures of a run of faults: class, tried, survived, lost."""

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.faults.lab import LostError


class Table:
    """Counts by class, written after every fault, so that an end at any moment leaves them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: dict[str, dict[str, int]] = {}
        self.failures: list[str] = []

    def count(self, kind: str, fault: str, check: Callable[[], None]) -> bool:
        """Counts one fault whose invariants `check` tests; returns whether they hold."""
        row = self.rows.setdefault(kind, {"tried": 0, "survived": 0, "lost": 0})
        row["tried"] += 1
        try:
            check()
        except LostError as error:
            row["lost"] += 1
            self._failed(kind, fault, str(error))
        except Exception:
            self._failed(kind, fault, traceback.format_exc())
        else:
            row["survived"] += 1
            self._write()
            return True
        self._write()
        return False

    def _failed(self, kind: str, fault: str, text: str) -> None:
        self.failures.append(f"{kind}: {fault}: {text}")
        print(f"{time.strftime('%X')} FAILED {self.failures[-1]}", flush=True)

    def _write(self) -> None:
        content = {"rows": self.rows, "failures": self.failures}
        self._path.write_text(json.dumps(content, indent=1))

    def text(self) -> str:
        """The table, with a sum."""
        lines = [f"{'class':<42} {'tried':>6} {'survived':>9} {'lost':>5}"]
        for kind, row in self.rows.items():
            lines.append(f"{kind:<42} {row['tried']:>6} {row['survived']:>9} {row['lost']:>5}")
        sums = [
            sum(row[name] for row in self.rows.values()) for name in ("tried", "survived", "lost")
        ]
        return "\n".join([*lines, f"{'all':<42} {sums[0]:>6} {sums[1]:>9} {sums[2]:>5}"])
