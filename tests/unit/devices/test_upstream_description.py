"""What another server is asked when a client attaches: in one go, and nothing of it is left behind."""

from __future__ import annotations

import os
from typing import Any

import pytest

from fakeserver import Answer, Handler, connected
from openfds import open_fds
from upstreambed import DULL, irq, region
from vfiouser_oob.client.client import ClientRegion
from vfiouser_oob.client.errors import BadReply
from vfiouser_oob.devices.upstream_description import describe_server
from vfiouser_oob.transport.reaper import REAPER
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import Command, RegionFlags
from vfiouser_protocol.messages import RegionInfo
from vfiouser_protocol.session import CommandReceived


async def test_no_question_waits_for_the_answer_to_the_one_before_it() -> None:
    """When the first of its kind is answered the others are on their way: two round trips in place of fifteen."""
    waiting: dict[int, int] = {}

    def noted(handler: Handler) -> Handler:
        def answer(event: CommandReceived) -> Any:
            waiting.setdefault(event.header.command, client.outstanding)
            return handler(event)

        return answer

    async with connected(handlers={command: noted(handler) for command, handler in DULL.items()}) as (client, _):
        regions: list[ClientRegion] = []
        description = await describe_server(client, regions)
    assert waiting[Command.DEVICE_GET_INFO] == 1 + 9
    assert waiting[Command.DEVICE_GET_REGION_INFO] >= 9
    assert waiting[Command.DEVICE_GET_IRQ_INFO] >= 5
    assert len(description.regions) == len(regions) == 9
    assert len(description.irqs) == 5


async def test_refused_questions_are_regions_and_interrupts_that_are_not_there() -> None:
    """A server may refuse an index that it does not implement; the answers to the others keep their places."""

    def some(event: CommandReceived) -> Answer:
        return Answer(errno=22) if decode(RegionInfo, event.payload).index == 3 else region(event)

    def none(event: CommandReceived) -> Answer:
        return Answer(errno=22)

    handlers = {**DULL, Command.DEVICE_GET_REGION_INFO: some, Command.DEVICE_GET_IRQ_INFO: none}
    async with connected(handlers=handlers) as (client, _):
        description = await describe_server(client, [])
    assert [spec.index for spec in description.regions if not spec.size] == [3]
    assert not any(each.count for each in description.irqs)


async def test_a_bad_answer_leaves_no_descriptor_of_those_behind_it() -> None:
    """What comes for questions that nobody waits for any more is closed."""
    memory = os.memfd_create("region")
    os.ftruncate(memory, 4096)

    def lie(event: CommandReceived) -> Answer:
        index = decode(RegionInfo, event.payload).index
        flags = RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP
        told = index if index != 3 else 4
        return Answer(encode(RegionInfo(32, flags, told, 0, 4096, 0)), [memory])

    handlers = {**DULL, Command.DEVICE_GET_REGION_INFO: lie, Command.DEVICE_GET_IRQ_INFO: irq}
    try:
        async with connected(handlers=handlers) as (client, _):
            before = open_fds()
            regions: list[ClientRegion] = []
            with pytest.raises(BadReply, match="described region 4 when asked for 3"):
                await describe_server(client, regions)
            assert client.outstanding == 0
            for each in regions:
                each.close()
            await client.get_info()  # its answer comes behind all others
            assert REAPER.settle(10)
            assert open_fds() == before
    finally:
        os.close(memory)
