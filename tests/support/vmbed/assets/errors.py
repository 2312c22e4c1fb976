"""The one error of the asset builder."""

from __future__ import annotations

__all__ = ["AssetError"]


class AssetError(Exception):
    """The assets cannot be had; the message is one line that says why and what to do."""
