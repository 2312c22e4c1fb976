"""Carrier V: QEMU's `dbus-vmstate` object, with this process as all of its bus.

The guest sees nothing of it. QEMU asks while its vCPUs stand and its memory has been sent, with the main loop at a
standstill: a DMA message that is sent then is answered only afterwards, and what it wrote is missing at the
destination. Stop and go are the monitor's to tell.

On the source the owners of the service are as many as the state has pieces. The destination cannot know how many will
come, so it offers as many as the largest state needs that is expected (`expect`); each costs QEMU two questions.

A cancel that comes while QEMU waits here is heard too late: the source resumes, and the destination may have loaded
all the same. It must not run by itself then, so it is to be started with -S, as libvirt does. (Found by running it.)
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import trio

from vfiouser_oob.transport.listener import Listener
from vfiouser_oob.transport.peer import Peer
from vfiouser_oob.transport.turns import FunctionQueue
from vfiouser_oob.vm.carriers.at_desk import CarrierAtDesk
from vfiouser_oob.vm.carriers.chunks import HEAD_SIZE, ChunkError, Joiner, cut, pieces_for
from vfiouser_oob.vm.carriers.dbus_auth import SaslError
from vfiouser_oob.vm.carriers.dbus_peer import (
    PIECE_MAX,
    Asked,
    DbusPeer,
    LoadCalled,
    Opened,
    OwnersAsked,
    SaveCalled,
)
from vfiouser_oob.vm.carriers.dbus_wire import DbusWireError
from vfiouser_oob.vm.carriers.desk import Answer, Offered, Refused
from vfiouser_oob.vm.carriers.interface import (
    Lost,
    MonitorCommand,
    QemuAttached,
    SaveAsked,
    StateLoaded,
    StateTaken,
)
from vfiouser_oob.vm.carriers.peer_socket import PeerGone, PeerSocket
from vfiouser_oob.vm.carriers.port import OPENING_S, CarrierPort, first_of
from vfiouser_oob.vm.carriers.vmstate_notes import VmstateNotes

#: Bytes of the largest state, and of the largest that is expected unless somebody says otherwise.
MOST_BYTES = 256 << 20
EXPECTED_BYTES = 16 << 20
#: Seconds for an answer; GDBus gives a call up after 25.
ANSWER_S = 20.0
#: Bytes read at once: a thousand of them are some twenty messages, which take a millisecond; more only of a message
#: that is known to be large.
_READ = 1 << 10
_READ_MAX = 256 << 10
#: Bytes looked at in one go that stay in the socket: all that GDBus sends without waiting, so no message is cut.
_LOOK = 16 << 10
#: Calls that were read and not answered: GDBus sends a few without waiting.
_UNANSWERED = 32
_NO_STATE = "there is no state to save, or it was saved before"
_STATE_LOST = "the daemon has restarted, and the state that QEMU had not read yet was lost"


@dataclass(frozen=True, slots=True)
class _BusConversation:
    """A QEMU's connection, and what is spoken there."""

    connection: PeerSocket
    peer: DbusPeer


class DbusVmstate(CarrierAtDesk):
    """One VM's carrier V.

    Args:
        listener: the socket that QEMU connects to; owned from now on.
        path: where it is, as QEMU knows it.
        object_id: what the object in QEMU is called.
        allow_uids: users that may connect; None allows whoever the socket's permissions let in.
        notes: keeps the connection for the daemon after this one, and what another one has left; None if nothing is
            kept.
    """

    name = "dbus-vmstate"
    most_bytes = MOST_BYTES

    def __init__(
        self,
        listener: Listener,
        path: Path,
        object_id: str = "oobvmstate",
        allow_uids: frozenset[int] | None = None,
        notes: VmstateNotes | None = None,
    ) -> None:
        super().__init__()
        self._notes = notes
        #: A connection that another daemon has left, until it is taken up.
        self._left = None if notes is None else notes.taken()
        connected = None if self._left is None else self._left.sock
        self._port = CarrierPort(listener, f"{self.name} {path}", allow_uids, connected)
        self._path = path
        self._object_id = object_id
        self._guid = secrets.token_hex(16)
        self._queue = FunctionQueue()
        #: At the destination: bytes of the largest state to take; None at the source.
        self._expected: int | None = None
        self._joiner: Joiner | None = None
        #: At the source: the pieces of the state that was offered, and which of them QEMU has not fetched.
        self._pieces: list[tuple[bytes, memoryview]] = []
        self._unfetched: set[int] = set()
        #: What a piece is refused with that is not there.
        self._lacks = _NO_STATE if self._left is None else _STATE_LOST

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve QEMU until cancelled, one QEMU after the other."""
        await self._port.serve(self._converse, task_status=task_status)

    def expect(self, most_bytes: int = EXPECTED_BYTES) -> None:
        """Be a destination from now on.

        Args:
            most_bytes: bytes of the largest state to take.

        Raises:
            ValueError: it is more than can be carried.
        """
        self._check(most_bytes)
        self._forget()
        self._expected = most_bytes

    def reset(self) -> None:
        """Be no destination any more, forget the state, and refuse what is open."""
        self._forget()
        self._desk.withdraw("the migration was given up")

    def repair(self) -> tuple[MonitorCommand, ...]:
        """The commands that connect QEMU's object anew, after we were away."""
        return (
            MonitorCommand("object-del", {"id": self._object_id}),
            MonitorCommand("object-add", vmstate_object(self._path, self._object_id)),
        )

    def _forget(self) -> None:
        self._expected, self._joiner = None, None
        self._offer_no_more()

    def _offer_no_more(self) -> None:
        self._pieces, self._unfetched = [], set()
        self._desk.gave()

    # Conversation

    async def _converse(self, connection: PeerSocket, process: Peer) -> None:
        left, self._left = self._left, None
        if left is None:
            peer = DbusPeer(process.uid, self._guid)
        else:
            peer = DbusPeer.resumed(self._guid, left.owners, left.serial, _STATE_LOST)
            connection.held = True
        send, receive = trio.open_memory_channel[Asked](_UNANSWERED)
        attached = False
        reason = "it closed the connection"
        try:
            # What is asked is answered beside the reading, so that the end of a QEMU that waits is noticed.
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._answer_all, _BusConversation(connection, peer), receive)
                with trio.CancelScope(deadline=trio.current_time() + OPENING_S) as opening:
                    if left is not None:
                        opening.deadline = math.inf
                        attached = await self._attach(process)
                        await connection.send(peer.data_to_send())
                    while True:
                        await self._queue.turn()
                        data = await connection.receive_alone(min(max(_READ, peer.missing), _READ_MAX), _LOOK)
                        for asked in peer.receive_data(data):
                            if isinstance(asked, Opened):
                                opening.deadline = math.inf
                                attached = await self._attach(process)
                            else:
                                self._let_go(connection)
                                await send.send(asked)
                        await connection.send(peer.data_to_send())
                        if peer.begun:  # nobody else could go on in the middle of a message
                            self._let_go(connection)
                        connection.take()
                raise PeerGone(f"it has not opened the conversation within {OPENING_S:g} s")
        except* (SaslError, DbusWireError, PeerGone) as errors:
            reason = str(first_of(errors))
        finally:
            if connection.held and self._notes is not None and self._notes.leaving:
                connection.leave()
            else:
                self._let_go(connection)
        if attached:
            self._offer_no_more()
            self._joiner = None
            await self._desk.tell(Lost(reason))
        raise PeerGone(reason)

    async def _attach(self, process: Peer) -> bool:
        await self._port.seat.take(process)
        await self._desk.tell(QemuAttached(process))
        return True

    # What outlives us

    def _hold(self, talk: _BusConversation, serial: int) -> None:
        """Let the connection outlive us, and what QEMU says stay in it until it is answered."""
        if self._notes is not None and not talk.peer.begun:
            self._notes.hold(talk.connection, len(self._pieces), serial)
            talk.connection.held = True

    def _let_go(self, connection: PeerSocket) -> None:
        """Let the connection end with us; what was received last is answered, or never will be."""
        if connection.held:
            assert self._notes is not None
            self._notes.let_go()
            connection.held = False

    # Answers

    async def _answer_all(self, talk: _BusConversation, receive: trio.MemoryReceiveChannel[Asked]) -> None:
        async for asked in receive:
            await _ANSWERS[type(asked)](self, talk, asked)
            await talk.connection.send(talk.peer.data_to_send())
            if not self._unfetched:
                self._desk.gave()

    async def _owners(self, talk: _BusConversation, asked: OwnersAsked) -> None:
        peer = talk.peer
        if self._expected is not None:
            self._joiner = Joiner(self._expected, PIECE_MAX)
            peer.list_owners(asked, pieces_for(self._expected, PIECE_MAX - HEAD_SIZE))
            return
        answer = await self._desk.ask(SaveAsked(), ANSWER_S)
        if isinstance(answer, Offered):
            self._pieces = cut(answer.state, PIECE_MAX)
            self._unfetched = set(range(len(self._pieces)))
            self._lacks = _NO_STATE
            self._desk.gives()
            self._hold(talk, asked.call.serial)
            peer.list_owners(asked, len(self._pieces))
        else:
            peer.refuse(asked, _reason(answer))

    async def _save(self, talk: _BusConversation, asked: SaveCalled) -> None:
        if asked.index not in self._unfetched:
            talk.peer.refuse(asked, self._lacks)
            return
        self._unfetched.remove(asked.index)
        talk.peer.give(asked, b"".join(self._pieces[asked.index]))
        if not self._unfetched:
            # Told before the last piece leaves: from then on the destination may have all of them.
            self._pieces = []
            await self._desk.tell(StateTaken())

    async def _load(self, talk: _BusConversation, asked: LoadCalled) -> None:
        peer = talk.peer
        if self._joiner is None:
            peer.refuse(asked, "no state is expected here")
            return
        try:
            state = self._joiner.add(asked.index, asked.piece)
        except ChunkError as error:
            self._joiner = None
            peer.refuse(asked, str(error))
            return
        if state is not None:
            self._joiner = None
            answer = await self._desk.ask(StateLoaded(state), ANSWER_S)
            if isinstance(answer, Refused):
                peer.refuse(asked, answer.reason)
                return
        peer.accept(asked)


_ANSWERS: Mapping[type[Asked], Callable[[DbusVmstate, _BusConversation, Any], Awaitable[None]]] = {
    OwnersAsked: DbusVmstate._owners,
    SaveCalled: DbusVmstate._save,
    LoadCalled: DbusVmstate._load,
}


def _reason(answer: Answer) -> str:
    return answer.reason if isinstance(answer, Refused) else "the daemon has no state to offer"


def vmstate_object(path: Path, object_id: str) -> dict[str, Any]:
    """Return the object to give QEMU, for its `-object` in JSON or `object-add`.

    Args:
        path: the carrier's socket, as QEMU sees it.
        object_id: what the object is called.
    """
    # In a D-Bus address everything but these is escaped.
    return {"qom-type": "dbus-vmstate", "id": object_id, "addr": f"unix:path={quote(os.fspath(path), safe='/-_.')}"}
