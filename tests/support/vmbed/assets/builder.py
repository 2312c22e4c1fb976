"""Fetches the packages and lays the assets out; see `vmbed.assets.store` for where."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from vmbed.assets.apt import Package, PrivateApt, require_tools, unpack
from vmbed.assets.archive import archive_address
from vmbed.assets.errors import AssetError
from vmbed.assets.initramfs import initramfs_recipe, write_initramfs
from vmbed.assets.mdev import (
    BUILD_SUITE,
    BUILD_SUITES,
    HEADERS_PACKAGE,
    MDEV_NEEDS,
    SOURCE_NEEDS,
    SOURCE_PACKAGE,
    build_modules,
    headers_release,
    mdev_recipe,
    require_compiler,
)
from vmbed.assets.plain import PLAIN, write_plain_kernel
from vmbed.assets.python import PYTHON_NEEDS, PYTHON_PACKAGES, lay_out, python_recipe
from vmbed.assets.recipe import (
    BACKPORTS,
    BUSYBOX_PACKAGE,
    KERNEL_FILES,
    KERNEL_NEEDS,
    KERNEL_PACKAGE,
    OLDEST_SUITE,
    PRUNE,
    QEMU_MINIMUM,
    QEMU_NEEDS,
    QEMU_PACKAGE,
    SUITE,
    recipe,
)
from vmbed.assets.store import Assets, Manifest, locate

__all__ = ["build", "exclusive"]

Report = Callable[[str], None]


def build(
    cache: Path, report: Report, *, archive: str | None = None, refresh: bool = False, long: bool = False
) -> Assets:
    """Make the assets of a cache complete and current; does nothing when they are.

    Args:
        cache: the folder to hold them; made if it is missing.
        report: called with one line for each step that takes time.
        archive: base address of the Debian archive, instead of the machine's own.
        refresh: look for newer packages although the cache is complete.
        long: have what the long tests need, too.

    Raises:
        AssetError: with one line that says what is wrong.
    """
    if platform.machine() != "x86_64":
        raise AssetError(f"the VM tests need an x86_64 machine, this is {platform.machine()}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with exclusive(cache, report):
            manifest = Manifest.load(cache)
            if refresh or manifest is None or manifest.recipe != recipe():
                manifest = _fetch(cache, report, archive)
            if manifest.python_recipe != python_recipe() or not (cache / manifest.python).is_dir():
                manifest = _fetch_python(cache, report, archive, manifest)
            if manifest.mdev_recipe != mdev_recipe() or not (cache / manifest.mdev_kernel).is_dir():
                manifest = _fetch_mdev_kernel(cache, report, archive, manifest)
            if long and not (cache / manifest.oldest_kernel / "vmlinuz").is_file():
                manifest = _fetch_oldest_kernel(cache, report, archive, manifest)
            if manifest.initramfs_recipe != initramfs_recipe() or not (cache / manifest.initramfs).is_file():
                manifest = _pack(cache, report, manifest)
            _unwrap(cache, manifest)
    except OSError as error:
        raise AssetError(f"cannot build in {cache}: {error.strerror}: {error.filename}") from error
    return locate(cache)


@contextmanager
def exclusive(cache: Path, report: Report) -> Iterator[None]:
    """Keep two builders out of one cache; the lock goes with the process, however it ends."""
    lock = os.open(cache / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another build is using this cache; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _fetch(cache: Path, report: Report, archive: str | None) -> Manifest:
    """Download and unpack QEMU, the kernel and busybox; returns a manifest that has no initramfs yet."""
    require_tools()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as scratch:
        work = Path(scratch)
        apt = PrivateApt(work / "apt", archive or archive_address(), (SUITE, BACKPORTS))
        report(f"fetching the package lists of {SUITE} and {BACKPORTS}")
        apt.update()
        qemu = _chosen(apt.closure(QEMU_PACKAGE, BACKPORTS), QEMU_NEEDS, QEMU_PACKAGE)
        kernel = _chosen(apt.closure(KERNEL_PACKAGE, BACKPORTS), KERNEL_NEEDS, "linux-")
        busybox = _chosen(apt.closure(BUSYBOX_PACKAGE, SUITE), re.compile(f"^{BUSYBOX_PACKAGE}$"), "busybox")
        qemu_version = _check_qemu(qemu)
        kernel_version = _check_kernel(kernel)
        total = sum(package.size for package in (*qemu, *kernel, *busybox))
        report(f"fetching QEMU {qemu_version} and Linux {kernel_version}: {total / 1e6:.0f} MB")
        apt.download(qemu, work / "qemu-debs")
        apt.download([*kernel, *busybox], work / "kernel-debs")
        report("unpacking")
        _unpack_qemu(work / "qemu-debs", work / "qemu")
        _unpack_kernel(work / "kernel-debs", work / "kernel")
        names = {"qemu": f"qemu-{_folder(qemu_version)}", "kernel": f"kernel-{_folder(kernel_version)}"}
        for source, name in names.items():
            _replace_tree(work / source, cache / name)
    report(f"fetched in {time.monotonic() - started:.1f} s")
    return Manifest(
        recipe=recipe(),
        qemu=names["qemu"],
        qemu_version=qemu_version,
        kernel=names["kernel"],
        kernel_version=kernel_version,
        initramfs="",
        initramfs_recipe="",
    )


def _fetch_python(cache: Path, report: Report, archive: str | None, manifest: Manifest) -> Manifest:
    """Download, unpack and compile Python; returns a manifest that has no initramfs yet, so that it is saved."""
    require_tools()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as scratch:
        work = Path(scratch)
        apt = PrivateApt(work / "apt", archive or archive_address(), (SUITE,))
        report(f"fetching the package list of {SUITE}")
        apt.update()
        needed = dict.fromkeys(each for package in PYTHON_PACKAGES for each in apt.closure(package, SUITE))
        packages = _chosen(list(needed), PYTHON_NEEDS, "libpython3")
        report(f"fetching Python for guests: {sum(package.size for package in packages) / 1e6:.0f} MB")
        apt.download(packages, work / "debs")
        lay_out(work / "debs", work / "python")
        version = next(package.version for package in packages if package.name.startswith("libpython3"))
        name = f"python-{_folder(version)}"
        _replace_tree(work / "python", cache / name)
    report(f"Python fetched and compiled in {time.monotonic() - started:.1f} s")
    return replace(manifest, python=name, python_recipe=python_recipe(), initramfs_recipe="")


def _fetch_oldest_kernel(cache: Path, report: Report, archive: str | None, manifest: Manifest) -> Manifest:
    """Download and unpack the oldest supported kernel; returns a manifest that has no initramfs yet."""
    require_tools()
    with tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as scratch:
        work = Path(scratch)
        apt = PrivateApt(work / "apt", archive or archive_address(), (OLDEST_SUITE,))
        report(f"fetching the package list of {OLDEST_SUITE}")
        apt.update()
        kernel = _chosen(apt.closure(KERNEL_PACKAGE, OLDEST_SUITE), KERNEL_NEEDS, "linux-")
        busybox = _chosen(apt.closure(BUSYBOX_PACKAGE, OLDEST_SUITE), re.compile(f"^{BUSYBOX_PACKAGE}$"), "busybox")
        packages = [*kernel, *busybox]
        version = _check_kernel(kernel)
        report(f"fetching Linux {version}: {sum(package.size for package in packages) / 1e6:.0f} MB")
        apt.download(packages, work / "debs")
        _unpack_kernel(work / "debs", work / "kernel")
        name = f"kernel-{_folder(version)}"
        _replace_tree(work / "kernel", cache / name)
    return replace(manifest, oldest_kernel=name, initramfs_recipe="")


def _fetch_mdev_kernel(cache: Path, report: Report, archive: str | None, manifest: Manifest) -> Manifest:
    """Download a kernel, build its mediated devices; returns a manifest that has no initramfs yet."""
    require_tools()
    require_compiler()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as scratch:
        work = Path(scratch)
        apt = PrivateApt(work / "apt", archive or archive_address(), BUILD_SUITES)
        report(f"fetching the package lists of {' and '.join(BUILD_SUITES)}")
        apt.update()
        packages = _chosen(apt.closure(HEADERS_PACKAGE, BUILD_SUITE), MDEV_NEEDS, "linux-headers-")
        release = headers_release(packages)
        source = _chosen(apt.closure(SOURCE_PACKAGE, BUILD_SUITE), SOURCE_NEEDS, SOURCE_PACKAGE)
        if not {package.version for package in source} <= {package.version for package in packages}:
            raise AssetError(
                f"{BUILD_SUITE} has Linux {release}, but the source of {source[0].version}; try again later"
            )
        size = sum(package.size for package in (*packages, *source))
        report(f"fetching Linux {release}, its headers and its source: {size / 1e6:.0f} MB")
        apt.download([*packages, *source], work / "debs")
        unpack(work / "debs", work / "tree")
        report("building modules")
        modules = build_modules(work / "tree", work / "build", release)
        _lay_out_mdev_kernel(work / "tree", work / "kernel", modules)
        name = f"kernel-mdev-{_folder(release)}"
        _replace_tree(work / "kernel", cache / name)
    report(f"Linux {release} with mediated devices ready in {time.monotonic() - started:.1f} s")
    return replace(manifest, mdev_kernel=name, mdev_recipe=mdev_recipe(), initramfs_recipe="")


def _lay_out_mdev_kernel(tree: Path, kernel: Path, modules: list[Path]) -> None:
    """Keep `vmlinuz` and the modules, with those that were built here."""
    kernel.mkdir()
    found = [path for place in KERNEL_FILES["vmlinuz"] for path in tree.glob(place) if path.is_file()]
    if not found:
        raise AssetError("the kernel package holds no vmlinuz")
    found[0].rename(kernel / "vmlinuz")
    (tree / "lib/modules").rename(kernel / "modules")
    for module in modules:
        shutil.copy(module, kernel / "modules" / module.name)


def _chosen(closure: list[Package], wanted: re.Pattern[str], essential: str) -> list[Package]:
    chosen = [package for package in closure if wanted.match(package.name)]
    if not any(package.name.startswith(essential) for package in chosen):
        raise AssetError(f"the archive offered no {essential}; it offered {len(closure)} other packages")
    return chosen


def _check_qemu(packages: list[Package]) -> str:
    """Return QEMU's version without epoch; it must have a vfio-user client."""
    version = next(package.version for package in packages if package.name == QEMU_PACKAGE).split(":", 1)[-1]
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < QEMU_MINIMUM:
        raise AssetError(f"{BACKPORTS} has QEMU {version}; 10.1 is the first with a vfio-user client")
    return version


def _check_kernel(packages: list[Package]) -> str:
    """Return the kernel's release, which its packages have in their names: linux-image-RELEASE."""
    return packages[0].name.split("-", 2)[2]


def _folder(version: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]", "_", version)


def _unpack_qemu(debs: Path, tree: Path) -> None:
    unpack(debs, tree)
    for pattern in PRUNE:
        for path in tree.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _unpack_kernel(debs: Path, tree: Path) -> None:
    """Lay out `vmlinuz`, `busybox` and the modules; other parts of the packages are not kept."""
    unpack(debs, tree)
    for name, places in KERNEL_FILES.items():
        found = [path for place in places for path in tree.glob(place) if path.is_file()]
        if not found:
            raise AssetError(f"the kernel and busybox packages hold no {name}; looked for {', '.join(places)}")
        found[0].rename(tree / name)
    for unused in ("boot", "usr/share"):
        shutil.rmtree(tree / unused, ignore_errors=True)


def _replace_tree(source: Path, target: Path) -> None:
    """Put a finished tree in its place; an older one of the same version gives way."""
    if target.exists():
        target.rename(source.with_name(f"{source.name}.old"))  # goes with the scratch folder
    source.rename(target)


def _pack(cache: Path, report: Report, manifest: Manifest) -> Manifest:
    """Write the initramfs and make the manifest the cache's."""
    tree = cache / manifest.kernel
    name = f"initramfs-{manifest.kernel.removeprefix('kernel-')}-{initramfs_recipe()}.cpio"
    temporary = cache / f".{name}.{os.getpid()}"
    try:
        write_initramfs(temporary, tree, tree / "busybox")
        temporary.replace(cache / name)
    finally:
        temporary.unlink(missing_ok=True)
    report(f"initramfs written: {(cache / name).stat().st_size / 1e6:.1f} MB")
    complete = replace(manifest, initramfs=name, initramfs_recipe=initramfs_recipe())
    complete.save(cache)
    _drop_stale(cache, complete)
    return complete


def _unwrap(cache: Path, manifest: Manifest) -> None:
    """Decompress the kernels, beside what they come from; these are no part of the manifest, guests boot either."""
    for name in filter(None, (manifest.kernel, manifest.oldest_kernel, manifest.mdev_kernel)):
        if not (cache / name / PLAIN).is_file():
            write_plain_kernel(cache / name / "vmlinuz", cache / manifest.python)


def _drop_stale(cache: Path, manifest: Manifest) -> None:
    """Remove what an earlier recipe or version left behind; a running QEMU keeps its open files."""
    current = {manifest.qemu, manifest.kernel, manifest.python, manifest.oldest_kernel, manifest.initramfs}
    current.add(manifest.mdev_kernel)
    for path in cache.iterdir():
        if path.name in current or not re.match(r"^(qemu|kernel|python|initramfs)-|^\.build-", path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
