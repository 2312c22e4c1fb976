"""`python -m vfiouser_oob` is the command `vfiouser-oob`."""

from __future__ import annotations

import sys

from vfiouser_oob.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
