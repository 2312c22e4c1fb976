"""What the figures are judged by: the budgets of the design, in one place."""

from __future__ import annotations

from vfiouser_oob.lab.bench.results import Budget

#: A trapped read of a model, as a multiple of a blocking echo; the same through another server, of the model's.
READ = Budget(0.45)
UPSTREAM_READ = Budget(1.9)
#: Maps, as a part of an empty loop's; with 65 535 ranges, of those with 64.
MAPS = Budget(0.6, at_most=False)
MANY_MAPS = Budget(0.9, at_most=False)
#: Milliseconds from connect() to the end of what a VMM asks.
ATTACH_MS = Budget(0.8)
UPSTREAM_ATTACH_MS = Budget(2.5)
#: Megabytes of a daemon with one function, and of each further one.
FIRST_FUNCTION_MB = Budget(40)
FURTHER_FUNCTION_MB = Budget(0.1)
NO_WAKE_UPS = Budget(0)
#: State, as a part of a plain copy's rate.
SAVING = Budget(0.8, at_most=False)
LOADING = Budget(0.7, at_most=False)
#: Many functions that migrate at once, as a part of the rate of one.
CROWD = Budget(0.9, at_most=False)
#: Milliseconds of downtime beyond the agent's own.
ADDED_DOWNTIME_MS = Budget(3)
#: Milliseconds that a connected client waits for an answer while the daemon is restarted or killed.
RESTART_MS = Budget(1500)
