"""Functions behind a vendor's own JSON-RPC methods, by the method map of the configuration."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import trio

from vfiouser_agents.api import AgentState, Capabilities, Chunk, Descriptor, Outcome, Phase, Range, Role
from vfiouser_agents.errors import NoResources, NotFound, ProtocolError
from vfiouser_agents.operations import Op, Operation
from vfiouser_agents.rpc.wire import WireError, from_wire, to_wire

from .commands import run_command
from .jsonrpc_map import FUNCTIONS, MappedMethod, MethodMap, StateFile
from .primitive import Primitive


class Caller(Protocol):
    """Calls a method of the vendor's."""

    async def __call__(self, method: str, params: dict[str, Any]) -> Any:
        """Call, and give the result."""


async def list_functions(call: Caller, methods: MethodMap) -> Sequence[str]:
    """The names of all functions, as the configuration or the vendor tells them; empty if neither does.

    Args:
        call: calls the vendor's methods.
        methods: the map.
    """
    mapped = methods.methods.get(FUNCTIONS)
    if methods.functions or mapped is None:
        return methods.functions
    listed = _part(await call(mapped.method, mapped.arguments({})), mapped.result.get("list", ""), mapped.method)
    if not isinstance(listed, list):
        raise ProtocolError(f"the result of {mapped.method} is not a list of functions: {str(listed)[:100]!r}")
    names = [_part(entry, mapped.result["name"], mapped.method) for entry in listed]
    return [name for name in names if isinstance(name, str)]


class MappedFunction(Primitive):
    """A function whose operations are a vendor's methods.

    Args:
        function_id: its name, in our configuration and for the vendor.
        methods: the map.
        call: calls the vendor's methods.
        reach: makes the connection, if there is none.
    """

    def __init__(self, function_id: str, methods: MethodMap, call: Caller, reach: Callable[[], Awaitable[Any]]) -> None:
        self._function_id = function_id
        self._map = methods
        self._call = call
        self._reach = reach
        self._file = None if methods.state is None else _FileOnSoc(methods.state, function_id, methods.caps.max_state)
        self._fetched = b""

    @property
    def caps(self) -> Capabilities:
        """What the map has methods for, and what the configuration adds."""
        return self._map.caps

    async def reach(self) -> None:
        """Connect."""
        await self._reach()

    async def _ask(self, op: Op[..., Any], **variables: Any) -> Any:
        """Call what an operation is mapped to; without a mapping nothing is done."""
        mapped = self._map.methods.get(op.name)
        if mapped is None:
            return None
        params = mapped.arguments({"function": self._function_id, **variables})
        return await self._call(mapped.method, params)

    def _mapped(self, op: Op[..., Any]) -> MappedMethod:
        return self._map.methods[op.name]

    def _value(self, op: Op[..., Any], result: Any, name: str, hint: Any) -> Any:
        mapped = self._mapped(op)
        if name not in mapped.result:
            return None
        try:
            return from_wire(hint, _part(result, mapped.result[name], mapped.method), name)
        except WireError as error:
            raise ProtocolError(f"the result of {mapped.method} cannot be used: {error}") from None

    async def describe(self) -> Descriptor:
        """Ask, or tell what is configured."""
        if Operation.DESCRIBE.name not in self._map.methods:
            await trio.lowlevel.checkpoint()
            return self._map.descriptor
        found: Descriptor | None = self._value(
            Operation.DESCRIBE, await self._ask(Operation.DESCRIBE), "descriptor", Descriptor
        )
        return self._map.descriptor if found is None else found

    async def check(self, descriptor: Descriptor) -> None:
        """Compare, and ask as well if that is mapped."""
        if Operation.CHECK.name in self._map.methods:
            await self._ask(Operation.CHECK, descriptor=to_wire(descriptor))
        else:
            await super().check(descriptor)

    async def state(self) -> AgentState | None:
        """Ask, if there is a method for it."""
        if Operation.STATUS.name not in self._map.methods:
            return None
        word = self._value(Operation.STATUS, await self._ask(Operation.STATUS), "state", str)
        states = self._mapped(Operation.STATUS).states
        if word not in states:
            asked = self._mapped(Operation.STATUS).method
            raise ProtocolError(f"{asked} says {word!r}; methods.status.states has only {', '.join(states)}")
        return states[word]

    async def begin(self, role: Role, migration_id: str) -> None:
        """Tell, if there is a method for it."""
        await self._ask(Operation.BEGIN, role=role.value, migration_id=migration_id)

    async def end(self, outcome: Outcome) -> None:
        """Tell, if there is a method for it."""
        await self._ask(Operation.END, outcome=outcome.value)

    async def quiesce(self) -> None:
        """Tell."""
        await self._ask(Operation.QUIESCE)

    async def stop(self, role: Role | None) -> None:
        """Tell."""
        await self._ask(Operation.STOP, role=None if role is None else role.value)

    async def resume(self) -> None:
        """Tell."""
        await self._ask(Operation.RESUME)

    async def estimate(self) -> int | None:
        """Ask, if there is a method for it."""
        if Operation.ESTIMATE.name not in self._map.methods:
            return None
        return self._value(Operation.ESTIMATE, await self._ask(Operation.ESTIMATE), "bytes", int)  # type: ignore[no-any-return]

    async def save(self, offset: int, limit: int, phase: Phase) -> Chunk:
        """Ask for a piece, or have the file written and fetch it."""
        if self._file is not None:
            if offset == 0:
                await self._ask(Operation.SAVE, offset=0, limit=limit, phase=phase.value, path=self._file.path)
                self._fetched = await self._file.fetch()
            piece = self._fetched[offset : offset + limit]
            return Chunk(piece, eof=offset + len(piece) == len(self._fetched))
        result = await self._ask(Operation.SAVE, offset=offset, limit=limit, phase=phase.value, path="")
        data, eof = (self._value(Operation.SAVE, result, name, kind) for name, kind in (("data", bytes), ("eof", bool)))
        drained = self._value(Operation.SAVE, result, "drained", bool)
        return Chunk(data, eof=eof, drained=bool(drained))

    @property
    def streams(self) -> bool:
        """Pieces go as they come, unless the vendor wants a file, or to know the size before the first piece."""
        begin = self._map.methods.get(Operation.LOAD_BEGIN.name)
        known_late = begin is None or "total" not in _variables(begin.params)
        return self._file is None and Operation.LOAD.name in self._map.methods and known_late

    async def load_open(self) -> None:
        """Tell, if there is a method for it."""
        await self._ask(Operation.LOAD_BEGIN)

    async def load_piece(self, offset: int, data: bytes) -> None:
        """Send it."""
        await self._ask(Operation.LOAD, offset=offset, data=base64.b64encode(data).decode(), path="")

    async def load_close(self, total: int, digest: bytes) -> None:
        """Tell, if there is a method for it."""
        await self._ask(Operation.LOAD_COMMIT, total=total, digest=base64.b64encode(digest).decode())

    async def apply(self, state: bytes, digest: bytes) -> None:
        """Send everything, or store it as the file and have that loaded."""
        if self._file is not None:
            await self._file.store(state)
            await self._load_file(self._file)
            return
        await self._ask(Operation.LOAD_BEGIN, total=len(state))
        size = self.caps.max_chunk
        for offset in range(0, len(state), size):
            await self.load_piece(offset, state[offset : offset + size])
        await self.load_close(len(state), digest)

    async def _load_file(self, file: _FileOnSoc) -> None:
        try:
            await self._ask(Operation.LOAD, offset=0, data="", path=file.path)
        finally:
            with trio.CancelScope(shield=True) as scope:
                scope.deadline = trio.current_time() + _FileOnSoc.REMOVE_S
                await file.remove()

    async def dirty_start(self, ranges: Sequence[Range], page_size: int) -> int:
        """Tell."""
        result = await self._ask(Operation.DIRTY_START, ranges=to_wire(list(ranges)), page_size=page_size)
        chosen = self._value(Operation.DIRTY_START, result, "page_size", int)
        return page_size if chosen is None else int(chosen)

    async def dirty_report(self, iova: int, length: int) -> bytes:
        """Ask."""
        result = await self._ask(Operation.DIRTY_REPORT, iova=iova, length=length)
        return self._value(Operation.DIRTY_REPORT, result, "bitmap", bytes)  # type: ignore[no-any-return]

    async def dirty_stop(self) -> None:
        """Tell."""
        await self._ask(Operation.DIRTY_STOP)

    async def reset(self) -> None:
        """Tell."""
        await self._ask(Operation.RESET)


def _variables(params: Any) -> set[str]:
    """The names of the variables in some parameters."""
    if isinstance(params, Mapping):
        params = tuple(params.values())
    if isinstance(params, list | tuple):
        return {name for value in params for name in _variables(value)}
    return {params[1:]} if isinstance(params, str) and params.startswith("$") else set()


def _part(value: Any, path: str, method: str) -> Any:
    for key in filter(None, path.split(".")):
        if not isinstance(value, Mapping) or key not in value:
            raise ProtocolError(f"the result of {method} has no {path!r}; although methods names it")
        value = value[key]
    return value


class _FileOnSoc:
    """The file that carries a state, and the commands that move it."""

    #: Seconds that removing the file may take; nothing depends on it.
    REMOVE_S = 5.0

    def __init__(self, file: StateFile, function_id: str, max_state: int) -> None:
        # The path goes through the hands of a shell on the other side, so names that mean something there are refused.
        if not all(character.isalnum() or character in "._:-" for character in function_id):
            raise NotFound(
                f"function {function_id!r}: its name becomes part of a path, so only letters, digits and ._:- are "
                f"allowed"
            )
        self._file = file
        self._max_state = max_state
        self.path = file.path.replace("$function", function_id)

    async def fetch(self) -> bytes:
        """The bytes of the file; it is removed."""
        data = await self._run(self._file.fetch, None)
        await self.remove()
        return data

    async def store(self, state: bytes) -> None:
        """Make the file."""
        await self._run(self._file.store, state)

    async def remove(self) -> None:
        """Remove the file, if there is a command for it."""
        if self._file.remove:
            await self._run(self._file.remove, None)

    async def _run(self, command: Sequence[str], data: bytes | None) -> bytes:
        words = [word.replace("$path", self.path) for word in command]
        output = await run_command(words, data, self._max_state)
        if len(output) > self._max_state:
            raise NoResources(
                f"the file {self.path} has more than {self._max_state} bytes", {"max_state": self._max_state}
            )
        return output
