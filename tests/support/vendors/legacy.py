"""A server of the 2022 plug-in example's protocol, as its source has it: blocking reads of one client at a time."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable

import trio

RUNNING, SAVING, RESUMING = 1, 2, 4
#: The ways between states that the documentation of VFIO's first protocol has, and those that QEMU took beside them.
WAYS = {
    0: {0, 1, SAVING},
    RUNNING: {0, 1, SAVING, SAVING | RUNNING, RESUMING},
    SAVING: {0, 1, SAVING},
    SAVING | RUNNING: {1, SAVING, SAVING | RUNNING},
    RESUMING: {1, RESUMING},
}


class LegacyServer:
    """One device.

    Args:
        content: its state.
        order: ``<`` or ``>``, the byte order of its machine.
        faithful: as the example is: it spins for ever when a client vanishes without FINISH, and takes no state but
            by the ways of `WAYS`; what it cannot do is state 6.
        slow_s: seconds that a LOAD_BUFFER or SAVE_BUFFER takes.
    """

    def __init__(
        self, content: bytes = bytes(range(256)) * 40, order: str = "<", *, faithful: bool = False, slow_s: float = 0
    ) -> None:
        self.content = content
        self.faithful = faithful
        self.slow_s = slow_s
        #: A client has vanished, and nobody is served any more.
        self.spins = False
        self.state = RUNNING
        self.states: list[int] = []
        self.clients = 0
        #: Does something instead of answering a request, once; by request code.
        self.instead: dict[int, Callable[[trio.SocketStream], object]] = {}
        #: Is waited for before a request is answered, once; by request code.
        self.before: dict[int, Callable[[], Awaitable[None]]] = {}
        #: Codes in the order in which they came.
        self.requests: list[int] = []
        self._header = struct.Struct(f"{order}IIQ")
        self._offset = 0
        self._loaded = b""

    async def serve(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled; tells the port."""
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        task_status.started(listener.socket.getsockname()[1])
        async with listener:
            while True:
                stream = await listener.accept()
                self.clients += 1
                async with stream:
                    await self._client(stream)
                if self.faithful and self.requests[-1:] != [7]:
                    self.spins = True
                    await trio.sleep_forever()

    async def _client(self, stream: trio.SocketStream) -> None:
        try:
            while header := await self._read(stream, 16):
                request, size, value = self._header.unpack(header)
                self.requests.append(request)
                if request in self.before:
                    await self.before.pop(request)()
                if request in self.instead:
                    result = self.instead.pop(request)(stream)
                    if result == "close":
                        return
                    if isinstance(result, bytes):
                        await stream.send_all(result)
                    elif result == "hang":
                        await self._read(stream, 1)
                        return
                elif not await self._serve(stream, request, size, value):
                    return
        except trio.BrokenResourceError:
            pass

    async def _serve(self, stream: trio.SocketStream, request: int, size: int, value: int) -> bool:
        if request == 1:
            left = len(self.content) - self._offset if self.state == SAVING else 0
            await stream.send_all(self.reply(left))
        elif request == 2:
            self._set(value)
        elif request == 3:
            await stream.send_all(self.reply(self.state))
        elif request == 4:
            await trio.sleep(self.slow_s)
            assert size <= len(self.content) - self._offset, "the example would read past its end"
            await stream.send_all(self.content[self._offset : self._offset + size])
            self._offset += size
        elif request == 5:
            self._loaded += await self._read(stream, size)
            await trio.sleep(self.slow_s)
        return request != 7

    def _set(self, value: int) -> None:
        self.states.append(value)
        if self.faithful and value not in WAYS.get(self.state, ()):
            value = 6
        if value == SAVING:
            self._offset = 0
        if value == RESUMING:
            self._loaded = b""
        if self.state == RESUMING and value == RUNNING:
            self.content = self._loaded
        self.state = value

    def reply(self, value: int, code: int = 6, size: int = 8) -> bytes:
        """A reply's header."""
        return self._header.pack(code, size, value)

    async def _read(self, stream: trio.SocketStream, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = await stream.receive_some(size - len(data))
            if not piece:
                return b""
            data += bytes(piece)
        return data
