"""`python -m plantedservers SOCKET HABIT`: the server as a process."""

from __future__ import annotations

import os
import sys

from plantedservers import HABITS


def main() -> None:
    """Serve as long as the habit has it."""
    server = HABITS[sys.argv[2]](sys.argv[1])
    server.listen()
    server.run()
    sys.stderr.flush()
    os._exit(server.crashed)  # taking the interpreter down takes as long as serving a client does


if __name__ == "__main__":
    main()
