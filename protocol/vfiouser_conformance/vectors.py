"""Golden vectors: whole messages as bytes, written down once and never computed.

A client builds them with `wire`; a test compares every builder with them. Some cases send them as they stand.
"""

from __future__ import annotations

from collections.abc import Mapping

#: VERSION's JSON as QEMU 11 sends it; the whole message has 214 bytes.
QEMU_CAPABILITIES = (
    b'{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, '
    b'"max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, '
    b'"write_multiple": true}}\0'
)
#: As the older QEMU forks send it; the whole message has 120 bytes.
V1_CAPABILITIES = (
    b'{"capabilities": {"migration": {"pgsize": 4096}, "max_msg_fds": 16, "max_data_xfer_size": 1048576}}\0'
)
#: As rust-vmm's client sends it.
RUST_CAPABILITIES = b'{"capabilities":{"max_msg_fds":1,"max_data_xfer_size":1048576,"migration":{"pgsize":4096}}}\0'
#: As libvfio-user's sample client sends it.
SAMPLE_CAPABILITIES = b'{"capabilities":{"max_msg_fds":32,"max_data_xfer_size":1024}}\0'

#: Whole messages by what they are.
MESSAGES: Mapping[str, bytes] = {
    "version 0.0 without data": bytes.fromhex("0100 0100 14000000 00000000 00000000 0000 0000"),
    "get info": bytes.fromhex("0200 0400 20000000 00000000 00000000 10000000 00000000 00000000 00000000"),
    "get info, no reply wanted": bytes.fromhex(
        "0200 0400 20000000 10000000 00000000 10000000 00000000 00000000 00000000"
    ),
    "get region info 7": bytes.fromhex(
        "0300 0500 30000000 00000000 00000000 20000000 00000000 07000000 000000000000000000000000 0000000000000000"
    ),
    "get irq info 2": bytes.fromhex("0400 0700 20000000 00000000 00000000 10000000 00000000 02000000 00000000"),
    "get io fds 1": bytes.fromhex("0500 0600 20000000 00000000 00000000 10000000 00000000 01000000 00000000"),
    "map 64 KiB at 0x100000": bytes.fromhex(
        "0600 0200 30000000 00000000 00000000 20000000 030000000000000000000000 0000100000000000 0000010000000000"
    ),
    "unmap 64 KiB at 0x100000": bytes.fromhex(
        "0700 0300 28000000 00000000 00000000 18000000 00000000 0000100000000000 0000010000000000"
    ),
    "disable MSI-X": bytes.fromhex("0800 0800 24000000 00000000 00000000 14000000 21000000 02000000 00000000 00000000"),
    "read 4 bytes of config space": bytes.fromhex(
        "0900 0900 20000000 00000000 00000000 0000000000000000 07000000 04000000"
    ),
    "write the interrupt line": bytes.fromhex(
        "0a00 0a00 21000000 00000000 00000000 3c00000000000000 07000000 01000000 0b"
    ),
    "reset": bytes.fromhex("0b00 0d00 10000000 00000000 00000000"),
    "two config writes in one": bytes.fromhex(
        "0c00 0f00 48000000 00000000 00000000 0200000000000000"
        "3c00000000000000 07000000 01000000 0b00000000000000"
        "0400000000000000 07000000 02000000 0600000000000000"
    ),
    "get migration feature": bytes.fromhex("0d00 1000 18000000 00000000 00000000 10000000 01000100"),
    "set state stop": bytes.fromhex("0e00 1000 20000000 00000000 00000000 10000000 02000200 01000000 00000000"),
    "report dirty pages": bytes.fromhex(
        "0f00 1000 30000000 00000000 00000000 28000000 080001000000100000000000 0000010000000000 0010000000000000"
    ),
    "read 64 bytes of migration data": bytes.fromhex("1000 1100 18000000 00000000 00000000 48000000 40000000"),
    "write 4 bytes of migration data": bytes.fromhex("1100 1200 1c000000 00000000 00000000 0c000000 04000000 deadbeef"),
    "start v1 dirty logging": bytes.fromhex("1200 0e00 18000000 00000000 00000000 08000000 01000000"),
    "get v1 dirty pages": bytes.fromhex(
        "1300 0e00 38000000 00000000 00000000 30000000 04000000"
        "0000100000000000 0000010000000000 0010000000000000 0800000000000000"
    ),
}


def message(name: str) -> bytes:
    """A golden message."""
    return MESSAGES[name]
