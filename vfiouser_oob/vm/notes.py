"""What one VM's migration leaves to the daemon after this one, taken down before anything is done about it.

The record is all that the machine knows. Beside it goes what came of functions that QEMU may not have yet: that is what
a replay is made of. A state itself is never taken down: where it is lost, the migration fails.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from vfiouser_oob import __version__
from vfiouser_oob.config.vms import VmConfig
from vfiouser_oob.observability.log import Logger
from vfiouser_oob.persist.successor.things import ArrivedThing, VmThing
from vfiouser_oob.server.ledger import Ledger
from vfiouser_oob.vm.bundle import FunctionState
from vfiouser_oob.vm.record import VmPhase, VmRecord


@dataclass(frozen=True, slots=True)
class LeftVm:
    """What another daemon knew of a VM.

    Args:
        record: that.
        arrived: what came of its functions, by their names; without their own states, which they have.
    """

    record: VmRecord
    arrived: Mapping[str, FunctionState] = field(default_factory=dict)


def vm_identity(config: VmConfig) -> str:
    """What a VM is configured to be, as a digest: a daemon that is told otherwise begins anew."""
    about = (config.functions, sorted(config.sockets.items()), config.carrier, config.vhost_user_fs_listens)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


class VmNotes:
    """Takes down what a VM does, and knows what another daemon has taken down.

    Args:
        config: the VM.
        ledger: where to; None if nothing is kept.
        log: a logger.
    """

    def __init__(self, config: VmConfig, ledger: Ledger | None, log: Logger) -> None:
        self._names = config.functions
        self._identity = vm_identity(config)
        self._ledger = ledger
        self._written: VmRecord | None = None
        #: What another daemon has left.
        self.left = None if ledger is None else self._read(ledger, log)

    def _read(self, ledger: Ledger, log: Logger) -> LeftVm | None:
        for thing in ledger.left(VmThing):
            if thing.identity != self._identity:
                log.warning("the VM is configured to be another one now: what was known of it is forgotten")
                return None
            try:
                record = VmRecord.from_json(thing.text)
            except ValueError as error:
                log.error("what was known of the VM cannot be used", reason=str(error), written_by=thing.program)
                return None
            if record.phase is VmPhase.ABSENT:
                return None
            arrived = {
                self._names[each.number]: FunctionState(
                    self._names[each.number], by_client=each.by_client, registers=each.registers
                )
                for each in ledger.left(ArrivedThing)
                if each.number < len(self._names)
            }
            return LeftVm(record, arrived)
        return None

    def record(self, record: VmRecord) -> None:
        """What is known from now on; to be called before anything is done about it."""
        if self._ledger is not None and record != self._written:
            self._written = record
            self._ledger.put(VmThing(self._identity, __version__, record.to_json()))

    def arrived(self, states: Mapping[str, FunctionState]) -> None:
        """What has come of the functions."""
        if self._ledger is not None:
            for number, name in enumerate(self._names):
                state = states[name]
                self._ledger.put(ArrivedThing(number, state.by_client, state.registers))

    def settled(self) -> None:
        """QEMU has what came, or never will."""
        if self._ledger is not None and self._written is not None:
            self._ledger.forget(ArrivedThing)

    def close(self) -> None:
        """Nothing more is taken down: what is done from now on is the end."""
        self._ledger = None
