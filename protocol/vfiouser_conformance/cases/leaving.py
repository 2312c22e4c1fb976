"""A client that is gone before it has the reply to what changes most: a mapping, the migration state."""

from __future__ import annotations

from vfiouser_conformance import wire
from vfiouser_conformance.case import CaseEffect, Level, check
from vfiouser_conformance.cases.dma_map import BASE, MAP, SIZE
from vfiouser_conformance.cases.reset import AREA as AREA
from vfiouser_conformance.migration import (
    FEATURE,
    RUNNING,
    STOP,
    STOP_COPY,
    back,
    get_state,
    name,
    set_request,
    to_running,
)
from vfiouser_conformance.trial import Trial

MUST = Level.MUST


@AREA.case(16, MUST, "R032 R033", effect=CaseEffect.SESSION)
def gone_before_the_map(t: Trial) -> None:
    """A client that leaves before its DMA_MAP is answered leaves no mapping.

    Sends: DMA_MAP of a locked file, and closes at once, three times; DMA_MAP of the same range on a new connection.
    Expects: the file is released; the new mapping is made.
    """
    t.facts.maps()
    for _ in range(3):
        link = t.attach()
        file = t.locked_file(SIZE)
        link.command(MAP, wire.dma_map(BASE, SIZE), [file.to_give])
        t.drop(link)
        file.check_released("of a client that left before its DMA_MAP was answered")
    again = t.attach()
    again.ok(MAP, wire.dma_map(BASE, SIZE), [t.memfd(SIZE)])
    again.alive()


@AREA.case(17, MUST, "R033 R235")
def gone_before_the_state(t: Trial) -> None:
    """A client that leaves before its SET of the state is answered leaves a device that serves the next.

    Sends: SET STOP, and closes at once; the same with STOP_COPY; GET of the state on a new connection each.
    Expects: RUNNING, or the state that was asked for, from which the device comes back.
    """
    t.facts.migratable()
    for state in (STOP, STOP_COPY):
        link = t.attach()
        link.command(FEATURE, set_request(state))
        t.drop(link)
        again = t.attach()
        now = get_state(again)
        to_running(again)
        check(now in (RUNNING, STOP, state), f"a device left on its way to {name(state)} was found in {name(now)}")
        back(again)
        t.drop(again)
