"""QEMU's `dbus-vmstate`, played by a test: the same questions in the same order, over a socket."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import trio
from jeepney import DBusAddress, Message, MessageType, new_method_call
from jeepney.auth import make_auth_external
from jeepney.low_level import HeaderFields, Parser

__all__ = ["BusClient", "BusError"]

BUS = DBusAddress("/org/freedesktop/DBus", bus_name="org.freedesktop.DBus", interface="org.freedesktop.DBus")
SERVICE = "org.qemu.VMState1"
WAIT_S = 30.0


class BusError(Exception):
    """The bus answered with an error; the text is its name and words."""


def owner(name: str, interface: str = SERVICE) -> DBusAddress:
    """The address of one owner of the service."""
    return DBusAddress("/org/qemu/VMState1", bus_name=name, interface=interface)


class BusClient:
    """One connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._parser = Parser()
        self._serial = 0

    @classmethod
    async def connect(cls, path: Path) -> Self:
        """Connect, and say nothing yet."""
        return cls(await trio.open_unix_socket(path))

    async def open(self) -> Self:
        """Say who we are, and Hello."""
        await self.stream.send_all(b"\0" + make_auth_external())
        assert (await self.line()).startswith("OK ")
        await self.stream.send_all(b"NEGOTIATE_UNIX_FD\r\n")
        assert (await self.line()).startswith("ERROR")
        await self.stream.send_all(b"BEGIN\r\n")
        assert await self.call(BUS, "Hello") == (":1.0",)
        return self

    async def line(self) -> str:
        """Read a line of the opening."""
        data = b""
        with trio.fail_after(WAIT_S):
            while not data.endswith(b"\r\n"):
                some = await self.stream.receive_some(1)
                if not some:
                    raise EOFError
                data += some
        return data.decode().strip()

    async def call(self, to: DBusAddress, member: str, signature: str = "", *arguments: Any) -> tuple[Any, ...]:
        """Call a method; returns what it returns.

        Raises:
            BusError: it returned an error.
            EOFError: the connection was closed.
        """
        self._serial += 1
        message = new_method_call(to, member, signature, arguments)
        with trio.fail_after(WAIT_S):
            await self.stream.send_all(message.serialise(serial=self._serial))
            reply = await self._reply()
        if reply.header.message_type is MessageType.error:
            raise BusError(f"{reply.header.fields[HeaderFields.error_name]}: {reply.body[0]}")
        body: tuple[Any, ...] = reply.body
        return body

    async def _reply(self) -> Message:
        """The answer to the last call; one to a call that was answered before says nothing to GDBus."""
        while True:
            while (message := self._parser.get_next_message()) is None:
                data = await self.stream.receive_some(1 << 20)
                if not data:
                    raise EOFError
                self._parser.add_data(data)
            if message.header.fields[HeaderFields.reply_serial] == self._serial:
                return message

    async def owners(self) -> list[str]:
        """Who has a piece of the state."""
        owners: list[str] = (await self.call(BUS, "ListQueuedOwners", "s", SERVICE))[0]
        return owners

    async def proxies(self, owners: Sequence[str] | None = None) -> dict[str, str]:
        """Find the owners and their ids, as QEMU does at first; returns owner by id.

        Args:
            owners: they, if they were asked for before.
        """
        found = {}
        for name in await self.owners() if owners is None else owners:
            await self.call(BUS, "AddMatch", "s", f"type='signal',sender='{name}'")
            assert await self.call(BUS, "GetNameOwner", "s", name) == (name,)
            properties = (await self.call(owner(name, "org.freedesktop.DBus.Properties"), "GetAll", "s", SERVICE))[0]
            found[properties["Id"][1]] = name
        return found

    async def save(self) -> dict[str, bytes]:
        """Collect the state, as QEMU does; returns the pieces by id."""
        return {key: (await self.call(owner(name), "Save"))[0] for key, name in (await self.proxies()).items()}

    async def load(self, pieces: dict[str, bytes]) -> None:
        """Give pieces of a state to those with the same ids, as QEMU does."""
        found = await self.proxies()
        for key, piece in pieces.items():
            await self.call(owner(found[key]), "Load", "ay", piece)
