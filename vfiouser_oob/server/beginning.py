"""How a command is begun where another process may have to go on: it is said before it is done."""

from __future__ import annotations

import errno

from vfiouser_oob.devices.base import BackendSession, DeviceBackend
from vfiouser_oob.persist.kept_socket import KeptSocket
from vfiouser_oob.persist.stream_memory import CommandStage
from vfiouser_oob.server.executor import Executor
from vfiouser_oob.server.handlers import Result
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
    """

    def __init__(self, stream: KeptSocket, executor: Executor, session: BackendSession, device: DeviceBackend) -> None:
        self._stream = stream
        self._memory = stream.memory
        self._begin = executor.begin
        self._session = session
        self._device = device

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
            if event.header.command not in self._device.repeatable:
                name = Command(event.header.command).name
                raise CommandError(f"{name} was started by a daemon that has ended; it is not done again", errno.EIO)
        self._session.command_begins(self._memory.tag, again=again)
        stream.begin()
        return self._begin(event)
