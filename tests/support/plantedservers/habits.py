"""The habits: what each server does besides, or instead."""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import time
from typing import Any

from mutants.device import MIGRATION, Refused
from mutants.dma import Fault
from mutants.server import HEADER, Command, Connection, Gone, Server

RUNNING, STOP, STOP_COPY = 2, 1, 3
_FEATURE, _MIG_READ, _MIG_WRITE = 16, 17, 18


class Leaves(Server):
    """Exits when its client leaves, as the specification allows."""

    status = 0

    def run(self) -> None:
        """Serve one client."""
        sock, _ = self.listener.accept()
        self.serve(sock)
        if self.status:
            sys.stderr.write("the client has gone\n")
            self.crashed = self.status


class LeavesWithStatus(Leaves):
    """Calls it an error that its client left."""

    status = 3


class OneAtATime(Server):
    """Has no room for a client that waits, besides the one that the kernel keeps."""

    def listen(self) -> None:
        """Begin to listen."""
        self.listener.bind(self.path)
        self.listener.listen(0)


class NeverListens(Server):
    """Says why, and does not listen."""

    def listen(self) -> None:
        """Say something."""
        sys.stderr.write("warming up\nno firmware found\n")

    def run(self) -> None:
        """Fail."""
        self.crashed = 4


class Crashes(Server):
    """Dies of GET_IRQ_INFO."""

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves, or asks."""
        connection = Connection(self, sock)

        def die(command: Command, fds: list[int]) -> bytes:
            sys.stderr.write("null pointer in irq_info()\n")
            os.kill(os.getpid(), signal.SIGSEGV)
            raise AssertionError

        connection.session.table[7] = die
        connection.run()


class CrashesLate(Server):
    """Dies of fifty commands at a time."""

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves, or asks too much."""
        connection = Connection(self, sock)
        handle = connection._handle

        def counting(command: Command) -> None:
            if command.msg_id == 149:
                os.kill(os.getpid(), signal.SIGSEGV)
            handle(command)

        connection._handle = counting  # type: ignore[method-assign]
        connection.run()


class _Habit(Server):
    """Serves with a connection of another kind."""

    connection: type[Connection] = Connection

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves."""
        self.connection(self, sock).run()


class _LosingConnection(Connection):
    def _receive(self, sock: socket.socket) -> Command:
        while True:
            head = sock.recv(16, socket.MSG_PEEK)
            if len(head) < 16 or HEADER.unpack(head)[1] != _FEATURE:
                return super()._receive(sock)
            msg_id, number, *_ = HEADER.unpack(sock.recv(16))
            self._send(HEADER.pack(msg_id, number, 16, 0x21, 38))


class LosesItsPlace(_Habit):
    """Refuses DEVICE_FEATURE, which it does not know, without taking its body from the stream."""

    connection = _LosingConnection

    def __init__(self, path: str) -> None:
        super().__init__(path, "@no-migration")

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves."""
        connection = self.connection(self, sock)
        for number in (14, _FEATURE, _MIG_READ, _MIG_WRITE):
            del connection.session.table[number]
        connection.run()


class _StrictConnection(Connection):
    def _execute(self, command: Command, fds: list[int]) -> bytes:
        if self.server.device.state == STOP_COPY and command.number not in (_FEATURE, _MIG_READ, _MIG_WRITE):
            access = command.number in (9, 10) and len(command.payload) >= 12
            if not access or struct.unpack_from("<QI", command.payload)[1] != MIGRATION:
                raise Refused
        return super()._execute(command, fds)


class RefusesInStopCopy(_Habit):
    """Takes nothing but what migration needs while the device is saved."""

    connection = _StrictConnection


class StaysStopped(Server):
    """Its device stops, and then does not run again: what it ran on has gone to the other host."""

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves."""
        connection = Connection(self, sock)
        migration = connection.session.migration
        step, reset, state = migration._step, migration.reset, self.device.state

        def limited(begin: int, end: int) -> None:
            if begin == STOP and end == RUNNING:
                raise Refused(16)
            step(begin, end)

        def keeping() -> None:
            before = self.device.state
            reset()
            self.device.state = before

        migration._step = limited  # type: ignore[method-assign]
        migration.reset = keeping  # type: ignore[method-assign]
        self.device.state = state
        connection.run()


class KeepsState(Server):
    """Retains all state of the device when its client leaves, its log of dirty pages too."""

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves."""
        connection = Connection(self, sock)
        migration = connection.session.migration
        kept: dict[str, Any] = self.__dict__.setdefault("kept_state", {})
        for name, value in kept.items():
            setattr(migration, name, value)

        def end() -> None:
            kept.update({name: getattr(migration, name) for name in ("stream", "at", "loaded", "log", "dirty")})

        migration.end = end  # type: ignore[method-assign]
        connection.run()


class _SerialConnection(Connection):
    def receive_reply(self, sock: socket.socket, msg_id: int) -> Command:
        message = self._receive(sock)
        if message.flags & 15 != 1:
            self._keep_or_close(message.fds)
            raise Fault(22)  # it expected the reply, and what came instead is lost
        return message


class SerialDma(_Habit):
    """Takes one message at a time: while it waits for the reply to its DMA command no other may come."""

    connection = _SerialConnection


class DoesDmaInside(_Habit):
    """Does its DMA before it answers the access that starts it, one message at a time."""

    connection = _SerialConnection

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves."""
        connection = self.connection(self, sock)
        dma = connection.session.dma
        order = dma.order

        def at_once(value: int) -> None:
            order(value)
            dma.work()

        dma.order = at_once  # type: ignore[method-assign]
        connection.run()


class AgreesToMaps(Server):
    """Its device does no DMA: it agrees to everything about maps, and keeps nothing."""

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves."""
        connection = Connection(self, sock)
        connection.session.table[2] = connection.session.table[3] = lambda command, fds: b""
        connection.run()


class VendorZero(Server):
    """Its device has vendor id 0."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.device.config[:2] = b"\0\0"
        power_on = self.device.power_on

        def without_vendor() -> None:
            power_on()
            self.device.config[:2] = b"\0\0"

        self.device.power_on = without_vendor  # type: ignore[method-assign]


class _SilentLimit(Connection):
    def _spoil(self, found: dict[str, Any], proposed: dict[str, Any]) -> None:
        super()._spoil(found, proposed)
        found.pop("max_dma_maps", None)


class FewMaps(_Habit):
    """Takes 16 maps, and does not say so."""

    connection = _SilentLimit

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves."""
        connection = self.connection(self, sock)
        connection.session.dma.limit = 16
        connection.run()


class Floods(Server):
    """Asked for an IRQ type it sends commands of its own, and never stops."""

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves."""
        connection = Connection(self, sock)
        message = HEADER.pack(7, 11, 32, 0x10, 0) + struct.pack("<QQ", 0x1000, 16)

        def flood(command: Command, fds: list[int]) -> bytes:
            try:
                while True:
                    sock.sendall(message)
                    time.sleep(0.001)
            except OSError:
                raise Gone from None

        connection.session.table[7] = flood
        connection.run()


class _TalkativeConnection(Connection):
    def _reply(self, command: Command, payload: bytes, error: int = 0, fds: list[int] | None = None) -> None:
        if not error or command.flags & 0x10:
            super()._reply(command, payload, error, fds)
        else:
            self._send(HEADER.pack(command.msg_id, command.number, 32, 0x21, error) + bytes(16))


class AnswersErrorsWithData(_Habit):
    """Sends data along with error replies, which the specification rules out."""

    connection = _TalkativeConnection
