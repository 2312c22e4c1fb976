"""What a VM does about what happens, as one table that `machine` reads.

A pair of phase and cue that is not in it means that nothing is to be done, but for a carrier that waits: it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType

from vfiouser_oob.vm.record import CarrierKind, Deed, FunctionPlace, Migration, VmPhase


class Cue(Enum):
    """Something that has happened, in the terms of the table."""

    STOP = auto()
    RESUME = auto()
    #: QEMU starts the VM, by the carrier's word.
    GO = auto()
    #: The VM runs or stands, by QEMU's answer.
    RUNS = auto()
    STANDS = auto()
    #: A QEMU that comes back has moved its VM meanwhile.
    MOVED = auto()
    LIVE = auto()
    ENDING = auto()
    BACK = auto()
    OVER = auto()
    JUDGED = auto()
    HOLD = auto()
    SAVE = auto()
    #: The same, while QEMU could not have told us of a migration.
    HOLD_BLIND = auto()
    SAVE_BLIND = auto()
    #: The same for a migration that must not go through.
    SAVE_REFUSED = auto()
    LOAD = auto()
    CARRIER_RESET = auto()
    #: All functions are where the phase wants them.
    ARRIVED = auto()
    #: One of them could not be brought there.
    FELL = auto()
    #: The daemon was started anew: no carrier waits any more.
    STARTED = auto()
    REPLAYED = auto()
    UNREPLAYED = auto()


class Act(Enum):
    """What is to be done, in order; `machine` has the effect for each."""

    ARM = auto()
    JUDGE = auto()
    CANCEL = auto()
    #: Only for a carrier that QEMU has to connect anew, which it must not while it migrates.
    DOUBT = auto()
    PREPARE = auto()
    ASK = auto()
    ANSWER_HOLD = auto()
    REFUSE_HOLD = auto()
    ANSWER_SAVE = auto()
    REFUSE_SAVE = auto()
    REPLAY = auto()
    #: Only for a carrier whose answer does not wait for the replay.
    ANSWER_LOAD_EARLY = auto()
    #: Only for one whose answer does.
    ANSWER_LOAD_LATE = auto()
    REFUSE_LOAD_LATE = auto()
    REFUSE_LOAD = auto()
    INFO = auto()
    ERROR = auto()


@dataclass(frozen=True, slots=True)
class CueRow:
    """What is done about a cue.

    Args:
        to: the phase that follows; None keeps it.
        acts: what is to be done.
        text: for people; the cue's own reason follows it.
    """

    to: VmPhase | None = None
    acts: tuple[Act, ...] = ()
    text: str = ""


def _row(to: VmPhase | None, *acts: Act, text: str = "") -> CueRow:
    return CueRow(to, acts, text)


_UNASKED = "the VM has moved without its functions' state, which QEMU did not ask for: is the carrier's object missing?"
_UNLOADED = "the VM came without its functions' state, so they must not run: had its source no carrier, or no daemon?"
_INCOMPLETE = "the VM resumed before its functions' state was loaded, so they must not run"
_RESTARTED = "the daemon was started again during the migration, and what carries the functions' state was lost with it"
_LOST = "the migration to here has failed"
_AGAIN = "the VM runs again"
_BACK = _row(VmPhase.ARMED)
_BAR = _row(VmPhase.BARRED, Act.ERROR, text=_UNLOADED)
_BAR_LOST = _row(VmPhase.BARRED, Act.INFO, text=_LOST)
_BEGIN = (Act.ARM, Act.JUDGE)
_UNSAVED = _row(VmPhase.ARMED, Act.REFUSE_SAVE, text=_AGAIN)
_VETO = _row(None, Act.REFUSE_SAVE)
_BAR_LOADING = _row(VmPhase.BARRED, Act.REFUSE_LOAD, Act.ERROR, text=_INCOMPLETE)

#: RESUME comes on another socket than the carrier's calls, and may be older than the last of them. As long as nothing
#: has left this side that does not matter. Once the state is being saved it does: QEMU is asked before anything runs.
ROWS: Mapping[VmPhase, Mapping[Cue, CueRow]] = MappingProxyType(
    {
        VmPhase.ABSENT: {},
        VmPhase.RUNNING: {
            Cue.LIVE: _row(VmPhase.ARMED, *_BEGIN),
            # A device that is reset, or whose driver goes: no migration would have been untold.
            Cue.HOLD: _row(None, Act.ANSWER_HOLD),
            Cue.HOLD_BLIND: _row(VmPhase.HOLDING, Act.ARM),
            Cue.SAVE_BLIND: _row(VmPhase.SAVING, Act.ARM),
            Cue.MOVED: _row(VmPhase.AWAY, Act.ERROR, text=_UNASKED),
            Cue.FELL: _row(None, Act.ERROR),
        },
        VmPhase.ARMED: {
            Cue.STOP: _row(VmPhase.STOPPED),
            Cue.HOLD: _row(VmPhase.HOLDING),
            Cue.HOLD_BLIND: _row(VmPhase.HOLDING),
            Cue.SAVE: _row(VmPhase.SAVING),
            Cue.SAVE_BLIND: _row(VmPhase.SAVING),
            Cue.SAVE_REFUSED: _VETO,
            Cue.JUDGED: _row(None, Act.CANCEL, Act.ERROR),
            Cue.OVER: _row(VmPhase.AWAY, Act.ERROR, text=_UNASKED),
            Cue.FELL: _row(None, Act.ERROR),
            Cue.STARTED: _row(None, Act.DOUBT, text=_RESTARTED),
        },
        VmPhase.HOLDING: {
            Cue.ARRIVED: _row(VmPhase.STOPPED, Act.ANSWER_HOLD, Act.ASK),
            Cue.FELL: _row(VmPhase.STOPPED, Act.REFUSE_HOLD, Act.CANCEL, Act.ERROR),
            Cue.GO: _row(VmPhase.ARMED, Act.ANSWER_HOLD),
            Cue.JUDGED: _row(None, Act.CANCEL, Act.ERROR),
            Cue.CARRIER_RESET: _row(VmPhase.STOPPED, Act.ASK),
            Cue.STARTED: _row(VmPhase.STOPPED, Act.DOUBT, text=_RESTARTED),
        },
        VmPhase.STOPPED: {
            Cue.RESUME: _BACK,
            Cue.GO: _BACK,
            Cue.RUNS: _BACK,
            # RESUME comes before it, unless the VM was paused when the migration began. Such a VM may be waiting for
            # its very first RESUME here, and its copy may run instead: what stands goes on standing.
            Cue.BACK: _row(None, Act.ASK),
            Cue.LIVE: _row(None, *_BEGIN),
            Cue.HOLD: _row(VmPhase.HOLDING),
            Cue.HOLD_BLIND: _row(VmPhase.HOLDING),
            Cue.SAVE: _row(VmPhase.SAVING),
            Cue.SAVE_BLIND: _row(VmPhase.SAVING),
            Cue.SAVE_REFUSED: _VETO,
            Cue.JUDGED: _row(None, Act.CANCEL, Act.ERROR),
            Cue.FELL: _row(None, Act.CANCEL, Act.ERROR),
            Cue.OVER: _row(VmPhase.AWAY, Act.ERROR, text=_UNASKED),
            Cue.STARTED: _row(None, Act.DOUBT, text=_RESTARTED),
        },
        VmPhase.SAVING: {
            Cue.ARRIVED: _row(VmPhase.SAVED, Act.ANSWER_SAVE),
            Cue.FELL: _row(VmPhase.STOPPED, Act.REFUSE_SAVE, Act.ERROR),
            Cue.CARRIER_RESET: _row(VmPhase.STOPPED, Act.ASK),
            Cue.RESUME: _row(None, Act.ASK),
            Cue.RUNS: _UNSAVED,
            Cue.GO: _UNSAVED,
            Cue.BACK: _row(VmPhase.STOPPED, Act.REFUSE_SAVE, Act.ASK, text="the migration was given up"),
            Cue.JUDGED: _row(VmPhase.STOPPED, Act.REFUSE_SAVE, Act.CANCEL, Act.ERROR),
            Cue.STARTED: _row(VmPhase.STOPPED, Act.DOUBT, text=_RESTARTED),
            Cue.OVER: _row(VmPhase.AWAY, Act.REFUSE_SAVE, Act.ERROR, text=_UNASKED),
        },
        VmPhase.SAVED: {
            Cue.RESUME: _row(None, Act.ASK),
            Cue.RUNS: _BACK,
            Cue.GO: _BACK,
            Cue.BACK: _row(None, Act.ASK),
            Cue.OVER: _row(VmPhase.AWAY),
            Cue.MOVED: _row(VmPhase.AWAY),
            Cue.LIVE: _row(VmPhase.STOPPED, *_BEGIN),
            Cue.JUDGED: _row(None, Act.CANCEL, Act.ERROR),
            # Asked again, for another part of it: it has not changed.
            Cue.SAVE: _row(VmPhase.SAVING),
            Cue.SAVE_BLIND: _row(VmPhase.SAVING),
            Cue.HOLD: _row(None, Act.ANSWER_HOLD),
            Cue.HOLD_BLIND: _row(None, Act.ANSWER_HOLD),
        },
        VmPhase.AWAY: {
            Cue.RESUME: _row(VmPhase.ARMED, Act.INFO, text="the VM is taken back after it had moved"),
            Cue.GO: _row(VmPhase.ARMED, Act.INFO, text="the VM is taken back after it had moved"),
            Cue.RUNS: _row(VmPhase.ARMED, Act.INFO, text="the VM is taken back after it had moved"),
            Cue.FELL: _row(None, Act.ERROR),
            Cue.HOLD: _row(None, Act.ANSWER_HOLD),
            Cue.HOLD_BLIND: _row(None, Act.ANSWER_HOLD),
        },
        VmPhase.INCOMING: {
            Cue.LOAD: _row(VmPhase.LOADING),
            Cue.RESUME: _BAR,
            Cue.GO: _BAR,
            Cue.RUNS: _BAR,
            Cue.OVER: _BAR,
            Cue.BACK: _BAR_LOST,
            Cue.STARTED: _row(None, Act.PREPARE),
        },
        VmPhase.LOADING: {
            Cue.ARRIVED: _row(VmPhase.LOADED, Act.REPLAY, Act.ANSWER_LOAD_EARLY),
            Cue.FELL: _row(VmPhase.BARRED, Act.REFUSE_LOAD, Act.ERROR),
            Cue.CARRIER_RESET: _row(VmPhase.BARRED, Act.ERROR, text="the carrier was lost while the state was loaded"),
            Cue.RESUME: _BAR_LOADING,
            Cue.GO: _BAR_LOADING,
            Cue.RUNS: _BAR_LOADING,
            Cue.BACK: _row(VmPhase.BARRED, Act.REFUSE_LOAD, Act.INFO, text=_LOST),
            Cue.STARTED: _row(VmPhase.BARRED, Act.ERROR, text="the daemon was started again while it loaded the state"),
        },
        VmPhase.LOADED: {
            Cue.REPLAYED: _row(VmPhase.READY, Act.ANSWER_LOAD_LATE),
            Cue.UNREPLAYED: _row(VmPhase.BARRED, Act.REFUSE_LOAD_LATE, Act.ERROR),
            Cue.RESUME: _row(VmPhase.GOING),
            Cue.GO: _row(VmPhase.GOING),
            Cue.RUNS: _row(VmPhase.GOING),
            Cue.BACK: _row(VmPhase.BARRED, Act.REFUSE_LOAD_LATE, Act.INFO, text=_LOST),
        },
        VmPhase.READY: {
            Cue.RESUME: _row(VmPhase.RUNNING),
            Cue.GO: _row(VmPhase.RUNNING),
            Cue.RUNS: _row(VmPhase.RUNNING),
            Cue.BACK: _BAR_LOST,
            # It goes on to another host before it ever ran here.
            Cue.LIVE: _row(VmPhase.STOPPED, *_BEGIN),
            Cue.SAVE: _row(VmPhase.SAVING, Act.ARM),
            Cue.SAVE_BLIND: _row(VmPhase.SAVING, Act.ARM),
            Cue.HOLD: _row(None, Act.ANSWER_HOLD),
            Cue.HOLD_BLIND: _row(None, Act.ANSWER_HOLD),
        },
        VmPhase.GOING: {
            Cue.REPLAYED: _row(VmPhase.RUNNING),
            Cue.UNREPLAYED: _row(VmPhase.BARRED, Act.ERROR),
            Cue.STOP: _row(VmPhase.LOADED),
        },
        VmPhase.BARRED: {
            Cue.LIVE: _row(None, Act.CANCEL, Act.ERROR, text="its functions do not have the guest's state"),
            Cue.FELL: _row(None, Act.ERROR),
        },
    }
)
#: What a carrier is told that waits for something for which there is no row.
REFUSALS: Mapping[Cue, CueRow] = MappingProxyType(
    {
        Cue.HOLD: _row(None, Act.ANSWER_HOLD),
        Cue.HOLD_BLIND: _row(None, Act.ANSWER_HOLD),
        Cue.SAVE: _row(None, Act.REFUSE_SAVE, text="no migration from here is under way"),
        Cue.SAVE_BLIND: _row(None, Act.REFUSE_SAVE, text="this VM has no state to be saved"),
        Cue.SAVE_REFUSED: _VETO,
        Cue.LOAD: _row(None, Act.REFUSE_LOAD, text="no migration to here is under way"),
    }
)
#: Where a phase wants the functions; None leaves them alone.
WANTED: Mapping[VmPhase, FunctionPlace | None] = MappingProxyType(
    {
        VmPhase.ABSENT: None,
        VmPhase.RUNNING: FunctionPlace.RUNS,
        VmPhase.ARMED: FunctionPlace.RUNS,
        VmPhase.HOLDING: FunctionPlace.STANDS,
        VmPhase.STOPPED: FunctionPlace.STANDS,
        VmPhase.SAVING: FunctionPlace.SAVED,
        VmPhase.SAVED: FunctionPlace.STANDS,
        VmPhase.AWAY: FunctionPlace.STANDS,
        VmPhase.INCOMING: None,
        VmPhase.LOADING: FunctionPlace.LOADED,
        VmPhase.LOADED: FunctionPlace.LOADED,
        VmPhase.READY: FunctionPlace.LOADED,
        VmPhase.GOING: FunctionPlace.LOADED,
        VmPhase.BARRED: FunctionPlace.BARRED,
    }
)
_HALTED: Mapping[FunctionPlace, Deed | None] = MappingProxyType(
    {
        FunctionPlace.FRESH: Deed.STOP,
        FunctionPlace.RUNS: Deed.STOP,
        FunctionPlace.UNSURE: Deed.STOP,
        FunctionPlace.STANDS: None,
        FunctionPlace.SAVED: None,
        FunctionPlace.LOADED: None,
        FunctionPlace.BARRED: None,
    }
)
#: The next step from a place to where a phase wants a function; None if it is there.
ROUTES: Mapping[FunctionPlace, Mapping[FunctionPlace, Deed | None]] = MappingProxyType(
    {
        FunctionPlace.RUNS: {
            FunctionPlace.FRESH: None,
            FunctionPlace.RUNS: None,
            FunctionPlace.STANDS: Deed.RESUME,
            FunctionPlace.SAVED: Deed.RESUME,
            FunctionPlace.LOADED: Deed.RESUME,
            FunctionPlace.UNSURE: Deed.RESUME,
            FunctionPlace.BARRED: None,
        },
        FunctionPlace.STANDS: _HALTED,
        FunctionPlace.SAVED: {**_HALTED, FunctionPlace.STANDS: Deed.SAVE, FunctionPlace.LOADED: Deed.SAVE},
        FunctionPlace.LOADED: {**dict.fromkeys(FunctionPlace, Deed.LOAD), FunctionPlace.LOADED: None},
        FunctionPlace.BARRED: {**dict.fromkeys(FunctionPlace, Deed.BAR), FunctionPlace.BARRED: None},
    }
)
#: Where a function is after what was done to it.
DONE: Mapping[Deed, FunctionPlace] = MappingProxyType(
    {
        Deed.STOP: FunctionPlace.STANDS,
        Deed.SAVE: FunctionPlace.SAVED,
        Deed.LOAD: FunctionPlace.LOADED,
        Deed.RESUME: FunctionPlace.RUNS,
        Deed.BAR: FunctionPlace.BARRED,
    }
)
#: Where it is after what could not be done.
UNDONE: Mapping[Deed, FunctionPlace] = MappingProxyType(
    {**dict.fromkeys(Deed, FunctionPlace.UNSURE), Deed.SAVE: FunctionPlace.STANDS}
)
#: QEMU's names for what a migration does.
#: Spec: QEMU, qapi/migration.json, MigrationStatus.
STATUSES: Mapping[str, Migration] = MappingProxyType(
    {
        "none": Migration.NONE,
        "": Migration.NONE,
        **dict.fromkeys(("setup", "active", "pre-switchover", "device", "wait-unplug", "colo"), Migration.LIVE),
        **dict.fromkeys(("cancelling", "failing"), Migration.ENDING),
        **dict.fromkeys(("cancelled", "failed"), Migration.BACK),
        # From here on the VM runs at the destination, and a failure does not bring it back.
        **dict.fromkeys(
            ("postcopy-device", "postcopy-active", "postcopy-paused", "postcopy-recover-setup", "postcopy-recover"),
            Migration.OVER,
        ),
        "completed": Migration.OVER,
    }
)
MIGRATION_CUES: Mapping[Migration, Cue] = MappingProxyType(
    {
        Migration.LIVE: Cue.LIVE,
        Migration.ENDING: Cue.ENDING,
        Migration.BACK: Cue.BACK,
        Migration.OVER: Cue.OVER,
    }
)
#: The phase of a QEMU that is seen for the first time, and where its functions are then; others are `RUNNING`.
#: Spec: QEMU, qapi/run-state.json, RunState.
BEGINNINGS: Mapping[str, tuple[VmPhase, FunctionPlace]] = MappingProxyType(
    {
        "inmigrate": (VmPhase.INCOMING, FunctionPlace.FRESH),
        "finish-migrate": (VmPhase.STOPPED, FunctionPlace.UNSURE),
        "postmigrate": (VmPhase.AWAY, FunctionPlace.UNSURE),
    }
)
#: Carriers that are answered before the replay is read back: QEMU carries out what was written before it goes on.
ANSWERED_EARLY = frozenset({CarrierKind.DBUS_VMSTATE})
#: Carriers whose connection ends with the daemon.
ENDING_WITH_US = frozenset({CarrierKind.DBUS_VMSTATE})
#: What is worth knowing when QEMU ends in a phase.
FAREWELLS: Mapping[VmPhase, str] = MappingProxyType(
    {
        VmPhase.SAVED: "QEMU ended after the state was handed over: the functions may run elsewhere, and stay stopped",
        VmPhase.LOADING: "QEMU ended while the state was loaded",
        VmPhase.LOADED: "QEMU ended after the state was loaded, and before the VM ran here",
        VmPhase.READY: "QEMU ended after the state was loaded, and before the VM ran here",
    }
)
