"""Agents that are somebody's."""

from __future__ import annotations

import struct
import time

from hostilekit.agent import AgentLink, RogueAgent
from hostilekit.case import Scene, Stage, attack
from hostilekit.wire import Peer
from rawmessages import FEATURE, MIG_DATA_READ

STOP, RUNNING, STOP_COPY, PRE_COPY = 0, 1, 3, 7


def _attach(stage: Stage, agent: RogueAgent) -> Peer:
    """A client of the first function, once the daemon knows what the agent can do."""
    deadline = time.monotonic() + 10
    while "session.open" not in agent.asked and time.monotonic() < deadline:
        time.sleep(0.01)
    return Peer(stage.first).negotiate()


def _set_state(peer: Peer, state: int) -> int:
    """Ask for a migration state; returns the error number."""
    return peer.command(FEATURE, struct.pack("<IIII", 16, 0x2_0002, state, 0)).error


def _migrate(peer: Peer) -> None:
    """Begin a migration, read some of it, and give it up."""
    if _set_state(peer, PRE_COPY) == 0 or _set_state(peer, STOP_COPY) == 0:
        for _ in range(3):
            peer.command(MIG_DATA_READ, struct.pack("<II", 8 + 65536, 65536))
    _set_state(peer, RUNNING)


@attack(Scene.AGENT, seconds=3.0, budget_s=1.0, waits=True)
def agent_that_never_answers(stage: Stage) -> None:
    """An agent that takes every call and answers none of those that matter."""
    going = stage.clock()

    def never(link: AgentLink, params: object, result: object) -> object:
        time.sleep(30)
        return result

    agent = RogueAgent(stage.agent, {"migration.stop": never, "migration.save": never})
    try:
        with _attach(stage, agent) as peer:
            while going():
                _migrate(peer)
    except (OSError, EOFError, AssertionError):
        pass


@attack(Scene.AGENT, seconds=3.0, waits=True)
def agent_garbage(stage: Stage) -> None:
    """Garbage, deep structures and messages without end in the place of answers, on each connection anew."""
    going = stage.clock()
    junk = [b"\xc1" * 1000, b"\x91" * 100_000, b"\xdc\x08\x00" * 100_000, b"\xc6\xff\xff\xff\xff" + bytes(1 << 20)]
    turn = [0]

    def hello(link: AgentLink, params: object, result: object) -> object:
        turn[0] += 1
        if turn[0] % 3:
            link.say(junk[turn[0] % len(junk)])
        return result

    agent = RogueAgent(stage.agent, {"agent.hello": hello, "session.open": hello})
    while going():
        try:
            with _attach(stage, agent) as peer:
                _migrate(peer)
        except (OSError, EOFError, AssertionError):
            pass
