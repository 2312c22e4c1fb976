"""The client profile of stock QEMU sends what the installed QEMU sends."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from mutants import serving
from vfiouser_conformance import describe, wire
from vfiouser_conformance.cases import all_cases
from vfiouser_conformance.runner import CaseVerdict, Runner
from vfiouser_conformance.trial import Target
from vmbed.assets import Assets
from vmbed.qemu import QemuConfig, VfioUserDevice, start_qemu

pytestmark = pytest.mark.vm

ATTACH = "CLIENT-001"
MEMORY_MIB = 64  # as the profile has it
DEADLINE_S = 60.0


def profile(path: Path) -> list[str]:
    """What the profile sends when it attaches."""
    case = next(case for case in all_cases() if case.name == ATTACH)
    with serving(str(path)) as server:
        outcome = Runner(Target(str(path))).run([case])
        log = list(server.heard)
    assert CaseVerdict.PASSED is outcome.results[0].verdict
    # Before it the run finds out what the device has, after it, last, that the server still serves.
    begins = [index for index, (command, _) in enumerate(log) if command == 1]
    return words(log[begins[-2] : begins[-1]])


def words(log: list[tuple[int, bytes]]) -> list[str]:
    """Messages as text, so that a difference can be read."""
    return [describe.message(wire.pack(command, payload)) for command, payload in log]


async def test_qemu_attaches_as_its_profile(assets: Assets, workdir: Path) -> None:
    """From VERSION to the machine's final memory layout, every message of QEMU is that of the profile."""
    expected = await trio.to_thread.run_sync(profile, workdir / "p.sock")
    path = workdir / "q.sock"
    with serving(str(path)) as server:
        machine = QemuConfig([VfioUserDevice(path)], accel="qtest", memory_mib=MEMORY_MIB)
        async with start_qemu(assets, machine, workdir):
            await trio.to_thread.run_sync(server.wait_heard, len(expected), DEADLINE_S)
        actual = words(server.heard)
    assert expected == actual[: len(expected)]
