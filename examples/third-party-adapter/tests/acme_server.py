"""Acme's agent, as its manual describes it, for the tests: `python acme_server.py SOCKET`."""

from __future__ import annotations

import base64
import sys

import trio


class Device:
    """A function of Acme's."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As new."""
        self.state = "active"
        self.content = b"ACME" + bytes(range(256)) * 300
        self.incoming = b""


class AcmeServer:
    """An agent with one function, `disk0`."""

    def __init__(self) -> None:
        self.devices = {"disk0": Device()}

    async def serve(self, path: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen at a path until cancelled."""
        listening = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await listening.bind(path)
        listening.listen()
        await trio.serve_listeners(self._client, [trio.SocketListener(listening)], task_status=task_status)

    async def _client(self, stream: trio.abc.Stream) -> None:
        buffer = b""
        try:
            async with stream:
                async for piece in stream:
                    *lines, buffer = (buffer + bytes(piece)).split(b"\n")
                    for line in lines:
                        await stream.send_all(self.answer(line.decode().split()).encode() + b"\n")
        except trio.BrokenResourceError:
            pass

    def answer(self, words: list[str]) -> str:
        """The answer to a request."""
        request, *words = words
        if request == "HELLO":
            return "OK blaster-9 2.1"
        if request == "LIST":
            return " ".join(["OK", *self.devices])
        device = self.devices.get(words[0])
        if device is None:
            return f"ERR unknown there is no {words[0]}"
        return str(getattr(self, f"_{request.lower()}")(device, *words[1:]))

    def _info(self, device: Device) -> str:
        return "OK nvme-x 7.0"

    def _state(self, device: Device) -> str:
        return f"OK {device.state}"

    def _freeze(self, device: Device) -> str:
        device.state = "frozen"
        return "OK"

    def _thaw(self, device: Device) -> str:
        device.state = "active"
        return "OK"

    def _reset(self, device: Device) -> str:
        device.reset()
        return "OK"

    def _read(self, device: Device, offset: str, limit: str) -> str:
        begin, end = int(offset), int(offset) + int(limit)
        last = "last" if end >= len(device.content) else "more"
        return f"OK {last} {base64.b64encode(device.content[begin:end]).decode()}"

    def _write(self, device: Device, offset: str, piece: str) -> str:
        device.incoming = device.incoming[: int(offset)] + base64.b64decode(piece)
        return "OK"

    def _commit(self, device: Device, total: str) -> str:
        found, device.incoming = device.incoming, b""
        if not found.startswith(b"ACME") or len(found) != int(total) or len(found) != len(device.content):
            return "ERR corrupt this is no state of a function"
        device.content = found
        return "OK"


if __name__ == "__main__":
    trio.run(AcmeServer().serve, sys.argv[1])
