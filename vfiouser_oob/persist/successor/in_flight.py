"""What becomes of commands that were taken by a process that is gone, and not known to be answered."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from enum import Enum
from types import MappingProxyType

from vfiouser_oob.persist.command_page import Stage, Taken
from vfiouser_protocol.constants import Command

#: Commands that do no more when they are done twice, on any device. A backend whose registers do nothing when they are
#: read may add REGION_READ.
REPEATABLE: frozenset[int] = frozenset(
    {
        Command.DEVICE_GET_INFO,
        Command.DEVICE_GET_REGION_INFO,
        Command.DEVICE_GET_REGION_IO_FDS,
        Command.DEVICE_GET_IRQ_INFO,
        Command.DEVICE_RESET,
    }
)
#: Commands whose answer says nothing that was not in them: who knows that they were executed can give it.
CONFIRMABLE: frozenset[int] = frozenset(
    {
        Command.REGION_WRITE,
        Command.DMA_MAP,
        Command.DEVICE_SET_IRQS,
        Command.DEVICE_RESET,
    }
)


class Fate(Enum):
    """What a successor does with a command. Unheard: the client shows no sign of having got the answer."""

    #: It does it as if it had just come.
    EXECUTE = "execute"
    #: It answers EIO, and does nothing.
    FAIL = "fail"
    #: It does nothing: nobody waits.
    FORGET = "forget"
    #: It executes it again.
    EXECUTE_IF_UNHEARD = "execute if unheard"
    #: It says that it was executed.
    CONFIRM_IF_UNHEARD = "confirm if unheard"
    #: It answers EIO: it failed, or was executed and must not be again.
    FAIL_IF_UNHEARD = "fail if unheard"


Rule = tuple[Callable[[Taken, Container[int]], bool], Fate]


def _whole(taken: Taken, repeatable: Container[int]) -> bool:
    return taken.payload is not None and not taken.with_fds


def _again(taken: Taken, repeatable: Container[int]) -> bool:
    return _whole(taken, repeatable) and taken.command in repeatable


def _known(taken: Taken, repeatable: Container[int]) -> bool:
    return taken.payload is not None and taken.command in CONFIRMABLE


def _always(taken: Taken, repeatable: Container[int]) -> bool:
    return True


#: By how far it was; of several rules the first that holds counts.
_RULES: Mapping[Stage, Sequence[Rule]] = MappingProxyType(
    {
        Stage.TAKEN: ((_whole, Fate.EXECUTE), (_always, Fate.FAIL)),
        Stage.BEGUN: ((_again, Fate.EXECUTE), (_always, Fate.FAIL)),
        Stage.ANSWERING: (
            (_known, Fate.CONFIRM_IF_UNHEARD),
            (_again, Fate.EXECUTE_IF_UNHEARD),
            (_always, Fate.FAIL_IF_UNHEARD),
        ),
        Stage.REFUSING: ((_always, Fate.FAIL_IF_UNHEARD),),
    }
)
#: The same where nobody waits for an answer: anything else is forgotten.
_SILENT: Mapping[Fate, Fate] = MappingProxyType({Fate.EXECUTE: Fate.EXECUTE})


def fate(taken: Taken, repeatable: Container[int] = REPEATABLE) -> Fate:
    """What to do with a command.

    Args:
        taken: what the page says of it.
        repeatable: commands that do no more when they are done twice.
    """
    decided = next(fate for holds, fate in _RULES[taken.stage] if holds(taken, repeatable))
    return _SILENT.get(decided, Fate.FORGET) if taken.no_reply else decided
