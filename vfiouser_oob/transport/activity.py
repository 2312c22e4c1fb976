"""Bounded, adaptive spinning: why a trapped register read need not pay for a wake-up.

A guest that polls a register sends its next request some 20 µs after our reply. Going to sleep in between costs two
scheduler wake-ups, which is most of the round trip. So a reader may look for the next request for a moment before it
sleeps, under three rules:

Rule 1: it spins only while requests have been coming back to back, and less and less often while that does not pay
        (another process may need the processor that we spin on).
Rule 2: it spins at most `SPIN_NS`, and not at all while any other task of the daemon is ready to run.
Rule 3: it watches the sockets of all clients and upstream servers while it spins, and stops as soon as another one has
        work. Those of agents, of the control socket and of listeners are not among them: what comes there waits for the
        end of a spin.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

import trio

#: How long to look for the next message. Two to three times what a client needs between a reply and its next request.
SPIN_NS = 60_000
#: A gap of up to this between messages counts as back to back. It includes our own wake-up when we did sleep and, when
#: the client reaches us through another daemon, that one's wake-ups: a limit below them would never let spinning begin.
BACK_TO_BACK_NS = 1_000_000
#: After spins in vain up to 2^2 chances to spin are passed over. With more, a chain of daemons that has once fallen
#: asleep stays so: none of them spins at the moment when another one does.
_MAX_BACK_OFF = 2


class Activity(trio.abc.Instrument):
    """The message sockets of one daemon, watched together while one of its readers spins.

    Args:
        spin_ns: longest spin in nanoseconds; 0 turns spinning off.
    """

    def __init__(self, spin_ns: int = SPIN_NS) -> None:
        self._epoll = select.epoll()
        # With a single processor the peer could not even run while we look for its message.
        self._spin_ns = spin_ns if len(os.sched_getaffinity(0)) > 1 else 0
        self._ready_tasks = 0
        self._pass_over = 0
        self._failures = 0
        #: Sockets that hold messages which wait for their answers: that there is something to read says nothing.
        self.holding: set[int] = set()
        #: Whether processors are wanted for something better than spinning, such as state on its way.
        self.busy: Callable[[], bool] = lambda: False
        if self._spin_ns:
            trio.lowlevel.add_instrument(self)

    # Counting the tasks that are ready to run: asking trio for it costs more than the rest of the hot path.

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        """Count a task that becomes ready (called by trio)."""
        self._ready_tasks += 1

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count a ready task that gets its turn (called by trio)."""
        if self._ready_tasks:
            self._ready_tasks -= 1

    def register(self, fd: int) -> None:
        """Watch a socket from now on."""
        self._epoll.register(fd, select.EPOLLIN)

    def unregister(self, fd: int) -> None:
        """Stop watching a socket; it is still open."""
        self.holding.discard(fd)
        self._epoll.unregister(fd)

    def spin(self, fd: int) -> bool:
        """Look for data on one socket for a moment.

        Args:
            fd: a registered socket.

        Returns:
            True when there is data to read; False when the moment passed or somebody else has work.
        """
        if not self._spin_ns or self._ready_tasks or self.busy():
            return False
        if self._pass_over:
            self._pass_over -= 1
            return False
        poll = self._epoll.poll
        now = time.perf_counter_ns
        step_aside = os.sched_yield
        deadline = now() + self._spin_ns
        while now() < deadline:
            # With fewer processors than spinners, whoever has our answer may need this very one to get on.
            step_aside()
            ready = poll(0, 2 + len(self.holding))
            if ready and self.holding:
                ready = [each for each in ready if each[0] not in self.holding]
            if ready:
                self._failures = 0
                return len(ready) == 1 and ready[0][0] == fd
        self._pass_over = 1 << min(self._failures, _MAX_BACK_OFF)
        self._failures += 1
        return False

    def close(self) -> None:
        """Stop watching everything."""
        self._epoll.close()
