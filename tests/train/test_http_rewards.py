"""Rewards over HTTP: both protocols, concurrency, and every way in which a service can fail."""

import shutil
import threading
from pathlib import Path

import pytest

from engine.config.sections.launch import LaunchConfig
from engine.config.sections.reward import HTTPConfig, RewardConfig, RewardSource
from engine.errors import UserInputError
from engine.progress import report_nothing
from engine.train.data.prompts import Prompt, batch_prompts
from engine.train.distributed.ranks import RankGroup
from engine.train.rewards import calls
from engine.train.rewards.kinds import http_client
from engine.train.rewards.mix import load_rewards
from engine.train.rewards.source import (
    IncompleteScoresError,
    LoadContext,
    RewardCallError,
    RewardInputs,
)
from engine.train.rollout.conversation import Turns
from tests.reward_service import RewardService, lengths, reply
from tests.train.reward_inputs import TEXTS

SINGLE_RANK = RankGroup(LaunchConfig(device="cpu"))
CERTIFICATE = Path(__file__).parent.parent / "data" / "tls" / "localhost.pem"
BEARER = "s3cret-t0ken"


@pytest.fixture
def service():
    running = RewardService()
    yield running
    running.stop()


def repeated(inputs, times):
    prompts = inputs.batch.prompts * times
    return RewardInputs(
        batch_prompts(prompts, 1, 0), inputs.ids * times, inputs.texts * times,
        inputs.eos * times, inputs.step,
    )  # fmt: skip


@pytest.fixture
def mix(tokenizer, monkeypatch):
    """Loads a source of one key; retries do not wait."""
    monkeypatch.setattr(calls, "FIRST_DELAY", 0.0)

    def load(*, retries=2, batch_size=1, **keys):
        keys["http"] = HTTPConfig(**{"concurrency": 2, "timeout": 30} | keys.get("http", {}))
        config = RewardConfig(mix=[RewardSource(**keys)], retries=retries, batch_size=batch_size)
        return load_rewards(LoadContext(config, tokenizer.get_vocab(), SINGLE_RANK))

    return load


def scores(mix, inputs):
    (name,) = mix.names
    return mix.source_scores(name, inputs)


# -- the protocols ---------------------------------------------------------------------------------


def test_a_service_gets_prompts_responses_columns_and_step(service, mix, inputs):
    assert scores(mix(service=service.url, batch_size=8), inputs) == [len(t) for t in TEXTS]
    assert service.requests == [
        {
            "prompts": ["The film"] * 3,
            "responses": TEXTS,
            "columns": {"prompt": ["The film"] * 3, "gold": [0, 1, 2]},
            "step": 7,
        }
    ]


def test_a_conversation_is_sent_as_its_messages(service, mix, inputs):
    messages = [{"role": "user", "content": "The film"}]
    prompts = [Prompt([1], "<user>The film", {}, messages)] * 3
    chat = RewardInputs(batch_prompts(prompts, 1, 0), inputs.ids, TEXTS, inputs.eos, 1)
    scores(mix(service=service.url, batch_size=8), chat)
    assert service.requests[0]["prompts"] == [messages] * 3
    assert service.requests[0]["messages"] == [
        [{"role": "assistant", "content": text}] for text in TEXTS
    ]


def test_a_conversation_is_sent_with_the_messages_of_its_environment(service, mix, inputs):
    both = [{"role": "assistant", "content": "1?"}, {"role": "user", "content": "No."}]
    prompts = [Prompt([1], "The film", {}), Prompt([1], "<user>The film", {}, both[1:])]
    chat = RewardInputs(
        batch_prompts(prompts, 1, 0), inputs.ids[:2], TEXTS[:2], [True, True], 1,
        turns=[Turns([], []), Turns(both, [(2, 5)])],
    )  # fmt: skip
    scores(mix(service=service.url, batch_size=8), chat)
    assert service.requests[0]["messages"] == [None, both]


def test_a_service_may_leave_responses_without_a_score(service, mix, inputs):
    service.behaviour = reply({"scores": [1, None, 2.5]})
    assert scores(mix(service=service.url, batch_size=3), inputs) == [1.0, None, 2.5]


def test_a_remote_reward_model_of_openrlhf_gets_whole_sequences_and_labels(
    service, mix, inputs, tokenizer
):
    service.behaviour = reply(
        {"rewards": [1, 2, 3.5], "scores": [9, 9, 9], "extra_logs": {"a": []}}
    )
    source = mix(
        service=service.url, protocol="openrlhf", http={"label_column": "gold"}, batch_size=3
    )
    inputs.batch.prompts[1].row["gold"] = None  # of a data set of a mixture without the column
    assert scores(source, inputs) == [1.0, 2.0, 3.5]
    eos = tokenizer.eos_token
    (request,) = service.requests
    assert request["query"] == [
        "The film" + TEXTS[0] + eos, "The film" + TEXTS[1] + eos, "The film" + TEXTS[2],
    ]  # fmt: skip
    assert request["prompts"] == ["The film"] * 3
    assert request["labels"] == [0, None, 2]


def test_a_column_of_labels_that_the_data_lack_is_named_beside_those_there_are(
    service, mix, inputs
):
    source = mix(
        service=service.url, protocol="openrlhf", http={"label_column": "label"}, retries=0
    )
    with pytest.raises(RewardCallError, match=r"'label' is no column of the data .*gold"):
        scores(source, inputs)


def test_an_end_that_the_tokenizer_does_not_know_has_no_text(service, mix, inputs):
    service.behaviour = reply({"rewards": [1, 2, 3]})
    only_the_models = [[*inputs.ids[0][:-1], 10**6], *inputs.ids[1:]]
    other = RewardInputs(inputs.batch, only_the_models, inputs.texts, inputs.eos, inputs.step)
    scores(mix(service=service.url, protocol="openrlhf", batch_size=3), other)
    assert service.requests[0]["query"][0] == "The film" + TEXTS[0]


def test_replies_out_of_order_leave_the_scores_in_order(service, mix, inputs):
    last = threading.Event()

    def first_waits(handler, request):
        if request["columns"]["gold"] == [0]:
            assert last.wait(60), "the requests must run at the same time"
        elif request["columns"]["gold"] == [2]:
            last.set()
        lengths(handler, request)

    service.behaviour = first_waits
    assert scores(mix(service=service.url), inputs) == [len(t) for t in TEXTS]


def test_a_certificate_is_trusted_once_its_file_is_there(mix, inputs, monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "trusted.pem"))
    service = RewardService(certificate=CERTIFICATE)
    source = mix(service=f"https://localhost:{service.port}", retries=0)
    with pytest.raises(RewardCallError, match=r"cannot be read: .*trusted\.pem"):
        scores(source, inputs)
    shutil.copy(CERTIFICATE, tmp_path / "trusted.pem")
    assert scores(source, inputs) == [len(t) for t in TEXTS]
    service.stop()


def test_a_service_that_expects_tls_is_asked_about(mix, inputs):
    service = RewardService(certificate=CERTIFICATE)
    with pytest.raises(RewardCallError, match=r"\(does the server expect https\?\)"):
        scores(mix(service=service.url, retries=0), inputs)
    service.stop()


# -- failures --------------------------------------------------------------------------------------


def test_only_what_failed_is_asked_for_again(service, mix, inputs):
    service.next = [reply({}, status=500), lengths, lengths, reply(b"oh", status=503)]
    assert scores(mix(service=service.url), inputs) == [len(t) for t in TEXTS]
    asked = [request["columns"]["gold"][0] for request in service.requests]
    assert sorted(asked) == sorted([0, 1, 2, asked[0], asked[0]])


def test_a_score_beside_a_failure_is_checked_like_any_other(inputs):
    def half_down(part, _report):
        if len(part) == 2:
            return [1.0, 2.0]
        raise IncompleteScoresError("down", {1: 1e300}, retry_after=0, works_again=bool)

    call = calls.SourceCall("own", half_down, inputs)
    with pytest.raises(RewardCallError, match="2 of 3"):
        call(report_nothing)
    with pytest.raises(RewardCallError, match=r"returned 1e\+300 for response 1 of step 7"):
        call(report_nothing)


def test_a_number_beyond_32_bits_is_asked_for_again(service, mix, inputs):
    service.next = [reply({"scores": [1e39]})]
    assert scores(mix(service=service.url), inputs) == [len(t) for t in TEXTS]


def test_a_service_that_asks_for_time_gets_it(service, mix, inputs, monkeypatch):
    waits = []
    monkeypatch.setattr("engine.train.rewards.mix.time.sleep", waits.append)
    service.next = [reply({}, status=429, Retry_After="7")]
    scores(mix(service=service.url), inputs)
    assert waits == [7.0]


def drip(handler, _request):
    """One byte at a time, without end: each arrives well within the time limit."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        threading.Event().wait(0.02)


def hang_up(handler, _request):
    handler.connection.close()


def cut_off(handler, _request):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [')
    handler.close_connection = True


FAILURES = {
    "error": (reply({"detail": "no GPU"}, status=500), 'HTTP 500 Internal Server Error: .*no GPU'),
    "refused": (reply(b"", status=401), "HTTP 401 Unauthorized"),
    "redirect": (reply(b"", status=307, Location="http://x/y/"), "a redirect to http://x/y/"),
    "page": (reply(b"<html>\n<h1>Proxy</h1>"), "unusable reply .*'<html> <h1>Proxy</h1>'"),
    "other JSON": (reply([1]), "unusable reply"),
    "no scores": (reply({"rewards": [1]}), "missing required field `scores`"),
    "texts": (reply({"scores": ["good"]}), "unusable reply"),
    "NaN": (reply({"scores": [float("nan")]}), "unusable reply"),
    "huge": (reply(b'{"scores": [1e999]}'), "out of range"),
    "beyond 32 bits": (reply({"scores": [-1e39]}), "Expected `float` >= -3.4"),
    "deep": (reply(b'{"x": ' + b"[" * 100_000), "unusable reply"),
    "too many": (reply({"scores": [1, 2]}), "2 scores for 1 responses"),
    "binary": (reply(b"\xff\xfe\x00"), "unusable reply"),
    "drip": (drip, r"no whole reply within 0\.3 s"),
    "hang up": (hang_up, "score: "),
    "cut off": (cut_off, "closed in the middle of the reply"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_reply_that_cannot_be_used_is_an_error_that_says_why(service, mix, inputs, name):
    service.behaviour, message = FAILURES[name]
    source = mix(service=service.url, retries=0, http={"timeout": 0.3 if name == "drip" else 30})
    with pytest.raises(RewardCallError, match=message) as caught:
        scores(source, inputs)
    assert str(caught.value).startswith(f"reward 'score' at step 7: {service.url}: ")
    assert str(caught.value).endswith("(3 of 3 responses are not scored)")
    assert "\n" not in str(caught.value)
    assert caught.value.recovers


def test_a_reply_without_end_is_not_read_to_its_end(service, mix, inputs, monkeypatch):
    monkeypatch.setattr(http_client, "MAX_REPLY", 2**20)
    service.behaviour = reply(b" " * (2**20 + 1))
    with pytest.raises(RewardCallError, match="longer than 1 MiB"):
        scores(mix(service=service.url, retries=0), inputs)


def test_a_host_without_a_service_is_an_error(service, mix, inputs):
    service.stop()
    with pytest.raises(RewardCallError, match="Connection refused"):
        scores(mix(service=service.url, retries=1), inputs)
    service.start()


def test_a_service_that_is_down_is_not_asked_about_every_response(service, mix, inputs):
    service.behaviour = reply({}, status=500)
    with pytest.raises(RewardCallError, match="300 of 300"):
        scores(mix(service=service.url, retries=0), repeated(inputs, 100))
    assert len(service.requests) < 150  # two at a time, and some before the first refusal is seen


def test_a_source_that_failed_reports_when_it_works_again(service, mix, inputs):
    service.stop()
    source = mix(service=service.url, retries=0)
    with pytest.raises(RewardCallError) as caught:
        scores(source, inputs)
    assert not caught.value.works_again()
    service.behaviour = reply(b"starting")
    service.start()
    assert not caught.value.works_again()
    service.behaviour = lengths
    assert caught.value.works_again()
    assert scores(source, inputs) == [len(t) for t in TEXTS]


# -- the token -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 401])
def test_a_token_is_sent_and_never_shown(service, mix, inputs, monkeypatch, caplog, status):
    monkeypatch.setenv("REWARD_TOKEN", BEARER)
    service.behaviour = reply({"you sent": f"Bearer {BEARER}"}, status=status, Location=BEARER)
    source = mix(service=service.url, retries=1, http={"token_env": "REWARD_TOKEN"})
    with pytest.raises(RewardCallError) as caught:
        scores(source, inputs)
    assert service.headers[0]["Authorization"] == f"Bearer {BEARER}"
    assert "Bearer ***" in str(caught.value)
    shown = str(caught.value) + caught.value.trace + caplog.text
    assert BEARER not in shown
    config = HTTPConfig(token_env="REWARD_TOKEN")  # noqa: S106 - the name of a variable
    endpoint = http_client.Endpoint.of(service.url, config)
    assert BEARER not in repr(endpoint)


@pytest.mark.parametrize("status", [200, 307, 401])
def test_a_key_in_the_url_is_sent_and_never_shown(service, mix, inputs, caplog, status):
    url = f"{service.url}?key={BEARER}"
    service.behaviour = reply({"you sent": url}, status=status, Location=url)
    with pytest.raises(RewardCallError) as caught:
        scores(mix(service=url, retries=1), inputs)
    assert BEARER not in str(caught.value) + caught.value.trace + caplog.text


@pytest.mark.parametrize("value", [None, "", "two words", "tok\nen: x", "tökén"])
def test_what_is_no_token_is_refused_and_not_repeated(mix, monkeypatch, value):
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("REWARD_TOKEN", value)
    with pytest.raises(UserInputError, match="REWARD_TOKEN is no") as caught:
        mix(service="http://127.0.0.1:9/", http={"token_env": "REWARD_TOKEN"})
    assert not value or value not in str(caught.value)


def test_a_source_without_a_name_is_called_as_its_path_or_its_host(mix):
    assert mix(service="http://a.example/v1/get_reward?key=1").names == ["get_reward"]
    assert mix(service="http://a.example:80/").names == ["a.example"]
