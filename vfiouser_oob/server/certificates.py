"""The certificates that agents are reached with: when they expire, and a warning before that stops a migration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import trio

from vfiouser_agents.rpc.certificates import UnreadableCertificate, expiry_words, first_expiry
from vfiouser_oob.config.schema import FunctionConfig
from vfiouser_oob.observability.log import Logger

#: Seconds between two looks.
LOOK_S = 12 * 3600.0
_FILES = ("cert", "ca")


class CertificateBook:
    """When the certificates of a daemon's agents expire.

    Args:
        functions: tells of which functions the agents are meant; asked at each look, since they come and go.
        log: for those that expire soon.
    """

    def __init__(self, functions: Callable[[], Iterable[FunctionConfig]], log: Logger) -> None:
        self._functions = functions
        self._log = log
        #: By file, in seconds since 1970.
        self.expiries: dict[str, float] = {}

    async def run(self) -> None:
        """Look now, and twice a day."""
        while True:
            files = {path for function in self._functions() for path in certificates_of(function)}
            for gone in self.expiries.keys() - files:
                del self.expiries[gone]
            for path in sorted(files):
                await self._look_at(path)
            await trio.sleep(LOOK_S)

    async def _look_at(self, path: str) -> None:
        try:
            expiry = await trio.to_thread.run_sync(first_expiry, Path(path), abandon_on_cancel=True)
        except (OSError, UnreadableCertificate) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._log.warning("cannot read a certificate", file=path, reason=reason)
            self.expiries.pop(path, None)
            return
        self.expiries[path] = expiry
        words = expiry_words(expiry, time.time())
        if words is not None:
            tell = self._log.warning if expiry > time.time() else self._log.error
            tell("a certificate for agents needs renewal", file=path, reason=words)


def certificates_of(function: FunctionConfig) -> Iterator[str]:
    """The files with certificates that a function's agent is reached with.

    Args:
        function: its configuration.
    """
    tls = None if function.agent is None else function.agent.options.get("tls")
    if isinstance(tls, Mapping):
        yield from (tls[name] for name in _FILES if isinstance(tls.get(name), str))
