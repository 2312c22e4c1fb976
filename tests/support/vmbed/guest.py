"""The Linux guest, driven by commands over its second serial port; see `guest/init.sh` for its side."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from vmbed.errors import BedError
from vmbed.lines import LineStream
from vmbed.processes import LoggedProcess, deadline

__all__ = ["Answer", "Guest", "digest_line", "pattern"]

# Generous: an emulated CPU on a busy two-core machine is several times slower than on an idle one.
BOOT_S = 90.0
COMMAND_S = 30.0
IO_S_PER_MIB = 1.0

MIB = 1 << 20
#: Bytes after which the pattern begins again, as in `guest/init.sh`.
PERIOD = 1_048_583
READY = "@@READY"
EXIT = "@@EXIT"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a guest command printed, and its exit status."""

    command: str
    lines: tuple[str, ...]
    status: int

    def fields(self) -> dict[str, str]:
        """Return the answer's `key=value` lines."""
        return dict(line.split("=", 1) for line in self.lines if "=" in line)


class Guest:
    """A guest's command channel. One command at a time."""

    def __init__(self, channel: LineStream, process: LoggedProcess, console: Path) -> None:
        self._channel = channel
        self._process = process
        self.console = console

    async def ready(self, seconds: float = BOOT_S) -> float:
        """Wait until the guest takes commands; returns its uptime in seconds at that point."""
        with self._deadline(seconds, "booted guest"):
            while not (line := await self._channel.receive()).startswith(READY):
                pass
        return float(line.removeprefix(READY))

    async def run(self, command: str, seconds: float = COMMAND_S) -> Answer:
        """Run a command to its end, whatever its status."""
        lines: list[str] = []
        with self._deadline(seconds, f"answer to guest command {command!r}"):
            await self._channel.send(command)
            while not (line := await self._channel.receive()).startswith(EXIT):
                if line.startswith(READY):
                    raise self._failed(command, [*lines, "the guest rebooted instead"])
                lines.append(line)
        return Answer(command, tuple(lines), int(line.removeprefix(EXIT)))

    async def check(self, command: str, seconds: float = COMMAND_S) -> Answer:
        """Run a command that must succeed.

        Raises:
            BedError: it did not; with what it printed.
        """
        answer = await self.run(command, seconds)
        if answer.status != 0:
            raise self._failed(command, [*answer.lines, f"status {answer.status}"])
        return answer

    async def start(self, command: str) -> None:
        """Start a command that is not waited for; no other can be given until it ends."""
        await self._channel.send(command)

    async def line_with(self, text: str, seconds: float = COMMAND_S) -> str:
        """Wait for a line with this text from a started command."""
        with self._deadline(seconds, f"line with {text!r} from the guest"):
            while text not in (line := await self._channel.receive()):
                pass
        return line

    async def ident(self, function: int = 0) -> dict[str, str]:
        """Return what the driver learned from a function: model, serial, state, size, PCI ids."""
        return (await self.check(f"ident {function}")).fields()

    async def io(self, seed: int, mib: int, function: int = 0) -> None:
        """Write a seeded pattern with O_DIRECT, and see that it reads back.

        Raises:
            BedError: it was not written, or reads back differently.
        """
        written = await self.check(f"write {seed} {mib} {function}", COMMAND_S + mib * IO_S_PER_MIB)
        self._transferred(written, mib)
        await self.verify(seed, mib, function)

    async def verify(self, seed: int, mib: int, function: int = 0) -> None:
        """Read with O_DIRECT what an earlier `io` wrote.

        Raises:
            BedError: it was not read, or is something else.
        """
        answer = await self.check(f"read {mib} {function}", COMMAND_S + mib * IO_S_PER_MIB)
        self._transferred(answer, mib)
        if (expected := digest_line(seed, mib)) not in answer.lines:
            raise self._failed(answer.command, [*answer.lines, f"what was written would be {expected}"])

    async def irqs(self) -> dict[str, int]:
        """Return the nvme driver's interrupts so far: count by vector name."""
        answer = await self.check("irqs")
        return {name: int(count) for name, count in (line.split() for line in answer.lines)}

    async def reboot(self) -> float:
        """Reboot the guest from inside; returns when it takes commands again, with its uptime."""
        await self._channel.send("reboot")
        return await self.ready()

    async def power_off(self) -> int:
        """Power the guest off from inside; returns QEMU's exit status."""
        await self._channel.send("poweroff")
        return await self._process.wait()

    def _transferred(self, answer: Answer, mib: int) -> None:
        for direction in ("in", "out"):
            if f"{mib}+0 records {direction}" not in answer.lines:
                raise self._failed(answer.command, [*answer.lines, f"not all of {mib} MiB was transferred"])

    def _failed(self, command: str, lines: list[str]) -> BedError:
        return BedError("\n".join([f"guest command {command!r} failed:", *lines]))

    def _deadline(self, seconds: float, what: str) -> AbstractContextManager[None]:
        return deadline(seconds, what, self.console, self._process.log)


def pattern(seed: int, mib: int) -> bytes:
    """Return the pattern that the guest's `write SEED MIB` writes; see `pattern` in `guest/init.sh`."""
    first = 100_000_000 + seed * 200_000
    base = "".join(f"{number}\n" for number in range(first, first + PERIOD // 10 + 1)).encode()[:PERIOD]
    return (base * mib)[: mib * MIB]


def digest_line(seed: int, mib: int) -> str:
    """Return the line that the guest's `read MIB` prints if it reads that pattern."""
    return f"md5 {hashlib.md5(pattern(seed, mib), usedforsecurity=False).hexdigest()}  -"
