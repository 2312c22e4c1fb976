"""Clients by name: the cases that play each of them, so that a server can be asked whether it would do for one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from vfiouser_conformance.case import Case


class ClientProfile(NamedTuple):
    """A client that the suite plays.

    Args:
        title: who it is.
        cases: the numbers of its cases in the area CLIENT.
    """

    title: str
    cases: tuple[int, ...]


#: A client that somebody has to support is named here; the cases say what it does.
CLIENTS: Mapping[str, ClientProfile] = MappingProxyType(
    {
        "qemu": ClientProfile("QEMU: attach, run, unplug, reset, private memory", (1, 2, 3, 4, 5)),
        "qemu-v1": ClientProfile("the older QEMU forks, which migrate by the v1 region", (6, 7)),
        "qemu-v2": ClientProfile(
            "QEMU's client with migration, as its patches in review have it",
            (1, 2, 3, 4, 5, 14, 16, 17, 18, 19, 20, 21, 22, 23),
        ),
        "rust-vmm": ClientProfile("rust-vmm's client, as in Cloud Hypervisor", (8, 15)),
        "libvfio-user": ClientProfile("libvfio-user's sample client", (9,)),
        "small": ClientProfile("clients that offer little or take little", (10, 11)),
        "snapshots": ClientProfile("clients that keep a stream, and go by the headers of its messages", (12, 13)),
    }
)


def cases_of(client: str, cases: Iterable[Case]) -> list[Case]:
    """Choose the cases that play a client.

    Args:
        client: its name.
        cases: to choose from.
    """
    names = {f"CLIENT-{number:03}" for number in CLIENTS[client].cases}
    return [case for case in cases if case.name in names]
