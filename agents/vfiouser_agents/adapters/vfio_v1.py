"""Functions whose interface is that of VFIO's first migration protocol: a state of bits, bytes to save, bytes to load.

Both interfaces of 2022, the plug-in and its example's wire protocol, are of this sort. None of their calls tells what
became of it except GET_STATE, so every state that is set is read back, and so is the state after each piece that is
loaded.

The states go the ways that QEMU took, since vendors built against that:

    source          1 → 3 (begin) → 2 (stop) → 0 (everything was read), and back to 1 from each of them
    destination     1 → 4 (stop) → 1 (resume)
    a pause         1 → 0 → 1, and 0 → 2 or 0 → 4 for a function that was stopped before its migration began

After a restart of ours, 2 says that the function is a source, 4 that it is a destination; 0 does not tell a pause from
a source that gave everything.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import trio

from vfiouser_agents.api import AgentState, Capabilities, Chunk, Descriptor, Outcome, Phase, Role
from vfiouser_agents.errors import DeviceFailed, InvalidState, ProtocolError
from vfiouser_agents.rpc.legacy_messages import MAX_CHUNK, V1State

from .primitive import Primitive

_PRECOPY = V1State.SAVING | V1State.RUNNING
_STATES: Mapping[int, AgentState] = {
    V1State.STOPPED: AgentState.STOPPED,
    V1State.RUNNING: AgentState.RUNNING,
    V1State.SAVING: AgentState.STOPPED,
    _PRECOPY: AgentState.RUNNING,
    V1State.RESUMING: AgentState.LOADING,
    V1State.ERROR: AgentState.ERROR,
}


def v1_caps(max_state: int, chunk_size: int, format_id: str) -> Capabilities:
    """What such an interface can do: no quiesce, no pre-copy, no dirty log, no reset.

    Args:
        max_state: bytes that a state may have.
        chunk_size: bytes of one piece.
        format_id: name of the state's format.
    """
    return Capabilities(
        reset=False,
        random_access_save=True,
        formats=(format_id,),
        max_state=max_state,
        max_chunk=min(chunk_size, MAX_CHUNK),
        takeover=False,
        verifies=False,
    )


class V1Function(Primitive):
    """A function with states of bits; derived classes say how its six operations are called.

    Args:
        caps: what it can do.
        descriptor: what it is, as configured.
    """

    def __init__(self, caps: Capabilities, descriptor: Descriptor) -> None:
        self._caps = caps
        # A table without a format means this interface's own: what is saved must be what can be loaded.
        format_id = descriptor.format_id or caps.formats[0]
        self._descriptor = replace(descriptor, format_id=format_id, state_max=caps.max_state)
        self._left = 0
        #: The state as it was read last.
        self._bits: int | None = None
        #: It went to SAVING or RESUMING by us, and nothing was read or loaded since.
        self._untouched = False
        #: What it is to apply came as a whole.
        self._whole = False

    @property
    def caps(self) -> Capabilities:
        """What it can do."""
        return self._caps

    @abstractmethod
    async def get_state(self) -> int:
        """Ask for the state's bits."""

    @abstractmethod
    async def set_state(self, state: int) -> None:
        """Set the state's bits; whether that worked is not told."""

    @abstractmethod
    async def pending(self) -> int:
        """Bytes that are left to save."""

    @abstractmethod
    async def save_bytes(self, size: int) -> bytes:
        """Exactly so many bytes of state."""

    @abstractmethod
    async def load_bytes(self, data: bytes) -> None:
        """Give bytes of state."""

    async def _ask_state(self) -> int:
        self._bits = await self.get_state()
        return self._bits

    async def _move(self, target: V1State) -> None:
        await self.set_state(target)
        found = await self._ask_state()
        if found == V1State.ERROR:
            raise DeviceFailed(f"the device went to state ERROR (6) when it was to go to {int(target)}")
        if found != target:
            raise InvalidState(f"the device is in state {found} after it was told to go to {int(target)}")

    async def describe(self) -> Descriptor:
        """What is configured."""
        return self._descriptor

    async def state(self) -> AgentState:
        """Ask."""
        found = await self._ask_state()
        if found not in _STATES:
            known = ", ".join(str(int(state)) for state in _STATES)
            raise ProtocolError(f"the device says that its state is {found}; allowed are {known}")
        if found == V1State.RESUMING and self._untouched:
            return AgentState.STOPPED
        return _STATES[found]

    @property
    def role_told(self) -> Role | None:
        """A function that saves is a source, also if nobody here has begun that."""
        return Role.SOURCE if self._bits in (V1State.SAVING, _PRECOPY) else None

    async def begin(self, role: Role, migration_id: str) -> None:
        """Pre-copy, for a source that runs; there is no state in it yet, but the device knows what is coming."""
        if role is Role.SOURCE and await self._ask_state() == V1State.RUNNING:
            await self._move(_PRECOPY)

    async def end(self, outcome: Outcome) -> None:
        """Leave the states that are of a migration, but not one that was loaded: that is left by running."""
        if self._bits in (V1State.STOPPED, V1State.RUNNING):
            return
        found = await self._ask_state()
        if found == _PRECOPY:
            await self._move(V1State.RUNNING)
        elif found == V1State.SAVING or (found == V1State.RESUMING and not self._whole):
            await self._move(V1State.STOPPED)

    async def stop(self, role: Role | None) -> None:
        """Go to where the migration goes on, or to 0 without one."""
        if role is None:
            if self._bits == _PRECOPY:  # left behind by somebody else
                await self._move(V1State.RUNNING)
            await self._move(V1State.STOPPED)
            return
        await self._move(V1State.SAVING if role is Role.SOURCE else V1State.RESUMING)
        self._untouched = True

    async def resume(self) -> None:
        """State 1; a device that was loaded applies the state now."""
        if self._bits == V1State.RESUMING and self._untouched:
            await self._move(V1State.STOPPED)  # there is nothing to be applied
        self._untouched = False
        await self._move(V1State.RUNNING)

    async def was_reset(self) -> None:
        """What was loaded before the reset must not be applied after it."""
        self._untouched = False
        if await self._ask_state() == V1State.RESUMING:
            await self._move(V1State.STOPPED)

    async def save(self, offset: int, limit: int, phase: Phase) -> Chunk:
        """Be in stop-and-copy at the beginning, and never ask for more than the device says it has."""
        if offset == 0:
            found = await self._ask_state()
            if found == V1State.SAVING and not self._untouched:
                # Nobody knows how much of it was read; entering anew makes the device begin anew.
                await self._move(V1State.STOPPED)
            if self._bits != V1State.SAVING:
                await self._move(V1State.SAVING)
            self._untouched = False
            self._left = await self.pending()
            if self._left == 0:
                raise ProtocolError("the device is in stop-and-copy and says that it has 0 bytes of state")
        data = await self.save_bytes(min(limit, self._left, self._caps.max_chunk))
        self._left = await self.pending()
        return Chunk(data, eof=self._left == 0)

    async def saved(self) -> None:
        """Leave stop-and-copy: whoever has the whole state asks for no more of it."""
        await self._move(V1State.STOPPED)

    async def estimate(self) -> int | None:
        """Nothing is known before stop-and-copy."""
        return None

    @property
    def streams(self) -> bool:
        """It takes a state as it comes, and applies it when it is to run."""
        return True

    async def load_open(self) -> None:
        """Enter RESUMING, anew if something was loaded already."""
        found = await self._ask_state()
        if found == V1State.RESUMING and not self._untouched:
            await self._move(V1State.STOPPED)
        if self._bits != V1State.RESUMING:
            await self._move(V1State.RESUMING)
        self._untouched, self._whole = True, False

    async def load_close(self, total: int, digest: bytes) -> None:
        """Nothing to tell: the state is applied when the function is to run."""
        self._whole = True
        await trio.lowlevel.checkpoint()

    async def load_piece(self, offset: int, data: bytes) -> None:
        """Give a piece; the state afterwards says that the peer lives, and that it has come to the end of it."""
        self._untouched = False
        await self.load_bytes(data)
        found = await self._ask_state()
        if found != V1State.RESUMING:
            raise DeviceFailed(f"the device went to state {found} after {offset + len(data)} bytes of the state")
