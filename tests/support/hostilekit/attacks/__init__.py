"""The attacks, by kind; each module is found by its name in this folder."""

import pkgutil
from importlib import import_module

from hostilekit.case import ATTACKS

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["ATTACKS"]
