"""Whether a function offers the P2P states, and why.

A VMM with several functions moves all of them into a P2P state before it stops the first, so that none does DMA to one
that stands still already. Ours goes on in such a state; that does no harm where it reaches no peer's BAR. QEMU migrates
a VM of several functions only if each of them offers P2P, so it is enough that each one speaks for itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from vfiouser_oob.config.agents import MigrationConfig, P2p
from vfiouser_oob.config.schema import FunctionConfig


class P2pOffer(NamedTuple):
    """What a client is offered.

    Args:
        offered: whether the P2P states are.
        reason: why, for people.
    """

    offered: bool
    reason: str


#: What "auto" comes to, by whether the device's DMA may reach a peer's BAR.
_AUTOMATIC = {
    True: P2pOffer(False, "where a client sends no descriptor, its DMA goes by messages, which can reach a peer's BAR"),
    False: P2pOffer(True, "its DMA reaches only memory that a client sent a descriptor for, so no peer's BAR"),
}
_CHOSEN = {
    P2p.ON: P2pOffer(True, 'migration.p2p is "on"'),
    P2p.OFF: P2pOffer(False, 'migration.p2p is "off"'),
}


def p2p_offer(function: FunctionConfig) -> P2pOffer:
    """Say whether a function offers the P2P states.

    Args:
        function: as it is configured.
    """
    return _CHOSEN.get(function.migration.p2p) or _AUTOMATIC[function.device.peer_dma]


def settled(function: FunctionConfig) -> MigrationConfig:
    """Return how a function is migrated, with nothing left to be found out.

    Args:
        function: as it is configured.
    """
    return replace(function.migration, p2p=P2p.ON if p2p_offer(function).offered else P2p.OFF)
