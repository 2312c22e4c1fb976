"""Generated examples have no deadline: on a machine that is busy with other tests any of them may take long."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("patient", settings(deadline=None))
settings.load_profile("patient")
