"""Writes the corpus: for each target a few inputs that reach far, from which a fuzzer goes on.

python -m fuzzkit.seeds DIRECTORY
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgpack

from fuzzkit.targets import CLASSES, TARGETS
from hostilekit.wire import PAYLOADS
from nvmebed import make_function
from rawmessages import HEADER
from streamkit import whole_records
from vfiouser_agents.rpc.legacy_messages import HEADERS, LegacyRequest
from vfiouser_agents.values import Descriptor
from vfiouser_oob.migration.descriptor import encode_descriptor
from vfiouser_protocol.commands import COMMANDS
from vfiouser_protocol.regions import RegionSpec, RegionType, SparseArea, region_info_reply
from vfiouser_soc.nvme.snapshot import capture, pack

_WHOLE, _BYTES, _FIVES = b"\0", b"\1", b"\x22"


def _message(command: int, payload: bytes, flags: int = 0, msg_id: int = 1) -> bytes:
    return HEADER.pack(msg_id, command, 16 + len(payload), flags, 0) + payload


def _conversation() -> bytes:
    return b"".join(_message(command, payload, 0, command) for command, payload in PAYLOADS.items())


def _snapshot() -> bytes:
    with closing(make_function()) as function:
        return pack(capture(function))


def _features() -> Iterator[bytes]:
    state = struct.pack("<II", 2, 0)
    yield struct.pack("<II", 16, 0x2_0002) + state
    yield struct.pack("<II", 16, 0x1_0002) + bytes(8)
    yield struct.pack("<II", 16, 0x1_0001) + bytes(8)
    yield struct.pack("<IIQIIQQ", 40, 0x2_0006, 4096, 1, 0, 0x10000, 0x4000)
    yield struct.pack("<II", 8, 0x2_0007)
    yield struct.pack("<IIQQQ", 40, 0x1_0008, 0x10000, 0x4000, 4096) + bytes(8)
    yield struct.pack("<II", 8, 0x6_0002)


def _chains() -> Iterator[bytes]:
    areas = (SparseArea(0, 4096), SparseArea(8192, 4096))
    for spec in (
        RegionSpec(0, 0x4000, 3, areas, mappable=True),
        RegionSpec(9, 0x2000, 3, areas, type=RegionType(3, 1), mappable=True),
        RegionSpec(2, 0x4000, 3, areas, msix_mappable=True, mappable=True),
    ):
        yield region_info_reply(spec, 4096)[0]


def _payloads() -> Iterator[bytes]:
    for number, cls in enumerate(CLASSES):
        for spec in COMMANDS.values():
            if cls is spec.request:
                yield bytes([number]) + PAYLOADS[int(spec.command)]
                break
        else:
            yield bytes([number]) + bytes(64)


def _rpc() -> list[list[object]]:
    error = {"code": "no-resources", "message": "m", "vendor_code": "7", "limits": {"max": 1}, "reasons": ["r"]}
    return [
        [0, 1, "migration.save", [{"session": 1, "offset": 0, "limit": 4096, "phase": "final"}]],
        [1, 1, None, {"data": b"x" * 200, "eof": True}],
        [1, 2, error, None],
        [2, "session.event", [{"session": 1, "kind": "device-error"}]],
    ]


def _json() -> list[dict[str, object]]:
    error = {"code": -22, "message": "m", "data": {"code": "busy"}}
    return [
        {"jsonrpc": "2.0", "id": 1, "method": "x", "params": {"a": [1, '\\"', {}]}},
        {"jsonrpc": "2.0", "id": 1, "result": {"data": "AAAA"}},
        {"jsonrpc": "2.0", "id": 1, "error": error},
        {"jsonrpc": "2.0", "method": "event", "params": {}},
    ]


def _records() -> Iterator[bytes]:
    yield bytes([0, 3, 0]) + b"abc" + bytes([1, 4, 0]) + b"conf" + bytes([2, 5, 0]) + b"state"
    yield bytes([0, 1, 0, 65, 0xFF, 0, 1, 0, 1, 0, 65, 1, 1, 0, 65])
    yield bytes([0, 1, 0, 65, 2, 2, 32, 1, 2])
    yield bytes([0, 1, 0, 65, 1, 1, 0, 66, 3, 48, 0]) + bytes(48)


def seeds() -> dict[str, list[bytes]]:
    """Inputs, by target."""
    talk = _conversation()
    whole = b"".join(whole_records([b"state" * 9, b"more"]))
    rpc = b"".join(msgpack.packb(message) for message in _rpc())
    texts = b"".join(json.dumps(message).encode() for message in _json())
    reply = HEADERS["little"].pack(LegacyRequest.MESSAGE_REPLY, 8, 1)
    about = Descriptor("f", 1, "v", "m", "nvme", "1", 64, {"a": "b"})
    return {
        "framing": [how + talk for how in (_WHOLE, _BYTES, _FIVES)],
        "session": [b"\1" + _WHOLE + talk, b"\0" + _WHOLE + _message(1, PAYLOADS[1], 1) + _message(9, bytes(20), 1)],
        "capabilities": [PAYLOADS[1], struct.pack("<HH", 0, 2), struct.pack("<HH", 0, 2) + b'{"capabilities":{}}\0'],
        "chains": list(_chains()),
        "features": list(_features()),
        "payloads": list(_payloads()),
        "stream": [how + whole for how in (_WHOLE, _FIVES)],
        "stream_records": list(_records()),
        "descriptor": [encode_descriptor(about)],
        "snapshot_values": [bytes(8), bytes([3, 1, 1, 1, 0, 7, 2, 9, 4, 4, 4, 1, 11])],
        "snapshot": [_snapshot()],
        "msgpack_rpc": [how + rpc for how in (_WHOLE, _BYTES)],
        "jsonrpc": [how + texts for how in (_WHOLE, _FIVES)],
        "legacy_tcp": [_WHOLE + reply, _FIVES + reply + reply + bytes(64)],
    }


def main() -> None:
    """Write them."""
    found = seeds()
    assert found.keys() == TARGETS.keys(), found.keys() ^ TARGETS.keys()
    for name, inputs in found.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (folder / f"seed-{number}").write_bytes(data)


if __name__ == "__main__":
    main()
