"""The last trouble: told as long as it matters."""

from __future__ import annotations

from vfiouser_oob.observability.trouble import PASSING_S, TroubleBook


def test_a_condition_lasts_until_it_is_over() -> None:
    """What keeps clients out is told until one is served again, with the time when it was seen last."""
    now = [1000.0]
    book = TroubleBook(clock=lambda: now[0])
    book.note("the agent is away")
    now[0] += 100 * PASSING_S
    last = book.last
    assert last is not None
    assert ("the agent is away", 1000.0) == last[:2]
    book.over()
    assert book.last is None


def test_an_event_is_old_news_after_a_while() -> None:
    """A refused command is told for some minutes, counted from the last of its kind."""
    now = [0.0]
    book = TroubleBook(clock=lambda: now[0])
    book.note("DMA_MAP: no", passing=True)
    now[0] += PASSING_S - 1
    assert book.last is not None
    book.note("DMA_MAP: no", passing=True)
    now[0] += PASSING_S - 1
    assert book.last is not None
    now[0] += 2
    assert book.last is None
