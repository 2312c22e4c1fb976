"""What becomes of an error that a model raises: its author sees where, its client gets EIO, the daemon goes on."""

from __future__ import annotations

import errno
import traceback
from types import TracebackType

from vfiouser_oob.observability.log import Logger
from vfiouser_protocol.errors import CommandError, DmaFault, RemoteProtocolError, ReplyError

#: What a model may raise to refuse an access; everything else is a mistake in it.
REFUSALS = (RemoteProtocolError, ReplyError, DmaFault)


class ModelFaults:
    """Reports the mistakes of one model: each place in its code once, with the traceback.

    A guest can run into the same mistake a million times; the first traceback says all that the others would.

    Args:
        log: where they are reported.
    """

    def __init__(self, log: Logger) -> None:
        self._log = log
        self._seen: set[tuple[str, str, str, int]] = set()

    def refused(self, method: str, error: Exception) -> CommandError:
        """Report a mistake, and make the error that the client gets in its place.

        Args:
            method: the model's method that raised.
            error: what it raised.
        """
        self.report(method, error)
        return CommandError(f"the model failed in {method}: {type(error).__name__}: {error}", errno.EIO)

    def report(self, method: str, error: Exception) -> None:
        """Report a mistake, unless it is known.

        Args:
            method: the model's method that raised.
            error: what it raised.
        """
        steps = traceback.extract_tb(error.__traceback__)
        last = steps[-1] if steps else traceback.FrameSummary("", 0, "")
        place = (method, type(error).__name__, last.filename, last.lineno or 0)
        if place not in self._seen:
            self._seen.add(place)
            self._log.traceback("a model failed", error, method=method)

    def inside(self, method: str) -> ModelCall:
        """A block that calls the model and reports what it raises; a mistake leaves it as a CommandError."""
        return ModelCall(self, method)


class ModelCall:
    """The block of `ModelFaults.inside`."""

    __slots__ = ("_faults", "_method")

    def __init__(self, faults: ModelFaults, method: str) -> None:
        self._faults = faults
        self._method = method

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(value, Exception) and not isinstance(value, REFUSALS):
            raise self._faults.refused(self._method, value) from value
