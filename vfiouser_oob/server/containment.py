"""The one place that catches every exception.

A fault in our own code must cost one command or one function, never the daemon. What escapes a handler or a device's
task is a bug: it is logged here, and turned into an EIO or the end of that function's work.
"""

from __future__ import annotations

import errno
from types import TracebackType

from vfiouser_oob.observability.log import Logger
from vfiouser_protocol.errors import LocalProtocolError, VfioUserError


def errno_of(error: Exception, log: Logger, what: str) -> int:
    """Return the error number that answers a failed command.

    Args:
        error: what a handler raised.
        log: where a bug is reported.
        what: which command failed, for the report.
    """
    # The peer's, the device's or another server's doing, unless it says that it is ours; its errno goes on the wire.
    if isinstance(error, VfioUserError) and not isinstance(error, LocalProtocolError):
        return error.errno
    if isinstance(error, OSError) and error.errno:
        log.warning("command failed", command=what, error=error.strerror, errno=errno.errorcode.get(error.errno, ""))
        return error.errno
    log.exception("bug: a command failed unexpectedly; its client gets EIO", error, command=what)
    return errno.EIO if not isinstance(error, LocalProtocolError) else error.errno


class Contained:
    """Keeps an exception of the block under it, instead of letting it spread; cancellation passes.

    The attribute `error` says what happened; it is None when the block went through.
    """

    __slots__ = ("error",)

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> Contained:
        return self

    def taken(self) -> Exception:
        """Hand the error over, so that it and the frames that it holds go with whoever has dealt with it."""
        assert self.error is not None
        error, self.error = self.error, None
        return error

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(value, Exception):
            self.error = value
            return True
        return False


def root_cause(error: BaseException) -> BaseException:
    """Return the first single exception inside nested groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
