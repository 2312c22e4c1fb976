"""What a successor needs: it is read as it was written, and what is damaged or unknown is refused with a reason."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_oob.persist.journal.journal import Journal, read_journal
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.persist.successor.descriptors import (
    DescriptorKind,
    file_name,
    function_name,
    function_of,
    kind_of,
    kind_of_target,
)
from vfiouser_oob.persist.successor.rebuild import CannotRebuild, rebuild, unused
from vfiouser_oob.persist.successor.things import (
    THINGS,
    AgreedThing,
    ArrivedThing,
    AssignedThing,
    ClientThing,
    CompanionThing,
    ConfigThing,
    CounterThing,
    FunctionThing,
    LineThing,
    MigrationThing,
    ProgressThing,
    RangeThing,
    RegionThing,
    SaidThing,
    SnapshotThing,
    Thing,
    TwinThing,
    UpstreamThing,
    VectorThing,
    VfioThing,
    VmstateThing,
    VmThing,
)
from vfiouser_oob.systemd.fd_store import MAX_NAME, is_name
from vfiouser_oob.transport.fds import LentFd, OwnedFd
from vfiouser_protocol.capabilities import MigrationCapability, TwinSocket, VersionCapabilities

CAPS = VersionCapabilities(8, 1 << 20, 65535, 4096, True, TwinSocket(True, 0), MigrationCapability(4096, 256 << 20))
#: One of each, with as much in it as it can have.
EXAMPLES: tuple[Thing, ...] = (
    FunctionThing("nvme0", "ab" * 32, "1.2"),
    ClientThing(7, "main", "page", 412, 64055, 109),
    TwinThing("twin", "page"),
    AgreedThing(0, 7, 1, b'{"a":1}\0', VersionCapabilities(), CAPS, True, True, 4096),
    AgreedThing(1, 7, 0, b"", CAPS, VersionCapabilities(), False, False, None),
    RangeThing(0xFFFF_FFFF_0000_0000, 1 << 43, 3, 0x1000, "file"),
    RangeThing(0, 4096, 1, 0, None),
    VectorThing(2, 2047, 1 << 5, "irq"),
    LineThing(2, True, bytes(2048), b"\1" * 2048),
    AssignedThing(2, bytes(2047) + b"\1"),
    ConfigThing(4, b"\x06\x00"),
    MigrationThing('{"version": 1}'),
    CounterThing(17, (1 << 64) - 1),
    RegionThing(0, "bar0"),
    SnapshotThing("package.module:Class", 3, 12345),
    UpstreamThing(1, "upstream", "page"),
    VfioThing(2, "device", 5),
    VmThing("cd" * 16, "1.2", '{"version": 1}'),
    ArrivedThing(65535, False, b"{}"),
    CompanionThing(0xFFFF_FFFF, True, False, True, bytes(16)),
    SaidThing(13, 15, bytes(8), 77, 1),
    VmstateThing(0xFFFF_FFFF, 256, 7),
    ProgressThing(1, (1 << 32) - 1, b"before", b"after"),
)
KINDS: Mapping[str, DescriptorKind] = {
    "main": DescriptorKind.SOCKET,
    "twin": DescriptorKind.SOCKET,
    "page": DescriptorKind.MEMORY,
    "file": DescriptorKind.MEMORY,
    "bar0": DescriptorKind.MEMORY,
    "irq": DescriptorKind.EVENTFD,
    "upstream": DescriptorKind.SOCKET,
    "device": DescriptorKind.VFIO,
}


def records_of(things: tuple[Thing, ...]) -> dict[int, dict[bytes, bytes]]:
    """Things as a journal has them."""
    records: dict[int, dict[bytes, bytes]] = {}
    for thing in things:
        records.setdefault(thing.KIND, {})[thing.key] = thing.to_record()
    return records


def test_there_is_an_example_of_each() -> None:
    """No kind is left out, no two kinds have one number, and no slot is shared by accident."""
    assert set(THINGS) == {type(example) for example in EXAMPLES}
    assert len(THINGS) == len({thing.KIND for thing in THINGS})


@pytest.mark.parametrize("thing", EXAMPLES, ids=lambda thing: type(thing).__name__)
def test_what_is_written_is_read(thing: Thing) -> None:
    """Each comes back as it was, and no byte of it can go without being missed."""
    record = thing.to_record()
    assert thing == type(thing).from_record(record)
    for size in range(len(record)):
        with pytest.raises(UnusableRecord):
            type(thing).from_record(record[:size])


def test_what_was_negotiated_comes_back() -> None:
    """The value that the protocol has, and no copy with other fields, is what is restored."""
    agreed = AgreedThing(0, 0, 1, b"{}\0", CAPS, VersionCapabilities(), True, False, 4096)
    assert agreed == AgreedThing.of(agreed.negotiated)
    assert agreed.negotiated.client == CAPS
    assert isinstance(agreed.negotiated.client.twin_socket, TwinSocket)
    assert isinstance(agreed.negotiated.client.migration, MigrationCapability)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (b"", "damaged"),
        (b"\xc1", "damaged"),
        (msgpack.packb({}), "not a list"),
        (msgpack.packb([]), "not a list"),
        (msgpack.packb([2, 0, 1, 2, 3, None]), "of version 2; 1 is understood"),
        (msgpack.packb(["x", 0, 1, 2, 3, None]), "of version 'x'"),
        (msgpack.packb([1, 0, 1, 2, 3]), "4 fields of 5"),
        (msgpack.packb([1, 0, 1, 2, 3, 4]), "file is int, it has to be str"),
        (msgpack.packb([1, -1, 1, 2, 3, None]), "address is -1, it has to be from 0"),
        (msgpack.packb([1, True, 1, 2, 3, None]), "address is bool, it has to be int"),
    ],
)
def test_a_damaged_record_is_refused_in_words(record: bytes, words: str) -> None:
    """The reason names what was found."""
    with pytest.raises(UnusableRecord, match=words):
        RangeThing.from_record(record)


plain = st.none() | st.integers(-5, (1 << 64) - 1) | st.booleans() | st.text(max_size=3) | st.binary(max_size=3)
lists = st.lists(st.recursive(plain, lambda inner: st.lists(inner, max_size=8)), max_size=8)


@given(st.sampled_from(THINGS), st.binary(max_size=40) | lists.map(lambda values: bytes(msgpack.packb([1, *values]))))
def test_rubbish_is_refused_and_nothing_else(kind: type[Thing], record: bytes) -> None:
    """Whatever a record is, it is a thing or a refusal; what is read can be written and has a key."""
    try:
        thing = kind.from_record(record)
    except UnusableRecord:
        return
    assert thing == kind.from_record(thing.to_record())
    assert isinstance(thing.key, bytes)


def test_all_is_rebuilt_in_order() -> None:
    """Everything that was kept is rebuilt, what others need first; through a real journal."""
    with Journal.create("test") as journal:
        for kind, records in records_of(EXAMPLES).items():
            for key, value in records.items():
                journal.put(kind, key, value)
        found = rebuild(read_journal(journal).records, KINDS)
    assert not [item for item in found if isinstance(item, CannotRebuild)]
    assert sorted(map(str, EXAMPLES)) == sorted(map(str, found))
    order = [THINGS.index(type(item)) for item in found if isinstance(item, Thing)]
    assert order == sorted(order)
    assert set() == unused(found, KINDS)
    assert {"more"} == unused(found, {**KINDS, "more": DescriptorKind.OTHER})


@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize("other", [None, DescriptorKind.OTHER])
def test_what_was_not_kept_is_refused_with_a_reason(name: str, other: DescriptorKind | None) -> None:
    """A descriptor that is missing or of another kind costs what needs it, and nothing else."""
    descriptors = {key: kind for key, kind in KINDS.items() if key != name}
    if other is not None:
        descriptors[name] = other
    found = rebuild(records_of(EXAMPLES), descriptors)
    refusals = [item for item in found if isinstance(item, CannotRebuild)]
    assert refusals
    assert len(found) == len(EXAMPLES)
    for refusal in refusals:
        assert refusal.thing is not None
        assert name in refusal.reason
        assert ("was not kept" if other is None else "is something else, it has to be") in str(refusal)
    assert name in unused(found, {name: DescriptorKind.OTHER})


def test_what_is_not_known_is_refused_with_a_reason() -> None:
    """A kind or a version of a newer daemon is a refusal, and what lies under a wrong key too."""
    newer = msgpack.packb([9, 1])
    wrong = RangeThing(4096, 1, 3, 0, None)
    found: list[Any] = rebuild({99: {b"k": b"v"}, 10: {b"\0\1": newer}, 5: {bytes(8): wrong.to_record()}}, {})
    texts = [str(item) for item in found]
    assert [
        "range 0000000000000000: it is damaged: it names another record as itself",
        "counter 0001: it is of version 9; 1 is understood",
        "record of kind 99 6b: this version of the program does not know that kind of record",
    ] == texts
    assert (wrong, None, None) == tuple(item.thing for item in found)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("socket:[123]", DescriptorKind.SOCKET),
        ("anon_inode:[eventfd]", DescriptorKind.EVENTFD),
        ("anon_inode:[eventpoll]", DescriptorKind.OTHER),
        ("anon_inode:[vfio-device]", DescriptorKind.VFIO),
        ("/dev/vfio/12", DescriptorKind.VFIO),
        ("/dev/vfio/devices/vfio0", DescriptorKind.VFIO),
        ("/dev/iommu", DescriptorKind.VFIO),
        ("/memfd:pc.ram (deleted)", DescriptorKind.MEMORY),
        ("/dev/hugepages/qemu (deleted)", DescriptorKind.MEMORY),
        ("pipe:[1]", DescriptorKind.OTHER),
    ],
)
def test_the_kernel_says_what_a_descriptor_is(target: str, kind: DescriptorKind) -> None:
    """By the link in /proc, which asks no file system."""
    assert kind == kind_of_target(target)


def test_real_descriptors() -> None:
    """The same of what this process has open."""
    left, right = socket.socketpair()
    with left, right, OwnedFd(os.memfd_create("x")) as memory, OwnedFd(os.eventfd(0)) as event:
        assert DescriptorKind.SOCKET is kind_of(left)
        assert DescriptorKind.MEMORY is kind_of(memory)
        assert DescriptorKind.EVENTFD is kind_of(event)
    with pytest.raises(OSError, match="No such file"):
        kind_of(LentFd(1 << 20))


def test_names() -> None:
    """A name says whose it is; the longest function name leaves room for more."""
    name = function_name("n" * 63, "irq-2-2047-32-18446744073709551615")
    assert is_name(name)
    assert len(name) < MAX_NAME
    assert "n" * 63 == function_of(name)
    shared = file_name(1, (1 << 64) - 1, 2)
    assert is_name(shared)
    assert shared == "vfu/file/1-ffffffffffffffff-2"
    assert (None, None, None) == tuple(map(function_of, (shared, "nvme0", "vfu/probe-1")))
