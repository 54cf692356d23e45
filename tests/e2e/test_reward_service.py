"""A run whose reward service goes away for a while."""

import threading

import pytest

from tests.reward_service import RewardService, lengths
from tests.waiting import LONG

SECRET = "s3cret-t0ken"  # noqa: S105 - looked for in the session's files


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def outage(request, make_lab):
    """5 steps; the service is down from a request of the third until the run has paused for it."""
    stopped = threading.Event()

    def lengths_until_step_3(handler, body):
        if body["step"] == 3 and not stopped.is_set():
            stopped.wait(LONG)
            raise ConnectionError("the service has stopped")
        lengths(handler, body)

    lab, service = make_lab(f"service-{request.param}"), RewardService(lengths_until_step_3)
    lab.environment["REWARD_TOKEN"] = SECRET
    source = f"{{service: '{service.url}', http: {{token_env: REWARD_TOKEN}}}}"
    run = lab.run(
        "outage",
        f"reward.mix=[{{function: 'gate:score'}}, {source}]",
        "reward.retries=1",
        f"launch.processes={request.param}",
        "log.tensorboard=true",
        steps=5,
    )
    run.hold(3)
    run.start()
    run.wait_at(3)
    service.stop()
    stopped.set()
    run.release(3)
    run.wait_for("paused")
    run.without_service = lab.json("status", run.name)
    run.headers = service.headers[0]
    service.start()
    run.finish()
    yield run
    run.end()
    service.stop()


def test_a_run_pauses_while_its_service_is_down_and_resumes_by_itself(outage):
    status = outage.without_service
    assert status["step"] == 2
    assert status["pause_reason"].startswith("reward 'score-2' at step 3: http://127.0.0.1:")
    assert "Connection refused (4 of 4 responses are not scored)" in status["pause_reason"]
    assert status["pause_reason"].endswith("resumes by itself when that works again")
    assert outage.step == 5
    assert any("works again" in event["text"] for event in outage.events("alert"))
    assert outage.commands() == {}
    with outage.reader() as reader:
        assert len(reader.attempts()) == 1, "nothing was restarted"


def test_the_token_is_in_no_file_of_the_session(outage):
    assert outage.headers["Authorization"] == f"Bearer {SECRET}"
    files = [path for path in outage.session.folder.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
