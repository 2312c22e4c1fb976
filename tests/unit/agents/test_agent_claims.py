"""What an agent says that it can do is checked before anything is made as large."""

from __future__ import annotations

import pytest

from vfiouser_agents.errors import ProtocolError
from vfiouser_agents.limits import check_capabilities
from vfiouser_agents.values import Capabilities


@pytest.mark.parametrize(
    "caps",
    [
        Capabilities(max_chunk=0),
        Capabilities(max_chunk=-65_000),
        Capabilities(dirty=True, page_sizes=(1 << 62,)),
        Capabilities(dirty=True, page_sizes=(0,)),
        Capabilities(dirty=True, page_sizes=(12_288,)),
        Capabilities(page_sizes=(4096,) * 100),
        Capabilities(formats=("a",) * 2000),
    ],
)
def test_capabilities_that_cannot_be_are_refused(caps: Capabilities) -> None:
    """A step of nothing, a page of no host: the session is not used, and the reason says why."""
    with pytest.raises(ProtocolError):
        check_capabilities(caps)
