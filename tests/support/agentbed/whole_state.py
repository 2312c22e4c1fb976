"""A whole state saved and loaded through sessions, piece by piece."""

from __future__ import annotations

from xxhash import xxh3_128_digest

from vfiouser_agents.api import Phase, Role, Session


async def save_all(session: Session, limit: int = 1000) -> bytes:
    """Stop a source and save its state."""
    await session.begin(Role.SOURCE, "m")
    await session.stop()
    found, eof = b"", False
    while not eof:
        chunk = await session.save(len(found), limit, Phase.FINAL)
        found, eof = found + chunk.data, chunk.eof
    return found


async def load_all(session: Session, state: bytes) -> None:
    """Stop a destination and load a state."""
    await session.begin(Role.DESTINATION, "m")
    await session.stop()
    await session.load_begin(len(state))
    size = session.caps.max_chunk
    for begin in range(0, len(state), size):
        await session.load(begin, state[begin : begin + size])
    await session.load_commit(len(state), xxh3_128_digest(state))
