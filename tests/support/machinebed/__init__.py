"""A minimal Debian that is booted, with its own systemd, in a container of systemd-nspawn.

The tools are fetched from the machine's Debian archive and unpacked, not installed; the root file system is made once,
and kept in the cache. Each boot sees it through an overlay that is gone afterwards.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from vmbed.assets.archive import archive_address

CHECKOUT = Path(__file__).resolve().parents[3]
CACHE = CHECKOUT / ".cache" / "machines"
#: As little as a machine can have: what installs packages, systemd, and the Python that the package depends on.
PACKAGES = "systemd,systemd-sysv,dbus,python3"
TOOLS = ("debootstrap", "systemd-container", "libsystemd-shared")
BOOT_S = 240.0
CONTROL_GROUPS = Path("/sys/fs/cgroup")
_UNIT = """\
[Unit]
Description=What the test does in the machine
After=dbus.socket systemd-tmpfiles-setup.service

[Service]
Type=exec
Environment=HOME=/root DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
WorkingDirectory=/test
ExecStart=/bin/sh -c 'sh -ex /test/script >/test/output 2>&1; echo $$? >/test/status'
ExecStopPost=systemctl --no-block poweroff
"""


def why_not() -> str | None:
    """Why there can be no such machine here; None if there can."""
    if os.geteuid():
        return "a machine in a container needs root"
    for tool in ("apt-get", "dpkg-deb", "unshare"):
        if shutil.which(tool) is None:
            return f"{tool} is not here; a Debian is needed"
    probe = ["unshare", "--mount", "--pid", "--cgroup", "--fork", "sh", "-c", "mount -t tmpfs none /mnt"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "namespaces with mounts of their own cannot be made"
    return None if os.access(CONTROL_GROUPS, os.W_OK) else "control groups cannot be made"


def base(suite: str = "bookworm") -> Path:
    """The root file system, made if it is not there.

    Args:
        suite: of Debian.

    Raises:
        CalledProcessError: the archive cannot be reached, or a package is not there.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        root = CACHE / suite
        if not root.is_dir():
            _fetch_tools()
            made = CACHE / f"{suite}.new"
            shutil.rmtree(made, ignore_errors=True)
            _run(
                [
                    *(str(_tools() / "usr/sbin/debootstrap"), "--variant=minbase", f"--include={PACKAGES}"),
                    *(suite, str(made), archive_address()),
                ],
                DEBOOTSTRAP_DIR=str(_tools() / "usr/share/debootstrap"),
            )
            for archive in (made / "var/cache/apt/archives").glob("*.deb"):
                archive.unlink()
            made.rename(root)
        return root


def run_in_machine(root: Path, place: Path, script: str) -> tuple[int, str]:
    """Boot a machine, run a script in it as root, and switch the machine off.

    Args:
        root: the root file system; it is left alone.
        place: a directory that the script sees as `/test`.
        script: for sh; it ends at the first command that fails.

    Returns:
        The script's exit code, and what it printed.
    """
    (place / "script").write_text(script)
    (place / "unit").write_text(_UNIT)
    unit = "/etc/systemd/system/test-script.service"
    command = [
        *(str(_tools() / "usr/bin/systemd-nspawn"), "--quiet", "--register=no", "--keep-unit", "--private-network"),
        *(f"--directory={root}", "--volatile=overlay", f"--machine=test-{os.getpid()}", "--console=pipe"),
        *(f"--bind={place}:/test", f"--bind-ro={place / 'unit'}:{unit}", "--boot", "systemd.wants=test-script.service"),
    ]
    library = str(_tools() / "usr/lib/x86_64-linux-gnu/systemd")
    environment = {"LD_LIBRARY_PATH": library, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
    with (place / "console").open("wb") as console:
        subprocess.run(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            timeout=BOOT_S,
            check=False,
        )
    if not (place / "status").is_file():
        raise AssertionError(f"the machine did not come to the script: {(place / 'console').read_text()[-2000:]}")
    return int((place / "status").read_text()), (place / "output").read_text(errors="replace")


def _tools() -> Path:
    return CACHE / "tools"


def _fetch_tools() -> None:
    if _tools().is_dir():
        return
    debs, made = CACHE / "debs", CACHE / "tools.new"
    debs.mkdir(exist_ok=True)
    shutil.rmtree(made, ignore_errors=True)
    try:
        _run(["apt-get", "-qq", "download", *TOOLS], cwd=debs)
    except subprocess.CalledProcessError:  # the machine's lists are old, or there are none
        _run(["apt-get", "-qq", "update"])
        _run(["apt-get", "-qq", "download", *TOOLS], cwd=debs)
    for deb in debs.glob("*.deb"):
        _run(["dpkg-deb", "--extract", str(deb), str(made)])
    made.rename(_tools())


def _run(command: list[str], cwd: Path | None = None, **environment: str) -> None:
    subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, check=True, capture_output=True)
