"""Moves the check for double imports to the end of the session, where it has seen all others."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests marked by their name as the last ones last."""
    items.sort(key=lambda item: item.name == "test_no_double_imports_in_the_whole_session")
