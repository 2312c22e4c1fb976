"""The process that a vendor's plug-in runs in: loads the library and calls it, one request after the other.

A program of its own, started as a file with the number of a socket and the library's path, so that it needs nothing but
the standard library. Whatever the plug-in does to its process (crash, exit, spin, close files) happens here. It speaks
with `plugin_so` over the socket, in this machine's byte order:

    request   op u32, size u32, value u64, then size bytes
    reply     code i32, size u32, value u64, then size bytes

A code of 0 is success, and what the library returned otherwise; `REFUSED` comes with a text. The first reply is sent
without a request, once the library is loaded.

When the daemon is gone, the call under way comes to its end if it does so in time, and the library is cleaned up: what
is behind it may not survive a client that just vanishes. With a path alone, this program only loads the library, prints
why it cannot be used, and exits with 1 then.

Spec: QEMU RFC "vfio/migration: introduce the plugin mechanism", 24 May 2022, include/hw/vfio/vfio-migration-plugin.h.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import socket
import struct
import sys
import threading
import time

REQUEST = struct.Struct("=IIQ")
REPLY = struct.Struct("=iIQ")
INIT, SAVE, LOAD, UPDATE_PENDING, SET_STATE, GET_STATE, CLEANUP = range(1, 8)
#: The code of a reply that is a text from here, not a number from the library.
REFUSED = -(1 << 31)
VERSION = 0
#: Bytes of one request or reply, beside the header: the chunks of the series.
MAX_SIZE = 1 << 20
#: Seconds that a library has to come to an end once the daemon is gone.
END_S = 2.0
#: What a library may leave out.
_OPTIONAL = frozenset({"cleanup"})

_C = ctypes.CDLL(None)
_HANDLE = ctypes.c_void_p
_BYTES = ctypes.POINTER(ctypes.c_uint8)


class Ops(ctypes.Structure):
    """`VFIOMigrationPluginOps`."""

    _fields_ = (
        ("init", ctypes.CFUNCTYPE(_HANDLE, ctypes.c_char_p, ctypes.c_char_p)),
        ("save", ctypes.CFUNCTYPE(ctypes.c_int, _HANDLE, _BYTES, ctypes.c_uint64)),
        ("load", ctypes.CFUNCTYPE(ctypes.c_int, _HANDLE, _BYTES, ctypes.c_uint64)),
        ("update_pending", ctypes.CFUNCTYPE(ctypes.c_int, _HANDLE, ctypes.POINTER(ctypes.c_uint64))),
        ("set_state", ctypes.CFUNCTYPE(ctypes.c_int, _HANDLE, ctypes.c_uint32)),
        ("get_state", ctypes.CFUNCTYPE(ctypes.c_int, _HANDLE, ctypes.POINTER(ctypes.c_uint32))),
        ("cleanup", ctypes.CFUNCTYPE(ctypes.c_int, _HANDLE)),
    )


class LibraryRefused(Exception):
    """The library cannot be used, or the request makes no sense."""


def load(path: str) -> Ops:
    """Load a library and get its operations.

    Args:
        path: the shared object.

    Raises:
        Refused: it cannot be loaded, lacks a symbol or an operation, or has another version.
    """
    try:
        library = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_LOCAL)
    except OSError as error:
        raise LibraryRefused(f"the library cannot be loaded: {error}") from error
    symbols = {}
    for name in ("vfio_lm_get_plugin_version", "vfio_lm_get_plugin_ops"):
        try:
            symbols[name] = getattr(library, name)
        except AttributeError:
            raise LibraryRefused(
                f"{path} has no symbol {name}; it is not a migration plug-in of the 2022 series"
            ) from None
    version = symbols["vfio_lm_get_plugin_version"]()
    if version != VERSION:
        raise LibraryRefused(f"{path} is a plug-in of version {version}; only version {VERSION} can be used")
    get_ops = symbols["vfio_lm_get_plugin_ops"]
    get_ops.restype = ctypes.POINTER(Ops)
    found = get_ops()
    if not found:
        raise LibraryRefused(f"vfio_lm_get_plugin_ops of {path} returned NULL")
    ops: Ops = found.contents
    for name, _ in Ops._fields_:
        if not getattr(ops, name) and name not in _OPTIONAL:
            raise LibraryRefused(f"{path} has no operation {name!r}")
    return ops


class PluginHost:
    """Executes requests.

    Args:
        ops: the library's operations.
    """

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._handle: int | None = None
        self._arguments: tuple[bytes, bytes] = (b"", b"")

    def execute(self, op: int, value: int, data: bytes) -> tuple[int, int, bytes]:
        """Call the library.

        Args:
            op: which operation.
            value: a state, or a number of bytes.
            data: bytes to load; for INIT, device and argument with a NUL between them.

        Returns:
            What the library returned, a value, and bytes.

        Raises:
            Refused: the request makes no sense.
        """
        if op == INIT:
            return self._init(data)
        if self._handle is None:
            raise LibraryRefused("there is no handle yet; INIT comes first")
        if op == SAVE and 0 < value <= MAX_SIZE:
            buffer = (ctypes.c_uint8 * value)()
            code = self._ops.save(self._handle, buffer, value)
            return code, 0, b"" if code else bytes(buffer)
        if op == LOAD and data:
            buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
            # The series takes whatever is not negative for success, such as a number of bytes.
            return min(self._ops.load(self._handle, buffer, len(data)), 0), 0, b""
        if op == UPDATE_PENDING:
            pending = ctypes.c_uint64()
            return self._ops.update_pending(self._handle, ctypes.byref(pending)), pending.value, b""
        if op == SET_STATE:
            return self._ops.set_state(self._handle, value), 0, b""
        if op == GET_STATE:
            state = ctypes.c_uint32()
            return self._ops.get_state(self._handle, ctypes.byref(state)), state.value, b""
        if op == CLEANUP:
            return self.cleanup(), 0, b""
        raise LibraryRefused(f"request {op} with value {value} and {len(data)} bytes")

    def cleanup(self) -> int:
        """Have the library let go of its device, if it has one; returns what it returned."""
        handle, self._handle = self._handle, None
        return self._ops.cleanup(handle) if handle is not None and self._ops.cleanup else 0

    def _init(self, data: bytes) -> tuple[int, int, bytes]:
        if self._handle is not None:
            raise LibraryRefused("there is a handle already")
        device, _, argument = data.partition(b"\0")
        # Kept, since a library may go on using what it was given.
        self._arguments = (device, argument)
        self._handle = self._ops.init(*self._arguments)
        if not self._handle:
            self._handle = None
            raise LibraryRefused(f"init for {device.decode(errors='replace')!r} returned NULL")
        return 0, 0, b""


def serve(connection: socket.socket, path: str) -> None:
    """Answer requests until the other side is gone."""
    try:
        host = PluginHost(load(path))
    except LibraryRefused as error:
        _reply(connection, REFUSED, 0, str(error).encode())
        return
    try:
        _reply(connection, 0, 0, b"")
        while _serve_one(connection, host):
            pass
    except OSError:
        pass  # the other side is gone
    host.cleanup()
    _flush()


def _serve_one(connection: socket.socket, host: PluginHost) -> bool:
    header = _read(connection, REQUEST.size)
    if header is None:
        return False
    op, size, value = REQUEST.unpack(header)
    data = _read(connection, size) if size else b""
    if data is None:
        return False
    try:
        answer = host.execute(op, value, data)
    except LibraryRefused as error:
        answer = REFUSED, 0, str(error).encode()
    _flush()
    _reply(connection, *answer)
    return True


def _flush() -> None:
    """Let out what the library has printed: the buffers of its C library do not survive a process that is killed."""
    _C.fflush(None)


def _reply(connection: socket.socket, code: int, value: int, data: bytes) -> None:
    connection.sendall(REPLY.pack(code, len(data), value) + data)


def _read(connection: socket.socket, size: int) -> bytes | None:
    found = bytearray()
    while len(found) < size:
        piece = connection.recv(size - len(found))
        if not piece:
            return None
        found += piece
    return bytes(found)


def _end_with_the_daemon(connection: socket.socket) -> None:
    # In a thread, because the library may never come back from a call.
    poller = select.poll()
    poller.register(connection, select.POLLRDHUP | select.POLLHUP)
    poller.poll()
    time.sleep(END_S)
    os._exit(1)


def check(path: str) -> int:
    """Say whether a library can be used; returns the exit status."""
    try:
        load(path)
    except LibraryRefused as error:
        sys.stdout.write(f"{error}\n")
        return 1
    return 0


def main() -> int:
    """Run with the library's path, and before it with the number of the socket if there is one."""
    # A library that crashes is expected here, and its core holds a guest's state.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    *number, path = sys.argv[1:]
    if not number:
        return check(path)
    connection = socket.socket(fileno=int(number[0]))
    threading.Thread(target=_end_with_the_daemon, args=(connection,), daemon=True).start()
    serve(connection, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
