"""Not attacks, but proofs that the kit would see them."""

from __future__ import annotations

import os
import signal
import time

from hostilekit.case import Stage, attack


@attack(proof=True, seconds=1.0)
def stopped_daemon(stage: Stage) -> None:
    """The daemon does not run for 0.4 s, and nothing keeps it from running but its own state."""
    os.kill(stage.daemon, signal.SIGSTOP)
    time.sleep(0.4)
    os.kill(stage.daemon, signal.SIGCONT)
