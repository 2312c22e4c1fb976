"""The attacker's process: `python -m hostilekit MODULE NAME DIRECTORY SECONDS`.

It begins when it is told the daemon's process id on standard input, so that it is ready when the daemon is.
"""

import sys
from importlib import import_module
from pathlib import Path

from hostilekit.case import ATTACKS, Stage

module, name, directory, seconds = sys.argv[1:]
import_module(module)
if told := sys.stdin.readline():
    ATTACKS[name].run(Stage(Path(directory), int(told), float(seconds)))
