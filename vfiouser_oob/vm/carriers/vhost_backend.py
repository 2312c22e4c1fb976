"""The back-end of a `vhost-user-fs` device that holds no files, without any I/O.

It keeps what the front-end sets and says what that means: guest memory is to be logged, the functions have to stand or
may run, a state goes out or comes in. What means none of it is answered at once.

The device *runs* while all of its vrings are enabled. It stops when the first is asked for its base, and goes when the
last is enabled; both only happen when the guest has bound a driver to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from vfiouser_oob.transport.fds import ForeignFd
from vfiouser_oob.vm.carriers.vhost_messages import (
    NO_FD,
    REQUESTS,
    VRING_MASK,
    Direction,
    LogArea,
    MemoryTable,
    Nothing,
    Number,
    ProtocolFeatures,
    StateTransfer,
    VhostFeatures,
    VhostRequest,
    VringAddress,
    VringState,
)
from vfiouser_oob.vm.carriers.vhost_wire import VhostMessage, VhostWireError, reply
from vfiouser_protocol.fields import Payload

FEATURES = VhostFeatures.VERSION_1 | VhostFeatures.PROTOCOL_FEATURES | VhostFeatures.LOG_ALL
PROTOCOL_FEATURES = ProtocolFeatures.LOG_SHMFD | ProtocolFeatures.REPLY_ACK | ProtocolFeatures.DEVICE_STATE
#: Vrings of a device with one request queue, and as many as a companion may have.
QUEUES_MAX = 16


@dataclass(frozen=True, slots=True)
class LogGiven:
    """Written pages are to be logged; answer by `log_taken`.

    Args:
        area: where in the file.
        fd: the file; whoever keeps it takes it.
    """

    area: LogArea
    fd: ForeignFd


@dataclass(frozen=True, slots=True)
class LogEnded:
    """Nobody reads the log any more; needs no answer."""


@dataclass(frozen=True, slots=True)
class QueuesChanged:
    """Something about guest memory or a vring was said; needs no answer.

    Args:
        message: what.
    """

    message: VhostMessage


@dataclass(frozen=True, slots=True)
class StopNeeded:
    """The functions have to stand; answer by `stopped` or `deny_stop`.

    Args:
        index: the vring that was asked for.
        logged: whether guest memory is being logged, so a migration is under way.
    """

    index: int
    logged: bool


@dataclass(frozen=True, slots=True)
class GoNeeded:
    """The functions may run; answer by `done`.

    Args:
        message: what asks for it.
        bases: where each vring's next request is.
    """

    message: VhostMessage
    bases: dict[int, int]


@dataclass(frozen=True, slots=True)
class SaveNeeded:
    """A state is to be written; answer by `transfer`.

    Args:
        fd: where to; whoever keeps it takes it.
    """

    fd: ForeignFd


@dataclass(frozen=True, slots=True)
class LoadNeeded:
    """A state is to be read; answer by `transfer`.

    Args:
        fd: where from; whoever keeps it takes it.
    """

    fd: ForeignFd


@dataclass(frozen=True, slots=True)
class CheckNeeded:
    """Whether the transfer succeeded is asked; answer by `checked`."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What outlives a connection to a front-end that goes on.

    Args:
        runs: whether all vrings are enabled.
        bases: of each vring, where its next request is.
    """

    runs: bool
    bases: tuple[tuple[int, int], ...]


Step: TypeAlias = QueuesChanged | LogGiven | LogEnded | StopNeeded | GoNeeded | SaveNeeded | LoadNeeded | CheckNeeded


class VhostBackend:
    """One front-end's connection.

    After `take` and after each answer, `data_to_send` has what is to be sent.

    Args:
        before: where a connection was that this one takes the place of, while the front-end went on; None if the
            front-end is new. It will not say anything again that it has said.
    """

    def __init__(self, before: Standing | None = None) -> None:
        self._to_send: list[bytes] = []
        self._features = VhostFeatures(0)
        self._bases: dict[int, int] = dict(before.bases) if before else {}
        self._enabled: set[int] = set()
        self._logged = False
        #: Whether all vrings are enabled.
        self.runs = before is not None and before.runs

    @property
    def standing(self) -> Standing:
        """Where this connection is, for one that takes its place."""
        return Standing(self.runs, tuple(self._bases.items()))

    def data_to_send(self) -> bytes:
        """Return what to send now; it is returned once."""
        data = b"".join(self._to_send)
        self._to_send.clear()
        return data

    def take(self, message: VhostMessage) -> Step | None:
        """Take a message.

        Args:
            message: the message; its descriptors stay its own.

        Returns:
            What has to be done, and answered, before the next message; None if nothing has.

        Raises:
            VhostWireError: the front-end asks for what cannot be.
        """
        handler = _HANDLERS.get(message.request)
        step = None if handler is None else handler(self, message, message.payload)
        if not REQUESTS[message.request].own_reply and not isinstance(step, GoNeeded):
            self.done(message)
        return step

    # Answers

    def done(self, message: VhostMessage, failed: bool = False) -> None:
        """Say that something without a reply of its own is done, if that is waited for."""
        if message.needs_reply:
            self._reply(message.request, Number(int(failed)))

    def log_taken(self) -> None:
        """Say that the log is in use."""
        self._logged = True
        self._reply(VhostRequest.SET_LOG_BASE, Nothing())

    def moved(self, bases: dict[int, int]) -> None:
        """Note where vrings have come to."""
        self._bases |= bases

    def stopped(self, index: int) -> None:
        """Say that a vring stands, and where."""
        self._reply(VhostRequest.GET_VRING_BASE, VringState(index, self._bases.get(index, 0)))

    def deny_stop(self, index: int) -> None:
        """Say something else than is waited for: QEMU's way of hearing no is a reply to another question."""
        self._reply(VhostRequest.GET_FEATURES, VringState(index, 0))

    def transfer(self, begins: bool) -> None:
        """Say whether a state's transfer begins, through the descriptor that was given."""
        self._reply(VhostRequest.SET_DEVICE_STATE_FD, Number(NO_FD if begins else NO_FD | 1))

    def checked(self, good: bool) -> None:
        """Say whether the transfer succeeded."""
        self._reply(VhostRequest.CHECK_DEVICE_STATE, Number(int(not good)))

    def _reply(self, request: VhostRequest, payload: Payload) -> None:
        self._to_send.append(reply(request, payload))

    # Messages

    def _get_features(self, _: VhostMessage, __: Any) -> None:
        self._reply(VhostRequest.GET_FEATURES, Number(FEATURES))

    def _get_protocol_features(self, _: VhostMessage, __: Any) -> None:
        self._reply(VhostRequest.GET_PROTOCOL_FEATURES, Number(PROTOCOL_FEATURES))

    def _own(self, _: VhostMessage, __: Any) -> None:
        # A front-end that begins, so what was known was another's.
        self._bases.clear()
        self._enabled.clear()
        self.runs = False

    def _set_features(self, _: VhostMessage, payload: Number) -> Step | None:
        self._features = VhostFeatures(payload.value)
        if self._logged and not self._features & VhostFeatures.LOG_ALL:
            self._logged = False
            return LogEnded()
        return None

    def _set_log_base(self, message: VhostMessage, payload: LogArea) -> Step:
        return LogGiven(payload, message.fds[0])

    def _memory(self, message: VhostMessage, payload: MemoryTable) -> Step:
        if len(message.fds) != payload.count:
            raise VhostWireError(f"{payload.count} regions of guest memory came with {len(message.fds)} descriptors")
        return QueuesChanged(message)

    def _vring_set(self, message: VhostMessage, payload: VringState | VringAddress) -> Step:
        _vring(payload)
        return QueuesChanged(message)

    def _vring_fd(self, message: VhostMessage, payload: Number) -> Step:
        if payload.value & VRING_MASK >= QUEUES_MAX:
            raise VhostWireError(f"there is no vring {payload.value & VRING_MASK}")
        return QueuesChanged(message)

    def _set_base(self, _: VhostMessage, payload: VringState) -> None:
        self._bases[_vring(payload)] = payload.number

    def _get_base(self, _: VhostMessage, payload: VringState) -> Step | None:
        index = _vring(payload)
        if self.runs:
            self.runs = False
            self._enabled.clear()
            return StopNeeded(index, self._logged)
        self.stopped(index)
        return None

    def _enable(self, message: VhostMessage, payload: VringState) -> Step | None:
        index = _vring(payload)
        if not payload.number:
            self._enabled.discard(index)
            return None
        self._enabled.add(index)
        if self.runs or not self._enabled >= self._bases.keys():
            return None
        self.runs = True
        return GoNeeded(message, dict(self._bases))

    def _state_fd(self, message: VhostMessage, payload: StateTransfer) -> Step:
        if payload.phase or payload.direction not in Direction._value2member_map_:
            raise VhostWireError(f"a state goes in direction {payload.direction} in phase {payload.phase}")
        kind = SaveNeeded if payload.direction == Direction.SAVE else LoadNeeded
        return kind(message.fds[0])

    def _check(self, _: VhostMessage, __: Any) -> Step:
        return CheckNeeded()


def _vring(payload: VringState | VringAddress) -> int:
    if payload.index >= QUEUES_MAX:
        raise VhostWireError(f"there is no vring {payload.index}")
    return payload.index


_HANDLERS: Mapping[VhostRequest, Callable[[VhostBackend, VhostMessage, Any], Step | None]] = MappingProxyType(
    {
        VhostRequest.GET_FEATURES: VhostBackend._get_features,
        VhostRequest.SET_FEATURES: VhostBackend._set_features,
        VhostRequest.SET_OWNER: VhostBackend._own,
        VhostRequest.GET_PROTOCOL_FEATURES: VhostBackend._get_protocol_features,
        VhostRequest.SET_MEM_TABLE: VhostBackend._memory,
        VhostRequest.SET_LOG_BASE: VhostBackend._set_log_base,
        VhostRequest.SET_VRING_NUM: VhostBackend._vring_set,
        VhostRequest.SET_VRING_ADDR: VhostBackend._vring_set,
        VhostRequest.SET_VRING_KICK: VhostBackend._vring_fd,
        VhostRequest.SET_VRING_CALL: VhostBackend._vring_fd,
        VhostRequest.SET_VRING_BASE: VhostBackend._set_base,
        VhostRequest.GET_VRING_BASE: VhostBackend._get_base,
        VhostRequest.SET_VRING_ENABLE: VhostBackend._enable,
        VhostRequest.SET_DEVICE_STATE_FD: VhostBackend._state_fd,
        VhostRequest.CHECK_DEVICE_STATE: VhostBackend._check,
    }
)
