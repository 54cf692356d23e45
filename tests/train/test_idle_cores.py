"""Waiting threads spin only while each of them has an idle core."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from engine.config.sections.launch import LaunchConfig
from engine.launch.environment import LONG_WAITING, OPENMP_WAITING, has_cpu_quota, rank_environment
from engine.train.distributed.idle_cores import CoreTimes, busy_seconds

CORES = len(os.sched_getaffinity(0))
STATISTICS = """\
cpu  500 0 100 9000 40 0 0 10 0 0
cpu0 300 10 60 4000 20 1 2 7 0 0
cpu1 200 0 40 5000 20 0 0 3 0 0
intr 12345 0 9
"""


def run_python(code: str, environment: dict[str, str]) -> list[str]:
    """Runs a program in a process of its own and returns the words it prints."""
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return found.stdout.split()


def test_time_that_a_core_was_idle_or_waited_for_a_disk_is_not_busy() -> None:
    tick = 1 / os.sysconf("SC_CLK_TCK")

    assert busy_seconds(STATISTICS, {0}) == pytest.approx(380 * tick)


def test_cores_that_the_process_may_not_use_do_not_count() -> None:
    both = busy_seconds(STATISTICS, {0, 1})

    assert both - busy_seconds(STATISTICS, {1}) == pytest.approx(busy_seconds(STATISTICS, {0}))


def test_another_busy_process_is_noticed() -> None:
    before = CoreTimes.read()
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        deadline = time.monotonic() + 60
        while (now := CoreTimes.read()).used_by_others(before) * (now.at - before.at) < 0.5:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        other.kill()
        other.wait()


def test_own_work_does_not_count_as_that_of_others() -> None:
    before = CoreTimes.read()
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass

    now = CoreTimes.read()

    assert (now.busy - before.busy) - now.used_by_others(before) * (now.at - before.at) >= 0.49


SLEEPS_BETWEEN_REGIONS = """
    import os, time, torch
    from engine.train.distributed.idle_cores import SecondTeam

    def sleeps():
        found = 0
        for task in os.listdir("/proc/self/task"):
            text = open(f"/proc/self/task/{task}/status").read()
            if int(task) != os.getpid():
                found += int(text.split("nonvoluntary")[0].split("voluntary_ctxt_switches:")[1])
        return found

    x = torch.zeros(1 << 17)
    x.add_(1.0)
    threads = len(os.listdir("/proc/self/task"))
    team = SecondTeam()
    more = len(os.listdir("/proc/self/task")) - threads
    before = sleeps()
    for _ in range(200):
        time.sleep(0.001)
        x.add_(1.0)
    found = sleeps() - before
    team.end()
    deadline = time.monotonic() + 30
    while len(os.listdir("/proc/self/task")) > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    print(more, found, len(os.listdir("/proc/self/task")) - threads)
"""


@pytest.mark.skipif(CORES < 2, reason="threads wait for each other on two cores or more")
def test_beside_a_second_team_threads_sleep_between_parallel_regions_and_it_ends_whole() -> None:
    always = LONG_WAITING | {"GOMP_SPINCOUNT": "3000000000", "OMP_NUM_THREADS": str(CORES)}

    threads, sleeps, left = map(int, run_python(SLEEPS_BETWEEN_REGIONS, always))

    assert (threads, left) == (CORES, 0)
    assert sleeps >= 100


WAITING = """
    import os
    from engine.train.distributed.idle_cores import adapt_thread_waits
    print(adapt_thread_waits(), os.environ["GOMP_SPINCOUNT"])
"""


@pytest.mark.skipif(CORES < 2, reason="threads wait for each other on two cores or more")
def test_programs_that_a_rank_starts_do_not_wait_actively() -> None:
    environment = LONG_WAITING | {"OMP_NUM_THREADS": str(CORES)}

    assert run_python(WAITING, environment) == ["True", OPENMP_WAITING["GOMP_SPINCOUNT"]]


def test_a_users_own_setting_of_waits_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")

    assert run_python(WAITING, rank_environment(LaunchConfig(), ranks=1)) == ["False", "7"]


def test_ranks_that_share_a_machine_sleep_soon() -> None:
    shared = rank_environment(LaunchConfig(), ranks=2)

    assert shared["GOMP_SPINCOUNT"] == OPENMP_WAITING["GOMP_SPINCOUNT"]


def test_a_rank_that_leaves_most_cores_to_others_sleeps_soon() -> None:
    alone = rank_environment(LaunchConfig(threads=max(1, CORES // 2)), ranks=1)

    assert alone["GOMP_SPINCOUNT"] == OPENMP_WAITING["GOMP_SPINCOUNT"]


@pytest.mark.parametrize(
    ("name", "text", "limited"),
    [
        ("cpu.max", "max 100000\n", False),
        ("cpu.max", "200000 100000\n", True),
        ("cpu/cpu.cfs_quota_us", "-1\n", False),
        ("cpu/cpu.cfs_quota_us", "200000\n", True),
        ("other", "", False),
    ],
)
def test_a_containers_limit_of_processor_time_is_seen(
    tmp_path: Path, name: str, text: str, limited: bool
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)

    assert has_cpu_quota(tmp_path) is limited
