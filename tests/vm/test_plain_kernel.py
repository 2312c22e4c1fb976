"""How a kernel is taken out of its wrapper, on images made here."""

from __future__ import annotations

import lzma
import struct
from pathlib import Path

import pytest

from vmbed.assets import AssetError, bootable
from vmbed.assets.plain import payload, write_plain_kernel

KERNEL = b"\x7fELF" + bytes(range(256)) * 64
NOWHERE = Path("/nowhere")
SETUP_SECTORS = 3


def bzimage(compressed: bytes, size: int = len(KERNEL)) -> bytes:
    """Make an image with this payload, as the kernel's build does: its size follows."""
    held = compressed + struct.pack("<I", size)
    image = bytearray((SETUP_SECTORS + 1) * 512)
    image[0x1F1] = SETUP_SECTORS
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 100, len(held))
    return bytes(image) + bytes(100) + held + b"what follows"


def test_payload_is_found_with_its_size() -> None:
    """The setup sectors and what stands before the payload are passed over, and so is what follows it."""
    assert payload(bzimage(b"compressed")) == (b"compressed", len(KERNEL))


def test_kernel_is_written_beside_its_image_and_booted(tmp_path: Path) -> None:
    """Without it the image is what is booted."""
    image = tmp_path / "vmlinuz"
    image.write_bytes(bzimage(lzma.compress(KERNEL)))
    assert bootable(image) == image
    assert write_plain_kernel(image, NOWHERE)
    assert bootable(image).read_bytes() == KERNEL
    assert {path.name for path in tmp_path.iterdir()} == {"vmlinuz", "vmlinux"}


@pytest.mark.parametrize("compressed", [b"\x1f\x8b by gzip", lzma.compress(b"no ELF file")], ids=["gzip", "no kernel"])
def test_what_cannot_be_had_is_left_as_it_is(tmp_path: Path, compressed: bytes) -> None:
    """A compression that is not known, and content that QEMU does not boot, leave nothing behind."""
    image = tmp_path / "vmlinuz"
    image.write_bytes(bzimage(compressed))
    assert not write_plain_kernel(image, NOWHERE)
    assert bootable(image) == image
    assert [path.name for path in tmp_path.iterdir()] == ["vmlinuz"]


def test_file_that_is_no_image_is_an_error(tmp_path: Path) -> None:
    """It is not taken for a kernel in an unknown compression."""
    image = tmp_path / "vmlinuz"
    image.write_bytes(bytes(4096))
    with pytest.raises(AssetError, match="no bzImage"):
        write_plain_kernel(image, NOWHERE)
