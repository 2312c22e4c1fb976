"""QMP without sockets: whole, byte by byte, in the wrong phase, garbage, floods and late answers."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_oob.vm import qmp
from vfiouser_oob.vm.qmp import (
    QmpAnswer,
    QmpEvent,
    QmpGreeting,
    QmpMessage,
    QmpPhase,
    QmpProtocolError,
    QmpRefusal,
    QmpSession,
    TooManyUnansweredError,
)

# As QEMU 11.1.3 wrote it.
GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, '
    b'"package": "Debian 1:11.1.3+ds-1~bpo13+1"}, "capabilities": ["oob"]}}\r\n'
)
STOP = b'{"timestamp": {"seconds": 1795818000, "microseconds": 250000}, "event": "STOP"}\r\n'


def line(message: Any) -> bytes:
    """A message as a line."""
    return json.dumps(message).encode() + b"\r\n"


def messages(session: QmpSession, data: bytes, step: int = 0) -> list[QmpMessage]:
    """What comes of bytes, in pieces of `step`."""
    found: list[QmpMessage] = []
    for at in range(0, len(data), step or len(data)):
        session.receive_data(data[at : at + (step or len(data))])
        while (message := session.next_message()) is not None:
            found.append(message)
    return found


def ready() -> QmpSession:
    """A session that was negotiated."""
    session = QmpSession()
    messages(session, GREETING)
    number, _ = session.command(qmp.NEGOTIATE)
    messages(session, line({"return": {}, "id": number}))
    assert session.phase is QmpPhase.READY
    return session


@pytest.mark.parametrize("step", [0, 1, 2, 7])
def test_conversation(step: int) -> None:
    """A whole conversation gives the same messages, however the bytes are cut."""
    session = QmpSession()
    greeting = QmpGreeting((11, 1, 3), "Debian 1:11.1.3+ds-1~bpo13+1", ("oob",))
    assert [greeting] == messages(session, GREETING, step)
    number, data = session.command("qmp_capabilities")
    assert {"execute": "qmp_capabilities", "id": number} == json.loads(data)
    assert [QmpAnswer(number, {})] == messages(session, line({"return": {}, "id": number}), step)
    first, data = session.command("query-status")
    second, _ = session.command("human-monitor-command", {"command-line": "i /w 0xcf8"})
    assert {"execute": "query-status", "id": first} == json.loads(data)
    assert data.endswith(b"\n")
    assert data.count(b"\n") == 1
    refusal = {"id": second, "error": {"class": "GenericError", "desc": "no"}}
    told = messages(session, STOP + line(refusal) + line({"return": [], "id": first}), step)
    assert told == [QmpEvent("STOP", {}, 1795818000.25), QmpRefusal(second, "GenericError", "no"), QmpAnswer(first, [])]


def test_commands_have_their_phase() -> None:
    """Nothing is sent before the greeting, nothing but the negotiation before its answer, and that only once."""
    session = QmpSession()
    with pytest.raises(ValueError, match="while greeting"):
        session.command(qmp.NEGOTIATE)
    messages(session, GREETING)
    with pytest.raises(ValueError, match="query-status cannot be sent while negotiating"):
        session.command("query-status")
    with pytest.raises(ValueError, match="while ready"):
        ready().command(qmp.NEGOTIATE)


def test_event_before_the_negotiation_is_answered() -> None:
    """QEMU turns events on before it answers."""
    session = QmpSession()
    messages(session, GREETING)
    number, _ = session.command(qmp.NEGOTIATE)
    told = messages(session, STOP + line({"return": {}, "id": number}))
    assert [type(each) for each in told] == [QmpEvent, QmpAnswer]


def test_refused_negotiation_is_not_ready() -> None:
    """Only a result makes it ready."""
    session = QmpSession()
    messages(session, GREETING)
    number, _ = session.command(qmp.NEGOTIATE)
    messages(session, line({"error": {"class": "CommandNotFound", "desc": "?"}, "id": number}))
    assert session.phase is QmpPhase.NEGOTIATING


@pytest.mark.parametrize(
    ("bytes_", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not JSON: 'SSH-2.0"),
        (b"\xff\xfe\n", "not JSON"),
        (b"\r\n", "not JSON"),
        (b"\x00\x01\x02\n", r"not JSON: '\\x00\\x01\\x02'"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b"1" * 10_000 + b"\n", "not JSON"),
        (b"[]\n", "not an object"),
        (b"NaN\n", "not JSON"),
        (b"{}\n", "session that is greeting"),
        (STOP, "session that is greeting"),
        (line({"return": {}, "id": 1}), "session that is greeting"),
        (line({"QMP": 1}), "QMP is not an object"),
        (line({"QMP": {}}), "version is not an object"),
        (line({"QMP": {"version": {"qemu": {"major": 11}}}}), "without QEMU's version"),
        (line({"QMP": {"version": {"qemu": {"major": "1", "minor": 1, "micro": 1}}}}), "without QEMU's version"),
        (line({"QMP": {"version": {"qemu": {"major": 1, "minor": -1, "micro": 1}}}}), "without QEMU's version"),
        (line({"QMP": {"version": {"qemu": {"major": 1, "minor": 1, "micro": 1}}, "capabilities": 3}}), "not a list"),
        (line({"QMP": {"version": {"qemu": {"major": 1, "minor": 1, "micro": 1}}, "capabilities": [3]}}), "text was"),
    ],
)
def test_what_is_no_greeting(bytes_: bytes, words: str) -> None:
    """Whoever talks rubbish is told apart from QEMU at the first line."""
    with pytest.raises(QmpProtocolError, match=words):
        messages(QmpSession(), bytes_)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"return": {}, "id": 77}, "not sent: id '77'"),
        ({"return": {}, "id": True}, "not sent"),
        ({"return": {}, "id": "1"}, "not sent"),
        ({"return": {}}, "not sent"),
        ({"return": {}, "id": 1}, "not sent"),  # the negotiation was answered already
        ({"error": {"class": "GenericError", "desc": "JSON parse error"}}, "belongs to no command"),
        ({"error": 3, "id": 2}, "error is not an object"),
        ({"error": {"class": 1, "desc": ""}, "id": 2}, "text was expected"),
        ({"event": 3}, "text was expected"),
        ({"event": "STOP", "data": []}, "data is not an object"),
        ({"QMP": {}}, "session that is ready"),
        ({"hello": 1}, "session that is ready"),
    ],
)
def test_what_is_no_message(message: Any, words: str) -> None:
    """A message that fits nothing ends the conversation."""
    session = ready()
    session.command("query-status")
    with pytest.raises(QmpProtocolError, match=words):
        messages(session, line(message))


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_has_an_end(end: bytes) -> None:
    """A line longer than the limit is refused, whether its end has come or not; one of that length is taken."""
    session = QmpSession(line_max=200)
    messages(session, GREETING)
    number, _ = session.command(qmp.NEGOTIATE)
    answer = json.dumps({"return": {}, "id": number}).encode()
    assert [QmpAnswer(number, {})] == messages(session, answer.ljust(200) + b"\n")
    with pytest.raises(QmpProtocolError, match="more than 200 bytes"):
        messages(session, b" " * 201 + end)


def test_late_answer_is_dropped() -> None:
    """An answer to what was given up is none, and the next one is fetched; it comes only once."""
    session = ready()
    late, _ = session.command("query-status")
    session.give_up(late)
    session.give_up(99)
    other, _ = session.command("query-pci")
    assert [QmpAnswer(other, [])] == messages(
        session, line({"return": 1, "id": late}) + line({"return": [], "id": other})
    )
    with pytest.raises(QmpProtocolError, match="not sent"):
        messages(session, line({"return": 1, "id": late}))


def test_late_refusal_is_dropped() -> None:
    """The same for an error."""
    session = ready()
    late, _ = session.command("query-status")
    session.give_up(late)
    assert [] == messages(session, line({"error": {"class": "GenericError", "desc": "no"}, "id": late}))


def test_unanswered_commands_are_bounded() -> None:
    """A QEMU that never answers gets no further command, also if all were given up; one answer makes room for one."""
    session = ready()
    numbers = [session.command("query-status")[0] for _ in range(qmp.UNANSWERED_MAX)]
    for number in numbers[::2]:
        session.give_up(number)
    with pytest.raises(TooManyUnansweredError):
        session.command("query-status")
    messages(session, line({"return": {}, "id": numbers[0]}))
    session.command("query-status")


def test_command_that_is_no_json_leaves_no_trace() -> None:
    """A command that cannot be written down was never sent."""
    session = ready()
    with pytest.raises(ValueError, match="JSON"):
        session.command("o", {"value": float("nan")})
    assert 2 == session.command("query-status")[0]


@pytest.mark.parametrize(
    ("timestamp", "seconds"),
    [
        ({"seconds": 5, "microseconds": 500_000}, 5.5),
        ({"seconds": -1, "microseconds": -1}, None),
        ({"seconds": 10**30, "microseconds": 0}, None),
        ({"seconds": 5}, None),
        (7, None),
        (None, None),
    ],
)
def test_when(timestamp: Any, seconds: float | None) -> None:
    """A time that makes no sense is none."""
    assert [QmpEvent("RESUME", {"a": 1}, seconds)] == messages(
        ready(), line({"event": "RESUME", "data": {"a": 1}, "timestamp": timestamp})
    )


def test_words_are_bounded() -> None:
    """A peer's words are kept up to a limit."""
    session = ready()
    number, _ = session.command("x")
    (refusal,) = messages(session, line({"error": {"class": "G" * 9000, "desc": "d" * 9000}, "id": number}))
    assert isinstance(refusal, QmpRefusal)
    assert len(refusal.kind) == len(refusal.text) == 500


@given(st.binary(max_size=300), st.booleans())
def test_garbage_raises_nothing_else(data: bytes, negotiated: bool) -> None:
    """Whatever comes, it is a message or the one error."""
    session = ready() if negotiated else QmpSession()
    with suppress(QmpProtocolError):
        messages(session, data + b"\n")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["QMP", "event", "data", "return", "error", "id", "timestamp", "seconds", "class", "desc"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(JSON, st.booleans())
def test_wrong_shapes_raise_nothing_else(value: Any, negotiated: bool) -> None:
    """Nor does JSON of another shape."""
    session = ready() if negotiated else QmpSession()
    with suppress(QmpProtocolError):
        messages(session, line(value))
