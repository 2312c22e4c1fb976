"""Where this machine gets Debian from: the base address of its archive, read from apt's own sources.

Only the address is taken. The suites the machine follows do not matter, since the bed names its own.
Both of apt's formats are read: one-line `.list` files and deb822 `.sources` files (sources.list(5)).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmbed.assets.errors import AssetError

__all__ = ["Source", "archive_address", "parse_deb822", "parse_one_line"]

APT_DIR = Path("/etc/apt")
OS_RELEASE = Path("/etc/os-release")

_ONE_LINE = re.compile(r"^deb\s+(?:\[[^\]]*\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)(?:\s+(?P<components>.*))?$")


@dataclass(frozen=True, slots=True)
class Source:
    """One archive that apt is told to use: its address and the suites taken from it."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]


def parse_one_line(text: str) -> Iterator[Source]:
    """Yield the binary sources of a one-line style `.list` file."""
    for line in text.splitlines():
        if match := _ONE_LINE.match(line.split("#", 1)[0].strip()):
            yield Source(match["uri"], (match["suite"],), tuple((match["components"] or "").split()))


def parse_deb822(text: str) -> Iterator[Source]:
    """Yield the enabled binary sources of a deb822 style `.sources` file, one for each address."""
    for stanza in re.split(r"\n\s*\n", text):
        fields = _deb822_fields(stanza)
        if "deb" not in fields.get("types", "").split():
            continue
        if fields.get("enabled", "yes").strip().lower() in {"no", "false", "0"}:
            continue
        suites, components = fields.get("suites", "").split(), fields.get("components", "").split()
        for uri in fields.get("uris", "").split():
            yield Source(uri, tuple(suites), tuple(components))


def _deb822_fields(stanza: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line.startswith("#"):
            continue
        if line[:1].isspace():  # continuation of the field above
            fields[name] = f"{fields.get(name, '')} {line.strip()}"
        elif ":" in line:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            fields[name] = value.strip()
    return fields


def archive_address(apt_dir: Path = APT_DIR, os_release: Path = OS_RELEASE) -> str:
    """Return the base address of the Debian archive that this machine uses.

    The source of the running release's own suite wins (`bookworm`, not `bookworm-security`, which
    may live elsewhere); on a machine that follows `stable` or the like, the first source with `main`.

    Raises:
        AssetError: apt has no source that looks like Debian's main archive.
    """
    sources = list(_all_sources(apt_dir))
    codename = _codename(os_release)
    for source in sources:
        if codename and codename in source.suites and "main" in source.components:
            return source.uri.rstrip("/")
    generic = {"stable", "oldstable", "testing", "unstable", "sid"}
    for source in sources:
        if generic & set(source.suites) and "main" in source.components:
            return source.uri.rstrip("/")
    raise AssetError(
        f"no Debian archive found in {apt_dir}/sources.list, *.list or *.sources "
        f"(wanted: a source of suite {codename or 'stable'} with component main); name one with --archive"
    )


def _all_sources(apt_dir: Path) -> Iterator[Source]:
    parts = apt_dir / "sources.list.d"
    lists = [apt_dir / "sources.list", *sorted(parts.glob("*.list"))]
    for path in lists:
        if path.is_file():
            yield from parse_one_line(path.read_text(encoding="utf-8", errors="replace"))
    for path in sorted(parts.glob("*.sources")):
        yield from parse_deb822(path.read_text(encoding="utf-8", errors="replace"))


def _codename(os_release: Path) -> str:
    if os_release.is_file():
        for line in os_release.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VERSION_CODENAME="):
                return line.partition("=")[2].strip().strip('"')
    return ""
