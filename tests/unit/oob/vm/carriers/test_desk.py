"""Questions and answers: one at a time, and each answer to its own question."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from vfiouser_oob.vm.carriers.desk import Answer, Desk, Done, Offered, Refused
from vfiouser_oob.vm.carriers.interface import GoAsked, Lost, SaveAsked, StopAsked


async def asking(desk: Desk, question: SaveAsked | StopAsked | GoAsked, answers: list[Answer]) -> None:
    """Ask, and note the answer."""
    answers.append(await desk.ask(question, 10))


async def test_an_answer_reaches_who_asked(nursery: trio.Nursery) -> None:
    """Each kind of answer fits its kind of question; what does not fit is dropped."""
    desk = Desk()
    answers: list[Answer] = []
    nursery.start_soon(asking, desk, SaveAsked(), answers)
    assert await desk.next_event() == SaveAsked()
    assert not desk.done()
    assert desk.offer(b"x")
    assert not desk.refuse("too late")
    await trio.testing.wait_all_tasks_blocked()
    nursery.start_soon(asking, desk, StopAsked(), answers)
    await desk.next_event()
    assert not desk.offer(b"y")
    assert desk.done()
    await trio.testing.wait_all_tasks_blocked()
    nursery.start_soon(asking, desk, GoAsked(), answers)
    await desk.next_event()
    assert desk.refuse("no")
    await trio.testing.wait_all_tasks_blocked()
    assert answers == [Offered(b"x"), Done(), Refused("no")]


async def test_silence_is_a_refusal(autojump_clock: MockClock) -> None:
    """Whoever waits longer than QEMU would gets a refusal, and the late answer is dropped."""
    desk = Desk()
    assert await desk.ask(SaveAsked(), 10) == Refused("the daemon did not answer within 10 s")
    await desk.next_event()
    assert not desk.offer(b"x")


async def test_an_answer_to_a_lost_question_is_not_one_to_the_next(nursery: trio.Nursery) -> None:
    """A question that has not been read cannot be answered: the answer was meant for the one before."""
    desk = Desk()
    answers: list[Answer] = []
    async with trio.open_nursery() as first:
        first.start_soon(asking, desk, SaveAsked(), answers)
        assert await desk.next_event() == SaveAsked()
        first.cancel_scope.cancel()
    await desk.tell(Lost("gone"))
    nursery.start_soon(asking, desk, SaveAsked(), answers)
    await trio.testing.wait_all_tasks_blocked()
    assert not desk.offer(b"old")
    await desk.next_event()
    await desk.next_event()
    assert desk.offer(b"new")
    await trio.testing.wait_all_tasks_blocked()
    assert answers == [Offered(b"new")]


async def test_a_withdrawn_question_is_refused_even_if_nobody_read_it(nursery: trio.Nursery) -> None:
    """Giving a migration up leaves nobody waiting."""
    desk = Desk()
    answers: list[Answer] = []
    desk.withdraw("nothing is open")
    nursery.start_soon(asking, desk, SaveAsked(), answers)
    await trio.testing.wait_all_tasks_blocked()
    desk.withdraw("given up")
    await trio.testing.wait_all_tasks_blocked()
    assert answers == [Refused("given up")]
