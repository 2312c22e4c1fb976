"""Build the Debian package.

    python tools/make_deb.py [--release 12] [--output dist] [--lint]

The package has a private environment of Python below /usr/lib/vfiouser-oob, with everything that the daemon needs.
Debian 12 could not give it that: its trio is 0.22, and 0.25 is needed; and one recipe for both releases is one to be
tested. The environment is that of one version of Python, so there is a package for each release. Wheels come from
wherever this machine's pip configuration says; nothing is compiled. Needs dpkg-deb and the extra `package`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vfiouser_oob import __version__

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "packaging" / "debian"
#: Debian release: its Python.
PYTHONS: Mapping[str, str] = {"12": "3.11", "13": "3.13"}
EXTRAS = "grpc,demo,metrics"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
HOME = "usr/lib/vfiouser-oob"
_LAUNCHER = f"""\
#!/{HOME}/bin/python3
import sys

from vfiouser_oob.cli.main import main

sys.exit(main())
"""


def build(release: str, output: Path, compression: str = "xz") -> Path:
    """Build the package of a release.

    Args:
        release: of Debian.
        output: directory for it.
        compression: as dpkg-deb calls it; xz takes a minute.

    Returns:
        The package.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vfiouser-deb-") as place:
        stage = Path(place, "stage")
        stage.mkdir(mode=0o755)
        _environment(stage, PYTHONS[release], Path(place))
        _files(stage)
        _documents(stage, release)
        _control(stage, release)
        target = output / f"vfiouser-oob_{_version(release)}_amd64.deb"
        for path in stage.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or _is_program(stage, path) else 0o644)
        _run(["dpkg-deb", "--root-owner-group", f"-Z{compression}", "--build", str(stage), str(target)])
    return target


def lint(package: Path) -> None:
    """Judge a package by Debian's rules.

    Args:
        package: a package.

    Raises:
        SystemExit: lintian found an error or a warning, and has printed it.
    """
    if shutil.which("lintian") is None:
        print("make_deb: not checked: lintian is not installed (apt install lintian)", file=sys.stderr)
        return
    # lintian warns when root runs it, which containers do.
    as_root = ["--allow-root"] if os.geteuid() == 0 else []
    _run(["lintian", "--fail-on=error,warning", *as_root, "--tag-display-limit=0", str(package)])


def _is_program(stage: Path, path: Path) -> bool:
    """Whether a file is to be executed; many of the wheels say so without a reason."""
    if stage / HOME in path.parents:
        return False
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def _environment(stage: Path, python: str, place: Path) -> None:
    """A virtual environment as `python3 -m venv` would make it, for a Python that need not be here."""
    home = stage / HOME
    packages = home / "lib" / f"python{python}" / "site-packages"
    packages.mkdir(parents=True)
    (home / "bin").mkdir()
    (home / "bin" / "python3").symlink_to("../../../bin/python3")
    (home / "pyvenv.cfg").write_text(f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {python}\n")
    _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)], cwd=ROOT)
    [wheel] = place.glob("*.whl")
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    _run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"),
            *("--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms),
            *(f"--target={packages}", f"{wheel}[{EXTRAS}]"),
        ]
    )
    shutil.rmtree(packages / "bin", ignore_errors=True)
    # The files are laid out where they belong.
    shutil.rmtree(packages / "vfiouser_oob" / "files")
    launcher = stage / "usr" / "bin" / "vfiouser-oob"
    launcher.parent.mkdir(parents=True)
    launcher.write_text(_LAUNCHER)
    launcher.chmod(0o755)


def _files(stage: Path) -> None:
    """What `install-files` lays out for everybody."""
    command = [sys.executable, "-m", "vfiouser_oob", "install-files", f"--root={stage}", "--prefix=/usr"]
    _run([*command, "--command=/usr/bin/vfiouser-oob"], cwd=ROOT, stdout=subprocess.DEVNULL)
    for page in (stage / "usr/share/man").rglob("*.1"):
        _compress(page, page.read_bytes())
        page.unlink()
    zsh = stage / "usr/share/zsh"
    (zsh / "site-functions").rename(zsh / "vendor-completions")


def _documents(stage: Path, release: str) -> None:
    documents = stage / "usr/share/doc/vfiouser-oob"
    documents.mkdir(parents=True)
    shutil.copy(SOURCE / "copyright", documents)
    _compress(documents / "changelog", (ROOT / "CHANGELOG.md").read_bytes())
    entry = (
        f"vfiouser-oob ({_version(release)}) unstable; urgency=medium\n\n"
        "  * See changelog.gz for what is new.\n\n"
        " -- vfiouser-oob developers <vfiouser-oob@example.invalid>  Thu, 01 Jan 2026 00:00:00 +0000\n"
    )
    _compress(documents / "changelog.Debian", entry.encode())
    overrides = stage / "usr/share/lintian/overrides/vfiouser-oob"
    overrides.parent.mkdir(parents=True)
    shutil.copy(SOURCE / "lintian-overrides", overrides)


def _control(stage: Path, release: str) -> None:
    control = stage / "DEBIAN"
    files = [path for path in _regular(stage) if control not in path.parents]
    control.mkdir()
    python = PYTHONS[release]
    major, minor = python.split(".")
    text = (SOURCE / "control.in").read_text()
    for word, value in {
        "VERSION": _version(release),
        "SIZE": str(sum(path.stat().st_size for path in files) // 1024 + 1),
        "PYTHON": python,
        "NEXT": f"{major}.{int(minor) + 1}",
    }.items():
        text = text.replace(f"@{word}@", value)
    (control / "control").write_text(text)
    sums = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(stage)}\n" for path in files]
    (control / "md5sums").write_text("".join(sums))
    configuration = sorted(path for path in files if path.is_relative_to(stage / "etc"))
    (control / "conffiles").write_text("".join(f"/{path.relative_to(stage)}\n" for path in configuration))
    for script in ("postinst", "prerm", "postrm"):
        shutil.copy(SOURCE / script, control)
        (control / script).chmod(0o755)


def _version(release: str) -> str:
    return f"{__version__}~deb{release}"


def _regular(stage: Path) -> Iterator[Path]:
    yield from (path for path in sorted(stage.rglob("*")) if path.is_file() and not path.is_symlink())


def _compress(path: Path, content: bytes) -> None:
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content, 9, mtime=0))


def _run(command: Sequence[str], cwd: Path | None = None, stdout: int | None = None) -> None:
    paths = [str(ROOT), str(ROOT / "protocol"), str(ROOT / "agents")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=stdout, check=False)
    if done.returncode:
        raise SystemExit(f"make_deb: `{' '.join(command[:6])} …` failed with exit code {done.returncode}")


def main() -> None:
    """Build what the command line asks for."""
    parser = argparse.ArgumentParser(description="Build the Debian package.")
    parser.add_argument("--release", action="append", choices=sorted(PYTHONS), help="of Debian (default: all)")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="directory for the packages")
    parser.add_argument("--compression", choices=("xz", "gzip", "none"), default="xz", help="(default: xz)")
    parser.add_argument("--lint", action="store_true", help="check the packages with lintian, if it is installed")
    arguments = parser.parse_args()
    for release in arguments.release or sorted(PYTHONS):
        package = build(release, arguments.output, arguments.compression)
        print(package)
        if arguments.lint:
            lint(package)


if __name__ == "__main__":
    main()
