"""The attacker's process: `python -m hostilekit NAME DIRECTORY DAEMON SECONDS`."""

import sys
from pathlib import Path

from hostilekit.attacks import ATTACKS
from hostilekit.case import Stage

name, directory, daemon, seconds = sys.argv[1:]
ATTACKS[name].run(Stage(Path(directory), int(daemon), float(seconds)))
