"""Carrier F: a `vhost-user-fs-pci` device without files, whose back-end is this process.

The guest sees a device that it may bind a driver to (Linux does by itself) and never mounts. With a driver, QEMU asks
for the stop right after its vCPUs, before the last pass over memory, logs what the functions write meanwhile, and does
not let the guest run before the answer to the go. The state goes through a descriptor, so it may be large, and the
destination has it while QEMU's main loop is still free. Without a driver only the state remains; stop and go are the
monitor's to tell.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import trio

from vfiouser_oob.observability import log
from vfiouser_oob.transport.fds import ForeignFd, close_fds
from vfiouser_oob.transport.listener import Listener
from vfiouser_oob.transport.peer import Peer
from vfiouser_oob.transport.worker import Worker
from vfiouser_oob.vm.carriers.at_desk import CarrierAtDesk
from vfiouser_oob.vm.carriers.companion_notes import CompanionNotes, LeftCompanion
from vfiouser_oob.vm.carriers.desk import Desk, Offered, Refused
from vfiouser_oob.vm.carriers.interface import (
    AnswerDue,
    GoAsked,
    LogChanged,
    Lost,
    MonitorCommand,
    QemuAttached,
    SaveAsked,
    State,
    StateLoaded,
    StateTaken,
    StopAsked,
)
from vfiouser_oob.vm.carriers.peer_socket import PeerGone, PeerSocket
from vfiouser_oob.vm.carriers.port import OPENING_S, CarrierCaller, CarrierPort, Meeting, first_of
from vfiouser_oob.vm.carriers.state_pipe import PipedStateReader, PipeEnd, PipeError, write_state
from vfiouser_oob.vm.carriers.vhost_backend import (
    CheckNeeded,
    GoNeeded,
    LoadNeeded,
    LogEnded,
    LogGiven,
    QueuesChanged,
    SaveNeeded,
    Standing,
    Step,
    StopNeeded,
    VhostBackend,
)
from vfiouser_oob.vm.carriers.vhost_log import LogRefused, VhostLog
from vfiouser_oob.vm.carriers.vhost_messages import VRING_MASK, VhostRequest
from vfiouser_oob.vm.carriers.vhost_rings import Rings
from vfiouser_oob.vm.carriers.vhost_wire import VhostFramer, VhostMessage, VhostWireError

#: Bytes of the largest state, and of the largest that is expected unless somebody says otherwise.
MOST_BYTES = 1 << 30
#: Seconds for an answer. QEMU itself would wait for ever, and the guest with it.
ANSWER_S = 20.0
#: Messages that were read and not handled: some need no reply.
_UNHANDLED = 32


class VhostUserFs(CarrierAtDesk):
    """One VM's carrier F.

    QEMU cannot connect a device's back-end anew. So if the daemon is to be restarted under a running VM, somebody has
    to keep the connection (`notes`), or QEMU has to listen, and we connect; either way QEMU says nothing again.

    Args:
        listener: the socket that QEMU connects to, owned from now on; None if QEMU listens.
        path: where it is.
        allow_uids: users that may be the peer; None allows whoever the socket's permissions let in.
        before: where it was when a connection was lost, if QEMU listens and goes on; see `standing`.
        notes: takes the connection down for the daemon after this one, and what another one has left; None if nothing
            is kept.
    """

    name = "vhost-user-fs"
    most_bytes = MOST_BYTES

    def __init__(
        self,
        listener: Listener | None,
        path: Path,
        allow_uids: frozenset[int] | None = None,
        before: Standing | None = None,
        notes: CompanionNotes | None = None,
    ) -> None:
        super().__init__()
        name = f"{self.name} {path}"
        #: A connection that another daemon has left, until it is taken up.
        self._left = None if notes is None else notes.taken()
        connected = None if self._left is None else self._left.sock
        self._port = (
            CarrierCaller(path, name, allow_uids)
            if listener is None
            else CarrierPort(listener, name, allow_uids, connected)
        )
        self._notes = notes
        self._calls = listener is None
        #: Where the device was when its connection was lost; only where it can be taken up again.
        self.standing: Standing | None = before
        #: At the destination: bytes of the largest state to take; None at the source.
        self._expected: int | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve QEMU until cancelled, one QEMU after the other."""
        await self._port.serve(self._converse, task_status=task_status)

    def expect(self, most_bytes: int = MOST_BYTES) -> None:
        """Take a state if one comes.

        Args:
            most_bytes: bytes of the largest state to take.

        Raises:
            ValueError: it is more than can be carried.
        """
        self._check(most_bytes)
        self._expected = most_bytes

    def reset(self) -> None:
        """Expect no state any more, and refuse what is open."""
        self._expected = None
        self._desk.withdraw("the migration was given up")

    def repair(self) -> tuple[MonitorCommand, ...]:
        """Nothing that a monitor could do connects a device's back-end anew."""
        return ()

    async def _converse(self, connection: PeerSocket, process: Peer) -> None:
        left, self._left = self._left, None
        before = left.standing if left is not None else self.standing if self._calls else None
        conversation = _Conversation(connection, self._port, self._desk, lambda: self._expected, before, self._notes)
        attached = False
        reason = "it closed the connection"
        framer = VhostFramer()
        try:
            # What is asked is answered beside the reading, so that the end of a QEMU that waits is noticed.
            async with trio.open_nursery() as nursery:
                nursery.start_soon(conversation.run)
                with trio.CancelScope(deadline=trio.current_time() + OPENING_S) as opening:
                    if self._calls or left is not None:
                        opening.deadline = math.inf
                        attached = await self._attach(process)
                        await conversation.begin(None if self._calls else connection, left)
                    while True:
                        message = framer.feed(*await connection.receive(framer.bytes_wanted, conversation))
                        conversation.part = framer.begun
                        if message is None:
                            continue
                        if not attached:
                            opening.deadline = math.inf
                            attached = await self._attach(process)
                            await conversation.begin(connection, None)
                        await conversation.put(message)
                raise PeerGone(f"it has not said anything within {OPENING_S:g} s")
        except* (VhostWireError, PeerGone) as errors:
            reason = str(first_of(errors))
        finally:
            framer.close()
            if left is not None:
                left.close()
            if self._notes is not None and self._notes.leaving:
                connection.leave()
            elif attached and self._notes is not None and not self._calls:
                self._notes.ended()
            conversation.close()
            self._desk.gave()
            self.standing = conversation.standing
        if attached:
            await self._desk.tell(Lost(reason))
        raise PeerGone(reason)

    async def _attach(self, process: Peer) -> bool:
        await self._port.seat.take(process)
        await self._desk.tell(QemuAttached(process))
        return True


class _Transfer:
    """A state that goes out or comes in.

    Args:
        end: where it goes through.
        comes: whether it comes in.
    """

    def __init__(self, end: PipeEnd, comes: bool) -> None:
        self.end = end
        self.comes = comes
        self.error: str | None = None
        self.finished = trio.Event()


class _Conversation:
    """What one QEMU's device asks for, done in order.

    Args:
        connection: its socket.
        port: where it came in.
        desk: where to ask.
        expected: how large a state to take; None for none.
        before: where an earlier connection was that this one takes the place of.
        notes: takes it down for the daemon after this one.
    """

    def __init__(
        self,
        connection: PeerSocket,
        port: Meeting,
        desk: Desk,
        expected: Callable[[], int | None],
        before: Standing | None,
        notes: CompanionNotes | None,
    ) -> None:
        self._notes = notes
        #: Whether a part of a message was read, whether more is being read, and how many were read and not answered.
        self.part = False
        self._reading = False
        self._unanswered = 0
        self._connection = connection
        self._account = port.account
        self._desk = desk
        self._expected = expected
        self._backend = VhostBackend(before)
        self._worker = Worker(port.account)
        self._log = log.get("carrier").bind(carrier=VhostUserFs.name)
        self._written: VhostLog | None = None
        self._rings = Rings(port.account, self._mark)
        self._transfer: _Transfer | None = None
        self._send, self._receive = trio.open_memory_channel[VhostMessage](_UNHANDLED)
        self._transfers: trio.Nursery

    @property
    def standing(self) -> Standing:
        """Where the device is, for a connection that takes this one's place."""
        self._backend.moved(self._rings.bases)
        return self._backend.standing

    # What is taken down

    async def begin(self, sock: PeerSocket | None, left: LeftCompanion | None) -> None:
        """Somebody is served from now on.

        Args:
            sock: where, if another daemon can go on there.
            left: what another daemon has left, with which this one goes on.
        """
        if left is None:
            if self._notes is not None:
                self._notes.began(sock)
            return
        for message in left.said:
            step = self._backend.take(message)
            if step is not None:
                await _STEPS[type(step)](self, step)
        self._backend.data_to_send()  # what was answered before
        if left.standing.runs:
            self._rings.start(dict(left.standing.bases))

    def reads(self) -> None:
        """Messages may be read from now on."""
        self._reading = True
        if self._notes is not None:
            self._notes.busy()

    def rests(self) -> None:
        """None is there."""
        self._reading = False
        self._settle()

    def _settle(self) -> None:
        # A state that leaves breaks off with us, and whoever comes after us says so when QEMU asks how that went.
        comes = self._transfer is not None and self._transfer.comes
        if self._notes is not None and not (self._reading or self.part or self._unanswered or comes):
            self._notes.idle(self.standing)

    async def put(self, message: VhostMessage) -> None:
        """Have a message handled, in its turn."""
        self._unanswered += 1
        try:
            await self._send.send(message)
        except trio.Cancelled:
            close_fds(message.fds)
            raise

    async def run(self) -> None:
        """Handle messages until cancelled."""
        async with trio.open_nursery() as self._transfers:
            self._transfers.start_soon(self._rings.run)
            async for message in self._receive:
                try:
                    await self._handle(message)
                finally:
                    close_fds(message.fds)

    def close(self) -> None:
        """Give up what is still held."""
        while True:
            try:
                close_fds(self._receive.receive_nowait().fds)
            except trio.WouldBlock:
                break
        if self._written is not None:
            self._written.close()
        self._rings.close()
        self._worker.close()

    async def _handle(self, message: VhostMessage) -> None:
        if self._notes is not None:
            self._notes.said(message)
        step = self._backend.take(message)
        if step is not None:
            await _STEPS[type(step)](self, step)
        await self._connection.send(self._backend.data_to_send())
        if self._transfer is None:
            self._desk.gave()
        self._unanswered -= 1
        self._settle()

    # The queues

    async def _change_queues(self, step: QueuesChanged) -> None:
        message = step.message
        _QUEUES[message.request](self._rings, message.payload, message.fds)

    def _mark(self, address: int, length: int) -> None:
        if self._written is not None:
            self._written.mark(address, length)

    # The log

    async def _begin_log(self, step: LogGiven) -> None:
        await self._drop_log()
        try:
            self._written = VhostLog(step.fd, step.area.size, step.area.offset, self._account)
        except LogRefused as error:
            # QEMU cannot be told; what is written then travels in the state, as without a driver.
            self._log.warning("QEMU's log of written pages is not used", reason=error)
        else:
            await self._desk.tell(LogChanged(self._written))
        self._backend.log_taken()

    async def _end_log(self, _: LogEnded) -> None:
        await self._drop_log()
        if self._notes is not None:
            self._notes.unsaid(VhostRequest.SET_LOG_BASE)

    async def _drop_log(self) -> None:
        if self._written is not None:
            self._written.close()
            self._written = None
            await self._desk.tell(LogChanged(None))

    # Stop and go

    async def _stop(self, step: StopNeeded) -> None:
        self._backend.moved(await self._rings.stop())
        answer = await self._desk.ask(StopAsked(sure=step.logged), ANSWER_S)
        if isinstance(answer, Refused):
            self._log.warning("the daemon does not let QEMU stop", reason=answer.reason)
            self._backend.deny_stop(step.index)
        else:
            self._backend.stopped(step.index)
        await self._end_log(LogEnded())

    async def _go(self, step: GoNeeded) -> None:
        answer = await self._desk.ask(GoAsked(), ANSWER_S)
        self._backend.done(step.message, failed=isinstance(answer, Refused))
        self._rings.start(step.bases)

    # The state

    async def _save(self, step: SaveNeeded) -> None:
        asked = trio.current_time()
        answer = await self._desk.ask(SaveAsked(), ANSWER_S)
        took_s = trio.current_time() - asked
        if not isinstance(answer, Offered):
            self._refuse_transfer(answer.reason if isinstance(answer, Refused) else "there is no state to offer")
            return
        transfer = self._begin_transfer(PipeEnd(step.fd.take(), self._worker), comes=False)
        self._desk.gives()
        self._transfers.start_soon(self._write, transfer, answer.state, took_s)

    async def _load(self, step: LoadNeeded) -> None:
        most_bytes = self._expected()
        if most_bytes is None:
            self._refuse_transfer("no state is expected here")
            return
        transfer = self._begin_transfer(PipeEnd(step.fd.take(), self._worker), comes=True)
        self._transfers.start_soon(self._read, transfer, most_bytes)

    def _refuse_transfer(self, reason: str) -> None:
        self._transfer = None
        self._log.warning("QEMU's transfer of the state is refused", reason=reason)
        self._backend.transfer(begins=False)

    def _begin_transfer(self, end: PipeEnd, comes: bool) -> _Transfer:
        self._transfer = _Transfer(end, comes)
        self._backend.transfer(begins=True)
        return self._transfer

    async def _write(self, transfer: _Transfer, state: State, took_s: float) -> None:
        try:
            await write_state(transfer.end, state, lambda: self._desk.tell(StateTaken()), took_s)
        except PipeError as error:
            transfer.error = str(error)
        transfer.finished.set()

    async def _read(self, transfer: _Transfer, most_bytes: int) -> None:
        reader = PipedStateReader(transfer.end, most_bytes)
        try:
            state = await reader.state()
            # The trail is read meanwhile, else QEMU's main loop would be held up by a full pipe.
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader.end)
                answer = await self._desk.ask(StateLoaded(state, free=not reader.ended), ANSWER_S)
            if isinstance(answer, Refused):
                transfer.error = answer.reason
        except* PipeError as errors:
            transfer.error = str(first_of(errors))
        finally:
            transfer.end.close()
        transfer.finished.set()

    async def _check_transfer(self, _: CheckNeeded) -> None:
        transfer, self._transfer = self._transfer, None
        if transfer is None:
            self._backend.checked(good=False)
            return
        if not transfer.finished.is_set():
            if transfer.comes:
                await self._desk.tell(AnswerDue())
            await transfer.finished.wait()
        if transfer.error is not None:
            self._log.warning("the state did not arrive", reason=transfer.error)
        self._backend.checked(good=transfer.error is None)


_QUEUES: Mapping[VhostRequest, Callable[[Rings, Any, list[ForeignFd]], None]] = {
    VhostRequest.SET_MEM_TABLE: lambda rings, table, fds: rings.set_memory(table, fds),
    VhostRequest.SET_VRING_NUM: lambda rings, vring, _: rings.set_size(vring.index, vring.number),
    VhostRequest.SET_VRING_ADDR: lambda rings, address, _: rings.set_address(address),
    VhostRequest.SET_VRING_KICK: lambda rings, vring, fds: rings.set_kick(
        vring.value & VRING_MASK, fds[0] if fds else None
    ),
    VhostRequest.SET_VRING_CALL: lambda rings, vring, fds: rings.set_call(
        vring.value & VRING_MASK, fds[0] if fds else None
    ),
}
_STEPS: Mapping[type[Step], Callable[[_Conversation, Any], Awaitable[None]]] = {
    QueuesChanged: _Conversation._change_queues,
    LogGiven: _Conversation._begin_log,
    LogEnded: _Conversation._end_log,
    StopNeeded: _Conversation._stop,
    GoNeeded: _Conversation._go,
    SaveNeeded: _Conversation._save,
    LoadNeeded: _Conversation._load,
    CheckNeeded: _Conversation._check_transfer,
}


def companion_arguments(
    path: Path, *, tag: str = "vfiouser-oob", listens: bool = False, **properties: Any
) -> tuple[str, ...]:
    """Return QEMU's arguments for a companion; they belong behind those of the functions.

    Args:
        path: the carrier's socket, as QEMU sees it.
        tag: what a guest would mount.
        listens: whether QEMU listens there, and waits for us when it starts.
        properties: further properties of the device, such as `bus` and `addr`.
    """
    device = {"driver": "vhost-user-fs-pci", "id": "oobcompanion", "chardev": "oobvhost", "tag": tag, "queue-size": 16}
    # In a chardev's options a comma is written twice.
    chardev = f"socket,id=oobvhost,path={os.fspath(path).replace(',', ',,')}"
    if listens:
        chardev += ",server=on,wait=on"
    return "-chardev", chardev, "-device", json.dumps(device | properties)
