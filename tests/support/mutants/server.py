"""The stream: connections, headers, VERSION, order, and who gets a reply."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from mutants.device import Crash, Device, Refused
from mutants.session import Session

HEADER = struct.Struct("<HHIII")
MAX_MESSAGE = (1 << 20) + 4096
TRANSFER = 1 << 20
#: How long a mutant is slow, or waits for what never comes, in seconds.
SLOW_S = 2.0


class Gone(Exception):
    """The client has gone, or the server lets it go."""


class Variant(NamedTuple):
    """What the device lacks, or has besides."""

    migration: bool = True
    reset: bool = True
    pre_copy: bool = True
    p2p: bool = False

    @classmethod
    def named(cls, name: str) -> Variant:
        """`no-migration` and so on, or `p2p`; empty for a device that lacks nothing."""
        field = name.removeprefix("no-").replace("-", "_")
        return cls(**{field: not name.startswith("no-")}) if name else cls()


class Command:
    """A command as it came."""

    def __init__(self, msg_id: int, number: int, flags: int, payload: bytes, fds: list[int]) -> None:
        self.msg_id, self.number, self.flags = msg_id, number, flags
        self.payload, self.fds = payload, fds


class Server:
    """Serves one client after the other.

    Args:
        path: of the socket.
        fault: its name, perhaps with `@variant`; empty = a server without faults.
    """

    def __init__(self, path: str, fault: str = "") -> None:
        self.path = path
        self.fault, _, variant = fault.partition("@")
        self.variant = Variant.named(variant)
        self.crashed = 0
        self.device = Device(self.bad)
        self.served = 0
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._stopping, self._stop = socket.socketpair()
        self._current: socket.socket | None = None
        #: (command, payload) of everything that clients sent, in order.
        self.heard: list[tuple[int, bytes]] = []
        self._hearing = threading.Condition()
        #: Descriptors that a fault keeps; closed with the server.
        self.kept: list[int] = []

    def bad(self, name: str) -> bool:
        """Whether this fault is planted."""
        return bool(name) and name == self.fault

    def need(self, name: str, holds: object, number: int = 22) -> None:
        """A rule: refuse unless it holds, or unless the fault of this name leaves the check out."""
        if not holds and not (name and self.bad(name)):
            raise Refused(number)

    def note(self, number: int, payload: bytes) -> None:
        """A client has sent a command."""
        with self._hearing:
            self.heard.append((number, payload))
            self._hearing.notify_all()

    def wait_heard(self, count: int, timeout: float) -> bool:
        """Wait until so many commands have come; whether they have, in time."""
        with self._hearing:
            return self._hearing.wait_for(lambda: len(self.heard) >= count, timeout)

    def listen(self) -> None:
        """Begin to listen."""
        self.listener.bind(self.path)
        self.listener.listen(16)

    def run(self) -> None:
        """Serve until stopped or crashed."""
        try:
            while True:
                ready, _, _ = select.select([self.listener, self._stopping], [], [])
                if self._stopping in ready:
                    return
                sock, _ = self.listener.accept()
                self._current = sock
                heard = len(self.heard)
                self.serve(sock)
                self._current = None
                self.served += 1
                asked = [number for number, _ in self.heard[heard:]]
                if self.bad("session/serves-once") and asked == [1, 4]:
                    select.select([self._stopping], [], [])  # it stays, and takes no other client
                    return
        except Crash:
            self.crashed = 1
        finally:
            self.listener.close()
            if self._current is not None:
                self._current.close()

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves."""
        Connection(self, sock).run()

    def stop(self) -> None:
        """Make `run` return."""
        self._stop.send(b"x")
        current = self._current
        if current is not None:
            with contextlib.suppress(OSError):
                current.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give everything back."""
        for fd in self.kept:
            os.close(fd)
        self.device.close()
        self._stop.close()
        self._stopping.close()
        os.unlink(self.path)


@contextlib.contextmanager
def serving(path: str, fault: str = "") -> Iterator[Server]:
    """A server in a thread of this process."""
    server = Server(path, fault)
    server.listen()
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)
        server.close()


class Connection:
    """One client."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self.bad = server.bad
        self.twin: socket.socket | None = None
        self.queue: list[Command] = []
        self.held: list[tuple[bytes, list[int]]] = []
        self.session = Session(server, self)
        self.capabilities: dict[str, Any] = {}

    def run(self) -> None:
        """Until the client leaves."""
        try:
            self._negotiate()
            while True:
                self._handle(self.next_command())
                self.session.work()
        except (Gone, OSError):
            pass
        finally:
            for command in self.queue:
                self._keep_or_close(command.fds)
            self.session.end()
            if self.twin is not None:
                self.twin.close()
            self.sock.close()

    # Receiving

    def next_command(self) -> Command:
        """The next command, from those that came while a DMA reply was waited for, or from the stream."""
        if self.queue:
            return self.queue.pop(0)
        while True:
            if self.bad("session/second-client-mixed"):
                self._take_second()
            message = self._receive(self.sock)
            kind = message.flags & 15
            if kind == 0 or self.bad("frame/type-executed" if kind > 1 else "frame/reply-executed"):
                return message
            self._keep_or_close(message.fds)
            self._reply(message, b"", 22)
            if kind > 1 and not self.bad("frame/body-parsed-as-header"):
                raise Gone

    def _take_second(self) -> None:
        """Go on with the stream of whoever connects last."""
        listener = self.server.listener
        ready, _, _ = select.select([self.sock, listener], [], [])
        if listener in ready:
            self.sock.close()
            self.sock, _ = listener.accept()

    def receive_reply(self, sock: socket.socket, msg_id: int) -> Command:
        """A reply of the client to a command of ours; commands that come first are queued or served."""
        while True:
            message = self._receive(sock)
            if message.flags & 15 == 1:
                return message
            if self.bad("dma/commands-wait"):
                raise Gone  # it expects the reply next, and takes a command for one
            # What takes memory away, or resets, waits; everything else is served, as clients may wait for it.
            if message.number in (3, 13):
                self.queue.append(message)
            else:
                self._handle(message)

    def _receive(self, sock: socket.socket) -> Command:
        fds: list[int] = []
        try:
            head = self._exactly(sock, 16, fds)
            msg_id, number, size, flags, _ = HEADER.unpack(head)
            if size < 16 and self.bad("frame/size-8-ok"):
                size = 16
                flags |= 0x80000000  # remembered until the reply: it says success
                self._send(HEADER.pack(msg_id, number, 16, 1, 0))
                raise Gone
            if size > MAX_MESSAGE and self.bad("frame/huge-size-waits"):
                time.sleep(SLOW_S)
            if size > MAX_MESSAGE and number == 1 and self.bad("version/long-kills"):
                raise Crash
            if not 16 <= size <= MAX_MESSAGE:
                self._send(HEADER.pack(msg_id, number, 16, 0x21, 22))
                raise Gone
            if flags & 15 > 1 and self.bad("frame/body-parsed-as-header"):
                return Command(msg_id, number, flags, b"", fds)
            payload = self._body(sock, size - 16, fds)
        except BaseException:
            self._keep_or_close(fds, "fd/half-message-kept")
            raise
        if flags & 15 == 0:
            self.server.note(number, payload)
        return Command(msg_id, number, flags, payload, fds)

    def _body(self, sock: socket.socket, size: int, fds: list[int]) -> bytes:
        if self.bad("frame/split-body") and size:
            data = sock.recv(size, socket.MSG_PEEK)
            if len(data) < size:
                raise Gone
        return self._exactly(sock, size, fds)

    def _exactly(self, sock: socket.socket, count: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < count:
            room = socket.CMSG_SPACE(4 * 253)
            more, ancillary, _, _ = sock.recvmsg(count - len(data), room, socket.MSG_CMSG_CLOEXEC)
            for _, _, content in ancillary:
                got = struct.unpack(f"{len(content) // 4}i", content)
                lost = self.bad("fd/split-lost") and len(data) + len(more) < count
                (self.server.kept if lost else fds).extend(got)
            if not more:
                if data and self.bad("frame/half-message-kills"):
                    raise Crash
                raise Gone
            data += more
            short = len(data) < count
            if short and count == 16 and (self.bad("frame/split-header") or self.bad("frame/split-byte")):
                raise Gone
        return data

    # Sending

    def _send(self, data: bytes, fds: list[int] | None = None, sock: socket.socket | None = None) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        sock = sock or self.sock
        if fds and self.bad("region-info/fd-late"):
            sock.sendall(data[:16])
            time.sleep(0.01)
            data = data[16:]
        try:
            sent = sock.sendmsg([data], ancillary)
            if sent < len(data):  # an empty send would fail if the client has gone meanwhile
                sock.sendall(data[sent:])
        except OSError:
            if self.bad("frame/early-leave-kills"):
                raise Crash from None
            raise

    def _reply(self, command: Command, payload: bytes, error: int = 0, fds: list[int] | None = None) -> None:
        failed = error != 0
        silent = command.flags & 0x10
        if silent and not (
            (failed and self.bad("frame/no-reply-error"))
            or (not failed and self.bad("frame/reply-to-no-reply"))
            or (command.number == 13 and self.bad("session/reset-answers-no-reply"))
        ):
            return
        msg_id, flags, number = command.msg_id, 0x21 if failed else 1, error
        if failed and self.bad("frame/error-flag"):
            flags = 1
        if failed and self.bad("frame/error-payload-huge"):
            payload = bytes(200)
        if self.bad("frame/reply-id") and msg_id > 255:
            msg_id &= 0xFF
        if self.bad("session/ids-in-sequence"):
            self._sequence = getattr(self, "_sequence", -1) + 1
            msg_id = self._sequence
        if self.bad("frame/golden-info"):
            number = 1
        size = 16 + len(payload)
        if self.bad("frame/reply-size") and command.number == 9:
            size -= 4
        if self.bad("frame/slow-reply") and command.number == 7:
            time.sleep(SLOW_S)
        message = HEADER.pack(msg_id, command.number, size, flags, number) + payload
        self._send_in_order(command, message, fds or [])

    def _send_in_order(self, command: Command, message: bytes, fds: list[int]) -> None:
        late = (
            (self.bad("frame/out-of-order") and command.number == 4 and command.msg_id == 110)
            or (self.bad("frame/duplicate-ids") and command.number == 7 and command.msg_id == 7)
            or (self.bad("dma-map/burst-out-of-order") and command.number == 3 and command.msg_id == 50)
        )
        if late:
            self.held.append((message, fds))
            return
        if self.bad("frame/flood-lost") and command.number == 4:
            self._answered = getattr(self, "_answered", 0) + 1
            if self._answered > 1000:
                return
        self._send(message, fds)
        while self.held:
            self._send(*self.held.pop(0))

    def send_command(self, number: int, msg_id: int, payload: bytes) -> socket.socket:
        """Send a command of ours, where those go."""
        sock = self.sock if self.twin is None or self.bad("dma/twin-unused") else self.twin
        self._send(HEADER.pack(msg_id, number, 16 + len(payload), 0, 0) + payload, None, sock)
        return sock

    # Commands

    def _handle(self, command: Command) -> None:
        if command.number == 1:
            self._keep_or_close(command.fds)
            error = 0 if self.bad("version/second-accepted") else 22
            self._reply(command, b"" if error else bytes(4), error)
            return
        fds: list[int] = []
        try:
            payload, error = self._execute(command, fds), 0
        except Refused as refusal:
            payload, error = b"", refusal.number
        self._surplus(command, error)
        self._reply(command, payload, error, fds)

    def _execute(self, command: Command, fds: list[int]) -> bytes:
        number = command.number
        if command.flags & 0xFFFFFFC0:
            self.server.need("", not self.bad("frame/reserved-bits-refused"))
        if command.flags & 0x20:
            self.server.need("", not self.bad("frame/error-bit-refused"))
        if command.flags & 0x10 and number == 10 and self.bad("frame/no-reply-lost"):
            return b""
        handler = self.session.table.get(number)
        if handler is None:
            if number == 19 and self.bad("client/figures-kill"):
                raise Crash
            names = {0: "frame/command-zero-ok", 11: "frame/dma-command-ok", 12: "frame/dma-command-ok"}
            self.server.need(names.get(number, "frame/unknown-command-ok"), False)
            return b""
        if not command.payload and number != 13:
            self.server.need("frame/no-payload-ok", False)
            return b""
        return handler(command, fds)

    def _surplus(self, command: Command, error: int) -> None:
        """Descriptors that the command did not take."""
        names = {
            True: "fd/many-kept" if len(command.fds) < 100 else "fd/most-kept",
            False: "fd/surplus-kept",
        }
        name = names[len(command.fds) > 10]
        if command.number != 4:
            name = "fd/refused-kept" if error else "fd/by-command-kept"
        if command.number == 8 and error:
            name = "irq/refused-fds-kept"
        if command.flags & 0x10:
            name = "fd/no-reply-kept"
        self._keep_or_close(command.fds, name)

    def _keep_or_close(self, fds: list[int], fault: str = "") -> None:
        if fault and self.bad(fault):
            self.server.kept.extend(fds)
        else:
            for fd in fds:
                os.close(fd)
        fds.clear()

    # VERSION

    def _negotiate(self) -> None:
        command = self._receive(self.sock)
        if command.number != 1 and self.bad("version/skipped"):
            self.queue.append(command)
            return
        self._keep_or_close(command.fds, "version/fd-kept")
        if command.flags & 15 or command.number != 1:
            self._reply(command, b"", 22)
            raise Gone
        if self.bad("version/no-reply-silent") and command.flags & 0x10:
            time.sleep(SLOW_S)
            raise Gone
        command.flags &= ~0x10
        try:
            payload, fds = self._version(command.payload)
        except Refused as refusal:
            self._reply(command, b"", refusal.number)
            raise Gone from None
        self._reply(command, payload, 0, fds)
        for fd in fds:
            os.close(fd)

    def _version(self, payload: bytes) -> tuple[bytes, list[int]]:
        need, bad = self.server.need, self.bad
        need("version/short-payload-ok", len(payload) >= 4)
        major, minor = struct.unpack_from("<HH", payload.ljust(4, b"\0"))
        need("version/major-ignored", major == 0)
        data = payload[4:]
        if not data:
            need("", not bad("version/refuses-no-json") and not bad("client/minimal-refused"))
        proposed = self._capabilities(data) if data else {}
        self.capabilities = proposed
        own: dict[str, Any] = {
            "max_msg_fds": 16,
            "max_data_xfer_size": TRANSFER,
            "max_dma_maps": 256,
            "pgsizes": 4096,
            "write_multiple": True,
        }
        found = {name: value for name, value in own.items() if name in proposed}
        if "migration" in proposed and self.server.variant.migration and not bad("v1/no-pgsize"):
            found["migration"] = {"pgsize": min(4096, proposed["migration"].get("pgsize", 4096))}
        self._spoil(found, proposed)
        fds = self._grant_twin(found, proposed)
        text = json.dumps({"capabilities": found}, separators=(",", ":")).encode()
        if bad("version/reply-too-long"):
            text = text[:-1] + b" " * 200 + b"}"
        if bad("version/no-capabilities-member"):
            text = b"{}"
        text += b"" if bad("version/no-nul") else b"\0"
        if bad("version/refuses-odd-order") and data.startswith(b"{\n"):
            raise Refused
        answer = minor + 1 if bad("version/minor-too-high") else min(minor, 2)
        return struct.pack("<HH", 0, answer) + text, fds

    def _capabilities(self, data: bytes) -> dict[str, Any]:
        need, bad = self.server.need, self.bad
        need("version/nul-optional", data[-1:] == b"\0")
        try:
            document = json.loads(data.rstrip(b"\0"))
        except ValueError:
            need("version/bad-json-ok", False)
            return {}
        need("", isinstance(document, dict) and not (bad("version/refuses-empty-object") and not document))
        proposed = document.get("capabilities", {})
        need("version/list-of-capabilities-ok", isinstance(proposed, dict))
        if not isinstance(proposed, dict):
            return {}
        fds = proposed.get("max_msg_fds", 1)
        need("version/bad-max-fds-ok", isinstance(fds, int))
        need("version/negative-max-fds-ok", not isinstance(fds, int) or 0 <= fds <= 1024)
        transfer = proposed.get("max_data_xfer_size", TRANSFER)
        need("version/bad-transfer-ok", isinstance(transfer, int))
        need("", not (bad("client/small-limits") and isinstance(transfer, int) and transfer < 4096))
        migration = proposed.get("migration", {})
        well = isinstance(migration, dict) and isinstance(migration.get("pgsize", 4096), int)
        need("version/bad-migration-ok", well)
        if not well:
            proposed.pop("migration")
        elif bad("version/big-pgsize-refused") and migration.get("pgsize") == 8192:
            time.sleep(SLOW_S)
        twin = proposed.get("twin_socket", {})
        need("version/bad-twin-ok", isinstance(twin, dict) and isinstance(twin.get("supported", False), bool))
        if bad("version/refuses-old-names") and "max_fds" in proposed:
            raise Refused
        return dict(proposed)

    def _spoil(self, found: dict[str, Any], proposed: dict[str, Any]) -> None:
        bad = self.bad
        if bad("version/unknown-member"):
            found.update({name: value for name, value in proposed.items() if name.startswith("x-")})
        if bad("version/unproposed-capability"):
            found["twin_socket"] = {"supported": False}
        if bad("version/float-capability"):
            found["max_msg_fds"] = 8.0
        if bad("version/odd-limits"):
            found["max_msg_fds"] = 17
        if bad("version/offers-write-multi") and "write_multiple" in proposed:
            found["write_multiple"] = True

    def _grant_twin(self, found: dict[str, Any], proposed: dict[str, Any]) -> list[int]:
        twin = proposed.get("twin_socket", {})
        wanted = isinstance(twin, dict) and twin.get("supported") is True
        takes = proposed.get("max_msg_fds", 1)
        if not (wanted and (takes or self.bad("version/twin-without-fds"))) and not self.bad("version/twin-unasked"):
            return []
        self.twin, theirs = socket.socketpair()
        found["twin_socket"] = {"supported": True, "fd_index": 1 if self.bad("version/twin-bad-index") else 0}
        return [theirs.detach()]
