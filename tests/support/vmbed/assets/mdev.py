"""A kernel whose VFIO has mediated devices, and drivers that make such devices and migrate them.

The smallest kernel package that has VFIO comes without the mdev core, so that is built here, from the very source that
the kernel was built from, and beside it a sample driver of that source: `mtty`, serial ports in software, with the
migration of the kernel's interface. A second build of it, `mttydma`, offers no log of dirty pages, and does DMA: what
is written to a scratch register also goes to the first byte of the page that the port's divisor names.

The suite is the one whose kernels are built with the compiler that Debian 12 has. Nothing runs as root: headers and
tools stay where they are unpacked.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from vmbed.assets.apt import Package
from vmbed.assets.errors import AssetError

__all__ = [
    "BUILD_SUITE",
    "BUILD_SUITES",
    "HEADERS_PACKAGE",
    "MDEV_NEEDS",
    "SOURCE_NEEDS",
    "SOURCE_PACKAGE",
    "build_modules",
    "headers_release",
    "mdev_recipe",
    "require_compiler",
]

BUILD_SUITE = "bookworm-backports"
BUILD_SUITES = ("bookworm", BUILD_SUITE)
HEADERS_PACKAGE = "linux-headers-cloud-amd64"
SOURCE_PACKAGE = "linux-source"
MDEV_NEEDS = re.compile(r"^(linux-(image|headers|kbuild)-\d|libelf1)")
SOURCE_NEEDS = re.compile(r"^linux-source-\d")

MAKEFILE = "obj-m := mdev.o mtty.o mttydma.o\nmdev-y := mdev_core.o mdev_sysfs.o mdev_driver.o\n"
SOURCES = ("drivers/vfio/mdev", "samples/vfio-mdev/mtty.c")
#: Where that memory begins.
DMA_BASE = 0x4000_0000
#: What makes another driver of mtty.
DMA_DRIVER: Mapping[str, str] = {
    '"mtty"': '"mttydma"',
    "vdev->log_ops = &mtty_log_ops;": "",
    "\tcase UART_SCR:\n\t\tmdev_state->s[index].uart_reg[offset] = data;": "\tcase UART_SCR:\n"
    "\t\tmdev_state->s[index].uart_reg[offset] = data;\n"
    f"\t\tvfio_dma_rw(&mdev_state->vdev, {DMA_BASE:#x}ULL + ((u64)mdev_state->s[index].divisor << PAGE_SHIFT),\n"
    "\t\t\t    &data, sizeof(data), true);",
}
MODULES = ("mdev", "mtty", "mttydma")
RECIPE = "1"  # raise it when the way of building changes
BUILD_S = 600.0


def mdev_recipe() -> str:
    """Return a name for what is fetched and built; it changes when these do."""
    parts = (RECIPE, BUILD_SUITES, HEADERS_PACKAGE, SOURCE_PACKAGE, MDEV_NEEDS.pattern, MAKEFILE, SOURCES, MODULES)
    return hashlib.sha256(repr((parts, sorted(DMA_DRIVER.items()))).encode()).hexdigest()[:16]


def require_compiler() -> None:
    """Check for what builds kernel modules.

    Raises:
        AssetError: a tool is missing; the message names the package that has it.
    """
    for tool, package in {"gcc": "gcc", "make": "make", "ld": "binutils", "tar": "tar", "xz": "xz-utils"}.items():
        if shutil.which(tool) is None:
            raise AssetError(f"{tool} not found: install the package {package}, kernel modules have to be built")


def headers_release(packages: list[Package]) -> str:
    """Return the release that the headers are for, which their packages have in their names."""
    for package in packages:
        if match := re.fullmatch(r"linux-headers-(\d.*-cloud-amd64)", package.name):
            return match[1]
    raise AssetError(f"the archive offered no {HEADERS_PACKAGE} of a certain kernel")


def build_modules(tree: Path, work: Path, release: str) -> list[Path]:
    """Build the modules.

    Args:
        tree: where the packages were unpacked.
        work: an empty folder.
        release: the kernel's.

    Returns:
        The modules' files.

    Raises:
        AssetError: the sources are not as expected, or the compiler fails; with its first complaint.
    """
    headers = tree / "usr/src" / f"linux-headers-{release}"
    makefile = headers / "Makefile"
    # The one absolute path that the packages have in them: where they would be installed.
    makefile.write_text(makefile.read_text(encoding="utf-8").replace("/usr/src", str(tree / "usr/src")))
    _gather_sources(tree, work)
    libraries = tree / "usr/lib/x86_64-linux-gnu"  # of a tool that the build runs
    argv = ["make", "-C", str(headers), f"M={work}", "CC=gcc", "CONFIG_DEBUG_INFO_BTF_MODULES=", "KCFLAGS=-g0"]
    argv += [f"-j{len(os.sched_getaffinity(0))}", "modules"]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "LD_LIBRARY_PATH": str(libraries)}
    done = _run("build kernel modules", argv, environment)
    modules = [work / f"{name}.ko" for name in MODULES]
    if done.returncode != 0 or not all(module.is_file() for module in modules):
        raise AssetError(
            f"cannot build modules for Linux {release} with this machine's {_compiler()}: {_complaint(done)}"
        )
    return modules


def _gather_sources(tree: Path, work: Path) -> None:
    """Take the few files out of the kernel's source that are built."""
    archives = sorted((tree / "usr/src").glob("linux-source-*.tar.xz"))
    if not archives:
        raise AssetError("the kernel's source package holds no archive of the sources")
    top = archives[0].name.removesuffix(".tar.xz")
    work.mkdir()
    argv = ["tar", "--extract", "--file", str(archives[0]), "--directory", str(work)]
    argv += ["--use-compress-program", "xz -T0"]
    argv += ["--transform", "s#.*/##", "--no-anchored", *(f"{top}/{part}" for part in SOURCES)]
    done = _run("take sources out of the kernel's", argv, {"PATH": os.environ["PATH"], "LC_ALL": "C"})
    if done.returncode != 0:
        raise AssetError(f"the kernel's source {archives[0].name} is not as expected: {_complaint(done)}")
    text = (work / "mtty.c").read_text(encoding="utf-8")
    for old, new in DMA_DRIVER.items():
        if old not in text:
            raise AssetError(f"the kernel's mtty.c has no {old!r} any more: the recipe must be adapted")
        text = text.replace(old, new)
    (work / "mttydma.c").write_text(text, encoding="utf-8")
    (work / "Makefile").write_text(MAKEFILE, encoding="utf-8")


def _run(what: str, argv: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=BUILD_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise AssetError(f"cannot {what}: {argv[0]} did not finish within {BUILD_S:.0f} s") from error


def _compiler() -> str:
    done = _run("ask the compiler for its version", ["gcc", "-dumpfullversion"], {"PATH": os.environ["PATH"]})
    return f"gcc {done.stdout.strip()}"


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    """Return the first line that says what is wrong."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.search("error:|not found", line, re.IGNORECASE)] or lines
    return errors[0] if errors else f"exit {done.returncode}"
