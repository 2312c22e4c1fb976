"""Acme's agent: a line of words per request, a line per answer that begins with OK or with ERR and a word."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import trio

from vfiouser_agents.adapters.primitive import Primitive, PrimitiveAgent
from vfiouser_agents.api import AgentInfo, AgentState, Capabilities, Chunk, Descriptor, FunctionInfo, Phase, Role
from vfiouser_agents.errors import AgentError, Busy, CorruptState, NotFound, ProtocolError, TransportLost
from vfiouser_agents.options import OptionError, read_options, text
from vfiouser_agents.rpc.endpoint import Address, TlsOptions, check_plaintext, connect, parse_address

FORMAT = "acme-1"
#: Acme's agents read lines of 64 KiB at most.
MAX_CHUNK = 32 << 10
ERRORS: Mapping[str, type[AgentError]] = {"unknown": NotFound, "busy": Busy, "corrupt": CorruptState}
STATES = {"active": AgentState.RUNNING, "frozen": AgentState.STOPPED, "dead": AgentState.ERROR}


class AcmeFunction(Primitive):
    """One function; `PrimitiveAgent` makes a whole session out of these few methods."""

    def __init__(self, agent: AcmeAgent, name: str) -> None:
        self._agent = agent
        self._name = name

    @property
    def caps(self) -> Capabilities:
        """Only what Acme has: no pre-copy, no dirty log, and no memory of migrations."""
        return Capabilities(
            formats=(FORMAT,), max_state=1 << 20, max_chunk=MAX_CHUNK, random_access_save=True, takeover=False
        )

    async def describe(self) -> Descriptor:
        """INFO: what must be equal on both sides."""
        model, firmware = await self._agent.ask("INFO", self._name)
        return Descriptor(FORMAT, 1, "Acme", model, "nvme", firmware, self.caps.max_state)

    async def state(self) -> AgentState:
        """STATE: what the function does; without such a request, `status_query` would not be claimed."""
        [word] = await self._agent.ask("STATE", self._name)
        if word not in STATES:
            raise ProtocolError(f"Acme's agent says that {self._name} is {word!r}; known are {', '.join(STATES)}")
        return STATES[word]

    async def stop(self, role: Role | None) -> None:
        """FREEZE."""
        await self._agent.ask("FREEZE", self._name)

    async def resume(self) -> None:
        """THAW."""
        await self._agent.ask("THAW", self._name)

    async def reset(self) -> None:
        """RESET."""
        await self._agent.ask("RESET", self._name)

    async def save(self, offset: int, limit: int, phase: Phase) -> Chunk:
        """READ: a piece as base64, and whether it is the last."""
        last, piece = await self._agent.ask("READ", self._name, str(offset), str(min(limit, MAX_CHUNK)))
        return Chunk(base64.b64decode(piece), eof=last == "last")

    async def apply(self, state: bytes, digest: bytes) -> None:
        """WRITE each piece, then COMMIT; the state is whole and verified when this is called."""
        for offset in range(0, len(state), MAX_CHUNK):
            piece = base64.b64encode(state[offset : offset + MAX_CHUNK]).decode()
            await self._agent.ask("WRITE", self._name, str(offset), piece)
        await self._agent.ask("COMMIT", self._name, str(len(state)))


class AcmeAgent(PrimitiveAgent):
    """A connection to an agent of Acme's.

    Args:
        address: where it is.
    """

    def __init__(self, address: Address) -> None:
        # A call whose caller has given up is cancelled here, too; the function then tells where it is.
        super().__init__(detached=False)
        check_plaintext(address, allowed=False)
        self._address = address
        self._stream: trio.abc.Stream | None = None
        self._turn = trio.Lock()

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> AcmeAgent:
        """Make one out of the keys of an `agent` table; what is wrong with them is an OptionError."""
        if "address" not in options:
            raise OptionError("option 'address' is missing, such as unix:///run/acme.sock")
        return cls(**read_options(options, {"address": lambda name, value: parse_address(text(name, value), 4711)}))

    async def connect(self) -> AgentInfo:
        """HELLO: who answers."""
        product, firmware = await self.ask("HELLO")
        return AgentInfo("Acme", product, firmware)

    async def functions(self) -> Sequence[FunctionInfo]:
        """LIST."""
        return [FunctionInfo(name, "nvme") for name in await self.ask("LIST")]

    async def find(self, function_id: str) -> AcmeFunction:
        """A function, if there is one of this name."""
        if function_id not in await self.ask("LIST"):
            raise NotFound(f"no function {function_id!r} at {self._address}")
        return AcmeFunction(self, function_id)

    async def aclose(self) -> None:
        """Close the connection."""
        await super().aclose()
        await self._drop()

    async def ask(self, *words: str) -> list[str]:
        """Send a request and take the answer's words; whatever goes wrong ends the connection."""
        async with self._turn:
            done = False
            try:
                kind, *answer = (await self._exchange(" ".join(words) + "\n")).split()
                done = True
            except (trio.BrokenResourceError, trio.ClosedResourceError, ValueError) as error:
                raise TransportLost(f"the connection to {self._address} broke: {error}") from error
            finally:
                if not done:  # also when the caller was cancelled: the answer would be taken for the next one's
                    await self._drop()
        if kind != "OK":
            code = answer[0] if answer else "no word"
            raise ERRORS.get(code, AgentError)(f"{words[0]}: {' '.join(answer[1:])}", vendor_code=code)
        return answer

    async def _exchange(self, line: str) -> str:
        if self._stream is None:
            self._stream = await connect(self._address, TlsOptions(), None, allow_plaintext=False)
        await self._stream.send_all(line.encode())
        answer = bytearray()
        while not answer.endswith(b"\n"):
            if not (piece := await self._stream.receive_some(65536)):
                raise TransportLost(f"{self._address} closed the connection")
            answer += piece
        return answer.decode()

    async def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await trio.aclose_forcefully(stream)
