"""What an attack is: a function that is run in a process of its own, and the scene in which it is run."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class Scene(enum.Enum):
    """Which two functions the daemon serves; the first one is attacked."""

    MODELS = "two test devices"
    NVME = "two NVMe controllers in the daemon"
    SOC = "two NVMe controllers of one simulator behind the daemon"
    UPSTREAM = "a function whose upstream server is the attacker, and a test device"
    AGENT = "a test device whose agent is the attacker, and another one"


@dataclass(frozen=True)
class Stage:
    """Where an attack finds its victims.

    Args:
        directory: for files of the attack's own.
        daemon: process id of the daemon.
        seconds: how long the attack should go on.
    """

    directory: Path
    daemon: int
    seconds: float

    @property
    def first(self) -> Path:
        """Socket of the function that is attacked."""
        return self.directory / "first.sock"

    @property
    def second(self) -> Path:
        """Socket of the innocent client's function."""
        return self.directory / "second.sock"

    @property
    def third(self) -> Path:
        """Socket of another function, a test device that nobody uses, for clients of the attack's own."""
        return self.directory / "third.sock"

    @property
    def control(self) -> Path:
        """The control socket."""
        return self.directory / "control.sock"

    @property
    def upstream(self) -> Path:
        """Where the daemon looks for the first function's upstream server (`Scene.UPSTREAM`)."""
        return self.directory / "upstream.sock"

    @property
    def agent(self) -> Path:
        """Where the daemon looks for the first function's agent (`Scene.AGENT`)."""
        return self.directory / "agent.sock"

    def clock(self) -> Callable[[], bool]:
        """Start the attack's time; the result says whether there is some left."""
        end = time.monotonic() + self.seconds
        return lambda: time.monotonic() < end


@dataclass(frozen=True)
class Attack:
    """One case.

    Args:
        run: carries the attack out, and returns when it is over.
        scene: what it is run against.
        seconds: how long it should take.
        descriptors: limit of the daemon's descriptors (RLIMIT_NOFILE), 0 for the usual one.
        stderr: "file", or "full": the daemon's standard error is a small pipe that nobody reads.
        spare_mb: by how much the daemon's memory may have grown when the attack is over.
        budget_s: the daemon's `reply_budget_s`.
        proof: that the kit sees what it has to see: the case is to fail.
        waits: it keeps no processor busy, so that others need not take turns with it.
    """

    run: Callable[[Stage], None]
    scene: Scene
    seconds: float
    descriptors: int
    stderr: str
    spare_mb: float
    budget_s: float
    proof: bool
    waits: bool

    @property
    def name(self) -> str:
        """The function's name."""
        return self.run.__name__


#: Every attack, by name.
ATTACKS: dict[str, Attack] = {}


def attack(
    scene: Scene = Scene.MODELS,
    *,
    seconds: float = 2.0,
    descriptors: int = 0,
    stderr: str = "file",
    spare_mb: float = 16.0,
    budget_s: float = 1.0,
    proof: bool = False,
    waits: bool = False,
    possible: bool = True,
) -> Callable[[Callable[[Stage], None]], Callable[[Stage], None]]:
    """Make a function a case of the suite; see `Attack` for the arguments.

    Where this user on this machine cannot carry it out, it is not `possible`, and no case.
    """

    def register(run: Callable[[Stage], None]) -> Callable[[Stage], None]:
        assert run.__name__ not in ATTACKS, f"there are two attacks called {run.__name__}"
        if possible:
            ATTACKS[run.__name__] = Attack(run, scene, seconds, descriptors, stderr, spare_mb, budget_s, proof, waits)
        return run

    return register
