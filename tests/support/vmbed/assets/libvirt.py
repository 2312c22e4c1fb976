"""libvirt, from the suite whose QEMU the tests run: Debian 12's cannot migrate a QEMU as new as that.

Fetched and verified like the other assets, with all its libraries, and run through its own dynamic loader. It is kept
beside them and apart from their manifest, under a name that changes with what is fetched.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmbed.assets.apt import PrivateApt, require_tools, unpack
from vmbed.assets.archive import archive_address
from vmbed.assets.errors import AssetError
from vmbed.assets.recipe import BACKPORTS, SUITE

__all__ = ["Libvirt", "fetch_libvirt", "libvirt_recipe", "locate_libvirt"]

Report = Callable[[str], None]

PACKAGES = ("libvirt-daemon", "libvirt-daemon-driver-qemu", "libvirt-clients")
#: Of what they depend on, the parts that they load.
NEEDS = re.compile(r"^(lib(?!pam-|apt|debconf|asound|brlapi|cacard|usbredir|slirp|systemd-shared)|zlib)")
LIBRARIES = "usr/lib/x86_64-linux-gnu"
PREFIX = "libvirt-"
VERSION = "version"
RECIPE = "1"  # raise it when the layout changes


@dataclass(frozen=True, slots=True)
class Libvirt:
    """An unpacked libvirt.

    Args:
        root: its tree.
        version: its package's version.
    """

    root: Path
    version: str

    def command(self, program: str) -> tuple[str, ...]:
        """The start of a program's command line.

        Args:
            program: such as usr/bin/virsh.
        """
        libraries = self.root / LIBRARIES
        return (str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), str(self.root / program))


def libvirt_recipe() -> str:
    """Return a name for what is fetched; it changes when that does."""
    return hashlib.sha256(repr((RECIPE, SUITE, BACKPORTS, PACKAGES, NEEDS.pattern)).encode()).hexdigest()[:16]


def locate_libvirt(cache: Path) -> Libvirt:
    """Return the libvirt of a cache.

    Raises:
        AssetError: it is not there.
    """
    root = cache / f"{PREFIX}{libvirt_recipe()}"
    version = root / VERSION
    if not version.is_file():
        raise AssetError(f"libvirt is not in {cache}: run `make vm-assets`")
    return Libvirt(root, version.read_text(encoding="utf-8"))


def fetch_libvirt(cache: Path, report: Report, *, archive: str | None = None, refresh: bool = False) -> Libvirt:
    """Have libvirt in a cache; does nothing when it is there.

    Args:
        cache: the folder; it must exist, and nobody else may build in it.
        report: called with one line for each step that takes time.
        archive: base address of the Debian archive, instead of the machine's own.
        refresh: look for a newer one although there is one.

    Raises:
        AssetError: with one line that says what is wrong.
    """
    root = cache / f"{PREFIX}{libvirt_recipe()}"
    if (root / VERSION).is_file() and not refresh:
        return locate_libvirt(cache)
    require_tools()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as scratch:
        work = Path(scratch)
        apt = PrivateApt(work / "apt", archive or archive_address(), (SUITE, BACKPORTS))
        report(f"fetching the package lists of {SUITE} and {BACKPORTS}")
        apt.update()
        found = {package.name: package for name in PACKAGES for package in apt.closure(name, BACKPORTS)}
        packages = [package for name, package in found.items() if NEEDS.match(name)]
        if not set(PACKAGES) <= found.keys():
            raise AssetError(f"the archive offered no {PACKAGES[0]}; it offered {len(found)} other packages")
        version = found[PACKAGES[0]].version
        report(f"fetching libvirt {version}: {sum(package.size for package in packages) / 1e6:.0f} MB")
        apt.download(packages, work / "debs")
        unpack(work / "debs", work / "tree")
        (work / "tree" / VERSION).write_text(version, encoding="utf-8")
        if root.exists():
            root.rename(work / "old")  # goes with the scratch folder
        (work / "tree").rename(root)
    report(f"libvirt {version} ready in {time.monotonic() - started:.1f} s")
    return locate_libvirt(cache)
