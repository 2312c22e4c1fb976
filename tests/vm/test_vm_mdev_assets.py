"""Building kernel modules for the VM tests: what a machine without the means is told. Needs no network and no VM."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from vmbed.assets import AssetError, locate
from vmbed.assets.apt import Package
from vmbed.assets.initramfs import initramfs_recipe
from vmbed.assets.mdev import build_modules, headers_release, mdev_recipe, require_compiler
from vmbed.assets.python import python_recipe
from vmbed.assets.recipe import recipe
from vmbed.assets.store import Manifest

RELEASE = "6.12-cloud-amd64"
#: As much of the kernel's source as the builder looks at.
SCRATCH = "\tcase UART_SCR:\n\t\tmdev_state->s[index].uart_reg[offset] = data;"
MTTY = f'#define MTTY_NAME "mtty"\nvdev->log_ops = &mtty_log_ops;\n{SCRATCH}\n'
SOURCES = {"drivers/vfio/mdev/mdev_core.c": "// core\n", "samples/vfio-mdev/mtty.c": MTTY}
#: A kernel's Makefile that builds what it finds.
BUILDS = "modules:\n\tcd $(M) && for name in mdev_core:mdev mtty:mtty mttydma:mttydma; do \\\n"
BUILDS += "\t  cp $${name%:*}.c $${name#*:}.ko; done\n"


def packages(root: Path, makefile: str, sources: Mapping[str, str]) -> Path:
    """Lay out what headers and source packages hold."""
    headers = root / "tree/usr/src" / f"linux-headers-{RELEASE}"
    headers.mkdir(parents=True)
    (headers / "Makefile").write_text(makefile)
    with tarfile.open(headers.parent / "linux-source-6.12.tar.xz", "w:xz") as archive:
        for name, text in sources.items():
            entry = tarfile.TarInfo(f"linux-source-6.12/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return root / "tree"


def test_modules_are_built_from_the_kernels_own_source(tmp_path: Path) -> None:
    """The few files are taken out of the archive, and another driver is made of the one that is there."""
    tree = packages(tmp_path, "include /usr/src/rules\n", SOURCES)
    (tree / "usr/src/rules").write_text(BUILDS)
    modules = build_modules(tree, tmp_path / "work", RELEASE)
    assert ["mdev.ko", "mtty.ko", "mttydma.ko"] == [path.name for path in modules]
    assert MTTY == modules[1].read_text()
    text = modules[2].read_text()
    assert text.startswith(f'#define MTTY_NAME "mttydma"\n\n{SCRATCH}\n\t\tvfio_dma_rw(')


def test_a_compiler_that_cannot_build_them_is_named(tmp_path: Path) -> None:
    """With its version, the kernel's, and its first complaint."""
    broken = "modules:\n\t@echo making >&2; echo 'gcc: error: unrecognized option -fnew' >&2; false\n"
    tree = packages(tmp_path, broken, SOURCES)
    with pytest.raises(AssetError, match=rf"for Linux {RELEASE} with this machine's gcc [\d.]+: gcc: error: unrecog"):
        build_modules(tree, tmp_path / "work", RELEASE)


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ({"drivers/vfio/mdev/mdev_core.c": ""}, "linux-source-6.12.tar.xz is not as expected: .*mtty.c"),
        ({**SOURCES, "samples/vfio-mdev/mtty.c": '"mtty"'}, "has no 'vdev->log_ops.*' any more"),
    ],
)
def test_another_source_than_expected_is_told(tmp_path: Path, sources: Mapping[str, str], words: str) -> None:
    """A newer kernel may have moved what is built."""
    with pytest.raises(AssetError, match=words):
        build_modules(packages(tmp_path, BUILDS, sources), tmp_path / "work", RELEASE)


def test_missing_tools_and_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install, and what the archive lacks."""
    require_compiler()
    found = [Package("linux-headers-6.12-common", "1", 1), Package(f"linux-headers-{RELEASE}", "1", 1)]
    assert RELEASE == headers_release(found)
    with pytest.raises(AssetError, match="no linux-headers-cloud-amd64"):
        headers_release(found[:1])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match="gcc not found: install the package gcc"):
        require_compiler()


def test_a_cache_of_an_earlier_version_lacks_this_kernel(tmp_path: Path) -> None:
    """It is another version's; a complete one has the kernel where it says."""
    manifest = Manifest(recipe(), "qemu-1", "1", "kernel-1", "1", "initramfs-1.cpio", initramfs_recipe())
    manifest = replace(manifest, python="python-1", python_recipe=python_recipe(), mdev_kernel="kernel-mdev-1")
    for name in ("qemu-1", "kernel-1", "python-1", "kernel-mdev-1"):
        (tmp_path / name).mkdir()
    for name in ("initramfs-1.cpio", "kernel-mdev-1/vmlinuz"):
        (tmp_path / name).touch()
    manifest.save(tmp_path)
    with pytest.raises(AssetError, match="another version's: run `make vm-assets`"):
        locate(tmp_path)
    replace(manifest, mdev_recipe=mdev_recipe()).save(tmp_path)
    assert tmp_path / "kernel-mdev-1/vmlinuz" == locate(tmp_path).mdev_kernel
