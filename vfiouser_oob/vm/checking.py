"""Whether a VM would migrate, asked by people and scripts before they try."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import trio

from vfiouser_oob.vm.counterpart import FunctionOffer, VmOffer, mismatches
from vfiouser_oob.vm.monitor import MonitorError
from vfiouser_oob.vm.movable import MovableFunction
from vfiouser_oob.vm.preflight import Moment, Weight, judge
from vfiouser_oob.vm.runner import VmRunner
from vfiouser_oob.vm.survey import survey

#: Seconds that a function's agent may take; who asks by the control socket waits for 5.
DESCRIBE_S = 3.0


async def check_migration(runner: VmRunner, destination: VmOffer | None) -> dict[str, Any]:
    """Find what would be in the way of a VM's migration.

    Args:
        runner: the VM's.
        destination: what the other host says of itself; None to leave it out.

    Returns:
        `vm`, `offer`, which is what this host says of itself, and `reasons`, each with `code`, `text` and `weight`.
    """
    ours = await offer_of(runner)
    foreign = {} if destination is None else mismatches(ours, destination, runner.record.carrier.value)
    functions = tuple(replace(each.facts(), mismatch=foreign.get(each.name, "")) for each in runner.functions.values())
    try:
        facts = await survey(runner.record, runner.monitor, functions)
    except MonitorError:  # it has gone, or its main loop stands still
        facts = await survey(runner.record, None, functions)
    reasons = judge(facts, Moment.REST)
    return {
        "vm": runner.config.name,
        "offer": ours.to_document(),
        "reasons": [{"code": each.code, "text": each.text, "weight": each.weight.value} for each in reasons],
        "migratable": not any(each.weight is Weight.REFUSED for each in reasons),
    }


async def offer_of(runner: VmRunner) -> VmOffer:
    """Collect what this host says of a VM to another one.

    Args:
        runner: the VM's.
    """
    offers: dict[str, FunctionOffer] = {}

    async def ask(function: MovableFunction) -> None:
        offers[function.name] = await function.offer(trio.current_time() + DESCRIBE_S)

    async with trio.open_nursery() as nursery:
        for function in runner.functions.values():
            nursery.start_soon(ask, function)
    carriers = tuple(kind.value for kind in runner.carriers.kinds)
    return VmOffer(runner.config.name, carriers, {name: offers[name] for name in runner.functions})
