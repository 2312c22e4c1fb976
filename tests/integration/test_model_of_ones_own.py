"""A device of one's own: the example of the how-to, and what becomes of the mistakes of anybody's model."""

from __future__ import annotations

import errno
import io
import logging
import re
import runpy
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from daemonkit import function, serving
from rawclient import REGION_READ, REGION_WRITE, RESET, attached
from vfiouser_oob.config import ConfigError, parse_device
from vfiouser_oob.config.schema import LogFormat, LogLevel, ModelDevice
from vfiouser_oob.devices import model as authoring
from vfiouser_oob.devices.models.test_device import MAGIC
from vfiouser_oob.observability import log

ROOT = Path(__file__).resolve().parents[2]
DEVICE = ROOT / "examples/device-model/src"
CLIENT = ROOT / "examples/client-library/src/checksum_client.py"
PLACE = "acme_device.checksum:Checksum"


class Faulty(authoring.DeviceModel):
    """A device in which every method has a mistake, switched on by a register write."""

    def __init__(self, name: str, options: authoring.NoOptions) -> None:
        self.config = authoring.ConfigSpace(
            authoring.PciIdentity(vendor=1, device=2, class_code=0xFF0000),
            bars=[authoring.BarSpec(0, 4096)],
            capabilities=[authoring.PciExpress(flr=True)],
        )
        self.regions = {0: authoring.ModelRegion(0, 4096)}
        self.irqs = authoring.interrupts()
        self.broken = ""

    def attach(self, host: authoring.ModelHost) -> None:
        """Take nothing."""

    def fail_if(self, method: str) -> None:
        """Make a mistake."""
        if self.broken == method:
            raise ZeroDivisionError(f"a mistake in {method}")

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        """Fail from offset 0x10 on."""
        if offset == 0x10:
            raise KeyError("a mistake in region_read")
        return bytes(count)

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Choose the next mistake, or make one."""
        if offset == 0x10:
            raise OSError(errno.ENOENT, "a mistake in region_write")
        self.broken = data.rstrip(b"\0").decode()

    def reset(self, kind: authoring.ResetKind) -> None:
        """Fail when asked to."""
        self.fail_if("reset")

    def connected(self) -> None:
        """Fail when asked to."""
        self.fail_if("connected")

    def disconnected(self) -> None:
        """Fail when asked to."""
        self.fail_if("disconnected")


def unmakeable(name: str, options: authoring.NoOptions) -> Faulty:
    """Fail before there is a device."""
    raise LookupError("no such colour")


def nothing(name: str, options: authoring.NoOptions) -> str:
    """Make something else."""
    return name


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is logged; the models of this file and the example can be imported."""
    module = ModuleType("own_models")
    vars(module).update(Faulty=Faulty, unmakeable=unmakeable, nothing=nothing)
    monkeypatch.setitem(sys.modules, "own_models", module)
    monkeypatch.syspath_prepend(str(DEVICE))
    stream = io.StringIO()
    roots = [logging.getLogger(name) for name in (log.ROOT, log.AGENTS)]
    before = [(root, list(root.handlers), root.level, root.propagate) for root in roots]
    log.configure(LogLevel.ERROR, LogFormat.HUMAN, stream)
    yield stream
    for root, handlers, level, propagate in before:
        root.handlers[:], root.level, root.propagate = handlers, level, propagate


async def test_the_examples(told: io.StringIO, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example client makes the example device compute, with DMA and an interrupt; what it prints is on the page."""
    example: dict[str, Any] = runpy.run_path(str(CLIENT))
    device = parse_device(f"model:{PLACE},limit=64K")
    async with serving(function(tmp_path, device=device)):
        await example["main"](str(tmp_path / "f0.sock"))
    printed = capsys.readouterr().out
    page = (ROOT / "docs/howto/use-the-client.md").read_text()
    assert f"```\n{printed}```" in page
    assert f"{zlib.crc32(bytes(range(256)) * 16):#010x}" in printed
    assert "" == told.getvalue()


@pytest.mark.parametrize(
    ("page", "file"),
    [
        ("write-a-device", DEVICE / "acme_device/checksum.py"),
        ("use-the-client", CLIENT),
    ],
)
def test_the_pages_show_the_examples(page: str, file: Path) -> None:
    """The code on the page is the file, whole."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/howto/{page}.md").read_text(), re.DOTALL)
    assert file.read_text() in blocks


async def test_mistakes_of_a_model(told: io.StringIO, tmp_path: Path) -> None:
    """The client gets EIO, the log one traceback per mistake however often it is made, and the others go on."""
    faulty = function(tmp_path, "f0", ModelDevice(model="own_models:Faulty"))
    async with serving(faulty, function(tmp_path, "f1")):
        async with attached(tmp_path / "f0.sock") as client:
            for _ in range(3):
                assert errno.EIO == await client.errno(REGION_READ, struct.pack("<QII", 0x10, 0, 4))
            assert 1 == told.getvalue().count("Traceback")
            assert "a model failed" in told.getvalue()
            assert "function=f0 model=own_models:Faulty" in told.getvalue()
            assert '\n        raise KeyError("a mistake in region_read")\n' in told.getvalue()
            request = struct.pack("<QII", 0x10, 0, 4) + bytes(4)
            assert errno.EIO == await client.errno(REGION_WRITE, request)
            await client.write(0, 0, b"reset\0\0\0")
            assert errno.EIO == await client.errno(RESET)
            assert 3 == told.getvalue().count("Traceback")
            await client.write(0, 0, b"disconnected\0\0\0\0")
            assert bytes(4) == await client.read(0, 0, 4)
        async with attached(tmp_path / "f1.sock") as other:
            assert MAGIC == await other.read32(0, 0)
        async with attached(tmp_path / "f0.sock") as client:
            assert bytes(4) == await client.read(0, 0, 4)
            await client.write(0, 0, b"connected\0\0\0")
        assert "method=disconnected" in told.getvalue()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("own_models:unmakeable", "cannot be created: LookupError: no such colour"),
        ("own_models:nothing", "cannot be created: TypeError: it made a str, not a DeviceModel"),
    ],
)
async def test_models_that_cannot_be_made(told: io.StringIO, tmp_path: Path, model: str, reason: str) -> None:
    """The configuration is refused in one line, and the log has the traceback."""
    with pytest.RaisesGroup(ConfigError, flatten_subgroups=True, allow_unwrapped=True) as caught:
        async with serving(function(tmp_path, device=ModelDevice(model=model))):
            pass
    assert f"function 'f0': model {model} {reason}" in repr(caught.value)
    assert 1 == told.getvalue().count("Traceback")
