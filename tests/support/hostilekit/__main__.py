"""The attacker's process: `python -m hostilekit MODULE NAME DIRECTORY DAEMON SECONDS`."""

import sys
from importlib import import_module
from pathlib import Path

from hostilekit.case import ATTACKS, Stage

module, name, directory, daemon, seconds = sys.argv[1:]
import_module(module)
ATTACKS[name].run(Stage(Path(directory), int(daemon), float(seconds)))
