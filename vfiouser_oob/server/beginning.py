"""How a command is begun where another process may have to go on: it is said before it is done."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from struct import Struct
from types import MappingProxyType

from vfiouser_oob.devices.base import BackendSession, DeviceBackend
from vfiouser_oob.migration.no_migration import Port
from vfiouser_oob.persist.kept_socket import KeptSocket
from vfiouser_oob.persist.stream_memory import CommandStage
from vfiouser_oob.server.executor import Executor
from vfiouser_oob.server.handlers import Result
from vfiouser_oob.server.holding import REGION
from vfiouser_protocol.constants import Command, DirtyPagesFlags, FeatureFlags
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.session import CommandReceived

#: What DEVICE_FEATURE and DIRTY_PAGES begin with: argsz and flags.
_FLAGS = Struct("<II")
#: Whether such a command only asks, by its flags.
_ASKS: Mapping[int, Callable[[int], bool]] = MappingProxyType(
    {
        Command.DEVICE_FEATURE: lambda flags: not flags & FeatureFlags.SET or bool(flags & FeatureFlags.PROBE),
        Command.DIRTY_PAGES: lambda flags: bool(flags & DirtyPagesFlags.GET_BITMAP),
    }
)


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
                raise CommandError(f"a daemon that has ended started {name}; it is not done again", errno.EIO)
        self._session.command_begins(self._memory.tag, again=again)
        stream.begin()
        return self._begin(event)

    def _repeatable(self, event: CommandReceived) -> bool:
        """Whether a command that was begun may be begun once more.

        What the device's own ones may, and whatever only reads: how far the client has come counts by its answer alone,
        and after a restart everything is dirty. But no step of a migration, and no part of a load.
        """
        command, payload = event.header.command, event.payload
        if command == Command.REGION_WRITE and len(payload) >= REGION.size:
            return bool(REGION.unpack_from(payload)[0] != self._migration_region)
        asks = _ASKS.get(command)
        if asks is not None and len(payload) >= _FLAGS.size:
            return asks(_FLAGS.unpack_from(payload)[1])
        return command in self._device.repeatable or command == Command.MIG_DATA_READ
