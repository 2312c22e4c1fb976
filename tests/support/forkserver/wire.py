"""What a test and the fork server say to each other.

A request is one message on a SEQPACKET socket: JSON, and with it the descriptors that the program inherits, the
last of which is the socket on which the server reports the program's pid and how it ended.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

#: Bytes of a request: an environment may be large.
MOST = 1 << 20
#: Of the pid, then of the status as `os.waitstatus_to_exitcode` has it.
REPORT = struct.Struct("<i")
#: Descriptors of a request.
MOST_FDS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A program to run.

    Args:
        module: run as ``python -m`` does.
        arguments: its arguments.
        environ: its whole environment.
        cwd: its working directory.
        numbers: as which numbers it has the descriptors that come with the request.
    """

    module: str
    arguments: Sequence[str]
    environ: Mapping[str, str]
    cwd: str
    numbers: Sequence[int]

    def encode(self) -> bytes:
        """As it travels."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Request:
        """From what travelled."""
        return cls(**json.loads(data))
