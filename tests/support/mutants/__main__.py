"""`python -m mutants SOCKET [FAULT]`: the server as a process, for tests of crashes and restarts."""

from __future__ import annotations

import sys

from mutants.server import Server

if __name__ == "__main__":
    server = Server(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
    server.listen()
    server.run()
    sys.exit(server.crashed)
