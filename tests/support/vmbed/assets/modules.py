"""Which kernel modules must be loaded, in which order, for some drivers to work.

Debian's packages ship no `modules.dep` (it is made at installation), so the dependencies are read
from the modules' own `.modinfo`. A driver that is built into the kernel needs nothing.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable
from pathlib import Path

from vmbed.assets.errors import AssetError

__all__ = ["load_order"]

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def load_order(tree: Path, drivers: Iterable[str]) -> list[tuple[str, bytes]]:
    """Return (name, uncompressed module) of all that must be loaded, dependencies first.

    Args:
        tree: the unpacked kernel package.
        drivers: module names; `-` and `_` are the same, as for modprobe.

    Raises:
        AssetError: a driver is neither a module of this kernel nor built in.
    """
    files = {_canonical(path.name.split(".ko")[0]): path for path in tree.rglob("*.ko*")}
    builtin = {
        _canonical(Path(line).stem)
        for listing in tree.rglob("modules.builtin")
        for line in listing.read_text(encoding="ascii").split()
    }
    order: dict[str, bytes] = {}
    for driver in drivers:
        _visit(_canonical(driver), files, builtin, order)
    return list(order.items())


def _visit(name: str, files: dict[str, Path], builtin: set[str], order: dict[str, bytes]) -> None:
    if name in order or name in builtin:
        return
    if name not in files:
        raise AssetError(f"the kernel has no module {name}, neither loadable nor built in")
    raw = files[name].read_bytes()
    module = lzma.decompress(raw) if files[name].suffix == ".xz" else raw
    for needed in _DEPENDS.findall(module):
        for other in filter(None, needed.decode().split(",")):
            _visit(_canonical(other), files, builtin, order)
    order[name] = module


def _canonical(name: str) -> str:
    return name.replace("-", "_")
