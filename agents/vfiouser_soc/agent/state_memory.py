"""State memory: device memory that a migration has to carry, of any size, without taking up any.

What a block holds is computed from the function's seed, the block's index and its version; a "write" of the device
raises the version. So gigabytes can be saved, verified byte by byte where they arrive, and saved again, while each side
keeps one number per block. A part of the memory, the working set, is rewritten all the time while the function runs,
at a rate that is worked out when somebody looks: an idle simulator has nothing to do.
"""

from __future__ import annotations

import hashlib
import random
import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass

_BLOCK_SIZE = 256 << 10
_PATTERN_SIZE = 1 << 20
_PAGE = 4096
#: The working set is this part of the memory.
_WORKING_SET_PART = 16
#: What a block begins with: its index and its version.
_LABEL = struct.Struct("<QQ")
#: A version that a stream brings; it goes on being raised here.
_MAX_VERSION = 1 << 62


@dataclass(frozen=True, slots=True)
class StateMemoryOptions:
    """What kind of state memory to have.

    Args:
        size: bytes; rounded up to whole pages, so that every block has room for its label.
        churn: bytes per second that are rewritten while the function runs.
    """

    size: int = 0
    churn: int = 0


class StateMemory:
    """The state memory of one function.

    Args:
        options: size and churn.
        name: what its contents are derived from; two memories of one name hold the same.
        clock: seconds, monotonic.
    """

    def __init__(self, options: StateMemoryOptions, name: str, clock: Callable[[], float]) -> None:
        self.size = -(-options.size // _PAGE) * _PAGE
        self._churn = options.churn
        self._clock = clock
        self._seed = name
        self._pattern = b""
        self.blocks = -(-self.size // _BLOCK_SIZE)
        self._versions = array("Q", [1]) * self.blocks
        self._working_set = max(1, self.blocks // _WORKING_SET_PART) if self.blocks else 0
        self._next = 0
        #: When the blocks were last brought up to date; None while the function does not run.
        self._since: float | None = clock()
        #: Told the index of every block that is rewritten.
        self.rewritten: Callable[[int], None] = lambda index: None

    def length(self, index: int) -> int:
        """Bytes of a block; the last one may be short."""
        return min(_BLOCK_SIZE, self.size - index * _BLOCK_SIZE)

    # Time

    def start(self) -> None:
        """The function runs from now on."""
        if self._since is None:
            self._since = self._clock()

    def advance(self) -> None:
        """Do the rewriting that has been due since the last time."""
        if self._since is None or not self._churn or not self.blocks:
            return
        now = self._clock()
        due = int((now - self._since) * self._churn) // _BLOCK_SIZE
        if due:
            self._since += due * _BLOCK_SIZE / self._churn
        # A block that was due several times differs as much after one of them.
        for _ in range(min(due, self._working_set)):
            self.rewrite(self._next)
            self._next = (self._next + 1) % self._working_set

    def stop(self) -> None:
        """The function does not run any more."""
        self.advance()
        self._since = None

    def rewrite(self, index: int) -> None:
        """Write a block anew."""
        self._versions[index] += 1
        self.rewritten(index)

    def reset(self) -> None:
        """Hold what a fresh memory holds."""
        for index in range(self.blocks):
            if self._versions[index] != 1:
                self._versions[index] = 1
                self.rewritten(index)

    # Contents

    def block(self, index: int) -> bytes:
        """The bytes of a block."""
        return self._contents(index, self._versions[index])

    def recognise(self, index: int, data: bytes) -> int:
        """Find which version of a block some bytes are.

        Args:
            index: the block.
            data: its bytes, of the block's length.

        Returns:
            The version.

        Raises:
            ValueError: they are none.
        """
        if not 0 <= index < self.blocks or len(data) != self.length(index):
            raise ValueError(f"block {index} with {len(data)} bytes; there are {self.blocks} blocks")
        version: int = _LABEL.unpack_from(data)[1]
        if not 0 < version <= _MAX_VERSION or data != self._contents(index, version):
            raise ValueError(f"block {index} does not hold what the function can have written there")
        return version

    def take(self, versions: dict[int, int]) -> None:
        """Take over blocks, by index and version."""
        for index, version in versions.items():
            self._versions[index] = version

    def digest(self) -> bytes:
        """Of all contents."""
        return hashlib.sha256(self._versions.tobytes()).digest()

    def _contents(self, index: int, version: int) -> bytes:
        length = self.length(index)
        start = (index * 40503 + version * 2654435761) % _PATTERN_SIZE
        pattern = self._pattern or self._make_pattern()
        return _LABEL.pack(index, version) + pattern[start : start + length - _LABEL.size]

    def _make_pattern(self) -> bytes:
        self._pattern = random.Random(self._seed).randbytes(_PATTERN_SIZE + _BLOCK_SIZE)
        return self._pattern
