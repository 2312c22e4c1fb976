"""The processes of a scene: the daemon, and the simulator behind it where there is one."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

from hostilekit.case import Attack, Scene
from hostilekit.verdict import Health

READY_S = 60.0
#: A process that does not end when it is killed waits for what nothing can end.
GONE_S = 30.0
#: How large the pipe is that nobody reads: the smallest that there is.
SMALL_PIPE = 4096

_TEST = '{ kind = "model", model = "test" }'
_NVME = '{ kind = "model", model = "nvme", size = "64M" }'
#: The devices of both functions, and what the innocent client takes the second one for.
_DEVICES = {
    Scene.MODELS: (_TEST, _TEST, "test"),
    Scene.NVME: (_NVME, _NVME, "nvme"),
    Scene.SOC: (
        '{{ kind = "vfio-user", socket = "{place}/soc/f0.sock" }}',
        '{{ kind = "vfio-user", socket = "{place}/soc/f1.sock" }}',
        "nvme",
    ),
    Scene.UPSTREAM: ('{{ kind = "vfio-user", socket = "{place}/upstream.sock" }}', _TEST, "test"),
    Scene.AGENT: (_TEST, _TEST, "test"),
}
_AGENT = 'agent = {{ kind = "msgpack-rpc", address = "unix://{place}/agent.sock", function = "f0" }}\n'


def configuration(case: Attack, place: Path) -> str:
    """The daemon's configuration file for a case."""
    first, second, _ = _DEVICES[case.scene]
    agent = _AGENT if case.scene is Scene.AGENT else ""
    if case.scene in (Scene.SOC, Scene.UPSTREAM):
        first = first.format(place=place)
    if case.scene is Scene.SOC:
        second = second.format(place=place)
    return (
        f'[daemon]\ncontrol_socket = "{place}/control.sock"\nreply_budget_s = {case.budget_s:g}\n'
        f'[[function]]\nname = "first"\nsocket = "{place}/first.sock"\ndevice = {first}\n{agent.format(place=place)}'
        f'[[function]]\nname = "second"\nsocket = "{place}/second.sock"\ndevice = {second}\n'
        f'[[function]]\nname = "third"\nsocket = "{place}/third.sock"\ndevice = {_TEST}\n'
    )


class House:
    """The running processes of one case; a context manager.

    Args:
        case: the attack that they are for.
        place: an empty directory with a short path.
    """

    def __init__(self, case: Attack, place: Path) -> None:
        self.case = case
        self.place = place
        self.kind = _DEVICES[case.scene][2]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._unread: IO[bytes] | None = None

    def __enter__(self) -> House:
        try:
            if self.case.scene is Scene.SOC:
                (self.place / "soc").mkdir()
                options = [f"--socket-dir={self.place / 'soc'}", "--functions=2", "--size=64M", "--device-only"]
                with (self.place / "soc.log").open("wb") as log:
                    self._start("soc", ["simulate-soc", *options], log)
            (self.place / "daemon.toml").write_text(configuration(self.case, self.place))
            with self._standard_error() as log:
                self.daemon = self._start("daemon", ["serve", f"--config={self.place / 'daemon.toml'}"], log)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _standard_error(self) -> IO[bytes]:
        if self.case.stderr == "file":
            return (self.place / "daemon.log").open("wb")
        readable, writable = os.pipe()
        self._unread = os.fdopen(readable, "rb")
        log = os.fdopen(writable, "wb")
        fcntl.fcntl(writable, fcntl.F_SETPIPE_SZ, SMALL_PIPE)
        return log

    def _start(self, name: str, arguments: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "vfiouser_oob", *arguments]
        if name == "daemon" and self.case.descriptors:
            command = ["sh", "-c", f'ulimit -n {self.case.descriptors} && exec "$@"', "sh", *command]
        path = self.place / f"{name}.notify"
        search = os.pathsep.join(path for path in sys.path if path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(path))
            notify.settimeout(READY_S)
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": search, "NOTIFY_SOCKET": str(path)},
                start_new_session=True,
            )
            self._processes.append(process)
            while b"READY=1" not in notify.recv(4096):
                pass
        return process

    def pids(self) -> list[int]:
        """The processes that a read of the second function goes through."""
        return [process.pid for process in self._processes]

    def alive(self) -> bool:
        """Whether all of them run."""
        return all(process.poll() is None for process in self._processes)

    def health(self) -> Health:
        """The daemon, as the kernel sees it; zeros when it is gone."""
        place = Path(f"/proc/{self.daemon.pid}")
        try:
            fields = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
            return Health(int(fields["VmRSS"].split()[0]) / 1024, len(os.listdir(place / "fd")), int(fields["Threads"]))
        except (OSError, KeyError):
            return Health(0.0, 0, 0)

    def log(self) -> str:
        """What the daemon has said, where that can be read."""
        path = self.place / "daemon.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=GONE_S)
        if self._unread is not None:
            self._unread.close()
