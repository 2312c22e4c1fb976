"""How many descriptors one peer may have open here, so that the others find room.

The kernel gives out the lowest free number, so the number of a descriptor that has just come tells how many are open
in this process, whoever opened them; nobody has to count. Of what is left free, less a reserve for the control socket,
new clients and agents, a peer may hold as many again. So one alone gets half of all there is, a second one half of the
rest, and nobody can take the last ones.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Sequence

from vfiouser_oob.transport.fds import OwnedFd, close_fds
from vfiouser_oob.transport.reaper import Account
from vfiouser_protocol.errors import CommandError

#: Descriptors that no peer's may use up, or this part of a small limit. One message alone can bring 253.
_RESERVE = 512
_RESERVE_PART = 4
#: So many a peer may have in any case, while the reserve is untouched: a small VM needs no more.
_FLOOR = 32


def refusal_of(account: Account, fds: Sequence[OwnedFd]) -> CommandError | None:
    """Close descriptors that have just been received, if there is no room for them.

    Args:
        account: where they are counted already.
        fds: the descriptors.

    Returns:
        Why their command is refused when its turn has come; None when there is room.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    reserve = min(_RESERVE, limit // _RESERVE_PART)
    free = limit - reserve - 1 - max(fd.fileno() for fd in fds)
    if account.held <= free or (account.held <= _FLOOR and free > 0):
        return None
    close_fds(fds)
    return CommandError(
        f"{account.name} would have {account.held} descriptors open here, and may have {max(0, free, _FLOOR)}: this "
        f"process may have {limit} (LimitNOFILE=), and {reserve} are kept back; its {len(fds)} new ones are closed",
        errno.EMFILE,
    )
