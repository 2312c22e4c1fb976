"""`vfiouser-oob`, whose simulated devices wait half a minute for the memory of a client that is slow to answer.

A real device does not ask anybody. A daemon that starts on a busy machine may take longer than devices wait by default.
"""

from __future__ import annotations

import dataclasses
import sys

from vfiouser_oob.cli.main import main
from vfiouser_oob.config.schema import DaemonConfig
from vfiouser_soc.options import SocOptions

PATIENCE_S = 30.0


def _patient(options: SocOptions) -> DaemonConfig:
    return dataclasses.replace(_usual(options), reply_budget_s=PATIENCE_S)


if __name__ == "__main__":
    _usual = SocOptions.daemon_config
    SocOptions.daemon_config = _patient  # type: ignore[assignment, method-assign]
    sys.exit(main())
