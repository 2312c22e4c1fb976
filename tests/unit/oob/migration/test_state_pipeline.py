"""Parts of the pipelines: memory that is shared."""

from __future__ import annotations

from contextlib import ExitStack

from vfiouser_oob.migration.sharing import LEAST, TOTAL, BufferShare


def test_many_get_less_and_never_less_than_the_least() -> None:
    """Two chunks of everybody fit into the total, unless that leaves less than the least for each."""
    sharing = BufferShare()
    assert (False, 4 << 20) == (sharing.busy, sharing.part(4 << 20))
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(sharing.joined())
        assert (True, TOTAL // 10) == (sharing.busy, sharing.part(4 << 20))
        assert 64 << 10 == sharing.part(64 << 10)
        for _ in range(59):
            stack.enter_context(sharing.joined())
        assert TOTAL // 128 < LEAST == sharing.part(4 << 20)
    assert not sharing.busy
