"""The last migrations of each function, kept on disk beyond the daemon's end.

Rule 1: disk I/O is done by threads, one at a time, and nobody waits for it.
Rule 2: nothing in here ever fails: what cannot be read is forgotten, what cannot be written is in memory only.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import trio

from vfiouser_oob.observability.log import Logger
from vfiouser_oob.observability.status import MigrationEntry
from vfiouser_oob.persist.record import MAX_SIZE, UnusableRecord, read_record, write_record

KIND = "migrations"
VERSION = 1
#: Migrations of one function that are kept.
KEPT = 32
#: Seconds that a start of the daemon waits for what is stored; a disk that hangs is as good as none.
_READ_S = 1.0
#: Seconds that the end of the daemon waits for what is to be written.
_WRITE_S = 2.0
#: Bytes of a document beside what it lists, its indentation included.
_HEAD_ROOM = 4096
_NUMBER = (int, float)
#: What a stored entry has, and of which type.
_FIELDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "function": (str,),
        "direction": (str,),
        "way": (str, type(None)),
        "began": (str,),
        "ended": (str,),
        "bytes": (int,),
        "duration_s": _NUMBER,
        "bytes_per_s": _NUMBER,
        "downtime_s": (*_NUMBER, type(None)),
        "outcome": (str,),
        "why": (str, type(None)),
    }
)


class HistoryStore:
    """The migrations of all functions of a daemon.

    Args:
        directory: where they are kept; None keeps them in memory only.
        log: for what cannot be read or written.
    """

    def __init__(self, directory: Path | None, log: Logger) -> None:
        self._directory = None if directory is None else directory / "migrations"
        self._log = log
        #: Of the threads that do the work.
        self.limiter = trio.CapacityLimiter(1)

    def drawer(self, function: str) -> FunctionHistory:
        """The place of one function.

        Args:
            function: its name.
        """
        path = None if self._directory is None else self._directory / f"{function}.json"
        return FunctionHistory(path, self.limiter, self._log.bind(function=function))


class FunctionHistory:
    """The migrations of one function; `HistoryStore.drawer` makes it.

    Args:
        path: its file; None keeps nothing beyond the daemon's end.
        limiter: of the threads that do the work.
        log: for what cannot be read or written.
    """

    def __init__(self, path: Path | None, limiter: trio.CapacityLimiter, log: Logger) -> None:
        self._path = path
        self._limiter = limiter
        self._log = log
        #: Set while something is not written.
        self._added = trio.Event()
        #: The last ones, the oldest first.
        self.entries: deque[MigrationEntry] = deque(maxlen=KEPT)
        #: How many ended since the daemon began, by direction and outcome; and the bytes that they moved, by direction.
        self.ended: Counter[tuple[str, str]] = Counter()
        self.moved: Counter[str] = Counter()

    async def run(self) -> None:
        """Keep them: read what is stored, then write what comes; the end waits for what is not written yet."""
        try:
            await self.recall()
            while True:
                await self._added.wait()
                await self.write()
        finally:
            await self.finish()

    async def recall(self) -> None:
        """Read what an earlier daemon has kept; what was added meanwhile stays behind it."""
        if self._path is None:
            return
        with trio.move_on_after(_READ_S) as scope:
            found = await self._in_thread("read", partial(_read, self._path))
            self.entries.extendleft(reversed(found[-(KEPT - len(self.entries)) :] if len(self.entries) < KEPT else []))
        if scope.cancelled_caught:
            self._failed("read", f"{self._path}: the disk did not answer within {_READ_S:g} s")

    def add(self, entry: MigrationEntry) -> None:
        """Note a migration that is over.

        Args:
            entry: what it was like.
        """
        self.entries.append(entry)
        self.ended[entry["direction"], entry["outcome"]] += 1
        self.moved[entry["direction"]] += entry["bytes"]
        self._added.set()

    async def write(self) -> None:
        """Write what is noted, and what comes meanwhile."""
        while self._added.is_set():
            self._added = trio.Event()
            if self._path is None:
                return
            try:
                await self._in_thread("written", partial(_write, self._path, list(self.entries)))
            except trio.Cancelled:
                self._added.set()  # its thread may not have begun
                raise

    async def finish(self) -> None:
        """Write what no thread has written yet, because the daemon ends; two seconds at most, even if cancelled."""
        with trio.CancelScope(shield=True), trio.move_on_after(_WRITE_S) as scope:
            await self.write()
        if scope.cancelled_caught:
            self._failed("written", f"{self._path}: the disk did not answer within {_WRITE_S:g} s")

    async def _in_thread(self, what: str, work: Any) -> list[MigrationEntry]:
        """Read or write in a thread; when we are cancelled it goes on alone, and leaves the file whole."""
        try:
            found = await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limiter)
        except OSError as error:
            self._failed(what, f"{self._path}: {error.strerror or error}")
        except UnusableRecord as error:
            self._failed(what, f"{self._path}: {error}")
        else:
            return cast("list[MigrationEntry]", found or [])
        return []

    def _failed(self, what: str, reason: str) -> None:
        self._log.warning(f"the history of migrations could not be {what}; going on without it", reason=reason)


def _read(path: Path) -> list[MigrationEntry]:
    document = read_record(path, KIND, VERSION)
    if document is None:
        return []
    entries = document.get("migrations")
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise UnusableRecord("it is damaged: it lists things that are not migrations")
    return cast("list[MigrationEntry]", entries[-KEPT:])


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == _FIELDS.keys()
        and all(isinstance(entry[name], types) for name, types in _FIELDS.items())
    )


def _write(path: Path, entries: list[MigrationEntry]) -> None:
    # Reasons are an agent's, and may take six bytes for a character; the oldest go where they take too much.
    while len(json.dumps(entries, indent=1)) > MAX_SIZE - _HEAD_ROOM:
        del entries[0]
    write_record(path, KIND, VERSION, {"migrations": entries})
