"""The device kinds: how each is written in a file and in the short form of ``--device``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vfiouser_oob.config.schema import (
    DeviceConfig,
    Doorbells,
    KernelVfioDevice,
    ModelDevice,
    NvmeOptions,
    RegionPolicy,
    UpstreamDevice,
    VfioInterface,
)
from vfiouser_oob.config.tables import Key, Place, read_table, suggestion
from vfiouser_oob.config.values import (
    is_mdev,
    one_of,
    read_bdf,
    read_mdev,
    read_path,
    read_size,
    read_socket_path,
    read_string,
    read_switch,
    shown,
)

BLOCK_SIZE = 512
CMB_MIN = 2 << 20
MAX_WRITE_MIN = 4 << 10
MAX_WRITE_MAX = 1 << 20


def read_namespace_size(value: Any) -> int:
    """Bytes of an NVMe namespace: at least one block, and whole blocks."""
    size = read_size(value)
    if size == 0 or size % BLOCK_SIZE:
        raise ValueError(f"must be a multiple of {BLOCK_SIZE} bytes and not 0, got {shown(value)}")
    return size


def read_cmb_size(value: Any) -> int:
    """Bytes of a controller memory buffer: none, or enough for a driver to use it, in whole pages."""
    size = read_size(value)
    if size and (size < CMB_MIN or size % 4096):
        raise ValueError(f"must be 0 or at least 2M in whole pages of 4096 bytes, got {shown(value)}")
    return size


NVME_KEYS = (
    Key("size", read_namespace_size),
    Key("image", read_path),
    Key("cmb", read_cmb_size),
    Key("doorbells", one_of(Doorbells)),
    Key("shared", read_switch),
)


def _read_model(raw: Mapping[str, Any], place: Place) -> DeviceConfig:
    # The model's name decides which further keys there are, so it is looked at first.
    model = raw.get("model")
    if model is None:
        place.fail("key 'model' is missing", "model")
    if not isinstance(model, str) or model not in MODELS:
        place.fail(f"unknown model {shown(model)}{suggestion(str(model), tuple(MODELS))}", "model")
    options = {name: value for name, value in raw.items() if name != "model"}
    values = read_table(options, MODELS[model], place)
    return ModelDevice(model=model, options=NvmeOptions(**values))


def read_write_size(value: Any) -> int:
    """Bytes of data in one message to an upstream server: from a page to what the protocol takes by default."""
    size = read_size(value)
    if not MAX_WRITE_MIN <= size <= MAX_WRITE_MAX:
        raise ValueError(f"must be from 4K to 1M, got {shown(value)}")
    return size


UPSTREAM_KEYS = (
    Key("socket", read_socket_path, required=True),
    Key("max_write", read_write_size),
)


def _read_upstream(raw: Mapping[str, Any], place: Place) -> DeviceConfig:
    return UpstreamDevice(**read_table(raw, UPSTREAM_KEYS, place))


KERNEL_VFIO_KEYS = (
    Key("bdf", read_bdf),
    Key("mdev", read_mdev),
    Key("region_policy", one_of(RegionPolicy)),
    Key("interface", one_of(VfioInterface)),
)


def _read_kernel_vfio(raw: Mapping[str, Any], place: Place) -> DeviceConfig:
    values = read_table(raw, KERNEL_VFIO_KEYS, place)
    named = [name for name in ("bdf", "mdev") if name in values]
    if len(named) != 1:
        place.fail("keys 'bdf' and 'mdev' exclude each other" if named else "key 'bdf' or 'mdev' is missing")
    return KernelVfioDevice(**values)


#: Models by name, each with the keys that it has; `test` is a function for testing servers and clients.
MODELS: Mapping[str, Sequence[Key]] = {"nvme": NVME_KEYS, "test": ()}


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of device.

    Args:
        read: turns its table (without `kind`) into the dataclass.
        first: the key that the first word of the short form stands for.
        example: a short form for error messages.
        others: further keys that it may stand for, each with what tells its values.
    """

    read: Callable[[Mapping[str, Any], Place], DeviceConfig]
    first: str
    example: str
    others: Mapping[str, Callable[[str], bool]] = field(default_factory=dict)

    def key_of(self, first: str) -> str:
        """The key that a first word stands for."""
        return next((key for key, matches in self.others.items() if matches(first)), self.first)


KINDS: Mapping[str, Kind] = {
    "model": Kind(_read_model, "model", "model:nvme,size=64M"),
    "kernel-vfio": Kind(_read_kernel_vfio, "bdf", "kernel-vfio:0000:3b:00.2", {"mdev": is_mdev}),
    "vfio-user": Kind(_read_upstream, "socket", "vfio-user:/run/soc/f0.sock"),
}


def read_device(raw: Any, place: Place) -> DeviceConfig:
    """Read a ``device`` table.

    Args:
        raw: what stands in its place.
        place: where it stands.

    Raises:
        ConfigError: it cannot be used.
    """
    if not isinstance(raw, Mapping):
        place.fail(f'must be a table such as {{kind = "model", model = "nvme"}}, got {shown(raw)}')
    kind = raw.get("kind")
    if kind is None:
        place.fail(f"key 'kind' is missing (allowed: {', '.join(KINDS)})")
    if not isinstance(kind, str) or kind not in KINDS:
        place.fail(f"unknown kind {shown(kind)}{suggestion(str(kind), tuple(KINDS))}", "kind")
    return KINDS[kind].read({name: value for name, value in raw.items() if name != "kind"}, place)


def parse_device(text: str, source: str | None = None) -> DeviceConfig:
    """Read the short form of a device.

    Args:
        text: ``KIND:FIRST[,KEY=VALUE…]``; a comma inside a value is written twice.
        source: the option that it came from.

    Raises:
        ConfigError: it cannot be used.
    """
    place = Place(f"device {shown(text)}", source)
    kind_name, colon, rest = text.partition(":")
    kind = KINDS.get(kind_name)
    if kind is None:
        place.fail(f"unknown kind {kind_name!r}{suggestion(kind_name, tuple(KINDS))}")
    first, *options = (part.replace(",,", ",") for part in re.split(r"(?<!,),(?!,)", rest))
    if not colon or not first:
        place.fail(f"{kind.first} is missing; an example: {kind.example}")
    raw: dict[str, Any] = {"kind": kind_name, kind.key_of(first): read_string(first)}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            place.fail(f"{option!r} must be KEY=VALUE; an example: {kind.example}")
        if name in raw:
            place.fail(f"{name} is given twice")
        raw[name] = value
    return read_device(raw, place)
