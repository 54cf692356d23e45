"""What an open app keeps in memory."""

import subprocess
import sys

LINES = """
import gc
from rich.segment import Segment
from textual.strip import Strip
from rlhf_tui.commands.view import collect_what_is_drawn
gc.set_threshold(200_000, 20, 20)
kept, most = [], 0
for number in range(40_000):
    if number == 20_000:
        collect_what_is_drawn()
    strip = Strip([Segment("a" * 80)], 80)
    strip.crop_extend(0, 80, None)  # puts the line in a cache of its own
    kept = [*kept[-50:], strip]
    if number > 20_000 and number % 500 == 0:
        most = max(most, sum(type(o) is Strip for o in gc.get_objects()))
print(most)
"""


def test_lines_that_were_drawn_are_collected_once_the_app_has_started():
    done = subprocess.run(
        [sys.executable, "-c", LINES], capture_output=True, text=True, check=True, timeout=240
    )
    assert int(done.stdout) < 5_000
