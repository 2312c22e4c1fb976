"""VERSION: what is accepted, what is refused, and what the answer says."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest

from vfiouser_protocol.capabilities import (
    MigrationCapability,
    Negotiated,
    TwinSocket,
    VersionCapabilities,
    accept_reply,
    encode_version,
    negotiate,
    parse_version_reply,
    parse_version_request,
)
from vfiouser_protocol.errors import StreamError

#: The request of QEMU 11.1, 214 bytes with its header.
QEMU = bytes(4) + (
    b'{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, '
    b'"max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, '
    b'"write_multiple": true}}\0'
)
#: The request of the QEMU fork of the v1 generation, 120 bytes with its header.
QEMU_V1 = bytes(4) + (
    b'{"capabilities": {"migration": {"pgsize": 4096}, "max_msg_fds": 16, "max_data_xfer_size": 1048576}}\0'
)
RUST = b'\0\0\1\0{"capabilities":{"max_msg_fds":1,"max_data_xfer_size":1048576,"migration":{"pgsize":4096}}}\0'
SAMPLE_CLIENT = b"\0\0\2\0" + b'{"capabilities":{"max_msg_fds":32,"max_data_xfer_size":1024}}\0'

OFFER = VersionCapabilities(max_msg_fds=16, write_multiple=True, migration=MigrationCapability())


def version(text: str, minor: int = 1) -> bytes:
    """A VERSION payload with this JSON."""
    return b"\0\0" + minor.to_bytes(2, "little") + text.encode("utf-8", "surrogatepass") + b"\0"


def members(payload: bytes) -> dict[str, Any]:
    """The capabilities in a payload, read by an independent parser."""
    assert payload[-1] == 0
    found: dict[str, Any] = json.loads(payload[4:-1])["capabilities"]
    return found


def answer(payload: bytes, offer: VersionCapabilities = OFFER, **options: bool) -> Negotiated:
    """Negotiate the answer to a request's payload."""
    return negotiate(parse_version_request(payload), offer, request_payload_size=len(payload), **options)


def test_known_sizes() -> None:
    """Proves that the requests above are as long as they were seen on the wire."""
    assert [len(QEMU) + 16, len(QEMU_V1) + 16] == [214, 120]


@pytest.mark.parametrize("request_", [QEMU, QEMU_V1, RUST, SAMPLE_CLIENT], ids=["qemu", "v1", "rust", "sample"])
def test_real_clients_get_a_fitting_answer(request_: bytes) -> None:
    """Proves that no real client gets a reply longer than its request, and each gets only what it named."""
    agreed = answer(request_)
    assert len(agreed.reply_payload) <= len(request_)
    proposed = json.loads(request_[4:-1])["capabilities"]
    replied = members(agreed.reply_payload)
    assert set(replied) <= set(proposed)
    assert set(replied.get("migration", {})) <= set(proposed.get("migration", {}))


def test_qemu_answer() -> None:
    """Proves the whole answer to QEMU: minor 0, real integers and booleans, our values."""
    agreed = answer(QEMU)
    assert agreed.reply_payload[:4] == bytes(4)
    assert members(agreed.reply_payload) == {
        "max_msg_fds": 16,
        "max_data_xfer_size": 1048576,
        "max_dma_maps": 65535,
        "pgsizes": 4096,
        "write_multiple": True,
        "migration": {"pgsize": 4096, "max_bitmap_size": 268435456},
    }
    assert agreed.write_multiple
    assert agreed.migration_pgsize == 4096
    assert b" " not in agreed.reply_payload


def test_sample_client_keeps_what_differs_from_defaults() -> None:
    """Proves that a longer value makes room by dropping what equals its default, which loses nothing."""
    agreed = answer(SAMPLE_CLIENT, VersionCapabilities(max_msg_fds=16))
    assert members(agreed.reply_payload) == {"max_msg_fds": 16}
    assert agreed.minor == 2
    assert agreed.client.max_data_xfer_size == 1024


def test_limits_that_differ_are_dropped_last() -> None:
    """Proves that a smaller transfer limit, which the client must know, outlives the other members."""
    request = version('{"capabilities":{"max_data_xfer_size":1,"max_msg_fds":1}}')
    agreed = answer(request, VersionCapabilities(max_msg_fds=16, max_data_xfer_size=65536))
    assert members(agreed.reply_payload) == {"max_data_xfer_size": 65536}


@pytest.mark.parametrize("payload", [b"\0\0\0\0", version("{}"), version('{"capabilities":{}}')])
def test_silence_means_defaults(payload: bytes) -> None:
    """Proves that a request without capabilities is legal, and is answered by an empty object."""
    request = parse_version_request(payload)
    assert request.capabilities == VersionCapabilities(1, 1048576, 65535, 4096, False, None, None)
    assert request.present == frozenset()
    assert answer(payload).reply_payload[4:] == b'{"capabilities":{}}\0'


@pytest.mark.parametrize(("proposed", "used"), [(0, 0), (1, 1), (2, 2), (3, 2), (99, 2), (0xFFFF, 2)])
def test_minor_is_the_smaller(proposed: int, used: int) -> None:
    """Proves that the reply's minor is never above the proposed one, nor above our own."""
    assert answer(version("{}", proposed)).minor == used
    assert answer(version("{}", proposed)).reply_payload[2:4] == used.to_bytes(2, "little")


CAPS = '{{"capabilities":{}}}'
REFUSED = {
    "no payload": b"",
    "three bytes": b"\0\0\0",
    "major 1": b"\1\0\0\0{}\0",
    "no NUL": b"\0\0\0\0{}",
    "empty text": b"\0\0\0\0\0",
    "only blanks": version("  "),
    "missing brace": version('{"capabilities":{}'),
    "missing quote": version('{"capabilities:{}}'),
    "NUL inside": b'\0\0\0\0{"capa\0bilities":{}}\0',
    "an array": version("[]"),
    "a number": version("1"),
    "null": version("null"),
    "capabilities is an array": version('{"capabilities":[]}'),
    "capabilities is null": version('{"capabilities":null}'),
    "NaN": version('{"capabilities":NaN}'),
    "Infinity": version('{"x":Infinity}'),
    "a thousand levels": version("[" * 30000 + "]" * 30000),
    "objects nested deeply": version('{"a":' * 10000 + "1" + "}" * 10000),
    "a number of 5000 digits": version('{"capabilities":{"max_msg_fds":' + "9" * 5000 + "}}"),
    "not UTF-8": b'\0\0\0\0{"capabilities":{"\xff":1}}\0',
    "an encoded surrogate": version('{"\ud800":1}'),
    "more than 64 KiB": version('{"x":"' + "y" * 70000 + '"}'),
}
BAD_VALUES = {
    "max_msg_fds": ['"8"', "8.0", "null", "true", "-1", "1025", "[]", "1e3", "1" + "0" * 400],
    "max_data_xfer_size": ['"x"', "1.5", "false", "-1", "18446744073709551616"],
    "max_dma_maps": ['"x"', "true", "-1"],
    "pgsizes": ['"4096"', "0", "-4096", "4096.0"],
    "write_multiple": ["1", "0", '"true"', "null"],
    "twin_socket": [
        "[]",
        "true",
        '{"supported":1}',
        '{"supported":null}',
        '{"supported":true,"fd_index":"0"}',
    ],
    "migration": [
        "[]",
        "4096",
        '{"pgsize":"x"}',
        '{"pgsize":true}',
        '{"pgsize":-1}',
        '{"pgsize":3000}',
        '{"pgsize":2048}',
        '{"max_bitmap_size":"x"}',
        '{"max_bitmap_size":-1}',
    ],
}
for name, values in BAD_VALUES.items():
    for value in values:
        REFUSED[f"{name}: {value[:40]}"] = version(f'{{"capabilities":{{"{name}":{value}}}}}')


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """Proves that malformed version data ends the connection with EINVAL and a bounded sentence."""
    with pytest.raises(StreamError) as caught:
        parse_version_request(REFUSED[name])
    assert caught.value.errno == errno.EINVAL
    assert len(str(caught.value)) < 300
    str(caught.value).encode()


ACCEPTED = {
    "unknown members": '{"capabilities":{"max_fds":"x","new":[1]},"more":{}}',
    "text behind the object": '{"capabilities":{}} trailing',
    "a NUL and more": "{}\0garbage",
    "blanks before": "\n  {}",
    "an escaped surrogate": '{"\\ud800":"\\udfff"}',
    "zero descriptors": '{"capabilities":{"max_msg_fds":0}}',
    "1024 descriptors": '{"capabilities":{"max_msg_fds":1024}}',
    "no transfers": '{"capabilities":{"max_data_xfer_size":0}}',
    "pgsize 0": '{"capabilities":{"migration":{"pgsize":0}}}',
    "empty objects": '{"capabilities":{"migration":{},"twin_socket":{}}}',
    "a duplicate": '{"capabilities":[],"capabilities":{}}',
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    """Proves that what libvfio-user accepts is accepted, and answered with an object."""
    assert isinstance(members(answer(version(ACCEPTED[name])).reply_payload), dict)


def test_last_duplicate_counts() -> None:
    """Proves that of a member that occurs twice the last one counts."""
    request = parse_version_request(version('{"capabilities":{"max_msg_fds":3,"max_msg_fds":5}}'))
    assert request.capabilities.max_msg_fds == 5


def test_present_names_what_was_said() -> None:
    """Proves that defaults can be told from statements, nested ones included."""
    request = parse_version_request(version('{"capabilities":{"max_msg_fds":1,"migration":{"pgsize":0},"x":1}}'))
    assert request.present == {"max_msg_fds", "migration", "migration.pgsize"}


@pytest.mark.parametrize(
    ("theirs", "ours", "agreed"),
    [(8192, 4096, 4096), (4096, 65536, 4096), (65536, 65536, 65536), (0, 65536, 65536)],
)
def test_smaller_migration_pgsize_wins(theirs: int, ours: int, agreed: int) -> None:
    """Proves that both sides use the smaller page size, and that an unsaid one does not count."""
    request = version(f'{{"capabilities":{{"migration":{{"pgsize":{theirs}}}, "padding":"{"x" * 20}"}}}}')
    negotiated = answer(request, VersionCapabilities(migration=MigrationCapability(ours)))
    assert negotiated.migration_pgsize == agreed
    assert members(negotiated.reply_payload) == {"migration": {"pgsize": agreed}}


def test_no_migration_offered() -> None:
    """Proves that a server that cannot migrate does not mention it."""
    agreed = answer(QEMU, VersionCapabilities(max_msg_fds=8))
    assert "migration" not in members(agreed.reply_payload)
    assert agreed.migration_pgsize is None


@pytest.mark.parametrize("offered", [True, False])
@pytest.mark.parametrize("wanted", ["true", "false", None])
def test_write_multiple_needs_both(wanted: str | None, offered: bool) -> None:
    """Proves that WRITE_MULTI is agreed only if both want it, and never mentioned otherwise."""
    member = "" if wanted is None else f'"write_multiple":{wanted},'
    request = version(f'{{"capabilities":{{{member}"x":"{"y" * 30}"}}}}')
    agreed = answer(request, VersionCapabilities(write_multiple=offered))
    expected = wanted == "true" and offered
    assert expected == agreed.write_multiple
    assert expected == ("write_multiple" in members(agreed.reply_payload))


TWIN = '"twin_socket":{"supported":true}'


@pytest.mark.parametrize(
    ("text", "grant", "granted"),
    [
        ('"max_msg_fds":1,' + TWIN, True, True),
        (TWIN + ',"padding":"xxxxxxxxxxxxxxxx"', True, True),
        ('"max_msg_fds":1,' + TWIN, False, False),
        ('"max_msg_fds":0,' + TWIN, True, False),
        ('"max_msg_fds":1,"twin_socket":{"supported":false}', True, False),
        ('"max_msg_fds":1,"twin_socket":{"fd_index":0}', True, False),
        ('"max_msg_fds":1', True, False),
    ],
)
def test_twin_socket(text: str, grant: bool, granted: bool) -> None:
    """Proves that a twin socket is granted only if asked for, wanted by us, and receivable."""
    agreed = answer(version(f'{{"capabilities":{{{text}}}}}'), VersionCapabilities(), grant_twin=grant)
    assert granted == agreed.twin
    twin = members(agreed.reply_payload).get("twin_socket")
    assert twin == ({"supported": True, "fd_index": 0} if granted else None)


def test_what_does_not_fit_is_not_granted() -> None:
    """Proves that a member without room in the reply is not agreed on behind the client's back."""
    request = version('{"capabilities":{' + TWIN + "}}")
    agreed = answer(request, VersionCapabilities(), grant_twin=True)
    assert len(agreed.reply_payload) <= len(request)
    assert members(agreed.reply_payload) == {}
    assert not agreed.twin


def test_transfers_are_limited_by_both() -> None:
    """Proves that we never send more than the client takes, nor than we would take ourselves."""
    small = answer(version('{"capabilities":{"max_data_xfer_size":4096}}'))
    large = answer(version('{"capabilities":{"max_data_xfer_size":67108864}}'))
    assert (small.client.max_data_xfer_size, large.client.max_data_xfer_size) == (4096, 1 << 20)


PROPOSAL = parse_version_request(encode_version(OFFER._replace(twin_socket=TwinSocket(True), max_msg_fds=8), minor=1))


def reply(text: str, minor: int = 0) -> Negotiated:
    """Let a client judge a reply with this JSON."""
    return accept_reply(PROPOSAL, version(text, minor), 1)


def test_client_takes_a_silent_reply() -> None:
    """Proves that a four-byte reply and an empty object mean a server of defaults."""
    for agreed in (accept_reply(PROPOSAL, bytes(4), 0), reply("{}"), reply('{"capabilities":{}}')):
        assert agreed.server == VersionCapabilities()
        assert not agreed.twin
        assert not agreed.write_multiple
        assert agreed.migration_pgsize is None


def test_client_takes_a_full_reply() -> None:
    """Proves the client's view of a server that grants everything."""
    agreed = reply(
        '{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":65536,"write_multiple":true,'
        '"twin_socket":{"supported":true,"fd_index":0},"migration":{"pgsize":4096}}}'
    )
    assert agreed.twin
    assert agreed.write_multiple
    assert agreed.migration_pgsize == 4096
    assert agreed.server.max_data_xfer_size == 65536


CONTRADICTIONS = {
    "minor above the proposed": (bytes(2) + b"\2\0{}\0", 1),
    "major 1": (b"\1\0\0\0{}\0", 1),
    "no payload": (b"", 0),
    "twin without index": (version('{"capabilities":{"twin_socket":{"supported":true}}}', 0), 1),
    "twin index out of range": (
        version('{"capabilities":{"twin_socket":{"supported":true,"fd_index":1}}}', 0),
        1,
    ),
    "twin without descriptor": (
        version('{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}', 0),
        0,
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_client_refuses(name: str) -> None:
    """Proves that a client ends the connection with a server that contradicts itself or the proposal."""
    payload, nfds = CONTRADICTIONS[name]
    with pytest.raises(StreamError):
        accept_reply(PROPOSAL, payload, nfds)


def test_client_refuses_an_unasked_twin() -> None:
    """Proves that a twin socket that nobody asked for ends the connection."""
    silent = parse_version_request(encode_version(VersionCapabilities(), 1))
    granted = version('{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}', 0)
    with pytest.raises(StreamError, match="not asked for"):
        accept_reply(silent, granted, 1)


def test_reply_and_request_are_parsed_alike() -> None:
    """Proves that fd_index counts in replies and has no meaning in requests."""
    payload = version('{"capabilities":{"twin_socket":{"supported":true,"fd_index":2}}}')
    assert parse_version_request(payload).capabilities.twin_socket == TwinSocket(True, None)
    assert parse_version_reply(payload).capabilities.twin_socket == TwinSocket(True, 2)
