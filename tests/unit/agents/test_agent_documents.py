"""The protocol's page tells the truth: methods, parameters, errors, types and bytes are those of the code."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from vfiouser_agents import values
from vfiouser_agents.adapters.msgpack_rpc import DEFAULT_KEEPALIVE
from vfiouser_agents.errors import ERRORS, FunctionCertainty, Retry
from vfiouser_agents.operations import BY_WIRE
from vfiouser_agents.rpc import core, endpoint, methods, msgpack_codec, server
from vfiouser_agents.rpc.messages import DEFAULT_MAX_MESSAGE, Message, Request, Response

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "reference" / "agent-protocol.md").read_text()
HOWTO = (ROOT / "docs" / "howto" / "write-an-agent.md").read_text()
_ROW = re.compile(r"^\| (.*) \|$", re.MULTILINE)


def rows(heading: str) -> list[list[str]]:
    """The cells of all tables below a heading, up to the next one of the same depth or above."""
    depth = heading.split()[0]
    section = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^#{{2,{len(depth)}}} |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None, heading
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)] for row in _ROW.findall(section[1])]


def test_every_method_of_a_session_is_described() -> None:
    """The table has each method with exactly its parameters, and no other."""
    described = {
        row[0].strip("`"): re.findall(r"`(\w+)` (?:bin|int|str|Desc|`|\[\[)", row[1])
        for row in rows("## Methods of a session")
        if re.fullmatch(r"`(migration|dirty|device)\.\w+`", row[0]) and len(row) == 4
    }
    assert {wire: list(op.arguments) for wire, op in BY_WIRE.items()} == described


def test_every_method_of_the_agent_is_described() -> None:
    """The methods that belong to no session stand in their table, and no other."""
    named = [methods.HELLO, methods.PING, methods.FUNCTIONS, methods.OPEN, methods.CLOSE, methods.WATCH]
    assert named == [row[0].strip("`") for row in rows("## Methods of the agent") if row[0].startswith("`")]
    assert f"`{methods.EVENT}`" in PAGE


def test_every_error_is_described() -> None:
    """Codes, whether to repeat, the function's fate and the errno are those of the classes."""
    repeat = {"no": Retry.NO, "yes": Retry.YES, "after": Retry.RECONNECT}
    described = {
        row[0].strip("`"): (repeat[re.split(r"\W", row[2])[0]], FunctionCertainty(row[3]), getattr(errno, row[4]))
        for row in rows("## Errors")
        if row[0].startswith("`")
    }
    assert {kind.code: (kind.retry, kind.fate, kind.errno) for kind in ERRORS.values()} == described


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        value = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        return "" if value is None else json.dumps(value)
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if type(value) is int and value and value % unit == 0 and value != 4096 and value > 1024:
            return f"{value // unit} {name}"
    return "nil" if value is None else json.dumps(value)


def test_every_type_is_described() -> None:
    """Every key of every type stands in the table, in order, with its default."""
    described: dict[str, dict[str, str]] = {}
    for name, key, _, default, *_ in rows("## Types")[1:]:
        if name:
            described[name] = {}
        described[next(reversed(described))][key.strip("`")] = default
    for name, keys in described.items():
        fields = dataclasses.fields(getattr(values, name))
        assert [field.name for field in fields] == list(keys), name
        for field in fields:
            assert _default(field) == keys[field.name], f"{name}.{field.name}"
    classes = {name for name, kind in vars(values).items() if dataclasses.is_dataclass(kind)}
    assert classes - {"Range"} == set(described)


@pytest.mark.parametrize("kind", [values.AgentState, values.Role, values.Phase, values.Outcome])
def test_every_word_is_described(kind: type[Enum]) -> None:
    """The words of each enum stand on the page."""
    assert [] == [member.value for member in kind if f"`{member.value}`" not in PAGE]


def test_the_handshake_is_what_is_sent() -> None:
    """The bytes of the example decode to the messages beside them, and those encode to the bytes."""
    found = [bytes.fromhex(text) for text in re.findall(r"```hex\n(.*?)```", PAGE, re.DOTALL)]
    shown = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]
    messages: list[Message] = [
        Request(shown[0][1], shown[0][2], shown[0][3][0]),
        Response(shown[1][1], shown[1][3]),
    ]
    for data, message in zip(found, messages, strict=True):
        codec = msgpack_codec.MsgpackCodec()
        assert [message] == list(codec.feed(data))
        assert data == codec.encode(message)


def test_limits_are_those_of_the_code() -> None:
    """The numbers on the page are the constants."""
    for fact in (
        f"{DEFAULT_MAX_MESSAGE >> 20} MiB by default",
        f"{msgpack_codec.MAX_ARRAY}, {msgpack_codec.MAX_MAP}",
        f"{msgpack_codec.MAX_STRING >> 10} KiB",
        f"{msgpack_codec.MAX_VALUES:,}".replace(",", " "),
        f"| {server.HELLO_TIMEOUT:.0f} s |",
        f"| {core.MAX_REQUESTS}; more",
        f"({DEFAULT_KEEPALIVE:.0f} s) without",
        f"default port is {endpoint.DEFAULT_PORT}",
        f"at least {server.MIN_MESSAGE:,}".replace(",", " "),
        f"`{methods.PROTOCOL}`",
    ):
        assert fact in PAGE, fact
    assert f"version {methods.VERSIONS[0]}" in PAGE.splitlines()[0]


async def test_the_agent_of_the_howto_keeps_the_contract() -> None:
    """The Python of the how-to runs as it stands, and its own check passes."""
    blocks = re.findall(r"```python\n(.*?)```", HOWTO, re.DOTALL)
    assert 3 == len(blocks)
    names: dict[str, Any] = {"__name__": "howto"}
    for block in blocks:
        # The last line of the second block would serve for ever.
        exec(compile(block.replace("trio.run(main)", ""), "howto", "exec"), names)
    await names["check"]()
