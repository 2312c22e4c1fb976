"""The device kinds: what each may hold in a file, and how the short form of ``--device`` is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.models import PLACE, find_model, is_place, models
from vfiouser_oob.config.tables import (
    Key,
    NoOptions,
    Place,
    Table,
    key,
    keys,
    read_section,
    schema_of,
    section,
    suggestion,
    written,
)
from vfiouser_oob.config.values import (
    BDF,
    MDEV,
    SOCKET_PATH,
    TEXT,
    Word,
    one_of,
    shown,
    size_of,
)


class RegionPolicy(Word):
    """By which descriptor a client maps the regions of a real function."""

    AUTO = "auto", "a dma-buf if the kernel can map one, else the device"
    DEVICE_FD = "device-fd", "the device, which works on every kernel and gives the client access to all of it"
    DMABUF = "dmabuf", "a dma-buf, else no mapping"
    TRAP = "trap", "no mapping: every access is a message"


class UpstreamLoss(Word):
    """What becomes of a function whose server goes while a client uses it."""

    FAIL = "fail", "its client gets EIO until it connects again"
    RESET = (
        "reset",
        "the daemon repeats to the restarted server what the client told the first one, and resets the device",
    )


class VfioInterface(Word):
    """By which interface of the kernel a real function is opened."""

    AUTO = (
        "auto",
        "its own node and an iommufd if both exist and the daemon may open them, else its group's node",
    )
    GROUP = "group", "the IOMMU group's node and a container"
    CDEV = "cdev", "its own node and an iommufd"


def short_form(kind: str, *sections: Any) -> str:
    """A device as ``--device`` takes it: what differs from the defaults, the first without its key."""
    (_, first), *rest = [(name, text.replace(",", ",,")) for one in sections for name, text in written(one)]
    return f"{kind}:{first}" + "".join(f",{name}={text}" for name, text in rest)


@section
class ModelDevice:
    """A function that is played by a Python model."""

    kind: ClassVar[str] = "model"
    peer_dma: ClassVar[bool] = True
    first: ClassVar[Sequence[str]] = ("model",)
    example: ClassVar[str] = "model:nvme,size=64M"

    model: str = key(
        TEXT,
        "the model's name, or its place as `package.module:Class`; all other keys are the model's own options",
    )
    #: What the model declares; None = all of it at its defaults.
    options: Any = None

    def describe(self) -> str:
        """The device as ``--device`` takes it."""
        return short_form(self.kind, self, NoOptions() if self.options is None else self.options)


@section
class UpstreamDevice:
    """A function that another vfio-user server provides."""

    kind: ClassVar[str] = "vfio-user"
    peer_dma: ClassVar[bool] = True
    first: ClassVar[Sequence[str]] = ("socket",)
    example: ClassVar[str] = "vfio-user:/run/soc/f0.sock"

    socket: Path = key(SOCKET_PATH, "the other server's socket")
    # A socket holds 208 KiB by default on Linux; what is larger arrives in parts, which some servers cannot read.
    max_write: int = key(
        size_of(4 << 10, 1 << 20, rule="from 4K to 1M"),
        "bytes of data in one message to that server; larger writes are split. A socket holds 208 KiB by default on "
        "Linux, and some servers read a message with a single call and lose their place if only a part of it has "
        "arrived",
        default=128 << 10,
    )
    on_upstream_lost: UpstreamLoss = key(
        one_of(UpstreamLoss), "what happens to the function when that server exits", default=UpstreamLoss.FAIL
    )

    def describe(self) -> str:
        """The device as ``--device`` takes it."""
        return short_form(self.kind, self)


@section
class KernelVfioDevice:
    """A PCI function of this machine that is bound to the kernel's vfio-pci driver, or a mediated device."""

    kind: ClassVar[str] = "kernel-vfio"
    peer_dma: ClassVar[bool] = False
    first: ClassVar[Sequence[str]] = ("bdf", "mdev")
    example: ClassVar[str] = "kernel-vfio:0000:3b:00.2"
    constraints: ClassVar[Mapping[str, Any]] = {"oneOf": [{"required": ["bdf"]}, {"required": ["mdev"]}]}

    bdf: str | None = key(
        BDF, "its address; the domain is 0000 if it is left out", default=None, unset="this or `mdev` is required"
    )
    mdev: str | None = key(
        MDEV, "the mediated device, by its UUID or its directory", default=None, unset="this or `bdf` is required"
    )
    region_policy: RegionPolicy = key(
        one_of(RegionPolicy), "the descriptor by which a client maps its BARs", default=RegionPolicy.AUTO
    )
    interface: VfioInterface = key(
        one_of(VfioInterface), "the kernel's interface that opens it", default=VfioInterface.AUTO
    )

    def __post_init__(self) -> None:
        if self.bdf and self.mdev:
            raise ValueError("keys 'bdf' and 'mdev' exclude each other")
        if not self.name:
            raise ValueError("key 'bdf' or 'mdev' is missing")

    @property
    def name(self) -> str:
        """What the kernel calls it."""
        return self.bdf or self.mdev or ""

    def describe(self) -> str:
        """The device as ``--device`` takes it."""
        return short_form(self.kind, self)


#: Each kind names the keys that the first word of its short form may stand for, and an example of that form; and it
#: says whether its DMA goes by messages where the client sent no descriptor, and so may reach a peer's BAR.
DeviceConfig: TypeAlias = ModelDevice | UpstreamDevice | KernelVfioDevice
KINDS: Mapping[str, type[DeviceConfig]] = {
    declared.kind: declared for declared in (ModelDevice, KernelVfioDevice, UpstreamDevice)
}


def _read_model(raw: Mapping[str, Any], place: Place) -> ModelDevice:
    # The model's name decides which further keys there are, so it is looked at first.
    name = raw.get("model")
    if name is None:
        place.fail("key 'model' is missing", "model")
    if not isinstance(name, str) or (name not in models() and not is_place(name)):
        known = (*models(), "package.module:Class")
        place.fail(f"unknown model {shown(name)}{suggestion(str(name), known)}", "model")
    try:
        declared = find_model(name).options
    except ConfigError as error:
        place.fail(str(error), "model")
    given = {key: value for key, value in raw.items() if key != "model"}
    options = read_section(declared, given, place)
    return ModelDevice(model=name, options=options if given else None)


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
    rest = {name: value for name, value in raw.items() if name != "kind"}
    return _read_model(rest, place) if kind == ModelDevice.kind else read_section(KINDS[kind], rest, place)


def device_schema() -> Mapping[str, Any]:
    """The JSON Schema of a ``device`` table; it knows the models that are installed."""
    named = {name: schema_of(find_model(name).options, kind=ModelDevice.kind, model=name) for name in models()}
    others = [schema_of(declared, kind=kind) for kind, declared in KINDS.items() if declared is not ModelDevice]
    return {"oneOf": [*named.values(), _placed_schema(), *others]}


def _placed_schema() -> Mapping[str, Any]:
    """A model named by its place; which options it has cannot be told without it."""
    properties = {"kind": {"const": ModelDevice.kind}, "model": {"type": "string", "pattern": f"^{PLACE}$"}}
    return {"type": "object", "properties": properties, "required": [*properties]}


DEVICE = Table(lambda raw, place, around: read_device(raw, place), device_schema)


def device_forms() -> Mapping[str, Sequence[Key]]:
    """The short form of each device, up to its first comma, with the keys that may follow."""
    forms = {f"{ModelDevice.kind}:{name}": [*keys(find_model(name).options).values()] for name in models()}
    forms[f"{ModelDevice.kind}:PACKAGE.MODULE:CLASS"] = []
    for kind, declared in KINDS.items():
        if declared is not ModelDevice:
            others = [one for name, one in keys(declared).items() if name not in declared.first]
            forms[f"{kind}:{'|'.join(declared.first).upper()}"] = others
    return forms


def parse_device(text: str, source: str | None = None) -> DeviceConfig:
    """Read the short form of a device.

    Args:
        text: ``KIND:FIRST[,KEY=VALUE…]``; a comma inside a value is written twice.
        source: the option that it came from.

    Raises:
        ConfigError: it cannot be used.
    """
    place = Place(f"device {shown(text)}", source)
    kind, colon, rest = text.partition(":")
    declared = KINDS.get(kind)
    if declared is None:
        place.fail(f"unknown kind {kind!r}{suggestion(kind, tuple(KINDS))}")
    first, *options = (part.replace(",,", ",") for part in re.split(r"(?<!,),(?!,)", rest))
    default, *others = declared.first
    name = next((other for other in others if keys(declared)[other].fits(first)), default)
    if not colon or not first:
        place.fail(f"{name} is missing; an example: {declared.example}")
    raw: dict[str, Any] = {"kind": kind, name: first}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            place.fail(f"{option!r} must be KEY=VALUE; an example: {declared.example}")
        if name in raw:
            place.fail(f"{name} is given twice")
        raw[name] = value
    return read_device(raw, place)
