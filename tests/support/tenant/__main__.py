"""Entry point of `python -m tenant`."""

from __future__ import annotations

import sys

import trio

from tenant import main

trio.run(main, sys.argv[1], int(sys.argv[2]), sys.argv[3])
