"""A small vfio-user server of its own, written by hand, that can be told to break one rule at a time.

It shares no code with the daemon. Every fault has a name, `area/what is wrong`; where the code asks `self.bad(name)` or
`self.need(name, …)` the fault of that name makes it do the wrong thing, or leave a check out. The table in
`mutants.caught` says which case of the conformance suite has to catch which; `name@variant` asks for a device that
lacks something besides.

Made without dataclasses, whose import would be half of what it takes to start: some tests start it hundreds of times.
"""

from __future__ import annotations

from mutants.server import Server, Variant, serving

__all__ = ["Server", "Variant", "serving"]
