"""A kernel with iommufd and device nodes for VFIO, built here: no Debian kernel has them.

The source is Debian's, fetched and verified like every other package; what is switched on stands in
`vmbed/kernel/iommufd.config`, on top of the smallest configuration that there is. Building takes minutes, so the result
is kept under a name that changes with the configuration, beside the other assets and apart from their manifest.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vmbed.assets.apt import Package, PrivateApt, require_tools, unpack
from vmbed.assets.archive import archive_address
from vmbed.assets.errors import AssetError
from vmbed.assets.recipe import BACKPORTS, SUITE

__all__ = [
    "BUILD_HEADERS",
    "BUILD_TOOLS",
    "DRIVERS",
    "FRAGMENT",
    "build_own_kernel",
    "lay_out",
    "missing_tools",
    "own_kernel",
    "own_kernel_recipe",
    "unmet_options",
]

Report = Callable[[str], None]

FRAGMENT = Path(__file__).resolve().parent.parent / "kernel" / "iommufd.config"
SOURCE_PACKAGE = "linux-source"
#: The metapackage's dependency that holds the source: linux-source-7.3 or the like.
SOURCE_NAME = re.compile(r"^linux-source-\d")
#: What a build calls, and the packages that have it.
BUILD_TOOLS: Mapping[str, str] = {
    "make": "make",
    "gcc": "gcc",
    "ld": "binutils",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "perl": "perl-base",
    "tar": "tar",
    "xz": "xz-utils",
}
#: Headers that a build includes, likewise.
BUILD_HEADERS: Mapping[str, str] = {"gelf.h": "libelf-dev"}
INCLUDES = (Path("/usr/include"), Path("/usr/local/include"))
#: What the configuration builds in, and the names that these drivers would have as modules.
DRIVERS: Mapping[str, str] = {
    "CONFIG_BLK_DEV_NVME": "nvme",
    "CONFIG_VFIO_PCI": "vfio-pci",
    "CONFIG_VFIO_CONTAINER": "vfio_iommu_type1",
    "CONFIG_PCI_PF_STUB": "pci-pf-stub",
}
#: Half of the source, which x86 without graphics does not read.
UNUSED = ("*/include/asic_reg/*", "*/arch/*/boot/dts/*", "*/tools/testing/*")
#: The same bytes whoever builds.
BUILD_ENVIRONMENT: Mapping[str, str] = {
    "KBUILD_BUILD_USER": "vmbed",
    "KBUILD_BUILD_HOST": "vmbed",
    "KBUILD_BUILD_TIMESTAMP": "1970-01-01",
    "LC_ALL": "C",
}
RECIPE = "1"  # raise it when the way of building changes
PREFIX = "ownkernel-"
CONFIGURE_S = 300.0
BUILD_S = 5400.0
NICE = 5


def own_kernel_recipe() -> str:
    """Return a name for what is built; it changes when that does."""
    content = hashlib.sha256(FRAGMENT.read_bytes())
    content.update(repr((RECIPE, BACKPORTS, SOURCE_PACKAGE, UNUSED)).encode())
    return content.hexdigest()[:16]


def own_kernel(cache: Path) -> Path:
    """Return the kernel's vmlinuz, beside a list of what is built in.

    Raises:
        AssetError: it is not in the cache.
    """
    kernel = _folder(cache) / "vmlinuz"
    if not kernel.is_file():
        raise AssetError(f"the kernel with iommufd is not in {cache}: run `make test-vm-long`, which builds it")
    return kernel


def _folder(cache: Path) -> Path:
    return cache / f"{PREFIX}{own_kernel_recipe()}"


def build_own_kernel(cache: Path, report: Report, *, archive: str | None = None, refresh: bool = False) -> Path:
    """Have the kernel in a cache; does nothing when it is there.

    Args:
        cache: the folder; it must exist, and nobody else may build in it.
        report: called with one line for each step that takes time.
        archive: base address of the Debian archive, instead of the machine's own.
        refresh: look for a newer source although there is a kernel.

    Returns:
        The vmlinuz.

    Raises:
        AssetError: with one line that says what is wrong.
    """
    folder = _folder(cache)
    if (folder / "vmlinuz").is_file() and not refresh:
        return own_kernel(cache)
    require_tools()
    if missing := missing_tools():
        raise AssetError(
            f"building a kernel with iommufd needs tools that are not here: {', '.join(missing)}; install the packages "
            f"{' '.join(sorted(set(missing.values())))}"
        )
    with tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as scratch:
        work = Path(scratch)
        apt = PrivateApt(work / "apt", archive or archive_address(), (SUITE, BACKPORTS))
        report(f"fetching the package lists of {SUITE} and {BACKPORTS}")
        apt.update()
        source = _source_package(apt.closure(SOURCE_PACKAGE, BACKPORTS))
        if (folder / "version").is_file() and (folder / "version").read_text() == source.version:
            return own_kernel(cache)
        report(f"fetching {source.name} {source.version}: {source.size / 1e6:.0f} MB")
        apt.download([source], work / "debs")
        tree = _extract(work)
        _build(tree, source.version, report)
        lay_out(tree, work / "kernel", source.version)
        _install(work / "kernel", folder)
    _drop_others(cache, folder)
    return own_kernel(cache)


def missing_tools(includes: Sequence[Path] = INCLUDES) -> dict[str, str]:
    """Return what a build needs and this machine lacks, with the packages that have it.

    Args:
        includes: where headers are.
    """
    missing = {tool: package for tool, package in BUILD_TOOLS.items() if shutil.which(tool) is None}
    absent = {name for name in BUILD_HEADERS if not any((folder / name).is_file() for folder in includes)}
    return missing | {name: package for name, package in BUILD_HEADERS.items() if name in absent}


def unmet_options(wanted: str, config: str) -> list[str]:
    """Return the options of a fragment that a configuration does not have, as when a dependency is missing.

    Args:
        wanted: the fragment's text.
        config: the text of the .config that was made with it.
    """
    have = set(config.splitlines())
    return [line for line in wanted.splitlines() if line.startswith("CONFIG_") and line not in have]


def _source_package(closure: Sequence[Package]) -> Package:
    for package in closure:
        if SOURCE_NAME.match(package.name):
            return package
    raise AssetError(f"{BACKPORTS} has no {SOURCE_PACKAGE}")


def _extract(work: Path) -> Path:
    unpack(work / "debs", work / "package")
    archives = sorted((work / "package/usr/src").glob("linux-source-*.tar.xz"))
    if not archives:
        raise AssetError(f"the package of {SOURCE_PACKAGE} holds no archive of the source")
    tree = work / "linux"
    tree.mkdir()
    unwanted = [f"--exclude={pattern}" for pattern in UNUSED]
    argv = ["tar", "--extract", "--xz", f"--file={archives[0]}", f"--directory={tree}", "--strip-components=1"]
    _run([*argv, *unwanted], work, CONFIGURE_S)
    shutil.rmtree(work / "package")
    return tree


def _build(tree: Path, version: str, report: Report) -> None:
    started = time.monotonic()
    jobs = len(os.sched_getaffinity(0))
    report(f"building Linux {version} with iommufd: minutes, but only once for each version and configuration")
    _run(["make", "-s", "tinyconfig"], tree, CONFIGURE_S)
    _run(["scripts/kconfig/merge_config.sh", "-m", ".config", str(FRAGMENT)], tree, CONFIGURE_S)
    _run(["make", "-s", "olddefconfig"], tree, CONFIGURE_S)
    unmet = unmet_options(FRAGMENT.read_text(encoding="ascii"), (tree / ".config").read_text(encoding="ascii"))
    if unmet:
        raise AssetError(f"Linux {version} does not take these options of {FRAGMENT.name}: {', '.join(unmet)}")
    _run(["nice", f"-n{NICE}", "make", "-s", f"-j{jobs}", "bzImage"], tree, BUILD_S)
    report(f"built in {time.monotonic() - started:.0f} s")


def _run(argv: Sequence[str], folder: Path, seconds: float) -> None:
    environment = {**os.environ, **BUILD_ENVIRONMENT}
    try:
        done = subprocess.run(
            argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise AssetError(f"{' '.join(argv)} did not finish within {seconds:.0f} s") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
        raise AssetError(f"{' '.join(argv)} failed with status {done.returncode}: {reason}")


def lay_out(tree: Path, kernel: Path, version: str) -> None:
    """Keep the kernel, its configuration, and the names of the drivers in it, for whoever looks for modules.

    Args:
        tree: where it was built.
        kernel: the folder to keep it in; it must not exist.
        version: of the source's package.
    """
    modules = kernel / "usr/lib/modules" / version
    modules.mkdir(parents=True)
    shutil.copy(tree / "arch/x86/boot/bzImage", kernel / "vmlinuz")
    shutil.copy(tree / ".config", kernel / "config")
    (modules / "modules.builtin").write_text("".join(f"{name}.ko\n" for name in DRIVERS.values()), encoding="ascii")
    (kernel / "version").write_text(version, encoding="ascii")


def _install(built: Path, folder: Path) -> None:
    if folder.exists():
        folder.rename(built.with_name("replaced"))  # goes with the scratch folder
    built.rename(folder)


def _drop_others(cache: Path, current: Path) -> None:
    for path in cache.glob(f"{PREFIX}*"):
        if path != current:
            shutil.rmtree(path, ignore_errors=True)
