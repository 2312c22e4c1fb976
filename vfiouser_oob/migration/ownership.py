"""Who moves a function's state: the first that begins to, until it runs again or is reset."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from types import MappingProxyType

from vfiouser_oob.migration.record import MigrationRecord, Owner
from vfiouser_protocol.errors import CommandError

#: Who moves the state, for those that are refused.
_HOLDERS: Mapping[Owner, str] = MappingProxyType(
    {
        Owner.V1: "generation v1",
        Owner.V2: "generation v2",
        Owner.CARRIER: "the carrier of its VM",
    }
)


def require_owner(record: MigrationRecord, owner: Owner, what: str) -> None:
    """Refuse a command of who does not own the migration.

    Args:
        record: what is known of it.
        owner: whose command it is.
        what: the command's name.

    Raises:
        CommandError: EBUSY.
    """
    holder = record.owner
    if holder not in (None, owner):
        assert holder is not None
        raise CommandError(f"{what}: the migration belongs to {_HOLDERS[holder]} until RUNNING or a reset", errno.EBUSY)
