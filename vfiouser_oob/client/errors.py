"""What can go wrong on the client's side, beyond a server that answers with an errno (`ReplyError`)."""

from __future__ import annotations

import errno

from vfiouser_protocol.errors import RemoteProtocolError, VfioUserError


class ServerGone(VfioUserError):
    """The connection to the server has ended; every outstanding and every later command fails with this."""

    default_errno = errno.EIO


class TooLate(RemoteProtocolError):
    """A command was not sent, since its reply could not come within the caller's deadline."""

    default_errno = errno.ETIMEDOUT


class BadReply(RemoteProtocolError):
    """The server's reply does not fit its command, or cannot be decoded; the connection goes on."""

    default_errno = errno.EPROTO
