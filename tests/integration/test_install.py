"""The packages: by Debian's rules, and by the how-to, word by word, on a minimal Debian that is booted for it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import machinebed

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/howto/install.md"
pytestmark = pytest.mark.slow
#: What there is of files, but for what any installation of any package changes.
_LISTING = (
    "find / -xdev \\( -path /proc -o -path /sys -o -path /run -o -path /test -o -path /tmp -o -path /var/log "
    "-o -path /var/cache -o -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/lib/systemd -o -path /dev \\) "
    "-prune -o -print | sort"
)


def commands() -> list[str]:
    """The commands of the section about the package, in order."""
    [section] = re.findall(r"^## From the Debian package\n(.*?)^## ", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
            for line in block.splitlines()]  # fmt: skip


def script(lines: list[str]) -> str:
    """The commands, with what is looked at between them."""
    *before, purge = lines
    assert "apt-get purge" in purge
    return "\n".join(
        [
            f"{_LISTING} >/test/before",
            *(f'echo "### {line}"\n{line}' for line in before),
            'echo "### what is there"',
            "man=/usr/share/man/man1/vfiouser-oob.1.gz; test -s $man",
            "vfiouser-oob --version; systemctl show -P ActiveState,User vfiouser-oob.service",
            "vfiouser-oob status --json >/test/status.json",
            f'echo "### {purge}"\n{purge}',
            f"{_LISTING} >/test/after",
            # systemd forgets the names of units that have gone when it finds the time.
            "systemctl list-units --all --plain --no-legend 'vfiouser-oob*' >/test/listed",
            "sed '/not-found *inactive *dead/d' /test/listed >/test/units",
            "ls -d /run/vfio-user /run/vfiouser-oob 2>/dev/null >/test/runtime || true",
        ]
    )


def build(release: str, place: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Build the package of a release."""
    command = [sys.executable, str(ROOT / "tools/make_deb.py"), f"--release={release}", f"--output={place}"]
    done = subprocess.run([*command, "--compression=none", *options], capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr
    return done


@pytest.mark.long
@pytest.mark.skipif(shutil.which("lintian") is None, reason="lintian is not installed")
@pytest.mark.parametrize("release", ["12", "13"])
def test_lintian_finds_nothing(tmp_path: Path, release: str) -> None:
    """No error and no warning but those that the overrides explain."""
    # lintian asks for a package that is compressed.
    done = build(release, tmp_path, "--lint", "--compression=gzip")
    assert "not checked" not in done.stderr


@pytest.mark.skipif(machinebed.why_not() is not None, reason=str(machinebed.why_not()))
@pytest.mark.parametrize(
    ("release", "suite"), [("12", "bookworm"), pytest.param("13", "trixie", marks=pytest.mark.long)]
)
def test_the_how_to(tmp_path: Path, release: str, suite: str) -> None:
    """Install, check, start, attach a client, restart, remove: each command succeeds, and nothing is left behind.

    The package obeys Debian's rules, too, where lintian is installed.
    """
    lines = commands()
    assert len(lines) >= 7
    # This package is built anyway, so CI judges it with lintian here; nothing else does at every change.
    build(release, tmp_path, *(("--lint", "--compression=gzip") if shutil.which("lintian") else ()))
    code, output = machinebed.run_in_machine(machinebed.base(suite), tmp_path, script(lines))
    assert 0 == code, output[-3000:]
    assert "no MUST failed" in output
    assert '"f0"' in (tmp_path / "status.json").read_text()
    assert (tmp_path / "before").read_text() == (tmp_path / "after").read_text()
    assert ("", "") == ((tmp_path / "units").read_text(), (tmp_path / "runtime").read_text())
