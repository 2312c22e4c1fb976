"""Questions and their answers: the half of a carrier that faces the VM.

Rule 1: *one question is open at a time*, because QEMU's main loop stands still until it is answered.
Rule 2: *whoever asks may go*; an answer that comes later is dropped.
Rule 3: *an answer is to the question that was read last*. Until a question has been read it cannot be answered, so an
        answer to a lost question is never taken for one to the question that came after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import trio

from vfiouser_oob.vm.carriers.interface import CarrierEvent, Lost, Question, SaveAsked, State

#: Events that nobody has read yet. QEMU asks one thing at a time, so only a peer that connects over and over makes
#: more; it waits then.
_EVENTS_MAX = 256


@dataclass(frozen=True, slots=True)
class Offered:
    """The state, in answer to `SaveAsked`."""

    state: State


@dataclass(frozen=True, slots=True)
class Done:
    """What was asked for is done."""


@dataclass(frozen=True, slots=True)
class Refused:
    """No.

    Args:
        reason: why, for people.
    """

    reason: str


Answer: TypeAlias = Offered | Done | Refused


class Desk:
    """Where a carrier asks and the VM answers."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[CarrierEvent](_EVENTS_MAX)
        self._question: Question | None = None
        self._answer: Answer | None = None
        self._answered = trio.Event()
        self._read: Question | Lost | None = None
        #: Set while no state is on its way out.
        self._given = trio.Event()
        self._given.set()

    async def tell(self, event: CarrierEvent) -> None:
        """Tell something that needs no answer; waits while too much is unread."""
        await self._send.send(event)

    async def next_event(self) -> CarrierEvent:
        """Wait for what comes next."""
        event = await self._receive.receive()
        if isinstance(event, Question | Lost):
            self._read = event
        return event

    async def ask(self, question: Question, seconds: float = math.inf) -> Answer:
        """Ask, and wait for the answer; a caller that is cancelled takes its question with it.

        Args:
            question: what to ask.
            seconds: how long QEMU would wait.

        Returns:
            The answer; a refusal that says so when there was none in time.
        """
        self._question, self._answer, self._answered = question, None, trio.Event()
        try:
            with trio.move_on_after(seconds):
                await self._send.send(question)
                await self._answered.wait()
        finally:
            self._question = None
        return self._answer or Refused(f"the daemon did not answer within {seconds:g} s")

    def give(self, answer: Answer, fits: Callable[[Question], bool] = lambda _: True) -> bool:
        """Answer the open question.

        Args:
            answer: the answer.
            fits: whether it is one to that question.

        Returns:
            Whether somebody waited for it.
        """
        question = self._question
        if question is None or question is not self._read or self._answer is not None or not fits(question):
            return False
        self._answer = answer
        self._answered.set()
        return True

    def offer(self, state: State) -> bool:
        """Answer `SaveAsked`; returns whether that was the question."""
        return self.give(Offered(state), lambda question: isinstance(question, SaveAsked))

    def gives(self) -> None:
        """A state that was offered begins to leave."""
        if self._given.is_set():
            self._given = trio.Event()

    def gave(self) -> None:
        """It has left, or never will."""
        self._given.set()

    async def given(self) -> None:
        """Wait until no state is on its way."""
        await self._given.wait()

    def done(self) -> bool:
        """Answer any question but `SaveAsked`; returns whether one was open."""
        return self.give(Done(), lambda question: not isinstance(question, SaveAsked))

    def refuse(self, reason: str) -> bool:
        """Answer any question with no; returns whether one was open."""
        return self.give(Refused(reason))

    def withdraw(self, reason: str) -> None:
        """Answer an open question with no, whether it was read or not."""
        if self._question is not None and self._answer is None:
            self._answer = Refused(reason)
            self._answered.set()
