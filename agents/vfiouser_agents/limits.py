"""What an agent's numbers may be at most, or at least, before anything is made as large as they say.

An agent is trusted with its functions' state, not with the process that serves other agents' functions as well.
"""

from __future__ import annotations

from vfiouser_agents.errors import ProtocolError
from vfiouser_agents.values import Capabilities

#: Entries of any list: functions, ranges, formats.
MAX_ITEMS = 64 << 10
#: Bytes of a page of the dirty log: from the smallest page of any host to its largest usual one.
MIN_PAGE = 4096
MAX_PAGE = 1 << 30
#: Page sizes that the dirty log may offer: every power of two, and more.
_MAX_PAGE_SIZES = 64
_MAX_FORMATS = 1024


def check_page_size(size: int) -> None:
    """Check a page size of the dirty log: a bitmap is spread by it.

    Args:
        size: bytes.

    Raises:
        ProtocolError: no host has such pages.
    """
    if not MIN_PAGE <= size <= MAX_PAGE or size & (size - 1):
        raise ProtocolError(
            f"the agent chose a page size of {size}; it must be a power of two from {MIN_PAGE} to {MAX_PAGE}"
        )


def check_capabilities(caps: Capabilities) -> None:
    """Check what an agent says that it can do with a function.

    Args:
        caps: its claim.

    Raises:
        ProtocolError: a number in it makes no sense.
    """
    if caps.max_chunk < 1:
        raise ProtocolError(f"the agent takes pieces of state of {caps.max_chunk} bytes; it must be 1 at least")
    if len(caps.page_sizes) > _MAX_PAGE_SIZES or len(caps.formats) > _MAX_FORMATS:
        raise ProtocolError(
            f"the agent names {len(caps.page_sizes)} page sizes and {len(caps.formats)} formats; "
            f"at most {_MAX_PAGE_SIZES} and {_MAX_FORMATS} are allowed"
        )
    if caps.dirty:
        for size in caps.page_sizes:
            check_page_size(size)
