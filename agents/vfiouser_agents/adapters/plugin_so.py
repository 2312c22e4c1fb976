"""Vendors' shared objects for the plug-in mechanism proposed for QEMU in 2022, each function in a process of its own.

A library that crashes, exits, hangs or takes too long loses its process and nothing else; the next call starts another.
A call that nobody waits for any more is let finish all the same: what is behind the library may not survive less.
The library is initialised when a migration begins and cleaned up when it ends, or when a source has given everything,
as that series had it, and for single calls outside of a migration.
"""

from __future__ import annotations

import logging
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio

from vfiouser_agents.api import AgentInfo, Capabilities, Descriptor, FunctionInfo
from vfiouser_agents.errors import (
    AgentError,
    ConnectError,
    NotFound,
    ProtocolError,
    TransportLost,
    Unsupported,
)
from vfiouser_agents.options import OptionError, number, read_options, seconds, text

from . import plugin_host as host
from .descriptor_option import read_descriptor
from .primitive import PrimitiveAgent
from .unbroken import unbroken
from .vfio_v1 import V1Function, v1_caps

_log = logging.getLogger(__name__)
DEFAULT_CALL_TIMEOUT = 10.0
DEFAULT_MAX_STATE = 64 << 20
FORMAT = "vfio-lm-plugin"
#: A device as the series names it.
_DEVICE = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
#: Seconds in which cleanup may take place when the agent is closed.
_CLEANUP_S = 2.0
#: Bytes of a line that a library prints which are logged.
_LINE = 500
#: Lines of one process that are logged at once, and seconds after which another one may be.
_LINES, _LINE_S = 50, 0.2
#: Seconds that a library may take to be loaded when a configuration is checked.
_CHECK_S = 10.0


class LibraryUnusable(Unsupported):
    """The library cannot be used as it is; only somebody who changes it, or the configuration, changes that."""


def _library(name: str, value: Any) -> Path:
    path = Path(text(name, value))
    if not path.is_absolute():
        raise OptionError(f"{name} must be an absolute path, got {value!r}")
    return path


def _argument(name: str, value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise OptionError(f"{name} must be text without NUL, got {value!r}")
    return value


def _devices(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(_DEVICE.fullmatch(str(device)) for device in value.values()):
        raise OptionError(f"{name} must be a table of devices such as {{nvme0 = '0000:3b:00.2'}}, got {value!r}")
    return dict(value)


_READERS = {
    "path": _library,
    "arg": _argument,
    "devices": _devices,
    "call_timeout_s": seconds(0.01, 3600),
    "max_state": number(1, 4 << 30),
    "chunk_size": number(4096, host.MAX_SIZE),
    "descriptor": lambda _, value: read_descriptor(value),
}


class PluginSoAgent(PrimitiveAgent):
    """A vendor's library.

    Args:
        path: the shared object.
        arg: what the library's `init` gets beside the device, such as ``192.0.2.1:3333``.
        devices: PCI addresses by the names that functions have here; without it, they are the names.
        call_timeout_s: seconds that one call of the library may take.
        max_state: bytes that a state may have.
        chunk_size: bytes of one `save` or `load`.
        descriptor: what must be equal on both sides.
    """

    def __init__(
        self,
        path: Path,
        *,
        arg: str = "",
        devices: Mapping[str, str] | None = None,
        call_timeout_s: float = DEFAULT_CALL_TIMEOUT,
        max_state: int = DEFAULT_MAX_STATE,
        chunk_size: int = host.MAX_SIZE,
        descriptor: Descriptor | None = None,
    ) -> None:
        super().__init__(detached=True)
        self.path = path
        self.arg = arg
        self.call_timeout_s = call_timeout_s
        self._devices = devices
        self._descriptor = descriptor or Descriptor(FORMAT, 1, "", "", "", "", 0)
        self._caps = v1_caps(max_state, chunk_size, self._descriptor.format_id or FORMAT)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> PluginSoAgent:
        """Make one out of options.

        Args:
            options: `path`, and optionally what the constructor has.

        Raises:
            OptionError: an option cannot be used.
        """
        if "path" not in options:
            raise OptionError("option 'path' is missing: the vendor's library, such as /usr/lib/vendor/lm-plugin.so")
        return cls(**read_options(options, _READERS))

    def verify(self) -> None:
        """Load the library once, in a process of its own.

        Raises:
            OptionError: it cannot be used.
        """
        try:
            done = subprocess.run(
                _command(self.path), stdin=subprocess.DEVNULL, capture_output=True, timeout=_CHECK_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise OptionError(f"path: {self.path} does not come back from being loaded within {_CHECK_S:g} s") from None
        if done.returncode:
            said = (done.stdout + done.stderr).decode(errors="backslashreplace").strip()
            raise OptionError(f"path: {said or f'{self.path} {_ending(done.returncode)} while it is loaded'}")

    async def connect(self) -> AgentInfo:
        """Load the library once, which shows whether it can be used.

        Raises:
            LibraryUnusable: it cannot.
        """
        nursery, process = self.nursery, PluginProcess(self, "the library")
        try:
            await process.start(nursery)
        finally:
            await process.end()
        about = self._descriptor
        product = about.model or self.path.name
        return AgentInfo(about.vendor or "a vendor", product, protocol=FORMAT, protocol_version=host.VERSION)

    async def functions(self) -> Sequence[FunctionInfo]:
        """What is configured; a library does not tell its devices."""
        await trio.lowlevel.checkpoint()
        if self._devices is None:
            raise Unsupported("a library does not list its devices, and 'devices' is not configured")
        kind = self._descriptor.kind
        return [FunctionInfo(name, kind, bdf=device) for name, device in self._devices.items()]

    async def find(self, function_id: str) -> PluginFunction:
        """A configured device, or one by its PCI address."""
        await trio.lowlevel.checkpoint()
        device = (self._devices or {}).get(function_id, function_id)
        if self._devices is not None and function_id not in self._devices:
            raise NotFound(f"no function {function_id!r} (configured: {', '.join(self._devices)})")
        if not _DEVICE.fullmatch(device):
            raise NotFound(f"no function {function_id!r}; without 'devices' it is a PCI address such as 0000:3b:00.2")
        return PluginFunction(self, device, self._caps, self._descriptor, self.nursery)


class _Refused(AgentError):
    """A call of the library returned an error."""


class PluginFunction(V1Function):
    """A device behind the library; its process is started by the first call that needs it."""

    def __init__(
        self, agent: PluginSoAgent, device: str, caps: Capabilities, descriptor: Descriptor, nursery: trio.Nursery
    ) -> None:
        super().__init__(caps, descriptor)
        self._agent = agent
        self._device = device
        self._nursery = nursery
        self._process: PluginProcess | None = None
        self._initialised = False

    async def get_state(self) -> int:
        """`get_state`."""
        try:
            return (await self._call("get_state", host.GET_STATE))[0]
        except _Refused as error:
            # A library that cannot even tell the state has lost its agent; only from `init` on does it connect again.
            await self._end()
            raise TransportLost(f"{error.message}; its process is stopped", vendor_code=error.vendor_code) from error

    async def set_state(self, state: int) -> None:
        """`set_state`."""
        await self._call("set_state", host.SET_STATE, state)

    async def pending(self) -> int:
        """`update_pending`."""
        return (await self._call("update_pending", host.UPDATE_PENDING))[0]

    async def save_bytes(self, size: int) -> bytes:
        """`save`, which fills exactly so many bytes."""
        return (await self._call("save", host.SAVE, size))[1]

    async def load_bytes(self, data: bytes) -> None:
        """`load`."""
        await self._call("load", host.LOAD, data=data)

    async def release(self) -> None:
        """`cleanup`; the process stays for the next call."""
        if self._initialised:
            self._initialised = False
            await self._ask("cleanup", host.CLEANUP)

    async def aclose(self) -> None:
        """`cleanup`, and end the process."""
        try:
            with trio.move_on_after(_CLEANUP_S):
                await self.release()
        except AgentError as error:
            _log.warning("plug-in of %s: %s", self._device, error)
        finally:
            await self._end()

    async def _call(self, name: str, op: int, value: int = 0, data: bytes = b"") -> tuple[int, bytes]:
        if not self._initialised:
            await self._init()
        return await self._ask(name, op, value, data)

    async def _init(self) -> None:
        """`init`, which is where libraries connect to their agent: until then nothing was asked of it."""
        both = f"{self._device}\0{self._agent.arg}".encode()
        try:
            await self._ask("init", host.INIT, data=both)
        except _Refused as error:
            raise ConnectError(error.message, vendor_code=error.vendor_code) from error
        self._initialised = True

    async def _ask(self, name: str, op: int, value: int = 0, data: bytes = b"") -> tuple[int, bytes]:
        if self._process is not None and self._process.gone and not self._initialised:
            # It held nothing, so this call need not fail because of it.
            _log.warning("plug-in of %s: its process %s; it is started again", self._device, self._process.ending)
            await self._end()
        if self._process is None:
            process = PluginProcess(self._agent, f"device {self._device}")
            try:
                await process.start(self._nursery)
            except BaseException:
                await process.end()
                raise
            self._process = process
        intact = False
        try:
            code, number, answer = await self._process.ask(name, op, value, data)
            intact = True
        finally:
            # Also when the caller was cancelled: the answer would be taken for that of the next call.
            if not intact:
                await self._end()
        if code == host.REFUSED:
            raise ConnectError(f"{self._agent.path}: {_text(answer)}")
        if code:
            raise _Refused(f"{name} of {self._agent.path} failed", vendor_code=str(code))
        return number, answer

    async def _end(self) -> None:
        process, self._process, self._initialised = self._process, None, False
        if process is not None:
            await process.end()


class PluginProcess:
    """A process with the library in it.

    Args:
        agent: whose library.
        what: whose process it is, for the log.
    """

    def __init__(self, agent: PluginSoAgent, what: str) -> None:
        self._agent = agent
        self._what = what
        self._process: trio.Process | None = None
        self._stream: trio.SocketStream | None = None
        self._lines: deque[str] = deque(maxlen=3)
        self._said = trio.Event()
        #: Lines that may be logged now, when the last one came, and how many were not.
        self._room = float(_LINES)
        self._heard_at = time.monotonic()
        self._left_out = 0

    @property
    def gone(self) -> bool:
        """It has ended by itself."""
        return self._process is not None and self._process.returncode is not None

    @property
    def ending(self) -> str:
        """How it ended, for people."""
        assert self._process is not None
        assert self._process.returncode is not None
        return _ending(self._process.returncode)

    async def start(self, nursery: trio.Nursery) -> None:
        """Start it and load the library.

        Raises:
            LibraryUnusable: the library cannot be used.
            DeadlineExceeded: it does not come back from being loaded.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            self._process = await trio.lowlevel.open_process(
                _command(self._agent.path, theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        nursery.start_soon(self._listen, self._process)
        try:
            code, _, text_ = await self._answer("loading")
        except TransportLost as error:
            raise LibraryUnusable(error.message) from error
        if code:
            raise LibraryUnusable(_text(text_))

    async def ask(self, name: str, op: int, value: int, data: bytes) -> tuple[int, int, bytes]:
        """Have the library called.

        Args:
            name: of the operation, for errors.
            op: its number.
            value: a state, or a number of bytes.
            data: bytes for it.

        Returns:
            What the library returned, a value, and bytes.
        """
        return await self._answer(name, host.REQUEST.pack(op, len(data), value) + data)

    async def _answer(self, name: str, request: bytes = b"") -> tuple[int, int, bytes]:
        limit = self._agent.call_timeout_s
        too_late = f"{name} of {self._agent.path} did not return within {limit:g} s; its process is killed"
        return await unbroken(partial(self._talk, name, request), limit, too_late)

    async def _talk(self, name: str, request: bytes) -> tuple[int, int, bytes]:
        try:
            return await self._exchange(request)
        except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
            raise await self._death(name) from None

    async def _exchange(self, request: bytes) -> tuple[int, int, bytes]:
        assert self._stream is not None
        if request:
            await self._stream.send_all(request)
        code, size, value = host.REPLY.unpack(await self._read(host.REPLY.size))
        if size > host.MAX_SIZE:
            raise ProtocolError(f"the process of {self._agent.path} announced {size} bytes; it is stopped")
        return code, value, await self._read(size)

    async def _read(self, size: int) -> bytes:
        assert self._stream is not None
        found = bytearray()
        while len(found) < size:
            piece = await self._stream.receive_some(size - len(found))
            if not piece:
                raise EOFError
            found += piece
        return bytes(found)

    async def _death(self, name: str) -> TransportLost:
        assert self._process is not None
        if self._process.returncode is None:
            # The library may have closed the socket, which is as good as dead.
            with trio.move_on_after(0.5):
                await self._process.wait()
        status = self._process.returncode
        how = "closed its connection" if status is None else _ending(status)
        with trio.move_on_after(0.5):
            await self._said.wait()
        said = f" (it said: {' / '.join(self._lines)})" if self._lines else ""
        return TransportLost(f"the process of {self._agent.path} {how} during {name}{said}")

    async def _listen(self, process: trio.Process) -> None:
        assert process.stdout is not None
        rest = b""
        try:
            async for piece in process.stdout:
                *lines, rest = (rest + piece).split(b"\n")
                rest = rest[:_LINE]
                for line in lines:
                    self._hear(line)
            if rest:
                self._hear(rest)
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            pass
        finally:
            self._said.set()

    def _hear(self, line: bytes) -> None:
        shown = line[:_LINE].decode(errors="backslashreplace")
        self._lines.append(shown)
        now = time.monotonic()
        self._room = min(_LINES, self._room + (now - self._heard_at) / _LINE_S)
        self._heard_at = now
        if self._room < 1:
            self._left_out += 1
            return
        self._room -= 1
        if self._left_out:
            _log.warning("plug-in of %s printed too much; %d lines were dropped", self._what, self._left_out)
            self._left_out = 0
        _log.info("plug-in of %s: %s", self._what, shown)

    async def end(self) -> None:
        """Kill it, whatever it does."""
        with trio.CancelScope(shield=True):
            if self._stream is not None:
                await self._stream.aclose()
            if self._process is not None:
                if self._process.returncode is None:
                    self._process.kill()
                await self._process.wait()
                if self._process.stdout is not None:
                    await self._process.stdout.aclose()


def _command(path: Path, *numbers: int) -> list[str]:
    # -I and -S: nothing that is installed beside us can come between.
    return [sys.executable, "-I", "-S", host.__file__, *map(str, numbers), str(path)]


def _ending(status: int) -> str:
    return f"ended with exit status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"


def _text(answer: bytes) -> str:
    return answer.decode(errors="replace")


__all__ = ["LibraryUnusable", "PluginSoAgent"]
