"""The files that belong to an installation beside the program: which there are, and where each goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

#: In a wheel they are inside the package; in a checkout they are beside it.
_PLACES = (Path(__file__).resolve().parents[1] / "files", Path(__file__).resolve().parents[2] / "packaging")
COMMAND = "/usr/bin/vfiouser-oob"
_OPT_IN = "share/vfiouser-oob"
#: Source, and target below the prefix; a source that ends in a slash is a folder with whatever is in it.
_TARGETS = (
    ("systemd/vfiouser-oob.service", "lib/systemd/system/vfiouser-oob.service"),
    ("systemd/vfiouser-oob.socket", "lib/systemd/system/vfiouser-oob.socket"),
    ("systemd/vfiouser-oob@.service", "lib/systemd/system/vfiouser-oob@.service"),
    ("systemd/vfiouser-oob@.socket", "lib/systemd/system/vfiouser-oob@.socket"),
    ("systemd/vfiouser-oob.sysusers", "lib/sysusers.d/vfiouser-oob.conf"),
    ("systemd/vfiouser-oob.tmpfiles", "lib/tmpfiles.d/vfiouser-oob.conf"),
    ("50-vfiouser-oob.json", "share/vfio-user/50-vfiouser-oob.json"),
    # What an administrator puts into place, since it opens something: agents on the network, functions of this machine.
    ("systemd/agents.conf", f"{_OPT_IN}/systemd/agents.conf"),
    ("systemd/kernel-vfio.conf", f"{_OPT_IN}/systemd/kernel-vfio.conf"),
    ("systemd/kernel-vfio.sysusers", f"{_OPT_IN}/systemd/kernel-vfio.sysusers"),
    ("udev/60-vfiouser-oob.rules", f"{_OPT_IN}/udev/60-vfiouser-oob.rules"),
    ("libvirt/", f"{_OPT_IN}/libvirt/"),
    ("grafana/", f"{_OPT_IN}/grafana/"),
    ("config.toml", f"{_OPT_IN}/config.toml"),
)
#: What belongs to the administrator as soon as it is there: never overwritten, never removed. Not below the prefix.
CONFIGURATION = ("config.toml", "etc/vfiouser-oob/config.toml")


@dataclass(frozen=True, slots=True)
class ShippedFile:
    """One file to be laid out.

    Args:
        target: where it goes, relative to the root.
        content: its bytes.
        mode: permission bits.
        keep: it is left alone where there is one already.
    """

    target: PurePosixPath
    content: bytes
    mode: int = 0o644
    keep: bool = False


class NoFiles(Exception):
    """This installation came without the files."""


def source() -> Path:
    """Where the files are.

    Raises:
        NoFiles: they are nowhere.
    """
    for place in _PLACES:
        if (place / CONFIGURATION[0]).is_file():
            return place
    raise NoFiles(f"this installation has no files to install (looked in {' and '.join(map(str, _PLACES))})")


def shipped(prefix: str, command: str) -> Iterator[ShippedFile]:
    """Every file that is shipped as it is.

    Args:
        prefix: relative to the root, such as ``usr/local``.
        command: the program's path, for units.

    Raises:
        NoFiles: this installation came without them.
    """
    base = source()
    below = PurePosixPath(prefix)
    for name, target in _TARGETS:
        paths = (
            sorted(path for path in (base / name).rglob("*") if path.is_file()) if name[-1] == "/" else [base / name]
        )
        for path in paths:
            where = below / target / path.relative_to(base / name) if name[-1] == "/" else below / target
            content = path.read_bytes()
            # A hook is a program; git keeps that.
            mode = 0o755 if content.startswith(b"#!") else 0o644
            yield ShippedFile(where, content.replace(COMMAND.encode(), command.encode()), mode)
    name, target = CONFIGURATION
    yield ShippedFile(PurePosixPath(target), (base / name).read_bytes(), keep=True)
