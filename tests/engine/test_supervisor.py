"""The supervisor's reaction to commands, alerts and messages of ranks, without rank processes."""

import asyncio
import signal
import sqlite3
from contextlib import closing

import pytest

from engine.config.settings import SettingChange
from engine.journal.reader import JournalReader
from engine.launch import environment
from engine.launch.start_checkpoints import last_checkpoint
from engine.launch.start_options import StartOptions
from engine.protocol import frames, rank_messages
from engine.protocol.client_messages import CommandRequest
from engine.protocol.commands import Note, Pause, Rollback, SetBeta, SetKLController, Stop, Unpause
from engine.protocol.rank_messages import (
    Adjusted,
    Applied,
    CheckpointComplete,
    CheckpointWritten,
    Ended,
    Failed,
    Paused,
    Preempted,
    RankCommand,
    Ready,
)
from engine.session.checkpoints import checkpoint_path
from engine.supervisor import supervisor
from engine.supervisor.attempt import Attempt, description
from engine.supervisor.server import receive
from tests.engine.demo_config import demo
from tests.engine.supervised import Engine, begin_of, rank_connection, starting_attempt

# -- to pause --------------------------------------------------------------------------------------


async def test_commands_are_checked_against_the_state_at_the_boundary(engine):
    commands = (Pause(), Pause(), Unpause(), Unpause(), Pause())
    replies = [engine.send(command) for command in commands]
    expected = ["accepted", "rejected", "accepted", "rejected", "accepted"]
    assert [reply.status for reply in replies] == expected
    assert engine.state == "pausing"
    for reply in replies:
        if reply.status == "accepted":
            engine.receive(Applied(id=reply.id, step=1))
    assert engine.state == "paused"


# -- to stop ---------------------------------------------------------------------------------------


async def test_a_stop_at_once_ends_ranks_whose_process_is_still_being_started(engine):
    attempt = await starting_attempt(engine, StartOptions())
    # It is starting a process now, which cannot be killed yet.
    engine.send(Stop(now=True))
    assert await attempt == 0
    assert await engine.supervisor.ranks.wait() == -signal.SIGKILL


async def test_an_attempt_is_recorded_with_the_steps_that_the_run_is_to_have(engine, writer):
    attempt = await starting_attempt(engine, StartOptions())
    engine.send(Stop(now=True))
    await attempt
    with JournalReader(writer.session) as reader:
        begun = [e.payload for e in reader.events() if e.kind == "attempt"]
    assert begun[-1].total_steps == writer.session.config().train.steps > 0


@pytest.mark.parametrize("commands", [[Pause()], [Pause(), Unpause()]])
async def test_a_pause_carried_out_before_a_stop_does_not_hide_the_stop(engine, commands):
    replies = [engine.send(command) for command in commands]
    engine.send(Stop())
    for reply in replies:
        engine.receive(Applied(id=reply.id, step=2))
        assert engine.state == "stopping"


@pytest.mark.parametrize("command", [Pause(), Stop(), Stop(now=True), SetBeta(value=0.2)])
async def test_a_command_after_the_end_is_rejected_while_the_engine_sends_its_messages(
    engine, writer, command
):
    engine.supervisor.publisher.set_state("finished")
    reply = engine.send(command)
    assert (reply.status, engine.state) == ("rejected", "finished")
    assert reply.reason == "the run has ended: resume it first"
    engine.supervisor.commands.on_signal(signal.SIGTERM)
    engine.supervisor.commands.on_signal(signal.SIGINT)
    with JournalReader(writer.session) as reader:
        assert reader.meta().state == "finished"
    assert engine.send(Note(text="good")).status == "applied"


# -- guard rails -----------------------------------------------------------------------------------


OUTAGE = Paused(step=3, rule="reward", reason="no service", recovers=True)


@pytest.mark.parametrize("ending", ["stopping", "finished"])
async def test_a_guard_rail_issues_no_command_to_a_run_that_ends(engine, writer, ending):
    engine.supervisor.publisher.set_state(ending)
    engine.alert("stop")
    with JournalReader(writer.session) as reader:
        assert reader.commands() == []


# -- refusals --------------------------------------------------------------------------------------


async def test_commands_are_checked_against_the_configuration_in_memory_not_the_file(
    engine, writer
):
    writer.session.config_file.write_text("not: [ours")
    assert engine.send(SetBeta(value=0.2)).status == "accepted"
    reply = engine.send(SetKLController(controller="adaptive", horizon=0.1))
    assert "kl.horizon" in reply.reason


async def test_a_command_that_cannot_be_checked_is_rejected_with_the_reason(engine, writer):
    with closing(sqlite3.connect(writer.session.journal_file)) as db:
        db.execute("PRAGMA user_version = 99")
    reply = engine.send(Rollback(step=2))
    assert reply.status == "rejected"
    assert "journal.db" in reply.reason


async def test_an_id_sent_again_with_another_command_does_not_report_the_first_ones_outcome(engine):
    def send(command):
        return engine.supervisor.commands.handle(CommandRequest(id="nightly", command=command), "")

    first = send(SetBeta(value=0.2))
    engine.receive(Applied(id="nightly", step=4))
    assert (first.status, send(SetBeta(value=0.2)).status) == ("accepted", "applied")
    for other in (Stop(), SetBeta(value=0.3)):
        reply = send(other)
        assert reply.status == "rejected"
        assert reply.reason.startswith("its id is that of an earlier, different command")
    assert engine.state == "running"


async def test_a_rejected_note_is_a_rejected_command_and_no_note(engine, writer):
    assert engine.send(Note(text=" ")).status == "rejected"
    assert engine.send(Note(text="look")).status == "applied"
    with JournalReader(writer.session) as reader:
        events = [e for e in reader.events() if e.kind in ("note", "command")]
    assert [(e.kind, getattr(e.payload, "text", None)) for e in events] == [
        ("command", None),
        ("note", "look"),
    ]


async def test_only_failures_of_ready_ranks_count_against_a_command(engine, writer):
    sent = engine.send(SetBeta(value=0.2))
    for ready in (False, True, True):
        assert [m.id for m in engine.supervisor.pending.messages()] == [sent.id]
        engine.shared.attempt = Attempt(StartOptions())
        if ready:
            engine.receive(Ready(info={}, settings=engine.shared.settings))
        engine.supervisor.attempt_end.handle(-signal.SIGKILL)
    assert engine.supervisor.pending.messages() == []
    assert "failed 2 times" in writer.journal.commands.reply(sent.id).reason


# -- checkpoints -----------------------------------------------------------------------------------


async def test_an_older_checkpoint_is_kept_until_the_newer_one_is_complete(engine, writer):
    writer.checkpoint(2)
    engine.receive(CheckpointWritten(step=4, size=1, score=0.0, kl=0.0))
    assert last_checkpoint(writer.session) == 2
    engine.receive(CheckpointComplete(step=4, removed=[2]))
    with JournalReader(writer.session) as reader:
        assert [c.step for c in reader.checkpoints()] == [4]


async def test_ranks_are_told_of_the_alerts_that_have_not_cleared(engine, tmp_path):
    server, reader, to_engine = await rank_connection(engine, tmp_path)
    async with server:
        await receive(reader)  # where to begin
        engine.supervisor.rank_messages.guardrails.check(2, {"objective/kl": 13.0}, {"target": 6.0})
        to_engine.write(frames.encode(CheckpointWritten(step=4, size=1, score=0.0, kl=0.0)))
        confirm = rank_messages.decode_to_rank(await receive(reader))
        to_engine.close()
    assert (confirm.step, confirm.alerts) == (4, [2])


async def test_ranks_are_told_what_this_engine_has_recorded_of_their_step(
    engine, writer, write_in, tmp_path
):
    writer.steps(1, 2, **{"eval/score": 0.5})
    engine.shared.attempt = Attempt(StartOptions(from_step=1))
    assert set((await begin_of(engine, tmp_path)).recorded) == {
        "objective/scores", "lr", "eval/score",
    }  # fmt: skip
    with closing(write_in(writer.session).journal) as other:
        assert other.recorded_metrics(1) == [], "the evaluation of another engine may differ"


async def test_ranks_are_told_the_best_metric_of_each_checkpoint(engine, writer, tmp_path):
    writer.steps(1, 2, 3)
    for step in (1, 3):
        writer.checkpoint(step)
    begin = await begin_of(engine, tmp_path)
    assert begin.best == {1: 1.1, 3: 3.1}


async def test_values_that_an_earlier_version_accepted_are_not_repeated(engine, writer, tmp_path):
    for number, (step, old, new) in enumerate(((2, 4, 10**19), (3, 10**19, 4), (4, 4, 6))):
        writer.change(str(number), step, old, new, key="epochs")
    begin = await begin_of(engine, tmp_path)
    assert [c.new for r in begin.repeat for c in r.changes] == [4, 6]
    with JournalReader(writer.session) as reader:
        alerts = [e.payload.text for e in reader.events() if e.kind == "alert"]
    assert alerts == [
        "a change of step 2 is not repeated: epochs must be a whole number of at most 1000, not 1"
        + "0" * 19
    ]


def damaged(step):
    return Failed(
        rank=0, text=f"the checkpoint of step {step} is damaged", final=True, damaged=True
    )


async def test_a_damaged_checkpoint_makes_a_resume_start_from_the_one_before(engine, writer):
    for step in (2, 4):
        writer.checkpoint(step)
    engine.shared.attempt = Attempt(StartOptions(from_step=4, reseed=True, who="me"))
    engine.receive(damaged(4))
    engine.supervisor.attempt_end.handle(1)
    assert engine.shared.next == StartOptions(from_step=2, reseed=True, who="me")
    with JournalReader(writer.session) as reader:
        alerts = [e.payload.text for e in reader.events() if e.kind == "alert"]
    assert alerts == [f"{damaged(4).text}; resuming from the one before, of step 2"]


@pytest.mark.parametrize(
    "start", [StartOptions(from_step=2), StartOptions(from_step=4, fresh=True)]
)
async def test_no_other_checkpoint_replaces_the_first_or_a_chosen_one(engine, writer, start):
    for step in (2, 4):
        writer.checkpoint(step)
    engine.shared.attempt = Attempt(start)
    engine.receive(damaged(start.from_step))
    engine.supervisor.attempt_end.handle(1)
    assert (engine.shared.next, engine.state) == (None, "failed")
    with JournalReader(writer.session) as reader:
        message = reader.meta().message
    assert message.endswith(f"resume from another one ({6 - start.from_step}) with --from STEP")


async def test_a_checkpoint_that_is_recorded_and_gone_is_named_where_an_earlier_one_takes_its_place(
    engine, writer
):
    for step in (2, 4):
        writer.checkpoint(step)
    checkpoint_path(writer.session.checkpoints, 4).rename(writer.session.folder / "away")
    engine.shared.next = StartOptions(from_step=2)
    engine.send(Stop(now=True))
    await engine.supervisor.run()
    with JournalReader(writer.session) as reader:
        alerts = [e.payload.text for e in reader.events() if e.kind == "alert"]
    assert alerts == [
        "the checkpoint of step 4 is recorded, but is not on disk: resuming from the one before, "
        "of step 2"
    ]


@pytest.mark.parametrize("changes", [[], [SettingChange(key="micro_batch_size", old=16, new=8)]])
async def test_ranks_do_not_start_again_at_step_0_while_the_checkpoints_cannot_be_found(
    engine, writer, changes
):
    """As on a disk that is no longer mounted: they stay checkpoints of the timeline."""
    writer.steps(1, 2, 3, 4)
    writer.checkpoint(2)
    writer.session.checkpoints.rename(writer.session.folder / "away")
    engine.receive(Failed(rank=0, text="input/output error", step=4, changes=changes))
    assert engine.supervisor.attempt_end.handle(1) == 1
    assert (engine.shared.next, engine.state) == (None, "failed")
    with JournalReader(writer.session) as reader:
        message = reader.meta().message
    assert message.startswith("input/output error; the journal of session 'run' has checkpoints")
    (writer.session.folder / "away").rename(writer.session.checkpoints)
    assert last_checkpoint(writer.session) == 2


# -- out of memory ---------------------------------------------------------------------------------

HALVED = SettingChange(key="micro_batch_size", old=16, new=8)


async def test_ranks_out_of_memory_start_again_with_a_halved_micro_batch_from_that_step(
    engine, writer, tmp_path
):
    writer.checkpoint(2)
    for _ in range(5):  # it is not the same start, so no limit of restarts applies
        text = "rank 1: step 4 ran out of memory"
        engine.receive(Failed(rank=1, text=text, final=True, step=4, changes=[HALVED]))
        engine.supervisor.attempt_end.handle(1)
        assert engine.shared.next == StartOptions(from_step=2)
    engine.shared.attempt = Attempt(engine.shared.next)
    begin = await begin_of(engine, tmp_path)
    assert {(r.step, *r.changes) for r in begin.repeat} == {(4, HALVED)}
    with JournalReader(writer.session) as reader:
        alert = next(e.payload.text for e in reader.events() if e.kind == "alert")
        assert reader.meta().settings["micro_batch_size"] == 8
    assert (
        alert == f"{text}: restart from step 2, from step 4 with micro_batch_size 8 instead of 16"
    )


async def test_a_micro_batch_that_a_rank_has_halved_is_in_the_history(engine, writer, tmp_path):
    engine.receive(Adjusted(step=3, changes=[HALVED], rule="memory", text="step 3 is repeated"))
    assert [(r.step, r.changes) for r in (await begin_of(engine, tmp_path)).repeat] == [
        (3, [HALVED])
    ]
    assert engine.shared.settings["micro_batch_size"] == 8


async def test_a_start_with_less_memory_leaves_the_restarts_for_other_failures(
    make_session, write_in
):
    writer = write_in(make_session("run", "launch.max_restarts=1"))
    with closing(writer.journal):
        writer.journal.begin_attempt(0, fresh=False)
        engine = Engine(writer)
        engine.receive(Failed(rank=1, text="no memory", final=True, step=4, changes=[HALVED]))
        engine.supervisor.attempt_end.handle(1)
        states = []
        for _ in range(2):
            engine.shared.attempt, engine.shared.next = Attempt(StartOptions()), None
            engine.supervisor.attempt_end.handle(-signal.SIGKILL)
            states.append((engine.shared.next is not None, engine.state))
        assert states == [(True, "running"), (False, "failed")]


# -- a deadline ------------------------------------------------------------------------------------


async def test_a_run_that_saved_before_its_deadline_is_stopped_and_not_finished(engine, writer):
    engine.receive(Ended(step=4, reason="deadline"))
    engine.supervisor.attempt_end.handle(0)
    with JournalReader(writer.session) as reader:
        assert reader.meta().state == "stopped"
        assert "save_before_deadline" in reader.meta().message


@pytest.mark.parametrize("reason", ["joining", "leaving"])
async def test_ranks_that_end_for_another_number_of_machines_start_again(engine, writer, reason):
    writer.checkpoint(4)
    engine.receive(Ended(step=4, reason=reason))
    engine.supervisor.attempt_end.handle(1)
    assert engine.shared.next == StartOptions(from_step=4)
    engine.shared.next, engine.shared.stopping = None, True
    engine.supervisor.attempt_end.handle(1)
    assert (engine.shared.next, engine.state) == (None, "stopped")


@pytest.mark.parametrize(
    ("number", "reason", "code"),
    [
        (signal.SIGTERM, "stopped", 75), (signal.SIGUSR1, "stopped", 75),
        (signal.SIGINT, "stopped", 0), (None, "deadline", 75), (None, "preempted", 75),
    ],
)  # fmt: skip
async def test_only_a_run_that_a_scheduler_ended_has_its_exit_code(
    make_session, write_in, number, reason, code
):
    writer = write_in(make_session("run", "launch.preempted_exit=75"))
    with closing(writer.journal):
        writer.journal.begin_attempt(0, fresh=False)
        engine = Engine(writer)
        if number is not None:
            engine.supervisor.commands.on_signal(number)
        engine.receive(Ended(step=4, reason=reason))
        assert engine.supervisor.attempt_end.handle(0) == code


@pytest.mark.parametrize("stopped_before", [False, True])
async def test_ranks_are_told_of_a_schedulers_signal_also_after_a_stop_and_a_restart(
    engine, tmp_path, stopped_before
):
    if stopped_before:
        engine.send(Stop())
    for attempt in ("present", "next"):
        engine.shared.attempt = Attempt(StartOptions())
        (folder := tmp_path / attempt).mkdir()
        server, reader, to_engine = await rank_connection(engine, folder)
        async with server:
            received = [rank_messages.decode_to_rank(await receive(reader))]
            if attempt == "present":
                engine.supervisor.commands.on_signal(signal.SIGTERM)
            while not isinstance(received[-1], Preempted):
                received.append(rank_messages.decode_to_rank(await receive(reader)))
            to_engine.close()
        (stop,) = [message for message in received if isinstance(message, RankCommand)]
        assert stop.command == Stop()


# -- the end of an attempt -------------------------------------------------------------------------


async def test_a_rank_that_connected_after_another_had_left_is_waited_for(engine):
    attempt = engine.shared.attempt
    attempt.rank_connected(1, None)
    attempt.rank_disconnected(1)
    attempt.rank_connected(2, None)
    waiting = asyncio.create_task(attempt.wait_disconnected())
    ended, _ = await asyncio.wait({waiting}, timeout=0.2)
    assert not ended
    attempt.rank_disconnected(2)
    await waiting


# -- GPUs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("with_cuda", "overrides", "asked"),
    [
        (True, ["launch.processes=2"], [([], 2)]),
        (True, ["launch.gpus=[4, 5]"], [([4, 5], 2)]),
        (True, ["launch.gpus=[4]", "rollout.engine=vllm", "rollout.gpus=[5]"], [([4], None)]),
        (True, ["launch.device=cpu"], []),
        (False, [], []),  # a build of torch for CPUs
    ],
)
async def test_a_run_warns_of_its_own_gpus_that_others_fill(
    writer, monkeypatch, with_cuda, overrides, asked
):
    found = []

    def busy(chosen, first):
        found.append((chosen, first))
        return ["GPU 4 already holds 9.0 GB"]

    monkeypatch.setattr(supervisor, "busy_gpus", busy)
    for module in (supervisor, environment):
        monkeypatch.setattr(module, "torch_is_built_for_gpus", lambda: with_cuda)
    writer.session.write_config(demo(*overrides))
    engine = Engine(writer)
    await engine.supervisor.run()
    assert found == asked
    with JournalReader(writer.session) as reader:
        alerts = [e.as_json()["text"] for e in reader.events() if e.kind == "alert"]
    assert alerts == ["GPU 4 already holds 9.0 GB"] * len(asked)


@pytest.mark.parametrize(
    ("start", "number", "first", "reason"),
    [
        (StartOptions(who="ana"), 1, True, "start by ana"),
        (StartOptions(from_step=4, who="ana"), 2, True, "resume by ana"),
        (StartOptions(from_step=4), 2, False, "restart"),
        (StartOptions(from_step=4, fresh=True, who="guard rail kl_high"), 2, False,
         "roll back by guard rail kl_high"),
        (StartOptions(from_step=4, fresh=True, origin={"from": "mine", "step": 4}), 3, True,
         "fork of 'mine'"),
    ],
)  # fmt: skip
def test_the_log_names_the_reason_of_an_attempt(start, number, first, reason):
    found = description(start, number, first=first)
    assert found == f"attempt {number} begins from step {start.from_step}: {reason}"
