"""The asset builder's parts that need no network: reading sources, writing archives, refusing clearly."""

from __future__ import annotations

import io
import lzma
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vmbed.assets import AssetError, locate
from vmbed.assets.__main__ import main
from vmbed.assets.archive import Source, archive_address, parse_deb822, parse_one_line
from vmbed.assets.cpio import CpioWriter
from vmbed.assets.initramfs import initramfs_recipe
from vmbed.assets.mdev import mdev_recipe
from vmbed.assets.modules import load_order
from vmbed.assets.python import python_recipe
from vmbed.assets.recipe import recipe
from vmbed.assets.store import Manifest

DEB822 = """\
# a comment
Types: deb deb-src
URIs: http://mirror.example/debian/
Suites: bookworm
 bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
Enabled: no
URIs: http://disabled.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://security.example/debian-security
Suites: bookworm-security
Components: main
"""


def apt_folder(root: Path, sources: str = "", one_line: str = "") -> Path:
    """Make an apt configuration folder with these sources."""
    (root / "sources.list.d").mkdir(parents=True)
    (root / "sources.list.d" / "debian.sources").write_text(sources, encoding="utf-8")
    (root / "sources.list").write_text(one_line, encoding="utf-8")
    return root


def os_release(root: Path, codename: str = "bookworm") -> Path:
    """Make an os-release file."""
    path = root / "os-release"
    path.write_text(f'ID=debian\nVERSION_CODENAME="{codename}"\n', encoding="utf-8")
    return path


def test_deb822_sources_are_read_as_apt_reads_them() -> None:
    """Comments, continuation lines, several fields and disabled stanzas mean what they mean to apt."""
    assert list(parse_deb822(DEB822)) == [
        Source("http://mirror.example/debian/", ("bookworm", "bookworm-updates"), ("main", "contrib")),
        Source("http://security.example/debian-security", ("bookworm-security",), ("main",)),
    ]


def test_one_line_sources_are_read_as_apt_reads_them() -> None:
    """Options in brackets, comments and source-only lines mean what they mean to apt."""
    text = (
        "# deb http://commented.example/debian bookworm main\n"
        "deb-src http://source.example/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/a/b.gpg] http://mirror.example/debian bookworm main contrib # why\n"
    )
    assert list(parse_one_line(text)) == [Source("http://mirror.example/debian", ("bookworm",), ("main", "contrib"))]


def test_archive_address_is_that_of_the_running_release(tmp_path: Path) -> None:
    """Other vendors' and the security archive come first in the files, and are passed over."""
    vendor = "deb https://vendor.example/apt nodistro main\n"
    security_first = "\n\n".join(reversed(DEB822.split("\n\n")))
    folder = apt_folder(tmp_path / "apt", security_first, vendor)
    assert archive_address(folder, os_release(tmp_path)) == "http://mirror.example/debian"


def test_archive_address_of_a_machine_that_follows_stable(tmp_path: Path) -> None:
    """Without the release's own name, a generic suite's source is taken."""
    folder = apt_folder(tmp_path / "apt", one_line="deb http://mirror.example/debian stable main\n")
    assert archive_address(folder, os_release(tmp_path)) == "http://mirror.example/debian"


def test_machine_without_debian_sources_is_told_so(tmp_path: Path) -> None:
    """The error says where was looked, for what, and what to do instead."""
    folder = apt_folder(tmp_path / "apt", one_line="deb https://vendor.example/apt nodistro main\n")
    with pytest.raises(AssetError, match=r"no Debian archive found in .*bookworm.*--archive"):
        archive_address(folder, os_release(tmp_path))


def test_cpio_is_what_cpio_reads() -> None:
    """Every kind of entry comes out with its mode, size, target and device number."""
    out = io.BytesIO()
    archive = CpioWriter(out)
    archive.character_device("dev/console", 5, 1)
    archive.file("a/b/odd", b"12345", 0o755)
    archive.file("a/even", b"")
    archive.link("a/link", "b/odd")
    archive.close()
    assert list(read_cpio(out.getvalue())) == [
        ("dev", stat.S_IFDIR | 0o755, b"", (0, 0)),
        ("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)),
        ("a", stat.S_IFDIR | 0o755, b"", (0, 0)),
        ("a/b", stat.S_IFDIR | 0o755, b"", (0, 0)),
        ("a/b/odd", stat.S_IFREG | 0o755, b"12345", (0, 0)),
        ("a/even", stat.S_IFREG | 0o644, b"", (0, 0)),
        ("a/link", stat.S_IFLNK | 0o777, b"b/odd", (0, 0)),
    ]


def read_cpio(data: bytes) -> list[tuple[str, int, bytes, tuple[int, int]]]:
    """Read a newc archive by the book: (name, mode, data, device) of each entry up to the trailer."""
    entries: list[tuple[str, int, bytes, tuple[int, int]]] = []
    offset = 0
    while True:
        assert data[offset : offset + 6] == b"070701"
        fields = [int(data[at : at + 8], 16) for at in range(offset + 6, offset + 110, 8)]
        mode, size, device, name_size = fields[1], fields[6], (fields[9], fields[10]), fields[11]
        name = data[offset + 110 : offset + 110 + name_size].rstrip(b"\0").decode()
        body = offset + (110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            return entries
        entries.append((name, mode, data[body : body + size], device))
        offset = body + (size + 3) // 4 * 4


def module(depends: str) -> bytes:
    """Make what a module's .modinfo section holds."""
    return f"\0license=GPL\0depends={depends}\0name=x\0".encode()


def test_modules_are_ordered_by_their_dependencies(tmp_path: Path) -> None:
    """Dependencies come first and once, compressed or not, and what is built in is left out."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "top-one.ko.xz").write_bytes(lzma.compress(module("mid_dle,builtin-part")))
    (tmp_path / "mid-dle.ko").write_bytes(module("base"))
    (tmp_path / "base.ko").write_bytes(module(""))
    (tmp_path / "modules.builtin").write_text("kernel/lib/builtin-part.ko\n", encoding="ascii")
    order = load_order(tmp_path, ["top_one", "base", "builtin_part"])
    assert [name for name, _ in order] == ["base", "mid_dle", "top_one"]
    assert order[2][1] == module("mid_dle,builtin-part")
    with pytest.raises(AssetError, match="no module absent"):
        load_order(tmp_path, ["absent"])


def test_missing_assets_name_the_command_that_makes_them(tmp_path: Path) -> None:
    """An empty, a damaged and an incomplete cache are all told apart from a good one."""
    for content in (None, "{", '{"recipe": "only"}'):
        if content is not None:
            (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
        with pytest.raises(AssetError, match=r"run `make vm-assets`"):
            locate(tmp_path)
    manifest = Manifest(recipe(), "qemu-1", "1", "kernel-1", "1", "initramfs-1.cpio", initramfs_recipe())
    manifest.save(tmp_path)
    with pytest.raises(AssetError, match=r"run `make vm-assets`"):
        locate(tmp_path)
    manifest = replace(manifest, python="python-1", python_recipe=python_recipe(), mdev_recipe=mdev_recipe())
    manifest.save(tmp_path)
    for name in ("qemu-1", "kernel-1", "python-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "initramfs-1.cpio").touch()
    assert locate(tmp_path).initramfs == tmp_path / "initramfs-1.cpio"
    for stale in ("recipe", "initramfs_recipe", "python_recipe", "mdev_recipe"):
        replace(manifest, **{stale: "old"}).save(tmp_path)
        with pytest.raises(AssetError, match=r"another version's: run `make vm-assets`"):
            locate(tmp_path)


def test_unreachable_archive_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """apt's refusal is passed on as the cause, the exit status is 1, and no half-built cache stays."""
    archive = tmp_path / "no-such-archive"
    assert main(["--cache", str(tmp_path / "cache"), "--archive", f"file:{archive}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vm-assets: error: cannot fetch the package lists: E:")
    assert str(archive) in error
    assert error.count("\n") == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_machine_without_apt_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing tool is named, with the package that has it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--cache", str(tmp_path / "cache")]) == 1
    assert "apt-get not found" in capsys.readouterr().err


def test_unusable_cache_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file where the cache should be is an error with its path, not a traceback."""
    (tmp_path / "file").touch()
    assert main(["--cache", str(tmp_path / "file" / "cache")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vm-assets: error: cannot build in ")
    assert error.count("\n") == 1


def test_builder_needs_only_the_standard_library() -> None:
    """It starts in an interpreter without site packages: `make vm-assets` comes before the environment."""
    support = Path(__file__).resolve().parents[1] / "support"
    done = subprocess.run(
        [sys.executable, "-S", "-m", "vmbed.assets", "--help"],
        env={"PYTHONPATH": str(support)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--cache" in done.stdout
