"""The errors of the bed."""

from __future__ import annotations

__all__ = ["BedError"]


class BedError(AssertionError):
    """A peer did not do in time what the test waited for; the message ends with what it said last."""
