"""Kernels without their wrapper, which an emulated CPU takes two seconds of each boot to decompress.

QEMU boots such a file by its PVH entry. A kernel in a compression that is not known here is booted as it is.

Spec: Linux, Documentation/arch/x86/boot.rst, "Details of Header Fields"; the last four bytes of the payload are its
size without compression.
"""

from __future__ import annotations

import lzma
import os
import struct
import subprocess
from pathlib import Path

from vmbed.assets.errors import AssetError
from vmbed.assets.python import interpreter

__all__ = ["PLAIN", "payload", "write_plain_kernel"]

#: Its name, beside `vmlinuz`.
PLAIN = "vmlinux"
MAGIC = b"HdrS"
ZSTD, XZ, ELF = b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"\x7fELF"
SETUP_SECTORS, MAGIC_AT, PAYLOAD_AT = 0x1F1, 0x202, 0x248
SECTOR = 512
DECOMPRESS_S = 120.0
#: The tree's own interpreter runs it: its library is there, that of this machine need not be.
UNZSTD = """
import ctypes, sys
source, target, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
data, out = open(source, "rb").read(), ctypes.create_string_buffer(size)
decompress = ctypes.CDLL("libzstd.so.1").ZSTD_decompress
decompress.restype, decompress.argtypes = ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_size_t] * 2
got = decompress(out, size, data, len(data))
assert got == size, f"{got:#x}, not {size:#x} bytes"
open(target, "wb").write(memoryview(out))
"""


def payload(image: bytes) -> tuple[bytes, int]:
    """Find what a bzImage holds.

    Returns:
        The compressed kernel, and its size in bytes when it is not.

    Raises:
        AssetError: it is no bzImage.
    """
    if image[MAGIC_AT : MAGIC_AT + 4] != MAGIC:
        raise AssetError("the kernel is no bzImage")
    offset, length = struct.unpack_from("<II", image, PAYLOAD_AT)
    start = (image[SETUP_SECTORS] + 1) * SECTOR + offset
    (size,) = struct.unpack_from("<I", image, start + length - 4)
    return image[start : start + length - 4], size


def write_plain_kernel(kernel: Path, python: Path) -> bool:
    """Write a kernel without its wrapper beside it.

    Args:
        kernel: the vmlinuz.
        python: the tree of the guests' Python.

    Returns:
        Whether this one can be had so.
    """
    compressed, size = payload(kernel.read_bytes())
    temporary = kernel.with_name(f".{PLAIN}.{os.getpid()}")
    try:
        if compressed.startswith(ZSTD):
            _unzstd(compressed, temporary, size, python)
        elif compressed.startswith(XZ):
            temporary.write_bytes(lzma.decompress(compressed))
        else:
            return False
        with temporary.open("rb") as file:
            if file.read(len(ELF)) != ELF:
                return False
        temporary.replace(kernel.with_name(PLAIN))
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _unzstd(compressed: bytes, target: Path, size: int, python: Path) -> None:
    libraries = python / "usr/lib/x86_64-linux-gnu"
    source = target.with_suffix(".zst")
    source.write_bytes(compressed)
    argv = [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), str(interpreter(python))]
    argv += ["-s", "-c", UNZSTD, str(source), str(target), str(size)]
    environment = {"PYTHONHOME": str(python / "usr"), "PATH": "/usr/bin:/bin"}
    try:
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=DECOMPRESS_S, check=False)
    finally:
        source.unlink()
    if done.returncode != 0:
        raise AssetError(f"the kernel cannot be decompressed: {done.stderr.strip()[-300:]}")
