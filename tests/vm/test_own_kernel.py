"""How a kernel with iommufd is built, as far as that needs no build."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmbed.assets import AssetError
from vmbed.assets.modules import load_order
from vmbed.assets.ownkernel import (
    BUILD_HEADERS,
    BUILD_TOOLS,
    DRIVERS,
    FRAGMENT,
    build_own_kernel,
    lay_out,
    missing_tools,
    own_kernel,
    own_kernel_recipe,
    unmet_options,
)
from vmbed.vfioguest import DRIVERS as WANTED


def test_missing_tools_are_named_with_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them at once, and the command line is one that can be typed."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for tool in ("apt-get", "dpkg-deb", "gpgv", "make", "gcc"):
        (programs / tool).touch(0o755)
    monkeypatch.setenv("PATH", str(programs))
    missing = missing_tools([tmp_path])
    assert {"ld", "flex", "bison", "bc", "perl", "tar", "xz", "gelf.h"} == missing.keys()
    assert {**BUILD_TOOLS, **BUILD_HEADERS}.items() >= missing.items()
    (tmp_path / "gelf.h").touch()
    assert "gelf.h" not in missing_tools([tmp_path])
    lines: list[str] = []
    with pytest.raises(AssetError, match=r"needs tools that are not here: .*flex.*; install the packages .*bison"):
        build_own_kernel(tmp_path, lines.append)
    assert [] == lines


def test_options_that_a_kernel_does_not_take() -> None:
    """An option whose dependency is missing disappears without a word; here it is noticed."""
    wanted = "# a comment\nCONFIG_A=y\nCONFIG_B=y\nCONFIG_C=8\n"
    assert ["CONFIG_B=y", "CONFIG_C=8"] == unmet_options(wanted, "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=64\n")


def test_the_configuration_says_each_thing_once() -> None:
    """Lines are options and comments, and what the guests load as modules elsewhere is built in."""
    lines = [line for line in FRAGMENT.read_text(encoding="ascii").splitlines() if line]
    options = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"CONFIG_[A-Z0-9_]+=(y|\d+)", line) for line in options)
    assert len(options) == len(set(options))
    assert {f"{name}=y" for name in DRIVERS} <= set(options)
    assert {"CONFIG_IOMMUFD=y", "CONFIG_VFIO_DEVICE_CDEV=y"} <= set(options)


def test_a_built_kernel_is_found_and_needs_no_modules(tmp_path: Path) -> None:
    """What is kept of a build is enough for a guest: vmlinuz, and that its drivers are in it."""
    with pytest.raises(AssetError, match=r"run `make test-vm-long`, which builds it"):
        own_kernel(tmp_path)
    tree = tmp_path / "linux"
    (tree / "arch/x86/boot").mkdir(parents=True)
    (tree / "arch/x86/boot/bzImage").write_bytes(b"kernel")
    (tree / ".config").write_text("CONFIG_IOMMUFD=y\n")
    kept = tmp_path / f"ownkernel-{own_kernel_recipe()}"
    lay_out(tree, kept, "7.3.4-1")
    assert b"kernel" == own_kernel(tmp_path).read_bytes()
    assert [] == load_order(own_kernel(tmp_path).parent, ["nvme", *WANTED])
    lines: list[str] = []
    assert own_kernel(tmp_path) == build_own_kernel(tmp_path, lines.append)
    assert [] == lines
