"""What a VM does about what happens, as one table that `machine` reads.

A pair of phase and cue that is not in it means that nothing is to be done, but for a carrier that waits: it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType

from vfiouser_oob.vm.record import Carrier, Deed, Migration, Phase, Place


class Cue(Enum):
    """Something that has happened, in the terms of the table."""

    STOP = auto()
    RESUME = auto()
    #: QEMU starts the VM, by the carrier's word.
    GO = auto()
    #: The VM runs or stands, by QEMU's answer.
    RUNS = auto()
    STANDS = auto()
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
class Row:
    """What is done about a cue.

    Args:
        to: the phase that follows; None keeps it.
        acts: what is to be done.
        text: for people; the cue's own reason follows it.
    """

    to: Phase | None = None
    acts: tuple[Act, ...] = ()
    text: str = ""


def _row(to: Phase | None, *acts: Act, text: str = "") -> Row:
    return Row(to, acts, text)


_UNASKED = "the VM has moved without its functions' state, which QEMU did not ask for: is the carrier's object missing?"
_UNLOADED = "the VM came without its functions' state, so they must not run: had its source no carrier, or no daemon?"
_INCOMPLETE = "the VM resumed before its functions' state was loaded, so they must not run"
_LOST = "the migration to here has failed"
_AGAIN = "the VM runs again"
_BACK = _row(Phase.ARMED)
_BAR = _row(Phase.BARRED, Act.ERROR, text=_UNLOADED)
_BAR_LOST = _row(Phase.BARRED, Act.INFO, text=_LOST)
_BEGIN = (Act.ARM, Act.JUDGE)
_UNSAVED = _row(Phase.ARMED, Act.REFUSE_SAVE, text=_AGAIN)
_VETO = _row(None, Act.REFUSE_SAVE)
_BAR_LOADING = _row(Phase.BARRED, Act.REFUSE_LOAD, Act.ERROR, text=_INCOMPLETE)

#: RESUME comes on another socket than the carrier's calls, and may be older than the last of them. As long as nothing
#: has left this side that does not matter. Once the state is being saved it does: QEMU is asked before anything runs.
ROWS: Mapping[Phase, Mapping[Cue, Row]] = MappingProxyType(
    {
        Phase.ABSENT: {},
        Phase.RUNNING: {
            Cue.LIVE: _row(Phase.ARMED, *_BEGIN),
            # A device that is reset, or whose driver goes: no migration would have been untold.
            Cue.HOLD: _row(None, Act.ANSWER_HOLD),
            Cue.HOLD_BLIND: _row(Phase.HOLDING, Act.ARM),
            Cue.SAVE_BLIND: _row(Phase.SAVING, Act.ARM),
            Cue.FELL: _row(None, Act.ERROR),
        },
        Phase.ARMED: {
            Cue.STOP: _row(Phase.STOPPED),
            Cue.HOLD: _row(Phase.HOLDING),
            Cue.HOLD_BLIND: _row(Phase.HOLDING),
            Cue.SAVE: _row(Phase.SAVING),
            Cue.SAVE_BLIND: _row(Phase.SAVING),
            Cue.SAVE_REFUSED: _VETO,
            Cue.JUDGED: _row(None, Act.CANCEL, Act.ERROR),
            Cue.OVER: _row(Phase.AWAY, Act.ERROR, text=_UNASKED),
            Cue.FELL: _row(None, Act.ERROR),
        },
        Phase.HOLDING: {
            Cue.ARRIVED: _row(Phase.STOPPED, Act.ANSWER_HOLD, Act.ASK),
            Cue.FELL: _row(Phase.STOPPED, Act.REFUSE_HOLD, Act.CANCEL, Act.ERROR),
            Cue.GO: _row(Phase.ARMED, Act.ANSWER_HOLD),
            Cue.JUDGED: _row(None, Act.CANCEL, Act.ERROR),
            Cue.CARRIER_RESET: _row(Phase.STOPPED, Act.ASK),
            Cue.STARTED: _row(Phase.STOPPED),
        },
        Phase.STOPPED: {
            Cue.RESUME: _BACK,
            Cue.GO: _BACK,
            Cue.RUNS: _BACK,
            # RESUME comes before it, unless the VM was paused when the migration began. Such a VM may be waiting for
            # its very first RESUME here, and its copy may run instead: what stands goes on standing.
            Cue.BACK: _row(None, Act.ASK),
            Cue.LIVE: _row(None, *_BEGIN),
            Cue.HOLD: _row(Phase.HOLDING),
            Cue.HOLD_BLIND: _row(Phase.HOLDING),
            Cue.SAVE: _row(Phase.SAVING),
            Cue.SAVE_BLIND: _row(Phase.SAVING),
            Cue.SAVE_REFUSED: _VETO,
            Cue.JUDGED: _row(None, Act.CANCEL, Act.ERROR),
            Cue.FELL: _row(None, Act.CANCEL, Act.ERROR),
            Cue.OVER: _row(Phase.AWAY, Act.ERROR, text=_UNASKED),
        },
        Phase.SAVING: {
            Cue.ARRIVED: _row(Phase.SAVED, Act.ANSWER_SAVE),
            Cue.FELL: _row(Phase.STOPPED, Act.REFUSE_SAVE, Act.ERROR),
            Cue.CARRIER_RESET: _row(Phase.STOPPED, Act.ASK),
            Cue.RESUME: _row(None, Act.ASK),
            Cue.RUNS: _UNSAVED,
            Cue.GO: _UNSAVED,
            Cue.BACK: _row(Phase.STOPPED, Act.REFUSE_SAVE, Act.ASK, text="the migration was given up"),
            Cue.JUDGED: _row(Phase.STOPPED, Act.REFUSE_SAVE, Act.CANCEL, Act.ERROR),
            Cue.STARTED: _row(Phase.STOPPED),
            Cue.OVER: _row(Phase.AWAY, Act.REFUSE_SAVE, Act.ERROR, text=_UNASKED),
        },
        Phase.SAVED: {
            Cue.RESUME: _row(None, Act.ASK),
            Cue.RUNS: _BACK,
            Cue.GO: _BACK,
            Cue.BACK: _row(None, Act.ASK),
            Cue.OVER: _row(Phase.AWAY),
            Cue.LIVE: _row(Phase.STOPPED, *_BEGIN),
            Cue.JUDGED: _row(None, Act.CANCEL, Act.ERROR),
            # Asked again, for another part of it: it has not changed.
            Cue.SAVE: _row(Phase.SAVING),
            Cue.SAVE_BLIND: _row(Phase.SAVING),
            Cue.HOLD: _row(None, Act.ANSWER_HOLD),
            Cue.HOLD_BLIND: _row(None, Act.ANSWER_HOLD),
        },
        Phase.AWAY: {
            Cue.RESUME: _row(Phase.ARMED, Act.INFO, text="the VM is taken back after it had moved"),
            Cue.GO: _row(Phase.ARMED, Act.INFO, text="the VM is taken back after it had moved"),
            Cue.RUNS: _row(Phase.ARMED, Act.INFO, text="the VM is taken back after it had moved"),
            Cue.FELL: _row(None, Act.ERROR),
            Cue.HOLD: _row(None, Act.ANSWER_HOLD),
            Cue.HOLD_BLIND: _row(None, Act.ANSWER_HOLD),
        },
        Phase.INCOMING: {
            Cue.LOAD: _row(Phase.LOADING),
            Cue.RESUME: _BAR,
            Cue.GO: _BAR,
            Cue.RUNS: _BAR,
            Cue.OVER: _BAR,
            Cue.BACK: _BAR_LOST,
        },
        Phase.LOADING: {
            Cue.ARRIVED: _row(Phase.LOADED, Act.REPLAY, Act.ANSWER_LOAD_EARLY),
            Cue.FELL: _row(Phase.BARRED, Act.REFUSE_LOAD, Act.ERROR),
            Cue.CARRIER_RESET: _row(Phase.BARRED, Act.ERROR, text="the carrier was lost while the state was loaded"),
            Cue.RESUME: _BAR_LOADING,
            Cue.GO: _BAR_LOADING,
            Cue.RUNS: _BAR_LOADING,
            Cue.BACK: _row(Phase.BARRED, Act.REFUSE_LOAD, Act.INFO, text=_LOST),
            Cue.STARTED: _row(Phase.BARRED, Act.ERROR, text="the daemon was started anew while the state was loaded"),
        },
        Phase.LOADED: {
            Cue.REPLAYED: _row(Phase.READY, Act.ANSWER_LOAD_LATE),
            Cue.UNREPLAYED: _row(Phase.BARRED, Act.REFUSE_LOAD_LATE, Act.ERROR),
            Cue.RESUME: _row(Phase.GOING),
            Cue.GO: _row(Phase.GOING),
            Cue.RUNS: _row(Phase.GOING),
            Cue.BACK: _row(Phase.BARRED, Act.REFUSE_LOAD_LATE, Act.INFO, text=_LOST),
            # The VM has not run yet, as far as was heard: writing it once more is no harm.
            Cue.STARTED: _row(None, Act.REPLAY),
        },
        Phase.READY: {
            Cue.RESUME: _row(Phase.RUNNING),
            Cue.GO: _row(Phase.RUNNING),
            Cue.RUNS: _row(Phase.RUNNING),
            Cue.BACK: _BAR_LOST,
            # It goes on to another host before it ever ran here.
            Cue.LIVE: _row(Phase.STOPPED, *_BEGIN),
            Cue.SAVE: _row(Phase.SAVING, Act.ARM),
            Cue.SAVE_BLIND: _row(Phase.SAVING, Act.ARM),
            Cue.HOLD: _row(None, Act.ANSWER_HOLD),
            Cue.HOLD_BLIND: _row(None, Act.ANSWER_HOLD),
        },
        Phase.GOING: {
            Cue.REPLAYED: _row(Phase.RUNNING),
            Cue.UNREPLAYED: _row(Phase.BARRED, Act.ERROR),
            Cue.STOP: _row(Phase.LOADED),
            Cue.STARTED: _row(Phase.BARRED, Act.ERROR, text="the daemon was started anew before it knew the replay"),
        },
        Phase.BARRED: {
            Cue.LIVE: _row(None, Act.CANCEL, Act.ERROR, text="its functions do not have the guest's state"),
            Cue.FELL: _row(None, Act.ERROR),
        },
    }
)
#: What a carrier is told that waits for something for which there is no row.
REFUSALS: Mapping[Cue, Row] = MappingProxyType(
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
WANTED: Mapping[Phase, Place | None] = MappingProxyType(
    {
        Phase.ABSENT: None,
        Phase.RUNNING: Place.RUNS,
        Phase.ARMED: Place.RUNS,
        Phase.HOLDING: Place.STANDS,
        Phase.STOPPED: Place.STANDS,
        Phase.SAVING: Place.SAVED,
        Phase.SAVED: Place.STANDS,
        Phase.AWAY: Place.STANDS,
        Phase.INCOMING: None,
        Phase.LOADING: Place.LOADED,
        Phase.LOADED: Place.LOADED,
        Phase.READY: Place.LOADED,
        Phase.GOING: Place.LOADED,
        Phase.BARRED: Place.BARRED,
    }
)
_HALTED: Mapping[Place, Deed | None] = MappingProxyType(
    {
        Place.FRESH: Deed.STOP,
        Place.RUNS: Deed.STOP,
        Place.UNSURE: Deed.STOP,
        Place.STANDS: None,
        Place.SAVED: None,
        Place.LOADED: None,
        Place.BARRED: None,
    }
)
#: The next step from a place to where a phase wants a function; None if it is there.
ROUTES: Mapping[Place, Mapping[Place, Deed | None]] = MappingProxyType(
    {
        Place.RUNS: {
            Place.FRESH: None,
            Place.RUNS: None,
            Place.STANDS: Deed.RESUME,
            Place.SAVED: Deed.RESUME,
            Place.LOADED: Deed.RESUME,
            Place.UNSURE: Deed.RESUME,
            Place.BARRED: None,
        },
        Place.STANDS: _HALTED,
        Place.SAVED: {**_HALTED, Place.STANDS: Deed.SAVE, Place.LOADED: Deed.SAVE},
        Place.LOADED: {**dict.fromkeys(Place, Deed.LOAD), Place.LOADED: None},
        Place.BARRED: {**dict.fromkeys(Place, Deed.BAR), Place.BARRED: None},
    }
)
#: Where a function is after what was done to it.
DONE: Mapping[Deed, Place] = MappingProxyType(
    {
        Deed.STOP: Place.STANDS,
        Deed.SAVE: Place.SAVED,
        Deed.LOAD: Place.LOADED,
        Deed.RESUME: Place.RUNS,
        Deed.BAR: Place.BARRED,
    }
)
#: Where it is after what could not be done.
UNDONE: Mapping[Deed, Place] = MappingProxyType({**dict.fromkeys(Deed, Place.UNSURE), Deed.SAVE: Place.STANDS})
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
BEGINNINGS: Mapping[str, tuple[Phase, Place]] = MappingProxyType(
    {
        "inmigrate": (Phase.INCOMING, Place.FRESH),
        "finish-migrate": (Phase.STOPPED, Place.UNSURE),
        "postmigrate": (Phase.AWAY, Place.UNSURE),
    }
)
#: Carriers that are answered before the replay is read back: QEMU carries out what was written before it goes on.
ANSWERED_EARLY = frozenset({Carrier.DBUS_VMSTATE})
#: What is worth knowing when QEMU ends in a phase.
FAREWELLS: Mapping[Phase, str] = MappingProxyType(
    {
        Phase.SAVED: "QEMU ended after the state was handed over: the functions may run elsewhere, and stay stopped",
        Phase.LOADING: "QEMU ended while the state was loaded",
        Phase.LOADED: "QEMU ended after the state was loaded, and before the VM ran here",
        Phase.READY: "QEMU ended after the state was loaded, and before the VM ran here",
    }
)
