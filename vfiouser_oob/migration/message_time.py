"""The time that one message of a client has, and how it is divided."""

from __future__ import annotations

from dataclasses import dataclass

import trio

#: Kept back of a message's time so that our own answer comes before the connection's.
_MARGIN_S = 0.05
_MARGIN_PART = 0.05
#: Parts of a message's time, see `MessageTime`.
_FORWARD = 0.6
_AGENT = 0.75
_AGAIN = 0.9


def message_deadline() -> float:
    """The time by which work for the current message has to be done, as trio's clock has it."""
    deadline = trio.current_effective_deadline()
    left = deadline - trio.current_time()
    return deadline - min(_MARGIN_S, left * _MARGIN_PART) if 0 < left < float("inf") else deadline


@dataclass(frozen=True, slots=True)
class MessageTime:
    """Points of trio's clock in the time of a message.

    Args:
        forward: until when what is done may be under way, so that there is time to undo it.
        agent: until when a reset waits for the agent; what is left is for the device.
        again: until when what did not reach the agent is attempted again: there is nothing to undo then.
        end: when the message has to be answered.
    """

    forward: float
    agent: float
    again: float
    end: float

    @classmethod
    def until(cls, end: float) -> MessageTime:
        """Divide the time from now on."""
        now = trio.current_time()
        left = max(0.0, end - now)
        return cls(now + left * _FORWARD, now + left * _AGENT, now + left * _AGAIN, end)

    @property
    def attempt(self) -> float:
        """When an attempt that begins now has to be over."""
        return self.forward if trio.current_time() < self.forward else self.end
