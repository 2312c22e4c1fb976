"""The reference agent protocol, version 1: what client, server and documents share.

The methods of a session are the operations of `vfiouser_agents.operations`, by their `wire` names; those of the agent
stand here.
"""

from __future__ import annotations

PROTOCOL = "vfiouser-oob-agent"
#: Versions that we speak, the best first.
VERSIONS = (1,)
#: Messages have this many bytes at most beside the data that they carry.
OVERHEAD = 64 << 10

HELLO = "agent.hello"
PING = "agent.ping"
FUNCTIONS = "agent.functions"
OPEN = "session.open"
CLOSE = "session.close"
WATCH = "session.watch"
EVENT = "session.event"
