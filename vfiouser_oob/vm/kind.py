"""What a VM is to a daemon.

The rest of this room is imported with the first VM, since a daemon without one has no use for it.
"""

from __future__ import annotations

from typing import Any

from vfiouser_oob.config.vms import VmConfig
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.observability.status import VmStatus
from vfiouser_oob.server.registry import FindFunction
from vfiouser_oob.server.sockets import SocketShelf
from vfiouser_oob.server.survival import Survival
from vfiouser_oob.server.unit import Unit, UnitKind, UnitLife


def vm_kind(events: EventHub, find: FindFunction, shelf: SocketShelf, survival: Survival) -> UnitKind:
    """What a VM is as a unit of a daemon.

    Args:
        events: where changes are announced.
        find: finds a function among those that are served.
        shelf: sockets that systemd has passed; one of a VM is found by its path, or is called as `web1.monitor`.
        survival: what is kept for the daemon after this one.
    """

    def open_one(config: VmConfig) -> UnitLife:
        from vfiouser_oob.vm.hosting import open_vm

        return open_vm(config, events, find, shelf, survival.ledger_of(config.name))

    return UnitKind("VM", "[[vm]]", lambda config: config.vms, open_one, _describe, check=_check)


def _describe(unit: Unit) -> VmStatus:
    from vfiouser_oob.vm.hosting import vm_status

    return vm_status(unit)


async def _check(unit: Unit, destination: str | None) -> dict[str, Any]:
    from vfiouser_oob.vm.hosting import check_vm

    return await check_vm(unit, destination)
