"""apt with a state of its own: downloads from suites the machine does not follow, without touching it.

Nothing is installed and no privilege is needed: lists, cache and package status live in a scratch
folder, the machine's `apt.conf` is honoured (a proxy may be set there) but its hooks are not run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmbed.assets.errors import AssetError

__all__ = ["Package", "PrivateApt", "require_tools", "unpack"]

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
TIMEOUT_S = 900.0

_CONF = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Dir::Etc::sourcelist "{work}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "{work}/state";
Dir::State::status "{work}/status";
Dir::Cache "{work}/cache";
Dir::Log "{work}/log";
Debug::NoLocking "1";
APT::Architecture "amd64";
#clear APT::Architectures;
APT::Sandbox::User "";
APT::Install-Recommends "false";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
"""

# 'ADDRESS' FILE SIZE [HASH]: what `--print-uris` writes for each file it would fetch
_URI_LINE = re.compile(r"^'\S+'\s+(?P<file>\S+\.deb)\s+(?P<size>\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Package:
    """A package file that apt would fetch: its name, version and download size in bytes."""

    name: str
    version: str
    size: int


class PrivateApt:
    """apt-get and apt-cache on the given suites, with all state under `work`."""

    def __init__(self, work: Path, archive: str, suites: Sequence[str]) -> None:
        for folder in ("state/lists/partial", "cache/archives/partial", "log"):
            (work / folder).mkdir(parents=True)
        lines = [f"deb [arch=amd64 signed-by={KEYRING}] {archive} {suite} main\n" for suite in suites]
        (work / "sources.list").write_text("".join(lines), encoding="utf-8")
        (work / "status").touch()  # no package is installed, so every dependency is in the closure
        self._conf = work / "apt.conf"
        self._conf.write_text(_CONF.format(work=work), encoding="utf-8")

    def update(self) -> None:
        """Fetch and verify the suites' package lists."""
        self._run("fetch the package lists", "update")

    def closure(self, package: str, suite: str) -> list[Package]:
        """Return the package from that suite, and everything it needs."""
        output = self._run(f"resolve {package}", "--yes", "--print-uris", "--target-release", suite, "install", package)
        return [_package(match) for match in _URI_LINE.finditer(output)]

    def download(self, packages: Sequence[Package], into: Path) -> None:
        """Fetch these very versions into a folder; apt verifies them against the signed lists."""
        into.mkdir(parents=True)
        names = [f"{package.name}={package.version}" for package in packages]
        self._run("download packages", "download", *names, cwd=into)

    def _run(self, what: str, *args: str, cwd: Path | None = None) -> str:
        return _run(what, ["apt-get", "-c", str(self._conf), "-qq", *args], cwd)


def _package(match: re.Match[str]) -> Package:
    name, version, _ = match["file"].removesuffix(".deb").rsplit("_", 2)
    return Package(name, version.replace("%3a", ":"), int(match["size"]))


def _run(what: str, argv: list[str], cwd: Path | None) -> str:
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise AssetError(f"cannot {what}: {argv[0]} did not finish within {TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        raise AssetError(f"cannot {what}: {_reason(done.stderr) or f'{argv[0]} exit {done.returncode}'}")
    return done.stdout


def _reason(stderr: str) -> str:
    """Return the first error line of apt's or dpkg's complaint: the cause, of which the rest follow."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E:", "dpkg"))] or lines
    return errors[0] if errors else ""


def require_tools() -> None:
    """Check for what the builder calls.

    Raises:
        AssetError: a tool or the archive's keys are missing; the message names the package that has it.
    """
    for tool, package in {"apt-get": "apt", "dpkg-deb": "dpkg", "gpgv": "gpgv"}.items():
        if shutil.which(tool) is None:
            raise AssetError(f"{tool} not found: a Debian machine with the package {package} is needed")
    if not KEYRING.is_file():
        raise AssetError(f"{KEYRING} not found: install the package debian-archive-keyring")


def unpack(debs: Path, into: Path) -> None:
    """Unpack every package file of a folder into one tree; nothing is installed, no script is run."""
    into.mkdir(parents=True, exist_ok=True)
    for deb in sorted(debs.glob("*.deb")):
        _run(f"unpack {deb.name}", ["dpkg-deb", "--extract", str(deb), str(into)], None)
