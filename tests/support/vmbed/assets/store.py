"""Where built assets live, how they are named, and how they are found again.

A cache folder holds one tree per package version and `manifest.json`, which says which of them are
current and by which recipe they were made. The manifest is replaced as a whole once everything it
names is in place, so a build that dies leaves the cache as it was.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from vmbed.assets.errors import AssetError
from vmbed.assets.initramfs import initramfs_recipe
from vmbed.assets.mdev import mdev_recipe
from vmbed.assets.plain import PLAIN
from vmbed.assets.python import python_recipe
from vmbed.assets.recipe import recipe

__all__ = ["CACHE_ENV", "Assets", "Manifest", "bootable", "default_cache", "locate"]

CACHE_ENV = "VFIOUSER_VM_CACHE"
MANIFEST = "manifest.json"
LIBRARIES = "usr/lib/x86_64-linux-gnu"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is current in a cache; folders and files are named relative to the cache."""

    recipe: str
    qemu: str
    qemu_version: str
    kernel: str
    kernel_version: str
    initramfs: str
    initramfs_recipe: str
    python: str = ""
    python_recipe: str = ""
    oldest_kernel: str = ""
    mdev_kernel: str = ""
    mdev_recipe: str = ""

    def save(self, cache: Path) -> None:
        """Make this the cache's manifest, in one step."""
        temporary = cache / f"{MANIFEST}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        temporary.replace(cache / MANIFEST)

    @classmethod
    def load(cls, cache: Path) -> Manifest | None:
        """Return the cache's manifest, or None when there is none that this version can use."""
        try:
            manifest = cls(**json.loads((cache / MANIFEST).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        complete = all((cache / name).exists() for name in (manifest.qemu, manifest.kernel))
        return manifest if complete else None


@dataclass(frozen=True, slots=True)
class Assets:
    """The assets, ready for use."""

    qemu_root: Path
    qemu_version: str
    kernel: Path
    kernel_version: str
    initramfs: Path
    python: Path
    #: vmlinuz of the oldest supported kernel; only where the long tests' assets were asked for.
    oldest_kernel: Path | None = None
    #: vmlinuz of the kernel with mediated devices.
    mdev_kernel: Path | None = None

    @property
    def qemu_command(self) -> tuple[str, ...]:
        """The start of QEMU's command line: its own dynamic loader, libraries and firmware folders."""
        libraries = self.qemu_root / LIBRARIES
        return (
            str(libraries / "ld-linux-x86-64.so.2"),
            "--library-path",
            f"{libraries}:{libraries / 'pulseaudio'}",
            str(self.qemu_root / "usr/bin/qemu-system-x86_64"),
            "-L",
            str(self.qemu_root / "usr/share/qemu"),
            "-L",
            str(self.qemu_root / "usr/share/seabios"),
        )

    @property
    def qemu_environment(self) -> dict[str, str]:
        """What must be set for QEMU to load its accelerators from its own tree."""
        return {"QEMU_MODULE_DIR": str(self.qemu_root / LIBRARIES / "qemu")}


def bootable(kernel: Path) -> Path:
    """Return the file to boot for a vmlinuz: the same kernel without its wrapper, where that has been made."""
    plain = kernel.with_name(PLAIN)
    return plain if plain.is_file() else kernel


def default_cache() -> Path:
    """Return the cache folder: `$VFIOUSER_VM_CACHE`, else `.cache/vm` in the checkout."""
    if configured := os.environ.get(CACHE_ENV):
        return Path(configured).resolve()
    checkout = Path(__file__).resolve().parents[4]
    return checkout / ".cache" / "vm"


def locate(cache: Path | None = None) -> Assets:
    """Return the assets of a cache.

    Raises:
        AssetError: they are not there; the message names the command that fetches them.
    """
    folder = cache or default_cache()
    manifest = Manifest.load(folder)
    if manifest is None or not manifest.python or not (folder / manifest.initramfs).is_file():
        raise AssetError(f"the VM test assets are not in {folder}: run `make vm-assets`")
    made_by = (manifest.recipe, manifest.initramfs_recipe, manifest.python_recipe, manifest.mdev_recipe)
    if made_by != (recipe(), initramfs_recipe(), python_recipe(), mdev_recipe()):
        raise AssetError(f"the VM test assets in {folder} are another version's: run `make vm-assets`")
    return Assets(
        qemu_root=folder / manifest.qemu,
        qemu_version=manifest.qemu_version,
        kernel=folder / manifest.kernel / "vmlinuz",
        kernel_version=manifest.kernel_version,
        initramfs=folder / manifest.initramfs,
        python=folder / manifest.python,
        oldest_kernel=_kernel(folder, manifest.oldest_kernel),
        mdev_kernel=_kernel(folder, manifest.mdev_kernel),
    )


def _kernel(folder: Path, name: str) -> Path | None:
    kernel = folder / name / "vmlinuz"
    return kernel if name and kernel.is_file() else None
