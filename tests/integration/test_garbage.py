"""The daemon is fed garbage: generated and mutated messages over a real socket, with descriptors attached at random.

The daemon is a process of its own, so that its death would be seen, and its descriptors are counted from outside.
"""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HEADER = struct.Struct("<HHIII")
HELLO = struct.pack("<HH", 0, 2) + b'{"capabilities":{"max_msg_fds":8,"write_multiple":true}}\0'
ROOT = Path(__file__).parents[2]
#: At the least, and how much each of them would send.
CLIENTS = 130
MESSAGES = 100

Chance = random.Random
Payload = Callable[[Chance], bytes]
Field = Callable[[Chance], int]


def between(first: int, last: int) -> Field:
    """Any number of a range."""
    return lambda chance: chance.randint(first, last)


def among(*values: int) -> Field:
    """One of these numbers."""
    return lambda chance: chance.choice(values)


def of_bits(bits: int, few: int, *edges: int) -> Field:
    """A number of so many bits: as often a small one, one at an edge, and any."""
    kinds = (between(0, few), among(*edges), between(0, (1 << bits) - 1))
    return lambda chance: chance.choice(kinds)(chance)


u16 = of_bits(16, 16, 0, 1, 0x7FFF, 0xFFFF)
u32 = of_bits(32, 64, 0xFFFFFFFF, 1 << 20, (1 << 20) + 1, 4096)
u64 = of_bits(64, 1 << 16, 0, (1 << 64) - 1, 1 << 63, 0x1000)


def blob(chance: Chance) -> bytes:
    """Any bytes, up to 64; half of the time none or few."""
    return chance.randbytes(chance.choice((0, chance.randint(0, 8), chance.randint(0, 64), chance.randint(0, 64))))


def packed(layout: str, *fields: Field) -> Payload:
    """Payloads of one layout, with a tail of any bytes."""
    return lambda chance: struct.pack(layout, *(field(chance) for field in fields)) + blob(chance)


def hello(chance: Chance) -> bytes:
    """A VERSION that is right, or no VERSION at all."""
    return HELLO if chance.randrange(2) else blob(chance)


def region_write(chance: Chance) -> bytes:
    """A REGION_WRITE whose count now and then lies."""
    data = blob(chance)
    lie = chance.choice((0, 0, 0, 1, 0xFFFF))
    return struct.pack("<QII", u64(chance), chance.randint(0, 12), len(data) + lie) + data


#: Payloads that are nearly right, so that they get past the first check.
PAYLOADS: dict[int, Payload] = {
    1: hello,
    2: packed("<IIQQQ", among(32, 31, 64), between(0, 31), u64, u64, u64),
    3: packed("<IIQQ", among(24, 48, 1 << 21), between(0, 7), u64, u64),
    4: packed("<4I", u32, u32, u32, u32),
    5: packed("<IIIIQQ", u32, u32, between(0, 12), u32, u64, u64),
    6: packed("<4I", u32, between(0, 1), between(0, 12), between(0, 1)),
    7: packed("<4I", u32, u32, between(0, 6), u32),
    8: packed("<5I", among(20, 0, 32), between(0, 255), between(0, 6), u32, u32),
    9: packed("<QII", u64, between(0, 12), u32),
    10: region_write,
    11: packed("<QQ", u64, u64),
    12: packed("<QQ", u64, u64),
    13: blob,
    14: packed("<II", u32, between(0, 9)),
    15: packed("<Q", u64),
    16: packed("<II", u32, u32),
    17: packed("<II", u32, u32),
    18: packed("<II", u32, u32),
}
#: As often any known command, one that goes far, and any number.
KINDS = (among(*sorted(PAYLOADS)), among(2, 3, 8, 9, 10), u16)


def message(chance: Chance) -> tuple[bytes, int]:
    """One message and how many descriptors come with it; now and then its header lies."""
    command = chance.choice(KINDS)(chance)
    payload = PAYLOADS.get(command, blob)(chance)
    flags = chance.choice((0, 0, 0, 0, 0x10, 0x20, 1, 2, 0xFFFFFF00))
    size = 16 + len(payload)
    if chance.randrange(401) == 0:
        size = chance.choice((0, 15, size + 1, size - 1, 0x7FFFFFFF, 0xFFFFFFFF))
    fds = chance.choice((0, 0, 0, 1, 1, 2, 20))
    return HEADER.pack(u16(chance), command, size, flags, chance.choice((0, 0, 22))) + payload, fds


#: What a client is told while the one before it is not gone yet: here, or at the server behind its device.
_TOO_EARLY = {errno.EBUSY, errno.ENODEV}


class Victim:
    """A daemon process with a model function and one behind the `vfio-user` backend."""

    def __init__(self, directory: Path) -> None:
        config = directory / "config.toml"
        self.sockets = [directory / "model.sock", directory / "front.sock"]
        test = 'model = "test"'
        config.write_text(
            f'[daemon]\ncontrol_socket = "{directory}/control.sock"\nreply_budget_s = 4.0\n'
            f'[[function]]\nname = "model"\nsocket = "{self.sockets[0]}"\ndevice = {{ kind = "model", {test} }}\n'
            f'[[function]]\nname = "up"\nsocket = "{directory}/up.sock"\ndevice = {{ kind = "model", {test} }}\n'
            f'[[function]]\nname = "front"\nsocket = "{self.sockets[1]}"\n'
            f'device = {{ kind = "vfio-user", socket = "{directory}/up.sock" }}\n'
        )
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.bind(str(directory / "notify"))
        notify.settimeout(30)
        path = os.pathsep.join([str(ROOT), str(ROOT / "protocol"), str(ROOT / "agents")])
        self.log = (directory / "log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vfiouser_oob", "serve", "--config", str(config)],
            env={**os.environ, "PYTHONPATH": path, "NOTIFY_SOCKET": str(directory / "notify")},
            stderr=self.log,
        )
        with notify:
            assert b"READY=1" in notify.recv(4096)
        # Descriptors to attach: memory, read-only memory, an eventfd, both ends of things that are neither.
        memory = os.memfd_create("victim")
        os.ftruncate(memory, 1 << 16)
        read_only = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
        self.offers = [memory, read_only, os.eventfd(0, os.EFD_NONBLOCK), *os.pipe(), os.open("/dev/null", os.O_RDWR)]
        for path_ in self.sockets:
            self.check_alive(path_)
        self.fds = self.fds_at_rest()

    def connect(self, path: Path) -> socket.socket:
        """Connect; the client before may not be gone yet, which the daemon waits out."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(str(path))
        return sock

    @contextmanager
    def attached(self, path: Path) -> Iterator[socket.socket]:
        """A client that was let in; one that comes too early is told so after a second, and comes again."""
        deadline = time.monotonic() + 20
        while True:
            with self.connect(path) as sock:
                sock.sendall(HEADER.pack(0, 1, 16 + len(HELLO), 0, 0) + HELLO)
                *_, flags, error = _receive(sock)
                if flags == 0x21 and error in _TOO_EARLY and time.monotonic() < deadline:
                    continue
                assert (1, 0) == (flags, error)
                yield sock
                return

    def check_alive(self, path: Path) -> None:
        """The next client must be served."""
        with self.attached(path) as sock:
            sock.sendall(HEADER.pack(1, 4, 32, 0, 0) + struct.pack("<4I", 16, 0, 0, 0))
            assert (1, 4, 32, 1, 0) == _receive(sock)[:5]

    def count_fds(self) -> int:
        """How many descriptors the daemon has open now."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def fds_at_rest(self) -> int:
        """How many descriptors the daemon has once nobody is connected: the number that ten looks agree on."""
        seen = deque([-1], maxlen=10)
        deadline = time.monotonic() + 10
        while (len(seen) < 10 or len(set(seen)) > 1) and time.monotonic() < deadline:
            seen.append(self.count_fds())
            select.select([], [], [], 0.02)
        return seen[-1]

    def check_fds_given_back(self) -> None:
        """No descriptor of a client that is gone may stay open.

        The end of a connection is not announced to the peer, and a thread of its own closes what the client sent: so
        this looks until the number is what it was, and not until it stands still, which it does on a busy machine too.
        """
        deadline = time.monotonic() + 20
        while self.count_fds() > self.fds and time.monotonic() < deadline:
            select.select([], [], [], 0.02)
        assert self.fds >= self.count_fds()

    def resident_kb(self) -> int:
        """Memory of the daemon."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def stop(self) -> None:
        """End the daemon, which must still do that in good order."""
        self.process.send_signal(signal.SIGTERM)
        assert 0 == self.process.wait(20)
        self.log.close()
        for fd in self.offers:
            os.close(fd)


def _receive(sock: socket.socket) -> tuple[int, ...]:
    header = sock.recv(16, socket.MSG_WAITALL)
    assert len(header) == 16, "the daemon closed the connection"
    fields = HEADER.unpack(header)
    if fields[2] > 16:
        sock.recv(fields[2] - 16, socket.MSG_WAITALL)
    return fields


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """The daemon that has to survive all examples."""
    daemon = Victim(tmp_path_factory.mktemp("garbage"))
    yield daemon
    daemon.stop()


def feed(sock: socket.socket, stream: list[tuple[bytes, int]], offers: list[int], chance: random.Random) -> int:
    """Send messages until the daemon ends the connection; its replies are thrown away.

    Returns:
        How many messages were sent.
    """
    sock.setblocking(False)
    for number, (data, count) in enumerate(stream):
        fds = [chance.choice(offers) for _ in range(count)]
        while True:
            readable, writable, _ = select.select([sock], [sock], [], 10)
            assert readable or writable, "the daemon neither reads nor answers"
            try:
                if readable and not sock.recv(1 << 16):
                    return number
                if writable:
                    socket.send_fds(sock, [data], fds) if fds else sock.send(data)
                    break
            except BlockingIOError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                return number
    return len(stream)


def survives(victim: Victim, chance: Chance) -> int:
    """Feed one client's garbage to the daemon, which then serves the next client; returns how many messages it took."""
    path = victim.sockets[chance.randrange(2)]
    with victim.connect(path) as sock:
        if chance.randrange(10):  # now and then the garbage comes before the negotiation
            sock.sendall(HEADER.pack(0, 1, 16 + len(HELLO), 0, 0) + HELLO)
            assert 1 == _receive(sock)[3]
        sent = feed(sock, [message(chance) for _ in range(MESSAGES)], victim.offers, chance)
    assert victim.process.poll() is None
    victim.check_alive(path)
    return sent


def test_generated_garbage(victim: Victim) -> None:
    """Over 10 000 messages: the daemon lives, serves the next client each time, and keeps no descriptor."""
    first = random.SystemRandom().getrandbits(32)
    print(f"seeds from {first}")  # noqa: T201  pytest shows it when the test fails
    sent, clients = 0, 0
    while sent < 10_000 or clients < CLIENTS:
        sent += survives(victim, Chance(first + clients))
        clients += 1
    victim.check_fds_given_back()


def test_mutated_conversation(victim: Victim) -> None:
    """A correct conversation with bytes flipped, dropped and doubled at random does no harm either."""
    chance = random.Random(20261123)
    good = b"".join(
        HEADER.pack(number, command, 16 + len(payload), 0, 0) + payload
        for number, (command, payload) in enumerate(
            [
                (1, HELLO),
                (4, struct.pack("<4I", 16, 0, 0, 0)),
                *((5, struct.pack("<IIIIQQ", 64, 0, index, 0, 0, 0)) for index in range(9)),
                (2, struct.pack("<IIQQQ", 32, 3, 0, 0x10000, 0x8000)),
                (8, struct.pack("<5I", 20, 0x24, 2, 0, 1)),
                (10, struct.pack("<QIII", 4, 0, 4, 0xCAFE)),
                (9, struct.pack("<QII", 4, 0, 4)),
                (3, struct.pack("<IIQQ", 24, 0, 0x10000, 0x8000)),
                (13, b""),
            ]
        )
    )
    for round_ in range(300):
        data = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            position = chance.randrange(len(data))
            match chance.randrange(3):
                case 0:
                    data[position] ^= 1 << chance.randrange(8)
                case 1:
                    del data[position : position + chance.randint(1, 20)]
                case 2:
                    data[position:position] = data[position : position + chance.randint(1, 20)]
        path = victim.sockets[round_ % 2]
        with victim.connect(path) as sock:
            feed(sock, [(bytes(data), 0)], victim.offers, chance)
        if round_ % 20 == 19:
            victim.check_alive(path)
    assert victim.process.poll() is None
    victim.check_fds_given_back()


def test_memory_stays_flat_over_200_clients(victim: Victim) -> None:
    """Clients that map memory and assign interrupts, and leave without a word, cost the daemon nothing in the end."""
    maps = b"".join(
        HEADER.pack(number, 2, 48, 0, 0) + struct.pack("<IIQQQ", 32, 3, 0, number << 16, 0x8000) for number in range(64)
    )

    def visit(path: Path) -> None:
        with victim.attached(path) as sock:
            socket.send_fds(sock, [maps], victim.offers[:1])
            for _ in range(64):
                assert 1 == _receive(sock)[3]
            socket.send_fds(
                sock, [HEADER.pack(0, 8, 36, 0, 0) + struct.pack("<5I", 20, 0x24, 2, 0, 1)], victim.offers[2:3]
            )
            assert 1 == _receive(sock)[3]

    for number in range(100):
        visit(victim.sockets[number % 2])
    before = victim.resident_kb()
    for number in range(200):
        visit(victim.sockets[number % 2])
    assert victim.resident_kb() - before < 1024
    victim.check_fds_given_back()
