"""Asks a QEMU what `preflight` judges by."""

from __future__ import annotations

from typing import Any

from vfiouser_oob.vm.monitor import RefusedError
from vfiouser_oob.vm.movable import VmMonitor
from vfiouser_oob.vm.preflight import QUERIES, FunctionFacts, VmFacts, read_answers
from vfiouser_oob.vm.record import VmRecord


async def survey(record: VmRecord, monitor: VmMonitor | None, functions: tuple[FunctionFacts, ...]) -> VmFacts:
    """Collect what is known of a VM.

    Args:
        record: the VM's.
        monitor: its QEMU's; None if it is not connected.
        functions: what is known of its functions.

    Returns:
        The facts; what QEMU would not say is left out.

    Raises:
        UnansweredError: QEMU did not answer in time.
        GoneError: the monitor was lost.
    """
    if monitor is None:
        return VmFacts(phase=record.phase, connected=False, carrier=record.carrier, functions=functions)
    answers: dict[str, Any] = {}
    for name, (command, arguments) in QUERIES.items():
        try:
            answers[name] = await monitor.execute(command, arguments)
        except RefusedError:
            continue
    return VmFacts(
        phase=record.phase,
        tells=monitor.found.tells,
        version=monitor.greeting.version,
        carrier=record.carrier,
        functions=functions,
        **read_answers(answers),
    )
