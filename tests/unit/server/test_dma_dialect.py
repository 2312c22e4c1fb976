"""DMA by messages with clients of both layouts, and with those that keep to neither."""

from __future__ import annotations

import errno
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmaclients import DMA_READ, DMA_WRITE, GuestRam, LinkedClient, NarrowRam, TerseRam
from vfiouser_protocol.dma_layout import DmaLayout
from vfiouser_protocol.errors import DmaFault

SPECIFIED, NARROW = DmaLayout.SPECIFIED, DmaLayout.NARROW
KINDS = pytest.mark.parametrize("kind", [GuestRam, NarrowRam])
LAYOUT = {GuestRam: SPECIFIED, NarrowRam: NARROW, TerseRam: SPECIFIED}
#: Bytes with which a layout can be mistaken: zeros in front, behind, on both sides, few of others in between.
CONTENTS = st.lists(st.sampled_from([0, 0, 0, 0, 1, 0xFF]), min_size=1, max_size=40).map(bytes)


@KINDS
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 64, 200_000])
async def test_reads_and_writes(kind: type[GuestRam], size: int) -> None:
    """What is read and written is the same in both layouts, of any size, and one reply is enough to know which."""
    content = random.Random(size).randbytes(size).replace(b"\0", b"\1")
    ram = kind(content + bytes(size))
    client = LinkedClient(ram)
    assert content == await client.link.read(0, size)
    assert [LAYOUT[kind]] == client.learned
    await client.link.write(size, content)
    assert content + content == ram.bytes
    assert content == await client.link.read(size, size)
    assert client.commands.count(DMA_READ) == 2 * -(-size // (64 << 10))


@KINDS
@given(content=CONTENTS, at=st.integers(0, 40))
async def test_no_memory_is_misread(kind: type[GuestRam], content: bytes, at: int) -> None:
    """Whatever a client's memory holds, the first read of any part of it is right, and nobody is taken for another."""
    ram = kind(bytes(16) + content + bytes(64))
    client = LinkedClient(ram)
    wanted = bytes(ram.bytes[at : at + len(content)])
    assert wanted == await client.link.read(at, len(content))
    assert client.learned == ([LAYOUT[kind]] if any(wanted) else [])
    assert len(client.requests) <= 3


@pytest.mark.parametrize("kind", [GuestRam, NarrowRam, TerseRam])
@given(before=CONTENTS, content=CONTENTS)
async def test_no_first_write_goes_wrong(kind: type[GuestRam], before: bytes, content: bytes) -> None:
    """A write is right even as the first thing that is asked of a client, and nothing beside it changes."""
    ram = kind(before + bytes(len(content)) + before)
    client = LinkedClient(ram)
    await client.link.write(len(before), content)
    assert before + content + before == ram.bytes
    assert client.learned == [LAYOUT[kind]] or not any(content)
    await client.link.write(0, content[: len(before)])
    assert content[: len(before)] == ram.bytes[: len(content[: len(before)])]


@KINDS
async def test_what_is_known_costs_nothing(kind: type[GuestRam]) -> None:
    """A client whose layout is known is asked for nothing that the device does not want."""
    client = LinkedClient(kind(b"\7" * 4096))
    await client.link.read(0, 64)
    for _ in range(10):
        await client.link.write(64, bytes(64))
        await client.link.read(64, 64)
    assert [DMA_READ, *[DMA_WRITE, DMA_READ] * 10] == client.commands


async def test_zeros_say_nothing() -> None:
    """As long as a client's memory holds only zeros, nothing is known and nothing is misread."""
    client = LinkedClient(NarrowRam(bytes(4096)))
    assert bytes(512) == await client.link.read(0, 512)
    await client.link.write(0, bytes(64))
    assert [] == client.learned
    assert client.link.dialect.layout is None


class NoReading(GuestRam):
    """Memory that may only be written."""

    def __call__(self, command: int, payload: bytes) -> bytes | int:
        """Answer a request."""
        return errno.EPERM if command == DMA_READ else super().__call__(command, payload)


async def test_memory_that_cannot_be_read() -> None:
    """A client that lets nobody read is written to as the specification says."""
    ram = NoReading(bytes(64))
    client = LinkedClient(ram)
    await client.link.write(8, b"content")
    assert b"content" == ram.bytes[8:15]
    assert [DMA_READ, DMA_WRITE] == client.commands
    assert [SPECIFIED] == client.learned


class Mixing(GuestRam):
    """Answers in the layouts of a list, one after the other, over and over."""

    def __init__(self, content: bytes, *kinds: type[GuestRam]) -> None:
        super().__init__(content)
        self._kinds = [kind(content) for kind in kinds]

    def read_reply(self, address: int, count: int) -> bytes:
        """The payload of a reply to DMA_READ."""
        self._kinds.append(self._kinds.pop(0))
        return self._kinds[-1].read_reply(address, count)


@pytest.mark.parametrize("order", [(GuestRam, NarrowRam), (NarrowRam, GuestRam)], ids=["spec first", "narrow first"])
async def test_a_client_that_mixes_layouts(order: tuple[type[GuestRam], ...]) -> None:
    """What came first holds; a reply of the other layout is a DMA fault, never shifted data."""
    client = LinkedClient(Mixing(b"abcdefgh" * 8, *order))
    for _ in range(3):
        assert b"abcdefgh" * 8 == await client.link.read(0, 64)
        with pytest.raises(DmaFault, match=r"not a reply of the narrow|makes no sense") as caught:
            await client.link.read(0, 64)
        assert errno.EPROTO == caught.value.errno
    assert [LAYOUT[order[0]]] == client.learned


NONSENSE = {
    "zeros on neither side": struct.pack("<QQ", 0, 8 | 1 << 32) + b"abcdefgh",
    "another count": struct.pack("<QQ", 0, 7) + b"abcdefgh",
    "too little": struct.pack("<QQ", 0, 8) + b"abcdefg",
    "too much": struct.pack("<QQ", 0, 8) + b"abcdefgh?",
    "narrow without its zeros": struct.pack("<QI", 0, 8) + b"abcdefgh",
    "nothing": b"",
    "the specification's, from elsewhere": struct.pack("<QQ", 4, 8) + b"abcdefgh",
    "narrow, from elsewhere": struct.pack("<QI", 4, 8) + b"abcdefgh" + bytes(4),
}


@pytest.mark.parametrize("name", NONSENSE)
async def test_nonsense_is_a_fault(name: str) -> None:
    """A reply of neither layout, or about something else, is a DMA fault."""
    client = LinkedClient(lambda command, payload: NONSENSE[name])
    with pytest.raises(DmaFault) as caught:
        await client.link.read(0, 8)
    assert errno.EPROTO == caught.value.errno


async def test_a_client_that_lies_while_it_is_found_out() -> None:
    """One that changes what it says between the reads is asked no more than twice, and gets a fault or its own lie."""
    answers = iter(range(1 << 20))

    def lying(command: int, payload: bytes) -> bytes:
        address, count = struct.unpack_from("<QQ", payload)
        size = 16 + count
        reply = bytearray(size)
        struct.pack_into("<QI", reply, 0, address, count)
        if size > 24:  # fits both layouts; what is read of it afterwards is 0
            reply[16 + next(answers) % 4] = 1
        return bytes(reply)

    client = LinkedClient(lying)
    for _ in range(5):
        assert 64 == len(await client.link.read(0, 64))
    assert [] == client.learned
    assert len(client.requests) == 15
