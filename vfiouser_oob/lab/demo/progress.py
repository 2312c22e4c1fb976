"""How the demonstrations say what they are doing."""

from __future__ import annotations

from collections.abc import Callable

#: Takes one line per step.
Progress = Callable[[str], None]
