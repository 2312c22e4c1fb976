"""Servers that keep the specification in ways that a test suite does not think of, and a few that torment it.

Each is the tests' small server (`mutants`) with one habit. They run as processes of their own:
`python -m plantedservers SOCKET HABIT`.
"""

from __future__ import annotations

from collections.abc import Mapping

from mutants.server import Server
from plantedservers.chains import CHAINS
from plantedservers.habits import (
    AgreesToMaps,
    AnswersErrorsWithData,
    Crashes,
    CrashesLate,
    DoesDmaInside,
    FewMaps,
    Floods,
    KeepsState,
    Leaves,
    LeavesWithStatus,
    LosesItsPlace,
    NeverListens,
    OneAtATime,
    RefusesInStopCopy,
    SerialDma,
    StaysStopped,
    VendorZero,
)

#: By name.
HABITS: Mapping[str, type[Server]] = {
    "leaves": Leaves,
    "leaves-with-status": LeavesWithStatus,
    "one-at-a-time": OneAtATime,
    "loses-its-place": LosesItsPlace,
    "refuses-in-stop-copy": RefusesInStopCopy,
    "stays-stopped": StaysStopped,
    "serial-dma": SerialDma,
    "dma-inside": DoesDmaInside,
    "keeps-state": KeepsState,
    "agrees-to-maps": AgreesToMaps,
    "vendor-zero": VendorZero,
    "few-maps": FewMaps,
    "floods": Floods,
    "crashes": Crashes,
    "crashes-late": CrashesLate,
    "never-listens": NeverListens,
    "errors-with-data": AnswersErrorsWithData,
    **CHAINS,
}
