"""Whether a VM would migrate, asked by people and scripts before they try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import trio

from vfiouser_oob.vm.counterpart import FunctionOffer, VmOffer, mismatches
from vfiouser_oob.vm.monitor import MonitorError
from vfiouser_oob.vm.preflight import FunctionFacts, Moment, Weight, judge
from vfiouser_oob.vm.runner import VmRunner
from vfiouser_oob.vm.survey import survey

#: Seconds that a function's agent may take; who asks by the control socket waits for 5.
DESCRIBE_S = 3.0


class OfferedFunction(Protocol):
    """One function of a VM, as far as it is asked beforehand."""

    @property
    def name(self) -> str:
        """Its name."""

    def facts(self) -> FunctionFacts:
        """What is known of it."""

    async def offer(self, deadline: float) -> FunctionOffer:
        """What this host says of it to another one; asks its agent.

        Args:
            deadline: when to give up, as trio's clock has it.
        """


async def check_migration(
    runner: VmRunner, functions: Sequence[OfferedFunction], destination: VmOffer | None
) -> dict[str, Any]:
    """Find what would be in the way of a VM's migration.

    Args:
        runner: the VM's.
        functions: its functions.
        destination: what the other host says of itself; None to leave it out.

    Returns:
        `vm`, `migratable`, `offer`, which is what this host says of itself, and `reasons`, each with `code`, `text` and
        `weight`.
    """
    ours = await offer_of(runner, functions)
    foreign = {} if destination is None else mismatches(ours, destination, runner.record.carrier.value)
    known = tuple(replace(each.facts(), mismatch=foreign.get(each.name, "")) for each in functions)
    try:
        facts = await survey(runner.record, runner.monitor, known)
    except MonitorError:  # it has gone, or its main loop stands still
        facts = await survey(runner.record, None, known)
    reasons = judge(facts, Moment.REST)
    return {
        "vm": runner.config.name,
        "migratable": not any(each.weight is Weight.REFUSED for each in reasons),
        "reasons": [{"code": each.code, "text": each.text, "weight": each.weight.value} for each in reasons],
        "offer": ours.to_document(),
    }


async def offer_of(runner: VmRunner, functions: Sequence[OfferedFunction]) -> VmOffer:
    """Collect what this host says of a VM to another one.

    Args:
        runner: the VM's.
        functions: its functions.
    """
    offers: dict[str, FunctionOffer] = {}

    async def ask(function: OfferedFunction) -> None:
        offers[function.name] = await function.offer(trio.current_time() + DESCRIBE_S)

    async with trio.open_nursery() as nursery:
        for function in functions:
            nursery.start_soon(ask, function)
    carriers = tuple(kind.value for kind in runner.carriers.kinds)
    return VmOffer(runner.config.name, carriers, {each.name: offers[each.name] for each in functions})
