"""What processes say to one another: frames that come back as they were sent, or not at all."""

import socket
import struct
import threading
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.settings import Settings, setting_name
from engine.errors import CommandRejectedError, LinkError
from engine.protocol import frames, rank_messages
from engine.protocol.client_messages import (
    ClientHello,
    CommandReply,
    CommandRequest,
    JournalAdvanced,
    Status,
    StatusRequest,
    Watch,
    Welcome,
    decode_from_client,
    decode_to_client,
)
from engine.protocol.commands import (
    AnyCommand,
    Command,
    SetBeta,
    SetKLController,
    SetSetting,
)

modest = settings(max_examples=60, deadline=None, derandomize=True)
text = st.text(st.characters(codec="utf-8"), max_size=20)
PLAIN = {
    str: text, float: st.floats(), bool: st.booleans(), type(None): st.none(),
    int: st.integers(-(2**63), 2**63 - 1),
    Any: st.none() | st.booleans() | st.floats() | text | st.lists(text, max_size=2),
}  # fmt: skip


CONTAINERS = {
    list: lambda of: st.lists(of, max_size=2),
    dict: lambda key, of: st.dictionaries(key, of, max_size=2),
    tuple: st.tuples,
}


def values(kind):
    """Anything of a type, as messages use them."""
    if kind in PLAIN:
        return PLAIN[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, UnionType):
        return st.one_of(*map(values, arguments))
    if origin in CONTAINERS:
        return CONTAINERS[origin](*map(values, arguments))
    hints = get_type_hints(kind)
    return st.builds(kind, **{k: values(hints[k]) for k in kind.__struct_fields__})


def body_of(message):
    frame = frames.encode(message)
    assert frames.frame_length(frame[:4]) == len(frame) - 4
    return frame[4:]


def same(a, b):
    """Equal, NaN being itself."""
    return msgspec.msgpack.encode(a) == msgspec.msgpack.encode(b)


@modest
@given(values(CommandRequest | StatusRequest | Watch | ClientHello))
def test_what_a_client_says_arrives(message):
    assert same(decode_from_client(body_of(message)), message)


@modest
@given(values(Welcome | CommandReply | JournalAdvanced | Status | rank_messages.Phase))
def test_what_an_engine_replies_arrives(message):
    assert same(decode_to_client(body_of(message)), message)


@modest
@given(
    values(
        rank_messages.StepReport
        | rank_messages.Failed
        | rank_messages.Applied
        | rank_messages.Ready
    )
)
def test_what_a_rank_says_arrives(message):
    assert same(rank_messages.decode_from_rank(body_of(message)), message)


@modest
@given(values(rank_messages.ToRank))
def test_what_a_supervisor_says_arrives(message):
    assert same(rank_messages.decode_to_rank(body_of(message)), message)


@modest
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_link_error(data):
    for decode in (
        decode_from_client,
        rank_messages.decode_from_rank,
        rank_messages.decode_to_rank,
    ):
        try:
            decode(data)
        except LinkError as error:
            assert str(frames.VERSION) in str(error)


def test_a_frame_over_the_limit_is_refused_on_both_sides(monkeypatch):
    with pytest.raises(LinkError, match="over the limit"):
        frames.frame_length(struct.pack(">I", frames.MAX_FRAME + 1))
    assert frames.frame_length(struct.pack(">I", frames.MAX_FRAME)) == frames.MAX_FRAME
    with pytest.raises(LinkError, match="too large to be sent"):
        frames.encode(CommandRequest(id="x", command=SetSetting(key="epochs", value=10**30)))
    monkeypatch.setattr(frames, "MAX_FRAME", 100)
    with pytest.raises(LinkError, match="over the limit"):
        frames.encode(ClientHello(who="x" * 100))


def test_a_frame_is_read_whole_however_it_comes():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        message = ClientHello(who="x" * 300_000)  # more than a socket's buffer
        sender = threading.Thread(target=theirs.sendall, args=(frames.encode(message),))
        sender.start()
        assert decode_from_client(frames.receive(ours)) == message
        sender.join()
        theirs.sendall(frames.encode(message)[:100])
        theirs.close()
        with pytest.raises(ConnectionError):
            frames.receive(ours)


def test_an_unknown_field_of_a_command_is_refused():
    data = {"type": "request", "id": "1", "command": {"command": "pause", "loudly": True}}
    with pytest.raises(LinkError):
        decode_from_client(msgspec.msgpack.encode(data))


@modest
@given(values(AnyCommand))
def test_each_command_has_a_name(command):
    assert isinstance(command, Command)
    assert command.name() == msgspec.to_builtins(command)["command"]


NOW = Settings(
    beta=0.1, controller="fixed", target=6.0, horizon=1000.0, beta_min=1e-4, beta_max=10.0,
    learning_rate=1e-5, save_every=5, clip_range=0.2, epochs=4, stop_kl=None, temperature=1.0,
    max_new_tokens=32,
)  # fmt: skip


@pytest.mark.parametrize(
    ("command", "values"),
    [
        (SetBeta(value=0), {"beta": 0.0}),
        (
            SetKLController(controller="adaptive", target=3),
            {"controller": "adaptive", "target": 3.0},
        ),
        (SetSetting(key="kl.beta", value=1), {"beta": 1.0}),
        (SetSetting(key="stop_kl", value=None), {"stop_kl": None}),
        (SetSetting(key="epochs", value=2), {"epochs": 2}),
    ],
)
def test_a_command_says_what_it_changes(command, values):
    assert command.new_values(NOW) == values


@pytest.mark.parametrize(
    "command",
    [
        SetBeta(value=-0.1), SetBeta(value=float("nan")), SetBeta(value=float("inf")),
        SetKLController(controller="adaptive", target=0),
        SetKLController(controller="fixed", horizon=-1),
        SetKLController(controller="fixed", beta_min=11.0), SetSetting(key="beta_max", value=1e-5),
        SetSetting(key="epochs", value=0), SetSetting(key="epochs", value=1.5),
        SetSetting(key="clip_range", value=1.5),
        SetSetting(key="learning_rate", value="1"), SetSetting(key="seed", value=1),
        SetSetting(key="", value=1),
        SetSetting(key="temperature", value=[]), SetSetting(key="controller", value="loose"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_rejected(command):
    with pytest.raises(CommandRejectedError):
        command.new_values(NOW)


def test_a_setting_is_known_by_its_name_and_by_its_key():
    assert setting_name("beta") == setting_name("kl.beta") == "beta"


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lerning_rate", "did you mean 'learning_rate'"),
        ("lr", "did you mean 'learning_rate'"),
        ("kl.beta_mn", "did you mean 'beta_min'"),
        ("ppo.minibatches", "these can: beta, controller"),
    ],
)
def test_an_unknown_setting_is_answered_with_a_similar_one_or_all(key, hint):
    with pytest.raises(CommandRejectedError, match=f"'{key}' cannot be set during a run; .*{hint}"):
        setting_name(key)
