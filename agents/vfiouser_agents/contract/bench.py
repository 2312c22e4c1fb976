"""What the checks of the contract stand on: a session in a known state, expectations, and the table of checks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from xxhash import xxh3_128_digest

from vfiouser_agents.answers import check_chunk
from vfiouser_agents.api import (
    Agent,
    AgentState,
    Capabilities,
    Descriptor,
    Outcome,
    Phase,
    Role,
    Session,
    Status,
)
from vfiouser_agents.errors import AgentError, ProtocolError

T = TypeVar("T")
#: Name that our migrations have.
MIGRATION = "agent-check"
#: Passes of pre-copy before a function that never drains is stopped anyway.
PASSES = 3


class CheckFailed(Exception):
    """The agent does not do what the contract says; the message says what came and what was wanted."""


@dataclass
class Bench:
    """What a check works with.

    Args:
        factory: makes further agents, that is connections, to the same functions.
        agent: an agent that is entered.
        session: a session for the function; the function runs, in no migration.
        caps: its capabilities.
    """

    factory: Callable[[], Agent]
    agent: Agent
    session: Session
    caps: Capabilities

    async def another(self) -> Session:
        """A second session for the same function."""
        return await self.agent.open(self.session.function_id)

    @asynccontextmanager
    async def new_connection(self) -> AsyncIterator[Session]:
        """A session for the same function, through an agent of its own."""
        async with self.factory() as agent:
            await agent.connect()
            yield await agent.open(self.session.function_id)

    async def expect_state(self, *allowed: AgentState) -> Status:
        """Ask for the status, and fail if the state is another one."""
        status = await self.session.status()
        if status.state not in allowed:
            names = " or ".join(state.value for state in allowed)
            raise CheckFailed(f"status says {status.state.value}, expected {names}")
        return status

    async def begin(self, role: Role) -> None:
        """Begin our migration, and stop for a destination."""
        await self.session.begin(role, MIGRATION)
        if role is Role.DESTINATION:
            await self.session.stop()

    async def pull(self, limit: int, phase: Phase, offset: int = 0, passes: int = PASSES) -> bytes:
        """Save until the end, or until it was drained some times.

        Args:
            limit: bytes per call.
            phase: which phase.
            offset: where to begin.
            passes: how often a pre-copy may be drained.
        """
        stream = bytearray()
        while True:
            chunk = await self.session.save(offset + len(stream), limit, phase)
            with broken_rules():
                check_chunk(chunk, limit, phase)
            stream += chunk.data
            expect(len(stream) <= self.caps.max_state, f"the state has more than {self.caps.max_state} bytes")
            passes -= chunk.drained
            if chunk.eof or (phase is Phase.PRECOPY and passes <= 0):
                return bytes(stream)

    async def whole_state(self) -> bytes:
        """The state of the stopped function; it is left stopped and in no migration."""
        await self.begin(Role.SOURCE)
        await self.session.stop()
        stream = await self.pull(self.caps.max_chunk, Phase.FINAL)
        await self.session.end(Outcome.SUCCESS)
        return stream

    async def push(self, stream: bytes, size: int) -> None:
        """Begin a load and send everything, without the commit."""
        await self.session.load_begin(len(stream))
        for offset in range(0, len(stream), size):
            await self.session.load(offset, stream[offset : offset + size])

    async def commit(self, stream: bytes) -> None:
        """Commit what was pushed."""
        await self.session.load_commit(len(stream), xxh3_128_digest(stream))

    async def descriptor(self) -> Descriptor:
        """What the function is."""
        return await self.session.describe()


Body = Callable[[Bench], Awaitable[None]]


@dataclass(frozen=True)
class Check:
    """One row of the contract.

    Args:
        name: for people and for `-k`.
        says: the rule, as a sentence.
        needs: capabilities without which it does not apply.
        body: proves it.
    """

    name: str
    says: str
    needs: tuple[str, ...]
    body: Body


class CheckTable(list[Check]):
    """Checks in the order in which they run; a table is filled by its own decorator."""

    def add(self, name: str, says: str, *needs: str) -> Callable[[Body], Body]:
        """Put a check into the table.

        Args:
            name: for people and for `-k`.
            says: the rule, as a sentence.
            needs: capabilities without which it does not apply; with ``!`` before it, one that must be missing.
        """

        def put(body: Body) -> Body:
            self.append(Check(name, says, needs, body))
            return body

        return put


@contextmanager
def broken_rules() -> Iterator[None]:
    """Fail the check where an answer breaks a rule of the interface."""
    try:
        yield
    except ProtocolError as error:
        raise CheckFailed(error.message) from error


def expect(true: bool, otherwise: str) -> None:
    """Fail the check with a message."""
    if not true:
        raise CheckFailed(otherwise)


async def expect_error(what: str, call: Awaitable[object], *kinds: type[AgentError]) -> AgentError:
    """Fail unless a call is refused in the right way.

    Args:
        what: the call, for people.
        call: the call.
        kinds: errors that are right.
    """
    names = " or ".join(kind.__name__ for kind in kinds)
    try:
        await call
    except kinds as error:
        return error
    except AgentError as error:
        raise CheckFailed(f"{what} raised {type(error).__name__} ({error}), expected {names}") from error
    raise CheckFailed(f"{what} was accepted, expected {names}")
