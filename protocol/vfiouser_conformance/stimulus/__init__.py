"""Device profiles: how to make a known device do DMA, raise interrupts or fail, so that a case can watch it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vfiouser_conformance.stimulus.base import Stimulus
from vfiouser_conformance.stimulus.nvme import NvmeProfile
from vfiouser_conformance.stimulus.test_profile import TestProfile

#: Makers of profiles by the name that --device-profile takes; each takes the time-out in seconds.
PROFILES: Mapping[str, Callable[[float], Stimulus]] = {"test": TestProfile, "nvme": NvmeProfile}
