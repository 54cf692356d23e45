"""What the panels say of the step in hand, of the ranks and of what they run on, line by line."""

import re

import pytest

from engine.metrics import EVALUATE, PHASES
from engine.protocol.client_messages import Gpu, RankLoad, Telemetry
from engine.protocol.rank_messages import ROOM, WAIT_FOR, Phase
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.widgets.panels.machine import PHASE_BARS, MachinePanel
from rlhf_tui.widgets.panels.phases import PhaseStrip
from tests.tui.panels import make_state, text

# -- phases ----------------------------------------------------------------------------------------


def test_each_phase_that_is_timed_on_the_ranks_has_its_part_of_their_bars():
    assert tuple(PHASE_BARS) == tuple(p for p in PHASES if p not in (EVALUATE, "checkpoint"))


def test_a_phase_has_its_share_and_what_is_left_of_the_step():
    state = make_state()
    state.take(SessionUpdate(phases=[Phase(rank=0, step=51, name="generate", done=25, total=100)]))
    state.clock[0] += 4
    shown = text(PhaseStrip(state), 120, 1)
    assert "▶ generate  25%" in shown
    assert "~6s left" in shown
    assert "· score" in shown


def test_a_phase_without_progress_shows_for_how_long_it_lasts():
    state = make_state()
    state.take(SessionUpdate(phases=[Phase(rank=0, step=51, name="score")]))
    assert "▶ score ·" in text(PhaseStrip(state), 120, 1)
    state.clock[0] += 75
    assert "▶ score 1m15s ·" in text(PhaseStrip(state), 120, 1)


def test_what_came_before_in_the_step_is_ticked():
    state = make_state()
    state.take(SessionUpdate(phases=[Phase(rank=0, step=51, name="optimise", done=1, total=4)]))
    assert "✓ generate 6.0s ✓ score" in text(PhaseStrip(state), 120, 1)


@pytest.mark.parametrize("name", ["sync", "fit"])
def test_a_phase_that_only_some_runs_have_is_part_of_their_steps(name):
    state = make_state()
    generating = Phase(rank=0, step=51, name="generate")
    state.take(SessionUpdate(phases=[generating]))
    assert name not in text(PhaseStrip(state), 120, 1)
    # The first step of such a run has no metrics yet.
    state.take(SessionUpdate(phases=[Phase(rank=0, step=51, name=name)]))
    shown = text(PhaseStrip(state), 120, 1)
    assert f"▶ {name}" in shown
    assert "· optimise" in shown
    assert "step 51" in shown
    curves = {f"time/{name}": [(step, 0.7) for step in range(41, 51)]}
    state.take(
        SessionUpdate(phases=[generating], names=[*state.curves.names, *curves], curves=curves)
    )
    assert f"{name} 0.7s" in text(PhaseStrip(state), 120, 1)
    state.take(SessionUpdate(phases=[]))
    assert f"{name} 0.7s" in text(PhaseStrip(state), 120, 1)


@pytest.mark.parametrize("before", ["generate", "score"])
def test_sync_stands_where_it_comes_which_is_not_first_with_rollout_ahead(before):
    state = make_state()
    curves = {"time/sync": [(step, 0.7) for step in range(41, 51)]}
    state.take(SessionUpdate(names=[*state.curves.names, *curves], curves=curves))
    for name in (before, "sync"):
        state.take(SessionUpdate(phases=[Phase(rank=0, step=51, name=name)]))
    shown = text(PhaseStrip(state), 120, 1)
    assert re.search(rf"✓ {before}( \S+)? ▶ sync", shown)
    left = state.boundary_in()
    state.take(SessionUpdate(phases=[Phase(rank=0, step=52, name="generate")]))
    assert text(PhaseStrip(state), 120, 1).startswith(" ▶ generate")
    assert state.boundary_in() > left
    state.take(SessionUpdate(phases=[Phase(rank=0, step=53, name="sync")]))
    assert text(PhaseStrip(state), 120, 1).startswith(" ▶ sync · generate")


def test_a_step_that_takes_longer_than_usual_has_no_negative_time_left():
    state = make_state()
    state.take(SessionUpdate(phases=[Phase(rank=0, step=51, name="generate")]))
    assert state.boundary_in() > 0
    state.clock[0] += 7200
    assert state.boundary_in() == 0


def test_how_long_a_wait_takes_is_not_estimated():
    state = make_state()
    state.take(SessionUpdate(phases=[Phase(rank=0, step=51, name=f"{WAIT_FOR}{ROOM}")]))
    assert state.boundary_in() is None


def test_loading_shows_progress_too():
    state = make_state()
    state.take(SessionUpdate(phases=[Phase(rank=0, step=0, name="load policy", done=3, total=12)]))
    assert "load policy" in text(PhaseStrip(state), 80, 1)
    assert "3/12" in text(PhaseStrip(state), 80, 1)


@pytest.mark.parametrize(("step", "name"), [(0, "load policy"), (51, "generate")])
def test_a_clock_that_is_set_back_lengthens_no_phase(step, name):
    state = make_state()
    state.take(SessionUpdate(phases=[Phase(rank=0, step=step, name=name)]))
    before = text(PhaseStrip(state), 80, 1)
    state.clock[0] -= 7200
    assert text(PhaseStrip(state), 80, 1) == before


@pytest.mark.parametrize("name", ["paused", "optimise", "fit"])
def test_a_start_shows_no_phase_of_the_attempt_before(name):
    state = make_state(state="starting")
    state.take(SessionUpdate(phases=[Phase(rank=0, step=51, name=name)]))
    assert text(PhaseStrip(state), 80, 1).strip() == "starting: loading models and prompts …"


def test_each_rank_has_a_line_and_the_slowest_is_never_left_out():
    state = make_state()
    phases = [Phase(rank=r, step=51, name="optimise") for r in range(4)]
    phases[2] = Phase(rank=2, step=51, name="generate")
    state.take(SessionUpdate(phases=phases))
    assert text(PhaseStrip(state), 120, 4).count("rank") == 4
    assert "rank 2" in text(PhaseStrip(state), 120, 2)


@pytest.mark.parametrize("width", range(10, 130, 7))
def test_the_strip_fits_every_width(width):
    state = make_state()
    state.take(SessionUpdate(phases=[Phase(rank=0, step=51, name="reference", done=5, total=9)]))
    assert text(PhaseStrip(state), width, 1)


def test_a_narrow_strip_drops_the_shortest_phase_of_the_last_step_and_keeps_the_longest():
    state = make_state(state="paused")
    seconds = {"generate": 2.2, "score": 0.3, "reference": 0.6, "optimise": 3.1}
    state.take(SessionUpdate(curves={f"time/{n}": [(51, s)] for n, s in seconds.items()}))
    shown = text(PhaseStrip(state), 79, 1)
    assert len(shown) <= 79
    assert "generate 2.2s" in shown
    assert "optimise 3.1s" in shown
    assert "score" not in shown


# -- machine ---------------------------------------------------------------------------------------


def test_gpus_stand_with_load_memory_heat_and_power():
    state = make_state()
    gpu = Gpu(
        index=1, name="H200", utilisation=93, memory_used=31_000_000_000,
        memory_total=141_000_000_000, temperature=64, power=412,
    )  # fmt: skip
    rank = RankLoad(rank=0, pid=55, cpu=180, memory=2_000_000_000)
    state.take(
        SessionUpdate(
            telemetry=Telemetry(
                time=1, cpu=50, memory_used=8, memory_total=16, disk_free=10**11, gpus=[gpu],
                ranks=[rank],
            )
        )
    )  # fmt: skip
    shown = text(MachinePanel(state), 80, 8)
    for part in ("GPU 1", "93%", "31.0/141 GB", "64°C", "412 W", "rank 0", "180%", "2.0 GB"):
        assert part in shown


def test_the_memory_of_a_rank_on_a_gpu_is_not_mixed_with_that_of_its_process():
    wide = text(machine_with([rank_of(0, on_gpu=True)], gpus=1), 100, 8)
    assert "GPU peak 41.0 GB  CPU 99%  host 3.0 GB" in wide
    narrow = text(machine_with([rank_of(0, on_gpu=True)], gpus=1), 45, 8)
    assert "GPU peak 41.0 GB" in narrow and "host" not in narrow
    assert "CPU 99%  peak 41.0 GB  now 3.0 GB" in text(machine_with([rank_of(0)]), 100, 8)


@pytest.mark.parametrize("width", range(36, 60))
def test_the_power_of_a_gpu_is_shown_whole_or_not_at_all(width):
    shown = text(machine_with([rank_of(0)], gpus=1), width, 8)
    (line,) = [x for x in shown.splitlines() if "GPU 0" in x]
    assert len(line.rstrip()) <= width
    assert line.rstrip().endswith(("66°C", "610 W"))


@pytest.mark.parametrize("gpus", [1, 8])
def test_what_a_gpu_does_not_measure_is_no_number(gpus):
    parts = [
        Gpu(index=i, name="A100 MIG", utilisation=None, memory_used=5 * 10**9,
            memory_total=20 * 10**9)
        for i in range(gpus)
    ]  # fmt: skip
    unified = [
        Gpu(index=i, name="GB10", utilisation=40, memory_used=0, memory_total=0, temperature=50)
        for i in range(gpus)
    ]
    for shown_gpus, there, missing in ((parts, "–", "0%"), (unified, "40%", "0/0")):
        state = make_state()
        state.take(
            SessionUpdate(
                telemetry=Telemetry(
                    time=1, cpu=77, memory_used=8, memory_total=16, disk_free=10**11,
                    gpus=shown_gpus,
                )
            )
        )  # fmt: skip
        lines = text(MachinePanel(state), 80, 5).splitlines()[: 1 + -(-gpus // 3)]
        assert there in "\n".join(lines[1:])
        assert missing not in "\n".join(lines[1:]).replace("40%", "")


def test_without_a_gpu_the_processors_stand():
    state = make_state()
    state.take(
        SessionUpdate(
            telemetry=Telemetry(
                time=1, cpu=97, memory_used=4 * 10**9, memory_total=16 * 10**9, disk_free=10**11
            )
        )
    )
    assert "CPU" in text(MachinePanel(state))
    assert "100.0 GB free" in text(MachinePanel(state))


def test_what_does_not_fit_is_counted():
    state = make_state()
    ranks = [RankLoad(rank=i, pid=i, cpu=1, memory=1) for i in range(16)]
    state.take(
        SessionUpdate(
            telemetry=Telemetry(
                time=1, cpu=97, memory_used=4, memory_total=16, disk_free=1, ranks=ranks
            )
        )
    )
    assert "more" in text(MachinePanel(state), 60, 6)


def rank_of(number, generate=2.0, **given):
    seconds = {"generate": generate, "score": 0.3, "reference": 0.5, "optimise": 3.0}
    base = {"pid": 100 + number, "cpu": 99, "memory": 3_000_000_000, "seconds": seconds}
    return RankLoad(rank=number, peak_memory=41_000_000_000, **(base | given))


def machine_with(ranks, gpus=0):
    gpu = {"name": "H100", "utilisation": 96, "memory_used": 61e9, "memory_total": 85e9}
    state = make_state()
    state.take(
        SessionUpdate(
            telemetry=Telemetry(
                time=1, cpu=50, memory_used=4, memory_total=16, disk_free=1, ranks=ranks,
                gpus=[Gpu(index=i, temperature=66, power=610, **gpu) for i in range(gpus)],
            )
        )
    )  # fmt: skip
    return MachinePanel(state)


def test_the_slowest_rank_is_marked_by_its_own_seconds():
    shown = text(machine_with([rank_of(0), rank_of(1, 4.0), rank_of(2)]), 60, 8)
    marked = [line for line in shown.splitlines() if "slowest" in line]
    assert len(marked) == 1
    assert marked[0].strip().startswith("rank 1")
    assert "7.8s" in marked[0]


def test_the_longest_rank_fills_its_bar_whatever_phases_the_run_has():
    phases = {"sync": 1.0, "generate": 2.0, "score": 0.3, "reference": 0.5, "fit": 1.0}
    shown = text(machine_with([rank_of(0, seconds=phases | {"optimise": 3.0})]), 100, 8)
    (bar,) = [line for line in shown.splitlines() if "rank 0" in line]
    assert "·" not in bar
    assert "▞ sync" in shown
    assert "▚ fit" in shown
    assert "sync" not in text(machine_with([rank_of(0)]), 100, 8)


def test_no_rank_is_called_slow_where_none_stands_out():
    assert "slowest" not in text(machine_with([rank_of(0), rank_of(1, 2.05)]), 60, 8)


@pytest.mark.parametrize("size", [(39, 6), (46, 13), (64, 16)])
def test_eight_gpus_and_eight_ranks_have_room_and_the_slowest_is_seen(size):
    ranks = [rank_of(i, 4.0 if i == 6 else 2.0) for i in range(8)]
    machine = machine_with(ranks, gpus=8)
    shown = text(machine, *size)
    assert shown.count("96%") == 8
    assert "rank 6" in shown
    assert all(sum(len(t) for t, _ in row) <= size[0] for row in machine.rows(*size)[1:])


def test_a_rank_on_another_machine_has_no_processor_of_this_one():
    away = rank_of(1, pid=0, cpu=0, memory=0)
    line = text(machine_with([rank_of(0), away]), 90, 8).splitlines()[-1]
    assert "elsewhere" in line
    assert "peak 41.0 GB" in line
    assert "0%" not in line
