"""Interrupts that the device itself raises."""

from __future__ import annotations

from vfiouser_conformance import wire
from vfiouser_conformance.case import CaseEffect, Level, NotApplicable, check
from vfiouser_conformance.cases.irqs import AREA as AREA
from vfiouser_conformance.cases.irqs import SET, UNMASK_NONE, assign, check_signals
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.trial import SILENCE_S, Trial, signalled
from vfiouser_protocol.constants import IrqIndex

MUST, SHOULD = Level.MUST, Level.SHOULD


def _ready(t: Trial) -> RawLink:
    link = t.attach()
    t.stimulus.prepare(link)
    return link


def _edge(t: Trial, least: int = 1) -> int:
    """An IRQ type of single interrupts that the device can raise."""
    for index in (IrqIndex.MSIX, IrqIndex.MSI):
        if t.facts.irq_count(index) >= least:
            return index
    raise NotApplicable(f"the device has neither MSI-X nor MSI with {least} vectors")


@AREA.case(60, MUST, "R180 R207", effect=CaseEffect.DEVICE)
def raised(t: Trial) -> None:
    """An interrupt of the device signals the eventfd of its vector, and no other.

    Sends: eventfds for two vectors; the device raises the first, and the second if it can choose.
    Expects: each time the right one is signalled.
    """
    index = _edge(t, 2)
    link = _ready(t)
    events = assign(t, link, index, 0, 2)
    t.stimulus.raise_irq(link, index, 0)
    check_signals(t, events, [True, False], "the interrupt of vector 0")
    try:
        t.stimulus.raise_irq(link, index, 1)
    except NotApplicable:
        return
    check_signals(t, events, [False, True], "the interrupt of vector 1")


@AREA.case(61, MUST, "R206", effect=CaseEffect.DEVICE)
def raised_without_eventfd(t: Trial) -> None:
    """An interrupt of a vector that has no eventfd is lost, and no harm is done.

    Sends: the device raises vectors that have no eventfd.
    Expects: the connection goes on.
    """
    index = _edge(t)
    link = _ready(t)
    t.stimulus.raise_irq(link, index, 0)
    link.alive()


@AREA.case(62, MUST, "R194 R195", effect=CaseEffect.DEVICE)
def raised_after_disable(t: Trial) -> None:
    """A type that was disabled signals nothing.

    Sends: an eventfd, disable of the type; the device raises the vector.
    Expects: nothing is signalled.
    """
    index = _edge(t)
    link = _ready(t)
    events = assign(t, link, index, 0, 1)
    link.ok(SET, wire.set_irqs(0x21, index, 0, 0))
    t.stimulus.raise_irq(link, index, 0)
    link.alive()
    check_signals(t, events, [False], "the interrupt of a disabled type")


@AREA.case(63, MUST, "R180", effect=CaseEffect.DEVICE)
def intx(t: Trial) -> None:
    """An asserted INTx line signals its eventfd.

    Sends: an eventfd for INTx; the device asserts the line.
    Expects: a signal.
    """
    if not t.facts.irq_count(IrqIndex.INTX):
        raise NotApplicable("the device has no INTx")
    link = _ready(t)
    events = assign(t, link, IrqIndex.INTX, 0, 1)
    t.at_end(lambda: t.stimulus.set_intx(link, False))
    t.stimulus.set_intx(link, True)
    check_signals(t, events, [True], "the asserted line")


@AREA.case(64, SHOULD, "R208", effect=CaseEffect.DEVICE)
def automask(t: Trial) -> None:
    """INTx masks itself when it fires, and fires again when it is unmasked while asserted.

    Sends: an eventfd; the device asserts the line, releases and asserts it; UNMASK; release; UNMASK.
    Expects: one signal, one more after the first UNMASK, none after the second.
    """
    if not t.facts.irq_count(IrqIndex.INTX) or not t.facts.irqs[IrqIndex.INTX][0] & 4:
        raise NotApplicable("INTx of the device does not mask itself")
    link = _ready(t)
    event = assign(t, link, IrqIndex.INTX, 0, 1)[0]
    t.at_end(lambda: t.stimulus.set_intx(link, False))
    t.stimulus.set_intx(link, True)
    check(signalled(event, t.timeout), "the asserted line was not signalled")
    t.stimulus.set_intx(link, False)
    t.stimulus.set_intx(link, True)
    check(not signalled(event, SILENCE_S), "a masked line was signalled")
    link.ok(SET, wire.set_irqs(UNMASK_NONE, IrqIndex.INTX, 0, 1))
    check(signalled(event, t.timeout), "the line was asserted at UNMASK, and not signalled again")
    t.stimulus.set_intx(link, False)
    link.ok(SET, wire.set_irqs(UNMASK_NONE, IrqIndex.INTX, 0, 1))
    check(not signalled(event, SILENCE_S), "a released line was signalled at UNMASK")


@AREA.case(65, MUST, "R205", effect=CaseEffect.DEVICE)
def intx_and_msix(t: Trial) -> None:
    """INTx and MSI-X do not share eventfds.

    Sends: an eventfd for INTx and one for MSI-X vector 0; disable of MSI-X; the device asserts INTx.
    Expects: INTx's eventfd is signalled, MSI-X's is not.
    """
    if not t.facts.irq_count(IrqIndex.INTX) or not t.facts.irq_count(IrqIndex.MSIX):
        raise NotApplicable("the device lacks INTx or MSI-X")
    link = _ready(t)
    line = assign(t, link, IrqIndex.INTX, 0, 1)
    vector = assign(t, link, IrqIndex.MSIX, 0, 1)
    link.ok(SET, wire.set_irqs(0x21, IrqIndex.MSIX, 0, 0))
    t.at_end(lambda: t.stimulus.set_intx(link, False))
    t.stimulus.set_intx(link, True)
    check_signals(t, [*line, *vector], [True, False], "the asserted line")
