"""How a command is begun where another process may have to go on: it is said before it is done."""

from __future__ import annotations

import errno

from vfiouser_oob.devices.base import BackendSession, DeviceBackend
from vfiouser_oob.migration.no_migration import Port
from vfiouser_oob.persist.kept_socket import KeptSocket
from vfiouser_oob.persist.stream_memory import CommandStage
from vfiouser_oob.server.executor import Executor
from vfiouser_oob.server.handlers import Result
from vfiouser_oob.server.holding import REGION
from vfiouser_protocol.constants import Command
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.session import CommandReceived


class KnownBeginning:
    """Begins commands so that another process knows of it, and with care what another one has begun.

    Args:
        stream: the client's socket.
        executor: begins commands.
        session: the device, as opened for the client.
        device: the device.
        port: the client's way into the migration.
    """

    def __init__(
        self, stream: KeptSocket, executor: Executor, session: BackendSession, device: DeviceBackend, port: Port
    ) -> None:
        self._stream = stream
        self._memory = stream.memory
        self._begin = executor.begin
        self._session = session
        self._device = device
        self._migration_region = -1 if port.v1 is None else port.v1.index

    def begin(self, event: CommandReceived) -> Result:
        """Begin a command.

        Args:
            event: the command.

        Raises:
            CommandError: it is refused, or was begun by another process, and must not be done twice.
        """
        stream = self._stream
        again = stream.inherited is CommandStage.BEGUN
        if again:
            stream.inherited = CommandStage.IDLE
            if not self._repeatable(event):
                name = Command(event.header.command).name
                raise CommandError(f"{name} was begun by a daemon that has ended; it is not done twice", errno.EIO)
        self._session.command_begins(self._memory.tag, again=again)
        stream.begin()
        return self._begin(event)

    def _repeatable(self, event: CommandReceived) -> bool:
        """Whether a command that was begun may be begun once more.

        What the device's own ones may, and whatever only reads what is taken down as answered by an answer alone; but
        no step of a migration, and no part of a load.
        """
        command = event.header.command
        if command == Command.REGION_WRITE and len(event.payload) >= REGION.size:
            return bool(REGION.unpack_from(event.payload)[0] != self._migration_region)
        return command in self._device.repeatable or command == Command.MIG_DATA_READ
