"""DIRTY_PAGES, the v1 generation's way to the dirty log.

Spec: vfio-user 0.9.1, VFIO_USER_DIRTY_PAGES. The bitmap is where every implementation has it, not where the text says.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from vfiouser_protocol.codec import decode
from vfiouser_protocol.constants import DirtyPagesFlags
from vfiouser_protocol.dirty import bitmap_size, check_report_pages
from vfiouser_protocol.dma_logging import DmaLogging
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.limits import MAX_BITMAP_ARGSZ
from vfiouser_protocol.messages import DirtyPages
from vfiouser_protocol.rules import check_request, dirty_pages_reply

_DIRTY_FIXED = 40


class StartDirty(NamedTuple):
    """Logging is to begin or to go on, with the migration page size; the reply is empty."""


class StopDirty(NamedTuple):
    """Logging is to end; the reply is empty."""


class GetDirty(NamedTuple):
    """A bitmap is asked for.

    Args:
        request: what came.
    """

    request: DirtyPages

    @property
    def iova(self) -> int:
        """First address of the range."""
        return self.request.iova or 0

    @property
    def length(self) -> int:
        """Bytes of the range."""
        return self.request.size or 0

    @property
    def page_size(self) -> int:
        """Bytes per bit."""
        return self.request.pgsize or 0

    @property
    def short(self) -> bytes | None:
        """The reply that only says how much is needed, if the client takes no more; nothing is read or cleared then."""
        size = bitmap_size(self.length, self.page_size)
        return dirty_pages_reply(self.request, bytes(size)) if self.request.argsz < _DIRTY_FIXED + size else None

    def reply(self, bitmap: bytes) -> bytes:
        """Return the whole reply; those to START and STOP are empty.

        Args:
            bitmap: the dirty pages of the range.
        """
        return dirty_pages_reply(self.request, bitmap)


DirtyCall: TypeAlias = StartDirty | StopDirty | GetDirty

_DIRTY_ACTIONS: Mapping[int, type[StartDirty | StopDirty]] = MappingProxyType(
    {int(DirtyPagesFlags.START): StartDirty, int(DirtyPagesFlags.STOP): StopDirty}
)


def interpret_dirty_pages(payload: bytes, logging: DmaLogging, *, migratable: bool = True) -> DirtyCall:
    """Check a DIRTY_PAGES request and say what it asks for.

    Args:
        payload: the bytes behind the request's header.
        logging: the function's log.
        migratable: whether the function can be migrated.

    Returns:
        The call.

    Raises:
        CommandError: ENOTSUP if the function cannot be migrated; EINVAL for sizes or flags that are impossible, for a
            bitmap while nothing is logged, of other pages than the logged ones, or of another size than it has.

    Spec: vfio-user 0.9.1, VFIO_USER_DIRTY_PAGES; the bitmap's place as in every implementation, not as in the text.
    """
    request = decode(DirtyPages, payload)
    check_request(request, MAX_BITMAP_ARGSZ)
    if not migratable:
        raise CommandError("DIRTY_PAGES on a function that cannot be migrated; refused", errno.ENOTSUP)
    action = _DIRTY_ACTIONS.get(request.flags)
    if action is not None:
        return action()
    if request.flags != DirtyPagesFlags.GET_BITMAP:
        raise CommandError(f"DIRTY_PAGES flags {request.flags:#x}; START 1, STOP 2 or GET_BITMAP 4 is needed; refused")
    call = GetDirty(request)
    check_report_pages(call.iova, call.length, call.page_size)
    if not logging.active:
        raise CommandError("DIRTY_PAGES GET_BITMAP while nothing is logged; START first; refused")
    if call.page_size != logging.page_size:
        raise CommandError(f"a bitmap of pages of {call.page_size} bytes; {logging.page_size} are logged; refused")
    if request.bitmap_size != (size := bitmap_size(call.length, call.page_size)):
        raise CommandError(f"a bitmap of {request.bitmap_size} bytes for a range that needs {size}; refused")
    return call


def require_dirty_range(call: GetDirty, *, mapped: bool, by_file: bool) -> None:
    """Refuse a bitmap of memory that nobody can have logged.

    Args:
        call: what was asked for.
        mapped: whether any of the range is mapped.
        by_file: whether any of it came with a file descriptor; what has none is written through the client.

    Raises:
        CommandError: ENOENT if nothing is mapped there, EINVAL if all of it is written through the client.
    """
    what = f"DIRTY_PAGES of {call.iova:#x}+{call.length:#x}"
    if not mapped:
        raise CommandError(f"{what}: nothing is mapped there", errno.ENOENT)
    if not by_file:
        raise CommandError(f"{what}: it has no file descriptor, so the client itself writes it; refused")
