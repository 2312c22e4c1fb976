"""What goes in and out of the calls of `api`, which has all of these, too: enums and frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Role(Enum):
    """Which side of a migration a session is."""

    SOURCE = "source"
    DESTINATION = "destination"


class Phase(Enum):
    """What `save` shall give."""

    #: What can be had while the function runs; comes again if it changes.
    PRECOPY = "precopy"
    #: The rest, from a stopped function.
    FINAL = "final"


class Outcome(Enum):
    """How a migration ended."""

    SUCCESS = "success"
    CANCELLED = "cancelled"
    FAILED = "failed"


class AgentState(Enum):
    """What a function does."""

    RUNNING = "running"
    #: Starts no DMA and no interrupts, but still answers registers.
    QUIESCED = "quiesced"
    #: Everything drained; nothing changes any more.
    STOPPED = "stopped"
    #: Stopped, and taking a state in.
    LOADING = "loading"
    #: Stopped, with a verified state applied; never run since.
    LOADED = "loaded"
    #: Only a reset leads out.
    ERROR = "error"


class EventKind(Enum):
    """What `watch` reports."""

    DEVICE_ERROR = "device-error"
    SIZE_CHANGED = "size-changed"
    STATE_CHANGED = "state-changed"
    #: From the adapter: the connection is gone, and the session with it; the function's state is not known.
    CONNECTION_LOST = "connection-lost"
    #: The agent can be reached again; `status` is what it says now.
    RECONNECTED = "reconnected"
    #: As RECONNECTED, to an agent that was started since.
    AGENT_RESTARTED = "agent-restarted"


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """Who answers.

    Args:
        vendor: who made the agent.
        product: what it is called.
        firmware: its version, for people.
        protocol: name of the protocol spoken.
        protocol_version: its version.
        max_sessions: sessions that one connection may have open.
        max_message: bytes of the longest message that the agent takes.
        instance: differs after each start of the agent.
    """

    vendor: str
    product: str
    firmware: str = ""
    protocol: str = ""
    protocol_version: int = 1
    max_sessions: int = 1024
    max_message: int = 16 << 20
    instance: str = ""


@dataclass(frozen=True, slots=True)
class FunctionInfo:
    """One function of an agent.

    Args:
        function_id: the agent's own name for it; opaque.
        kind: `nvme`, `virtio-blk`, `virtio-net` …
        bdf: PCI address on the host, if the agent knows it.
        pf: number of the physical function, if it has one.
        vf: number of the virtual function below it, if it is one.
        labels: anything else.
    """

    function_id: str
    kind: str = ""
    bdf: str | None = None
    pf: int | None = None
    vf: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a function's agent can do with it.

    Args:
        stop_copy: state can be saved and loaded; without it the function is not migratable.
        p2p: `quiesce` is a step of its own.
        precopy: `save(PRECOPY)` works.
        dirty: the agent logs which guest pages the function writes.
        reset: `reset` works.
        status_query: `status` tells the truth rather than what was asked for last.
        random_access_save: `save` takes any offset that was given before.
        takeover: the agent itself remembers migrations, so that another connection can take one over. Without it they
            are known to the session's own side only, and a lost one ends them.
        verifies: the agent notices a state that makes no sense although its digest is right.
        formats: ids of the state formats that can be loaded; the first is what is saved.
        max_state: bytes that a state may have at most.
        max_chunk: bytes of one `save` or `load` at most.
        page_sizes: page sizes that the dirty log can use, ascending.
        max_ranges: ranges that the dirty log takes at most.
    """

    stop_copy: bool = True
    p2p: bool = False
    precopy: bool = False
    dirty: bool = False
    reset: bool = True
    status_query: bool = True
    random_access_save: bool = False
    takeover: bool = True
    verifies: bool = True
    formats: tuple[str, ...] = ()
    max_state: int = 64 << 20
    max_chunk: int = 1 << 20
    page_sizes: tuple[int, ...] = (4096,)
    max_ranges: int = 0


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a function is, so that a destination knows if its state fits.

    Args:
        format_id: name of the state's format.
        format_version: its version.
        vendor: who made the function.
        model: what it is called.
        kind: `nvme`, `virtio-blk` …
        firmware: version of what runs on it.
        state_max: bytes that its state may have at most.
        fingerprint: everything else that must fit: features, queue limits, identity of namespaces.
    """

    format_id: str
    format_version: int
    vendor: str
    model: str
    kind: str
    firmware: str
    state_max: int
    fingerprint: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Status:
    """Where a function is.

    Args:
        state: what it does.
        role: its side in the current migration, if any.
        migration_id: the name of that migration, or empty.
        dirty_active: guest pages are being logged.
        pending: the call that is being executed now, or empty.
        detail: one line for people.
    """

    state: AgentState
    role: Role | None = None
    migration_id: str = ""
    dirty_active: bool = False
    pending: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """How much there is to save.

    Args:
        stop_copy_bytes: bytes still to come if the function were stopped now.
        initial_bytes: bytes of the first pass of pre-copy not yet given.
        dirty_bytes: bytes that changed after they were given.
        exact: the figures are exact, not estimates.
    """

    stop_copy_bytes: int
    initial_bytes: int = 0
    dirty_bytes: int = 0
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of state.

    Args:
        data: the bytes, or a read-only `memoryview` of them; may be empty only with `eof` or `drained`.
        eof: the state is complete with it (FINAL only).
        drained: nothing more for now (PRECOPY only).
    """

    data: bytes
    eof: bool = False
    drained: bool = False


@dataclass(frozen=True, slots=True)
class Range:
    """A stretch of the guest's I/O address space, in bytes."""

    iova: int
    length: int


@dataclass(frozen=True, slots=True)
class DirtyReport:
    """Guest pages written since they were last reported: a bitmap, or a list of ranges.

    Args:
        bitmap: bit n (LSB first) is the page at iova + n × page size; None if `ranges` is used.
        ranges: the dirty ranges, in whole pages.
        more: there is more to report for the same range; ask again.
        final: the function is stopped, so nothing will be added.
    """

    bitmap: bytes | None = None
    ranges: tuple[Range, ...] = ()
    more: bool = False
    final: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened without having been asked for.

    Args:
        kind: what.
        detail: one line for people.
        status: where the function is now, if known.
        lost: events that were dropped before this one because the watcher was slow.
    """

    kind: EventKind
    detail: str = ""
    status: Status | None = None
    lost: int = 0
