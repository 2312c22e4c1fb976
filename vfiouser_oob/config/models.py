"""Finds device models by name, so that anybody's can be installed beside ours, and the options that each declares.

A model is registered in the entry-point group `vfiouser_oob.models` under its name, or is named by where it is:
`package.module:Class`. Either leads to whatever makes a device out of a function's name and the model's options. It
brings the table of its options itself, declared as every section of the configuration is (see `tables`): a function by
the decorator `model`, a class by its own `Options`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.tables import NoOptions

if TYPE_CHECKING:
    from importlib import metadata

GROUP = "vfiouser_oob.models"
#: Found also where the distribution is not installed; the entry point in pyproject.toml is the same.
BUILT_IN: Mapping[str, str] = {"test": "vfiouser_oob.devices.models.test_device:build"}

#: A model by where it is, for one that no distribution registers.
PLACE = r"[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_.]*"

OptionsT = TypeVar("OptionsT")
DeviceT = TypeVar("DeviceT")


@dataclass(frozen=True, slots=True)
class Model(Generic[OptionsT, DeviceT]):
    """A kind of device that is played in Python.

    Args:
        make: makes one, from the function's name and the options.
        options: the section that declares its options.
    """

    make: Callable[[str, OptionsT], DeviceT]
    options: type[OptionsT]

    def __call__(self, name: str, options: OptionsT | None = None) -> DeviceT:
        """Make the device of a function.

        Args:
            name: the function's name.
            options: None = all of them at their defaults.
        """
        return self.make(name, self.options() if options is None else options)


def model(
    options: type[OptionsT],
) -> Callable[[Callable[[str, OptionsT], DeviceT]], Model[OptionsT, DeviceT]]:
    """Make a model of a function that makes devices.

    Args:
        options: the section that declares its options.
    """
    return lambda make: Model(make, options)


def _entry(name: str, value: str) -> metadata.EntryPoint:
    # It takes 2.5 MB, which only those have who use a model.
    from importlib import metadata

    return metadata.EntryPoint(name, value, GROUP)


@cache
def _installed() -> Sequence[metadata.EntryPoint]:
    from importlib import metadata

    # Every distribution's files are read for it, which is too slow to be done for each of hundreds of functions.
    return tuple(metadata.entry_points(group=GROUP))


def models() -> Mapping[str, metadata.EntryPoint]:
    """All models by name."""
    built_in = {name: _entry(name, value) for name, value in BUILT_IN.items()}
    return dict(sorted(({entry.name: entry for entry in _installed()} | built_in).items()))


def is_place(name: str) -> bool:
    """Whether a model's name says where it is, `package.module:Class`."""
    return re.fullmatch(PLACE, name) is not None


def find_model(name: str) -> Model[Any, Any]:
    """Return a model; it is loaded now.

    Args:
        name: of the model, or `package.module:Class`.

    Raises:
        ConfigError: there is no such model, or it cannot be loaded.
    """
    entry = _entry(name, name) if is_place(name) else models().get(name)
    if entry is None:
        raise ConfigError(f"there is no model {name!r} (there is: {', '.join(models())})")
    where = repr(name) if entry.value == name else f"{name!r} ({entry.value})"
    try:
        found = entry.load()
    # The module is somebody else's: whatever it raises while it is loaded makes it unusable, no more.
    except Exception as error:
        raise ConfigError(f"model {where} cannot be loaded: {_told(error)}") from error
    if not callable(found):
        raise ConfigError(
            f"model {where} must be a class or a function that makes a device, not a {type(found).__name__}"
        )
    return found if isinstance(found, Model) else Model(found, getattr(found, "Options", NoOptions))


def _told(error: Exception) -> str:
    if isinstance(error, ImportError | AttributeError):
        return str(error)
    return f"{type(error).__name__}: {error}"
