"""How often a daemon began with a state directory: what tells a restart, or a crash, from a quiet week."""

from __future__ import annotations

from pathlib import Path

import trio

from vfiouser_oob.observability.log import Logger
from vfiouser_oob.persist.record import UnusableRecord, read_record, write_record

KIND = "starts"
VERSION = 1
_MOST = 1 << 40


class StartCount:
    """Counts the starts of a daemon.

    Args:
        directory: where the number is kept; None keeps none.
        log: for what cannot be read or written.
    """

    def __init__(self, directory: Path | None, log: Logger) -> None:
        self._path = None if directory is None else directory / "starts.json"
        self._log = log
        #: This start included; None as long as that is not known.
        self.count: int | None = None

    async def run(self) -> None:
        """Count this start; the disk does that in its own time."""
        if self._path is None:
            return
        try:
            self.count = await trio.to_thread.run_sync(_count, self._path, abandon_on_cancel=True)
        except (OSError, UnusableRecord) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._log.warning("cannot count the starts of the daemon", reason=f"{self._path}: {reason}")


def _count(path: Path) -> int:
    try:
        document = read_record(path, KIND, VERSION) or {}
    except UnusableRecord:  # it is only a number: begin anew
        document = {}
    before = document.get("count", 0)
    count = 1 + (before if type(before) is int and 0 <= before < _MOST else 0)
    write_record(path, KIND, VERSION, {"count": count})
    return count
