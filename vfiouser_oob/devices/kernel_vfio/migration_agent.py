"""The agent that is in the kernel: `agent = { kind = "kernel-vfio" }`.

A variant driver of vfio-pci migrates its function itself. Behind the agents' interface it goes through the same engine
as an agent on an SoC. Calls run in the function's worker, in the order of their arrival; a reset waits for the call
before it, since the kernel cannot be interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import trio

from vfiouser_agents.api import (
    Agent,
    AgentInfo,
    AgentState,
    Capabilities,
    Chunk,
    Descriptor,
    DirtyReport,
    Estimate,
    FunctionInfo,
    Outcome,
    Phase,
    Range,
    Role,
    Session,
    Status,
)
from vfiouser_agents.errors import (
    AgentError,
    Busy,
    ConnectError,
    DeviceFailed,
    InvalidArgument,
    InvalidState,
    NotFound,
    Unsupported,
)
from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_oob.devices.kernel_vfio.migration_function import KernelFunction
from vfiouser_oob.devices.kernel_vfio.worker import Job, OrderedWorker

T = TypeVar("T")
INFO = AgentInfo("Linux", "vfio", protocol="linux-vfio", protocol_version=2)


class KernelAgent(Agent):
    """The kernel's migration of one function.

    Args:
        function: the function; the backend's.
        worker: the function's worker; it runs while the backend does.
        probe: opens the device for a moment to learn what it can do, in the worker's thread.
    """

    def __init__(self, function: KernelFunction, worker: OrderedWorker, probe: Callable[[], None]) -> None:
        self._function = function
        self._worker = worker
        self._probe = probe

    async def connect(self) -> AgentInfo:
        """Nothing to reach."""
        await trio.lowlevel.checkpoint()
        return INFO

    async def aclose(self) -> None:
        """Nothing to let go of."""
        await trio.lowlevel.checkpoint()

    async def open(self, function_id: str) -> KernelSession:
        """A session for the one function, after it was looked at."""
        if function_id != self._function.name:
            raise NotFound(f"no function {function_id!r} (there is {self._function.name})")
        if self._function.caps is None:
            try:
                await self._worker.submit(Job(lambda job: self._probe()))
            except (BackendUnavailable, OSError) as error:
                raise ConnectError(f"{function_id} cannot be looked at now: {error}") from error
        return KernelSession(self._function, self._worker)

    async def functions(self) -> Sequence[FunctionInfo]:
        """The one function."""
        await trio.lowlevel.checkpoint()
        name = self._function.name
        return [FunctionInfo(name, "pci", bdf=name if ":" in name else None)]


class KernelSession(Session):
    """A session for the function.

    Args:
        function: the function.
        worker: its worker.
    """

    def __init__(self, function: KernelFunction, worker: OrderedWorker) -> None:
        self._function = function
        self._worker = worker
        self._open = True

    @property
    def function_id(self) -> str:
        """The function's name."""
        return self._function.name

    @property
    def caps(self) -> Capabilities:
        """What its driver can do."""
        assert self._function.caps is not None
        return self._function.caps

    async def describe(self) -> Descriptor:
        """What the function is."""
        return await self._run(self._function.describe, anybody=True)

    async def check(self, descriptor: Descriptor) -> None:
        """Compare."""
        await self._run(partial(self._function.check, descriptor), anybody=True)

    async def begin(self, role: Role, migration_id: str) -> None:
        """Take part in a migration."""
        await self._run(partial(self._begin, role, migration_id), anybody=True)

    def _begin(self, role: Role, migration_id: str) -> None:
        function = self._function
        if not self.caps.stop_copy:
            raise Unsupported(f"the driver of {function.name} has no migration of its own")
        if not migration_id:
            raise InvalidArgument("a migration needs a name")
        state = function.ask()
        if state is AgentState.ERROR:
            raise DeviceFailed(f"{function.name} has failed; reset it first")
        if (function.role, function.migration_id) != (role, migration_id):
            if function.owner not in (None, self):
                raise Busy(f"{function.name} is in migration {function.migration_id!r} of another session")
            if function.role is not None and (function.owner is self or state is not AgentState.RUNNING):
                raise InvalidState(f"{function.name} is in migration {function.migration_id!r}")
        function.role, function.migration_id, function.owner = role, migration_id, self

    async def status(self) -> Status:
        """Where the function is; while a call is being executed, where it was before that."""
        await trio.lowlevel.checkpoint()
        self._require_open()
        function = self._function
        busy = self._worker.busy
        state = function.agent_state if busy else function.ask()
        detail = "" if function.attached else "used by no client: closed, and reset"
        return Status(
            state,
            function.role,
            function.migration_id,
            function.logging is not None,
            "a call" if busy else "",
            detail,
        )

    async def quiesce(self) -> None:
        """No new DMA."""
        await self._run(self._function.quiesce)

    async def stop(self) -> None:
        """Hold still."""
        await self._run(self._function.stop)

    async def resume(self) -> None:
        """Run."""
        await self._run(self._function.resume)

    async def estimate(self) -> Estimate:
        """How much there is."""
        return await self._run(self._function.estimate)

    async def save(self, offset: int, limit: int, phase: Phase) -> Chunk:
        """Give the next piece."""
        return await self._run(partial(self._function.save, offset, limit, phase), Role.SOURCE)

    async def load_begin(self, total: int | None) -> None:
        """Get ready."""
        await self._run(partial(self._function.load_begin, total), Role.DESTINATION)

    async def load(self, offset: int, data: bytes) -> None:
        """Take a piece."""
        await self._run(partial(self._function.load, offset, bytes(data)), Role.DESTINATION)

    async def load_commit(self, total: int, digest: bytes) -> None:
        """Verify and apply."""
        await self._run(partial(self._function.load_commit, total, digest), Role.DESTINATION)

    async def abort(self) -> None:
        """Drop what was being saved or loaded."""
        await self._run(self._function.drop)

    async def dirty_start(self, ranges: Sequence[Range], page_size: int) -> int:
        """Log."""
        return await self._run(partial(self._function.start_logging, tuple(ranges), page_size))

    async def dirty_report(self, iova: int, length: int) -> DirtyReport:
        """Report and forget."""
        return await self._run(partial(self._function.report, iova, length))

    async def dirty_stop(self) -> None:
        """Forget."""
        await self._run(self._function.stop_logging)

    async def reset(self) -> None:
        """Begin anew."""
        await self._run(self._function.reset, anybody=True)

    async def end(self, outcome: Outcome) -> None:
        """Leave the migration."""

        def work() -> None:
            self._function.drop()
            self._function.forget_migration()

        await self._run(work)

    async def aclose(self) -> None:
        """Let go; a migration stays, for whoever takes it over."""
        self._open = False
        if self._function.owner is self:
            self._function.owner = None
        await trio.lowlevel.checkpoint()

    def _require_open(self) -> None:
        if not self._open:
            raise NotFound(f"this session of {self._function.name} is closed")

    async def _run(self, work: Callable[[], T], role: Role | None = None, *, anybody: bool = False) -> T:
        """Do a call in its turn; the migration of another session is in the way."""

        def call(job: Job[T]) -> T:
            function = self._function
            if not anybody and function.owner not in (None, self):
                raise Busy(f"{function.name} is in migration {function.migration_id!r} of another session")
            if role is not None and (function.role is not role or function.owner is not self):
                raise InvalidState(f"this needs a session that began as {role.value}")
            return work()

        self._require_open()
        try:
            return await self._worker.submit(Job(call))
        except OSError as error:
            raise AgentError(f"{self._function.name}: {error.strerror}") from error
