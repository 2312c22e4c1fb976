"""The v2 generation's face: DEVICE_FEATURE, MIG_DATA_READ and MIG_DATA_WRITE."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias, cast

from vfiouser_oob.config.schema import MigrationConfig, P2p
from vfiouser_oob.migration.dirty import DirtyTracker
from vfiouser_oob.migration.message_time import message_deadline
from vfiouser_oob.migration.transfer import Transfer
from vfiouser_oob.transport.pieces import Pieces
from vfiouser_protocol.codec import decode
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.fields import layout_of
from vfiouser_protocol.messages import (
    FeatureDeviceState,
    FeatureLoggingReport,
    FeatureLoggingStart,
    MigDataRead,
    MigDataReadReply,
    MigDataWrite,
)
from vfiouser_protocol.migration_v2 import (
    READABLE,
    WRITABLE,
    FeatureAction,
    FeatureCall,
    interpret_feature,
    require_path,
    wish_of,
)
from vfiouser_protocol.packed import packed
from vfiouser_protocol.rules import check_request

Answer: TypeAlias = "bytes | Awaitable[bytes | Pieces]"
#: All of a reply to MIG_DATA_READ but its data, which lies in several places and is not encoded with it.
_DATA_HEAD = packed(layout_of(MigDataReadReply))
#: What MIG_DATA_SIZE says before a save has begun, in bytes: a size that no client postpones a migration for.
_UNKNOWN_SIZE = 1 << 20


class V2View:
    """The v2 commands of one connection.

    Args:
        transfer: moves the state.
        dirty: the connection's dirty log.
        config: the function's migration settings.
        max_read: bytes that the client takes per MIG_DATA_READ.
        max_write: bytes that we take per MIG_DATA_WRITE.
    """

    def __init__(
        self, transfer: Transfer, dirty: DirtyTracker, config: MigrationConfig, max_read: int, max_write: int
    ) -> None:
        self._transfer = transfer
        self._dirty = dirty
        self._config = config
        self._p2p = config.p2p is P2p.ON
        self._max_read = max_read
        self._max_write = max_write
        #: Bytes of data that a reply has at most.
        self._cap = max_read if config.read_cap is None else config.read_cap
        self._actions: Mapping[FeatureAction, Callable[[FeatureCall], Answer]] = {
            FeatureAction.PROBED: lambda call: call.echo(),
            FeatureAction.GET_MIGRATION: lambda call: call.flags(precopy=config.precopy, p2p=self._p2p),
            FeatureAction.GET_STATE: self._get_state,
            FeatureAction.SET_STATE: self._set_state,
            FeatureAction.START_LOGGING: self._start_logging,
            FeatureAction.STOP_LOGGING: self._stop_logging,
            FeatureAction.REPORT: self._report,
            FeatureAction.GET_DATA_SIZE: self._data_size,
        }

    def device_feature(self, payload: bytes, *, posted: bool) -> Answer:
        """DEVICE_FEATURE.

        Args:
            payload: behind the request's header.
            posted: nobody waits for the reply.

        Raises:
            CommandError: refused.
        """
        call = interpret_feature(payload)
        answer = self._actions[call.action](call)
        if posted and call.action is FeatureAction.REPORT and not isinstance(answer, bytes):
            return self._unheard(answer)
        return answer

    async def _unheard(self, answer: Awaitable[bytes | Pieces]) -> bytes | Pieces:
        """A report that is not sent has told nobody anything."""
        reply = await answer
        self._dirty.undo_report()
        return reply

    def _get_state(self, call: FeatureCall) -> Answer:
        if not self._transfer.certain:
            return self._get_state_later(call)
        return call.state(self._transfer.named(self._transfer.state))

    async def _get_state_later(self, call: FeatureCall) -> bytes:
        return call.state(self._transfer.named(await self._transfer.state_now()))

    async def _set_state(self, call: FeatureCall) -> bytes:
        assert isinstance(call.data, FeatureDeviceState)
        wanted, p2p = wish_of(call.data.device_state, p2p=self._p2p)
        await self._transfer.request(
            lambda current: require_path(current, wanted, precopy=self._config.precopy), p2p=p2p
        )
        return call.state_set()

    async def _start_logging(self, call: FeatureCall) -> bytes:
        assert isinstance(call.data, FeatureLoggingStart)
        return call.started(await self._dirty.start(call.data.page_size, call.data.ranges, message_deadline()))

    async def _stop_logging(self, call: FeatureCall) -> bytes:
        await self._dirty.stop(message_deadline())
        return call.echo()

    def _data_size(self, call: FeatureCall) -> bytes:
        left = self._transfer.left
        return call.data_size(_UNKNOWN_SIZE if left is None else left.buffered + left.remaining)

    async def _report(self, call: FeatureCall) -> Pieces:
        data = call.data
        assert isinstance(data, FeatureLoggingReport)
        bitmap = await self._dirty.report(data.iova, data.length, data.page_size, message_deadline())
        return Pieces([call.report_head(len(bitmap)), memoryview(bitmap)])

    def data_read(self, payload: bytes) -> Pieces | Awaitable[Pieces]:
        """MIG_DATA_READ: in STOP_COPY short only at the end, in PRE_COPY only when there is no more for now.

        Replies that are capped are short wherever that is.

        Args:
            payload: behind the request's header.

        Raises:
            CommandError: refused, or the agent does not give the state.
        """
        request = decode(MigDataRead, payload)
        check_request(request, self._max_read)
        self._require(READABLE, "MIG_DATA_READ")
        size = min(request.size, self._cap)
        if not size or self._transfer.has(size):
            return self._portion(size, request.size)
        return self._portion_later(size, request.size)

    async def _portion_later(self, size: int, wanted: int) -> Pieces:
        await self._transfer.prepare(size)
        return self._portion(size, wanted)

    def _portion(self, size: int, wanted: int) -> Pieces:
        data = self._transfer.read(size) if size else []
        if size:
            self._transfer.delivered()
        count = sum(map(len, data))
        padding = bytes(wanted - count) if self._config.pad_reads else b""
        return Pieces((_DATA_HEAD.pack(_DATA_HEAD.size + count, count), *data, padding))

    async def data_write(self, payload: bytes) -> bytes:
        """MIG_DATA_WRITE.

        Args:
            payload: behind the request's header.

        Raises:
            CommandError: refused; after that the load has failed, unless nothing of it was taken.
        """
        # Decoded as a view of what nobody changes any more: the data is large, and copied when it is put together.
        request = decode(MigDataWrite, cast("bytes", memoryview(payload)))
        check_request(request, self._max_write)
        self._require(WRITABLE, "MIG_DATA_WRITE")
        if not self._transfer.loading:
            raise CommandError("MIG_DATA_WRITE while no state is being loaded")
        if request.size:
            await self._transfer.write(request.data)
        return b""

    def _require(self, states: frozenset[DeviceState], what: str) -> None:
        self._transfer.require(what)
        state = self._transfer.state
        if state not in states:
            allowed = " or ".join(sorted(item.name for item in states))
            raise CommandError(f"{what} in {state.name}; it is for {allowed}")
