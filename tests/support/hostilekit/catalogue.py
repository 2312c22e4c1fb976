"""All attacks, by name; each module is found by its name in the folder."""

import pkgutil
from importlib import import_module

from hostilekit import attacks
from hostilekit.case import ATTACKS

for _module in pkgutil.iter_modules(attacks.__path__):
    import_module(f"{attacks.__name__}.{_module.name}")

__all__ = ["ATTACKS"]
