"""What our own servers of agents speak: names alone, for who parses a command line and serves nothing yet."""

from __future__ import annotations

#: Kinds of adapters; `vfiouser_agents.rpc.protocols.PROTOCOLS` has a server for each.
SERVED_KINDS = ("msgpack-rpc", "jsonrpc", "grpc", "legacy-tcp")
DEFAULT_KIND = SERVED_KINDS[0]
