"""What the panels say, line by line."""

import msgspec
import pytest

from engine.control import Gpu, RankLoad, Telemetry
from engine.protocol import Phase
from rlhf_tui.news import Head, News
from rlhf_tui.preferences import Seen
from rlhf_tui.screens.digest import digest
from rlhf_tui.screens.sessions import spark
from rlhf_tui.widgets.book import Book
from rlhf_tui.widgets.phases import PhaseStrip
from rlhf_tui.widgets.ranks import Machine
from rlhf_tui.widgets.readout import ReadOut
from rlhf_tui.widgets.steering import Steering
from rlhf_tui.widgets.topline import Status, Tabs
from rlhf_tui.widgets.view import View

SETTINGS = {
    "beta": 0.05, "controller": "adaptive", "target": 6.0, "horizon": 1000.0, "beta_min": 0.01,
    "beta_max": 1.0, "learning_rate": 1e-5, "save_every": 50, "clip_range": 0.2, "epochs": 4,
    "stop_kl": None, "temperature": 1.0, "max_new_tokens": 64,
}  # fmt: skip


def head(**given):
    base = Head("running", 50, 100, SETTINGS, "", [{"attempt": 1}], 77, "box")
    return Head(**{f: given.get(f, getattr(base, f)) for f in Head.__dataclass_fields__})


@pytest.fixture
def make_book():
    clock = [1000.0]

    def make(kl=6.0, **given):
        book = Book("run", batch_size=100, now=lambda: clock[0])
        curves = {
            "objective/kl": [(s, kl) for s in range(1, 51)],
            "objective/scores": [(s, s / 50) for s in range(1, 51)],
            "time/step": [(s, 10.0) for s in range(1, 51)],
            "time/generate": [(s, 6.0) for s in range(1, 51)],
        }
        book.take(News(head=head(**given), curves=curves, connected=True))
        book.clock = clock
        return book

    return make


def text(panel, width=100, height=20):
    return "\n".join("".join(piece for piece, _ in row) for row in panel.rows(width, height))


def command(status, **given):
    base = {
        "id": "1", "command": "beta", "args": {"value": 0.1}, "who": "ana on pts/1",
        "status": status, "queued": 1.0, "accepted": None, "ended": None, "attempt": 1,
        "applied_step": None, "reason": None, "changes": [], "live": 1,
    }  # fmt: skip
    return base | given


# -- steering -----------------------------------------------------------------------------------


def test_the_next_beta_is_the_controller_s(make_book):
    # e = 6.6/6 - 1 = 0.1 and n/horizon = 0.1, so beta grows by 1 %.
    assert "0.0505   +1.0%" in text(Steering(make_book(kl=6.6)))


def test_a_saturated_controller_says_so(make_book):
    assert "+2.0% saturated" in text(Steering(make_book(kl=60.0)))


def test_a_bound_that_holds_beta_says_so(make_book):
    settings = SETTINGS | {"beta": 1.0}
    assert "at its bound" in text(Steering(make_book(kl=60.0, settings=settings)))


def test_a_fixed_beta_stays_and_the_panel_says_what_the_controller_would_do(make_book):
    settings = SETTINGS | {"controller": "fixed"}
    shown = text(Steering(make_book(kl=6.6, settings=settings)))
    assert "stays; adaptive would give 0.0505" in shown


def test_beta_names_who_set_it(make_book):
    book = make_book()
    change = [{"key": "beta", "old": 0.04, "new": 0.05}]
    done = command("applied", applied_step=12, changes=change, ended=2.0)
    book.take(News(commands=[done]))
    assert "goes on from ana's, step 12" in text(Steering(book))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (command("queued"), "queued"),
        (command("accepted", accepted=1.0), "accepted"),
        (command("applied", applied_step=51, ended=2.0), "✓ applied at step 51"),
        (command("rejected", reason="too much", ended=2.0), "✗ rejected: too much"),
    ],
)
def test_a_command_s_life_is_shown(make_book, given, words):
    book = make_book()
    book.take(News(commands=[given]))
    assert words in text(Steering(book))


def test_a_pending_command_has_a_line_even_in_the_smallest_panel(make_book):
    book = make_book()
    book.take(News(commands=[command("accepted", accepted=1.0)]))
    assert "accepted" in text(Steering(book), 40, 6)


def test_read_only_stands_in_the_panel_s_heading(make_book):
    panel = Steering(make_book())
    panel.read_only = True
    assert "read-only" in text(panel)
    assert "±10%" not in text(panel)


# -- phases -------------------------------------------------------------------------------------


def test_a_phase_has_its_share_and_what_is_left_of_the_step(make_book):
    book = make_book()
    book.take(News(phases=[Phase(rank=0, step=51, name="generate", done=25, total=100)]))
    book.clock[0] += 4
    shown = text(PhaseStrip(book), 120, 1)
    assert "▶ generate  25%" in shown
    assert "~6s left" in shown
    assert "· score" in shown


def test_what_came_before_in_the_step_is_ticked(make_book):
    book = make_book()
    book.take(News(phases=[Phase(rank=0, step=51, name="optimise", done=1, total=4)]))
    assert "✓ generate 6.0s ✓ score" in text(PhaseStrip(book), 120, 1)


def test_loading_shows_progress_too(make_book):
    book = make_book()
    book.take(News(phases=[Phase(rank=0, step=0, name="load policy", done=3, total=12)]))
    assert "load policy" in text(PhaseStrip(book), 80, 1)
    assert "3/12" in text(PhaseStrip(book), 80, 1)


def test_each_rank_has_a_line_and_the_slowest_is_never_left_out(make_book):
    book = make_book()
    phases = [Phase(rank=r, step=51, name="optimise") for r in range(4)]
    phases[2] = Phase(rank=2, step=51, name="generate")
    book.take(News(phases=phases))
    assert text(PhaseStrip(book), 120, 4).count("rank") == 4
    assert "rank 2" in text(PhaseStrip(book), 120, 2)


@pytest.mark.parametrize("width", range(10, 130, 7))
def test_the_strip_fits_every_width(make_book, width):
    book = make_book()
    book.take(News(phases=[Phase(rank=0, step=51, name="reference", done=5, total=9)]))
    assert text(PhaseStrip(book), width, 1)


# -- machine ------------------------------------------------------------------------------------


def test_gpus_stand_with_load_memory_heat_and_power(make_book):
    book = make_book()
    gpu = Gpu(
        index=1, name="H200", utilisation=93, memory_used=31_000_000_000,
        memory_total=141_000_000_000, temperature=64, power=412,
    )  # fmt: skip
    rank = RankLoad(rank=0, pid=55, cpu=180, memory=2_000_000_000)
    book.take(
        News(
            telemetry=Telemetry(
                time=1, cpu=50, memory_used=8, memory_total=16, disk_free=10**11, gpus=[gpu],
                ranks=[rank],
            )
        )
    )  # fmt: skip
    shown = text(Machine(book), 80, 8)
    for part in ("GPU 1", "93%", "31.0/141 GB", "64°C", "412 W", "rank 0", "180%", "2.0 GB"):
        assert part in shown


def test_without_a_gpu_the_processors_stand(make_book):
    book = make_book()
    book.take(
        News(
            telemetry=Telemetry(
                time=1, cpu=97, memory_used=4 * 10**9, memory_total=16 * 10**9, disk_free=10**11
            )
        )
    )
    assert "CPU" in text(Machine(book))
    assert "100.0 GB free" in text(Machine(book))


def test_what_does_not_fit_is_counted(make_book):
    book = make_book()
    ranks = [RankLoad(rank=i, pid=i, cpu=1, memory=1) for i in range(16)]
    book.take(
        News(
            telemetry=Telemetry(
                time=1, cpu=97, memory_used=4, memory_total=16, disk_free=1, ranks=ranks
            )
        )
    )
    assert "more" in text(Machine(book), 60, 6)


def rank_of(number, generate=2.0, **given):
    seconds = {"generate": generate, "score": 0.3, "reference": 0.5, "optimise": 3.0}
    base = {"pid": 100 + number, "cpu": 99, "memory": 3_000_000_000, "seconds": seconds}
    return RankLoad(rank=number, peak_memory=41_000_000_000, **(base | given))


def machine_with(make_book, ranks, gpus=0):
    gpu = {"name": "H100", "utilisation": 96, "memory_used": 61e9, "memory_total": 85e9}
    book = make_book()
    book.take(
        News(
            telemetry=Telemetry(
                time=1, cpu=50, memory_used=4, memory_total=16, disk_free=1, ranks=ranks,
                gpus=[Gpu(index=i, temperature=66, power=610, **gpu) for i in range(gpus)],
            )
        )
    )  # fmt: skip
    return Machine(book)


def test_the_slowest_rank_is_marked_by_its_own_seconds(make_book):
    shown = text(machine_with(make_book, [rank_of(0), rank_of(1, 4.0), rank_of(2)]), 60, 8)
    marked = [line for line in shown.splitlines() if "slowest" in line]
    assert len(marked) == 1
    assert marked[0].strip().startswith("rank 1")
    assert "7.8s" in marked[0]


def test_no_rank_is_called_slow_where_none_stands_out(make_book):
    assert "slowest" not in text(machine_with(make_book, [rank_of(0), rank_of(1, 2.05)]), 60, 8)


@pytest.mark.parametrize("size", [(39, 6), (46, 13), (64, 16)])
def test_eight_gpus_and_eight_ranks_have_room_and_the_slowest_is_seen(make_book, size):
    ranks = [rank_of(i, 4.0 if i == 6 else 2.0) for i in range(8)]
    machine = machine_with(make_book, ranks, gpus=8)
    shown = text(machine, *size)
    assert shown.count("96%") == 8
    assert "rank 6" in shown
    assert all(sum(len(t) for t, _ in row) <= size[0] for row in machine.rows(*size)[1:])


def test_a_rank_on_another_machine_has_no_processor_of_this_one(make_book):
    away = rank_of(1, pid=0, cpu=0, memory=0)
    line = text(machine_with(make_book, [rank_of(0), away]), 90, 8).splitlines()[-1]
    assert "elsewhere" in line
    assert "peak 41.0 GB" in line
    assert "0%" not in line


# -- top lines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"state": "crashed", "pid": None}, "rlhf-tui resume run"),
        ({"state": "failed", "pid": None, "message": "out of memory\nmore"}, "out of memory"),
        ({"state": "finished", "pid": None, "step": 100}, "-o train.steps=200"),
        ({"state": "paused"}, "p goes on"),
    ],
)
def test_a_state_says_what_helps(make_book, given, words):
    assert words in text(Status(make_book(**given)))


def test_time_left_is_reckoned_from_the_last_steps(make_book):
    assert "8m20s left" in text(Status(make_book()))


def test_a_problem_takes_the_line(make_book):
    book = make_book()
    book.take(News(problem="the journal is gone"))
    assert "the journal is gone" in text(Status(book))


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_where_one_is_and_the_state_are_always_there(make_book, width):
    shown = text(Tabs(make_book(), "samples"), width, 1)
    assert "running" in shown
    assert "Samples" in shown or width < 60


# -- what happened ------------------------------------------------------------------------------


def test_an_intervention_s_effect_is_the_means_before_and_after(make_book):
    book = make_book()
    change = [{"key": "beta", "old": 0.04, "new": 0.05}]
    done = command("applied", applied_step=21, changes=change, ended=2.0)
    book.take(News(commands=[done]))
    shown = text(ReadOut(book, View()), 120, 2)
    assert "beta 0.04 → 0.05" in shown
    # Scores are step/50: the mean of steps 11-20 is 0.31, of 21-30 it is 0.51.
    assert "0.310→0.510" in shown


def test_the_crosshair_reads_the_values_of_its_step(make_book):
    assert "score 0.500" in text(ReadOut(make_book(), View(cursor=25)), 120, 2)


def test_a_digest_tells_what_came_since(make_book):
    book = make_book()
    alert = {"event": 9, "time": 900.0, "attempt": 1, "step": 40, "kind": "alert",
             "rule": "kl", "text": "KL is high"}  # fmt: skip
    book.take(News(events=[alert]))
    rows = digest(book, Seen(time=500.0, step=20, event=3))
    shown = "\n".join("".join(p for p, _ in row) for row in rows)
    assert "steps 20 → 50" in shown
    assert "KL is high" in shown
    assert "8m20s" in shown


def test_there_is_no_digest_for_who_was_not_away(make_book):
    book = make_book()
    assert digest(book, Seen(time=990.0, step=20, event=3)) == []
    assert digest(book, Seen(time=100.0, step=50, event=3)) == []


def test_a_sparkline_rises_with_its_values():
    assert spark([float(i) for i in range(100)], 8) == "▁▂▃▄▅▆▇█"
    assert spark([]) == ""
    assert len(set(spark([1.0, 1.0, 1.0]))) == 1


def test_the_settings_above_are_the_engine_s():
    from engine.settings import Settings  # noqa: PLC0415

    assert msgspec.convert(SETTINGS, Settings, strict=False).beta == 0.05
