"""The short form of a device, sizes, and what the simulator's options become."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_oob.config import (
    ConfigError,
    DeviceConfig,
    KernelVfioDevice,
    ModelDevice,
    RegionPolicy,
    UpstreamDevice,
    parse_device,
)
from vfiouser_oob.config.values import SIZE, format_size
from vfiouser_soc.nvme.options import Doorbells, NvmeOptions
from vfiouser_soc.options import SocOptions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model:nvme", ModelDevice(model="nvme")),
        ("model:nvme,size=64M", ModelDevice(model="nvme", options=NvmeOptions(size=64 << 20))),
        (
            "model:nvme,image=/a,,b.img,cmb=4M,doorbells=polled,shared=true",
            ModelDevice(
                model="nvme",
                options=NvmeOptions(image=Path("/a,b.img"), cmb=4 << 20, doorbells=Doorbells.POLLED, shared=True),
            ),
        ),
        ("model:test", ModelDevice(model="test")),
        ("vfio-user:/run/up.sock", UpstreamDevice(socket=Path("/run/up.sock"))),
        ("kernel-vfio:0000:3b:00.2", KernelVfioDevice(bdf="0000:3b:00.2")),
        ("kernel-vfio:3B:1f.7", KernelVfioDevice(bdf="0000:3b:1f.7")),
        (
            "kernel-vfio:10000:01:00.0,region_policy=trap",
            KernelVfioDevice(bdf="10000:01:00.0", region_policy=RegionPolicy.TRAP),
        ),
        ("vfio-user:up,,x.sock", UpstreamDevice(socket=Path("up,x.sock"))),
        ("vfio-user:up.sock,max_write=1M", UpstreamDevice(socket=Path("up.sock"), max_write=1 << 20)),
    ],
)
def test_short_form(text: str, expected: DeviceConfig) -> None:
    """The short form gives the same dataclasses as a file would."""
    assert expected == parse_device(text)
    assert expected == parse_device(expected.describe())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "unknown kind ''"),
        ("modle:nvme", "did you mean 'model'"),
        ("model", "model is missing; an example"),
        ("model:", "model is missing; an example"),
        ("vfio-user:", "socket is missing; an example"),
        ("model:nvme,size", "'size' must be KEY=VALUE"),
        ("model:nvme,size=1M,size=2M", "size is given twice"),
        ("model:nvme,size=-1", "size must be a size"),
        ("model:nvme,kind=x", "kind is given twice"),
        ("model:nvme,bogus=1", "unknown key 'bogus'"),
        ("kernel-vfio:", "bdf is missing; an example"),
        ("kernel-vfio:0000:3b:20.0", "bdf must be a PCI address"),
        ("kernel-vfio:3b:00.2,region_policy=fd", "region_policy must be one of"),
        ("vfio-user:/a,b=c", "unknown key 'b'"),
        ("vfio-user:/a,max_write=2M", "must be from 4K to 1M"),
        ("vfio-user:/a,max_write=1K", "must be from 4K to 1M"),
    ],
)
def test_short_form_mistakes(text: str, words: str) -> None:
    """A short form that cannot be used is one line that names the option and what is allowed."""
    with pytest.raises(ConfigError) as caught:
        parse_device(text, "--device")
    assert words in str(caught.value)
    assert str(caught.value).startswith("--device: ")


@given(st.integers(min_value=0, max_value=1 << 60))
def test_sizes_survive_being_written(size: int) -> None:
    """What format_size writes, SIZE reads back to the same number of bytes."""
    assert size == SIZE.read(format_size(size))


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("64K", 65536), ("1g", 1 << 30), ("2MiB", 2 << 20), ("3MB", 3 << 20), (7, 7)],
)
def test_sizes(text: object, size: int) -> None:
    """Sizes are bytes or carry a unit of a power of 1024, in either case."""
    assert size == SIZE.read(text)


@pytest.mark.parametrize("text", ["", "M", "1.5M", "-1", -1, "1 M", "1P", True, None, 1.0, "٣"])
def test_no_sizes(text: object) -> None:
    """Anything else is refused rather than guessed."""
    with pytest.raises(ValueError, match="must be a size"):
        SIZE.read(text)


def test_soc_functions_get_sockets_and_images_of_their_own(tmp_path: Path) -> None:
    """Each simulated function has its own socket and, with several functions, its own image file."""
    options = SocOptions(socket_dir=tmp_path, functions=2, image=Path("/d/disk.img"), cmb=2 << 20)
    config = options.daemon_config()
    assert ["f0", "f1"] == [function.name for function in config.functions]
    assert [tmp_path / "f0.sock", tmp_path / "f1.sock"] == [function.socket for function in config.functions]
    expected = [
        ModelDevice(model="nvme", options=NvmeOptions(image=Path(f"/d/disk.img.{index}"), cmb=2 << 20))
        for index in range(2)
    ]
    assert expected == [function.device for function in config.functions]
    assert config.control_socket is None


def test_one_soc_function_uses_the_image_as_it_is(tmp_path: Path) -> None:
    """With one function the file's name is not changed; without a file there is RAM of the default size."""
    image = Path("/d/disk.img")
    one = SocOptions(socket_dir=tmp_path, image=image).daemon_config().functions[0].device
    assert ModelDevice(model="nvme", options=NvmeOptions(image=image)) == one
    ram = SocOptions(socket_dir=tmp_path).daemon_config().functions[0].device
    assert ModelDevice(model="nvme", options=NvmeOptions(size=64 << 20)) == ram


@pytest.mark.parametrize("functions", [0, 257])
def test_soc_limits(tmp_path: Path, functions: int) -> None:
    """A number of functions that makes no sense is refused before any socket is made."""
    with pytest.raises(ConfigError, match="from 1 to 256"):
        SocOptions(socket_dir=tmp_path, functions=functions)
