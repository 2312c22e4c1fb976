"""Submission and completion queue entries.

Both are packed for every command of every queue, so they are plain `struct` layouts.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vfiouser_soc.nvme.spec import SQE_SIZE

_SQE = struct.Struct("<BBHIQQQQ6I")
_CQE = struct.Struct("<IIHHHH")
assert _SQE.size == SQE_SIZE


class SubmissionEntry(NamedTuple):
    """One submission queue entry (NVMe 1.4, figure 105)."""

    opcode: int
    flags: int
    cid: int
    nsid: int
    reserved: int
    metadata: int
    prp1: int
    prp2: int
    cdw10: int
    cdw11: int
    cdw12: int
    cdw13: int
    cdw14: int
    cdw15: int

    @property
    def slba(self) -> int:
        """Starting LBA of the NVM commands that have one."""
        return self.cdw10 | self.cdw11 << 32

    @property
    def block_count(self) -> int:
        """Number of logical blocks; on the wire it is 0's based."""
        return (self.cdw12 & 0xFFFF) + 1

    def pack(self) -> bytes:
        """The 64 bytes of the entry."""
        return _SQE.pack(*self)


def parse_commands(data: bytes) -> list[SubmissionEntry]:
    """Parse consecutive submission queue entries.

    Args:
        data: a multiple of 64 bytes.

    Returns:
        One Command per entry, in order.
    """
    return [SubmissionEntry._make(fields) for fields in _SQE.iter_unpack(data)]


class Completion(NamedTuple):
    """A finished command whose completion queue entry is to be written."""

    sqid: int
    cid: int
    status: int
    result: int

    def pack(self, sq_head: int, phase: int) -> bytes:
        """The 16 bytes of the entry (NVMe 1.4, 4.6).

        Args:
            sq_head: current head of the submission queue the command came from.
            phase: phase tag, 0 or 1.
        """
        return _CQE.pack(self.result, 0, sq_head, self.sqid, self.cid, self.status << 1 | phase)
