"""Finds device models by name, so that anybody's can be installed beside ours.

A model is registered in the entry-point group `vfiouser_oob.models` under its name, and is a function that takes the
function's name and the model's options and returns a `DeviceModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from typing import TypeAlias, cast

from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.devices.model import DeviceModel

GROUP = "vfiouser_oob.models"
#: Found also where the distribution is not installed; the entry point in pyproject.toml is the same.
BUILT_IN: Mapping[str, str] = {"test": "vfiouser_oob.devices.models.test_device:build"}

#: Builds a model from the function's name and the model's options.
ModelBuilder: TypeAlias = Callable[[str, object], DeviceModel]


def models() -> Mapping[str, metadata.EntryPoint]:
    """All models by name."""
    found = {name: metadata.EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    found.update((entry.name, entry) for entry in metadata.entry_points(group=GROUP) if entry.name not in BUILT_IN)
    return dict(sorted(found.items()))


def model_builder(name: str) -> ModelBuilder:
    """Return what builds a model; it is loaded now.

    Args:
        name: of the model.

    Raises:
        ConfigError: there is no such model, or it cannot be loaded.
    """
    entry = models().get(name)
    if entry is None:
        raise ConfigError(f"there is no model {name!r} (there is: {', '.join(models())})")
    try:
        return cast("ModelBuilder", entry.load())
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model {name!r} ({entry.value}) cannot be loaded: {error}") from error
