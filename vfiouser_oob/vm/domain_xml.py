"""What a libvirt domain says of functions, monitor and carriers, and the same domain for a host with other paths.

libvirt does not know of any of them: they are words for QEMU, which it passes on. They are found by the ids that
`snippet` gives them, the functions by their class.

Spec: libvirt, drvqemu: QEMU command-line passthrough.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from vfiouser_oob.vm.carriers.dbus_vmstate import vmstate_object
from vfiouser_oob.vm.preflight import CLIENT

NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
#: What `snippet` calls them in QEMU.
MONITOR_CHARDEV, COMPANION_CHARDEV, VMSTATE_ID = "oobmonitor", "oobvhost", "oobvmstate"
#: Bytes of the largest domain that is read.
MOST_BYTES = 4 << 20
_ARGUMENT = f"{{{NAMESPACE}}}arg"
_VMSTATE = "dbus-vmstate"
#: Chardevs by their ids, and what is met there.
_CHARDEVS: Mapping[str, str] = {MONITOR_CHARDEV: "monitor", COMPANION_CHARDEV: "vhost_user_fs"}
_CHARDEV_ID = re.compile(r"^socket,(?:.*,)?id=([^,]+)")
_CHARDEV_PATH = re.compile(r"(?<=,path=)((?:[^,]|,,)*)")


class DomainError(Exception):
    """What came is no domain."""


@dataclass(frozen=True, slots=True)
class DomainSockets:
    """Paths of sockets that QEMU is told of.

    Args:
        functions: of the functions, by name.
        others: of the VM, by the keys of its configuration.
    """

    functions: Mapping[str, Path] = field(default_factory=dict)
    others: Mapping[str, Path] = field(default_factory=dict)


class LibvirtDomain:
    """A domain.

    Args:
        text: as libvirt writes it.

    Raises:
        DomainError: it is none.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MOST_BYTES:
            raise DomainError(f"the domain has more than {MOST_BYTES} characters")
        try:
            # It comes from libvirt, and expat refuses entities that multiply.
            self._root = ET.fromstring(text)
        except ET.ParseError as error:
            raise DomainError(f"the domain is no XML: {error}") from None
        self._arguments = list(self._root.iter(_ARGUMENT))

    @property
    def name(self) -> str:
        """Its name."""
        return self._root.findtext("name", "")

    @property
    def sockets(self) -> DomainSockets:
        """All that QEMU is told of."""
        functions: dict[str, Path] = {}
        others: dict[str, Path] = {}
        for argument in self._arguments:
            found = _recognize(argument.get("value", ""))
            if found is not None:
                (functions if found.function else others)[found.name] = found.path
        return DomainSockets(functions, others)

    def moved(self, sockets: DomainSockets) -> str | None:
        """The same domain where the sockets are elsewhere.

        Args:
            sockets: where they are; what is not named stays as it is.

        Returns:
            The domain; None if it is the same.
        """
        changed = False
        for argument in self._arguments:
            found = _recognize(argument.get("value", ""))
            if found is None:
                continue
            wanted = (sockets.functions if found.function else sockets.others).get(found.name, found.path)
            if wanted != found.path:
                argument.set("value", found.at(wanted))
                changed = True
        if not changed:
            return None
        ET.register_namespace("qemu", NAMESPACE)
        return ET.tostring(self._root, encoding="unicode") + "\n"


@dataclass(frozen=True, slots=True)
class _SocketWord:
    """A word for QEMU that names a socket.

    Args:
        name: what is met there.
        path: where it is.
        at: the word for another path.
        function: it is a function's.
    """

    name: str
    path: Path
    at: Callable[[Path], str]
    function: bool = False


def _recognize(word: str) -> _SocketWord | None:
    return _recognize_json(word) if word.startswith("{") else _recognize_chardev(word)


def _recognize_json(word: str) -> _SocketWord | None:
    try:
        value = json.loads(word)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    if value.get("driver") == CLIENT:
        return _recognize_function(value)
    address = value.get("addr")
    prefix = "unix:path="
    ours = value.get("qom-type") == _VMSTATE and value.get("id") == VMSTATE_ID
    if not ours or not isinstance(address, str) or not address.startswith(prefix):
        return None
    path = Path(unquote(address.removeprefix(prefix)))
    return _SocketWord("dbus_vmstate", path, lambda path: json.dumps({**value, **vmstate_object(path, VMSTATE_ID)}))


def _recognize_function(value: Mapping[str, Any]) -> _SocketWord | None:
    socket, name = value.get("socket"), value.get("id")
    path = socket.get("path") if isinstance(socket, dict) else None
    if not isinstance(name, str) or not isinstance(path, str):
        return None

    def at(path: Path) -> str:
        assert isinstance(socket, dict)
        return json.dumps({**value, "socket": {**socket, "path": str(path)}})

    return _SocketWord(name, Path(path), at, function=True)


def _recognize_chardev(word: str) -> _SocketWord | None:
    known, place = _CHARDEV_ID.match(word), _CHARDEV_PATH.search(word)
    if known is None or place is None or known[1] not in _CHARDEVS:
        return None
    # A comma is written twice there.
    start, end = place.span()
    path = Path(place[1].replace(",,", ","))
    return _SocketWord(_CHARDEVS[known[1]], path, lambda path: word[:start] + str(path).replace(",", ",,") + word[end:])
