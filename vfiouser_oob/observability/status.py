"""The shape of a status document, and the interface that provides it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict

if TYPE_CHECKING:  # the client side is for quick commands, which do without trio
    import trio


class ClientStatus(TypedDict):
    """The VMM that uses a function."""

    pid: int
    uid: int
    command: str


class RegionStatus(TypedDict):
    """One region that has a size. `mapped`: whether the client may map (part of) it."""

    index: int
    name: str
    size: int
    mapped: bool


class MapsStatus(TypedDict):
    """The client's DMA mappings: how many, how many bytes, in how many distinct files."""

    count: int
    bytes: int
    files: int


class CapabilitiesStatus(TypedDict):
    """What a function's agent can do.

    `source` says how that is known: `agent` (it said so to this daemon), `stored` (to one before it), `configuration`
    (nobody heard it; what is configured is taken for possible, and the rest is null). `learned` is when it said so, ISO
    8601; `problem` why nothing can be remembered.
    """

    source: str
    learned: str | None
    stop_copy: bool | None
    precopy: bool | None
    dirty: bool | None
    problem: str | None


class MigrationStatus(TypedDict):
    """The migration of a function.

    `blocked` is why it cannot be migrated until somebody changes what is configured, `p2p` whether v2 offers the P2P
    states, in which a client's `state` is called by another name.
    `state` is that of the v2 generation, ERROR included; `known` whether it is certain, otherwise it is the last one
    that was, and `unknown_since` when that ended (ISO 8601, UTC); `agent_away_since` when the agent was first found not
    to answer, in the same form; `paused_over_link` whether STOP is a pause without the agent; `reset_due` whether the
    agent still owes a reset that the client was promised; `held_back` whether guest writes wait for the agent; `owner`
    the generation that migrates; `fenced` whether the function must be reset before anybody may use it. `bytes` counts
    what was taken from or given to this side's stream, `buffered` what waits, `remaining` what is estimated to come.
    `step` is what is being done at this moment.
    """

    agent: str
    migratable: bool
    blocked: str | None
    p2p: bool
    state: str
    known: bool
    unknown_since: str | None
    agent_away_since: str | None
    paused_over_link: bool
    reset_due: bool
    held_back: bool
    owner: str | None
    fenced: bool
    epoch: int
    bytes: int
    buffered: int
    remaining: int
    step: str | None
    steps: int
    failures: int
    last_failure: str | None
    capabilities: CapabilitiesStatus


class FunctionStatus(TypedDict):
    """One function.

    `phase` is `starting`, `listening`, `negotiating`, `attached`, `drained` or `failed`, and `failed` the reason of the
    last one. `irqs` counts the vectors with an eventfd
    by IRQ type, `messages` the messages of this connection by command, `dma` what went through the daemon
    itself, `unavailable` why the device cannot be had now. `migration` is None for a function without an agent. `since`
    is when the phase began (ISO 8601, UTC).
    """

    name: str
    socket: str
    device: str
    phase: str
    since: str
    failed: str | None
    client: ClientStatus | None
    regions: list[RegionStatus]
    maps: MapsStatus
    irqs: dict[str, int]
    fds: int
    messages: dict[str, int]
    dma: dict[str, int]
    migration: MigrationStatus | None
    unavailable: str | None
    last_error: str | None


class DaemonStatus(TypedDict):
    """The process. `started` is ISO 8601, UTC; `functions` how many there are."""

    version: str
    pid: int
    started: str
    functions: int


class VmFunctionStatus(TypedDict):
    """A function as its VM's migration knows it: `place` is where it is, `doing` what is being done to it."""

    name: str
    place: str
    doing: str | None


class VmStatus(TypedDict):
    """One VM that is migrated by a QEMU without migration of its own for vfio-user.

    `phase` is where the VM is, as its functions have to know it: `absent`, `running`, `armed`, `holding`, `stopped`,
    `saving`, `saved`, `away`, `incoming`, `loading`, `loaded`, `ready`, `going` or `barred`, and `since` when that
    began (ISO 8601, UTC). `migration` is the class of what QEMU said last of a migration. `qemu` is the process that
    has connected its monitor, and `version` what it says it is; both are null without one. `carrier` is what carries
    the state, `carriers` those that QEMU has connected. `refused` is why the migration under way must not go through.
    `sockets` are the paths, by the keys of the configuration.
    """

    name: str
    phase: str
    since: str
    migration: str
    qemu: ClientStatus | None
    version: str | None
    carrier: str
    carriers: list[str]
    refused: str | None
    functions: list[VmFunctionStatus]
    sockets: dict[str, str]
    last_error: str | None


class StatusReport(TypedDict):
    """All that `status` answers; `vms` is missing where an older daemon does."""

    daemon: DaemonStatus
    functions: list[FunctionStatus]
    vms: NotRequired[list[VmStatus]]


class StatusProvider(Protocol):
    """What the control server asks the daemon."""

    def status(self) -> StatusReport:
        """The state at this moment."""

    def subscribe(self) -> trio.MemoryReceiveChannel[dict[str, Any]]:
        """Changes from now on; closing the channel ends the subscription. `EventHub` is made for this."""
