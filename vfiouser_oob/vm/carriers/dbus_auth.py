"""D-Bus's opening, the server's side: who is there, by the kernel's word.

Only EXTERNAL is offered. What a client says about its identity is compared with what the kernel says; the client may
also leave it to the kernel.

Spec: D-Bus, "Authentication Protocol".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

#: Bytes of the longest line, and how many lines there may be: GDBus needs four.
LINE_MAX = 1024
LINES_MAX = 16
_EOL = b"\r\n"
_REJECTED = b"REJECTED EXTERNAL"


class SaslError(Exception):
    """The opening failed; the connection is to be closed."""


class SaslServer:
    """Takes the bytes of the opening and leaves those behind it alone.

    Args:
        uid: the client's user, by the kernel's word.
        guid: this server's identity, 32 hexadecimal digits.
    """

    def __init__(self, uid: int, guid: str) -> None:
        self._uid = uid
        self._guid = guid.encode()
        self._buffer = bytearray()
        self._to_send = bytearray()
        self._lines = 0
        self._nul_seen = False
        self._waits_for_data = False
        self._authenticated = False
        #: Whether the opening is over.
        self.done = False

    def receive_data(self, data: bytes) -> bytes:
        """Take bytes; `data_to_send` has what to answer.

        Args:
            data: as they came.

        Returns:
            The bytes behind the opening, once that is done.

        Raises:
            SaslError: this is no D-Bus client, or not the one that the kernel says.
        """
        self._buffer += data
        if not self._nul_seen and self._buffer:
            if self._buffer[0]:
                raise SaslError("the first byte is not 0, as D-Bus demands")
            del self._buffer[:1]
            self._nul_seen = True
        while not self.done and (end := self._buffer.find(_EOL, 0, LINE_MAX)) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + len(_EOL)]
            self._take_line(line)
        if self.done:
            rest = bytes(self._buffer)
            self._buffer.clear()
            return rest
        if len(self._buffer) >= LINE_MAX:
            raise SaslError(f"a line of the opening has more than {LINE_MAX} bytes")
        return b""

    def data_to_send(self) -> bytes:
        """Return what to send now; it is returned once."""
        data = bytes(self._to_send)
        self._to_send.clear()
        return data

    def _take_line(self, line: bytes) -> None:
        self._lines += 1
        if self._lines > LINES_MAX:
            raise SaslError(f"the opening has more than {LINES_MAX} lines")
        command, _, rest = line.partition(b" ")
        handler = _COMMANDS.get(command)
        if handler is None:
            self._say(b"ERROR not understood")
        else:
            handler(self, rest.strip())

    def _say(self, line: bytes) -> None:
        self._to_send += line + _EOL

    def _auth(self, rest: bytes) -> None:
        mechanism, *words = rest.split(b" ", 1)
        self._waits_for_data = False
        if mechanism != b"EXTERNAL":
            self._say(_REJECTED)
        elif words:
            self._identify(words[0])
        else:
            self._waits_for_data = True
            self._say(b"DATA")

    def _data(self, rest: bytes) -> None:
        if self._waits_for_data:
            self._identify(rest)
        else:
            self._say(b"ERROR there is nothing to tell")

    def _identify(self, claim: bytes) -> None:
        self._waits_for_data = False
        try:
            told = bytes.fromhex(claim.decode("ascii")).decode("ascii")
        except ValueError:
            raise SaslError("the identity is not hexadecimal") from None
        if told not in ("", str(self._uid)):
            raise SaslError(f"the client says that it is user {told[:20]!r}, and the kernel says {self._uid}")
        self._authenticated = True
        self._say(b"OK " + self._guid)

    def _begin(self, _: bytes) -> None:
        if not self._authenticated:
            raise SaslError("the client begins before it has authenticated")
        self.done = True

    def _cancel(self, _: bytes) -> None:
        self._waits_for_data = self._authenticated = False
        self._say(_REJECTED)

    def _no_fds(self, _: bytes) -> None:
        self._say(b"ERROR no descriptors are passed here")


_COMMANDS: Mapping[bytes, Callable[[SaslServer, bytes], None]] = MappingProxyType(
    {
        b"AUTH": SaslServer._auth,
        b"DATA": SaslServer._data,
        b"BEGIN": SaslServer._begin,
        b"CANCEL": SaslServer._cancel,
        b"ERROR": SaslServer._cancel,
        b"NEGOTIATE_UNIX_FD": SaslServer._no_fds,
    }
)
