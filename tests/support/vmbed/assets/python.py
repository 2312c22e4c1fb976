"""A Python interpreter for guests, as an unpacked tree that runs through its own dynamic loader.

From the same Debian suite as the other packages, so that it needs no further package lists. Its library is compiled to
byte code here: an emulated CPU takes longer to compile what the daemon imports than for all the rest of a test.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vmbed.assets.apt import unpack
from vmbed.assets.errors import AssetError

__all__ = ["PYTHON_NEEDS", "PYTHON_PACKAGES", "compile_tree", "interpreter", "lay_out", "python_recipe"]

#: The interpreter, and of what the daemon imports the packages with parts in C, which must fit it.
PYTHON_PACKAGES = ("python3", "python3-xxhash", "python3-msgspec")
PYTHON_NEEDS = re.compile(
    r"^(python3\.\d+(-minimal)?|libpython3\.\d+-(minimal|stdlib)|libc6|zlib1g|libexpat1|libffi8|libssl3(t64)?|libzstd1"
    r"|libbz2-1\.0|liblzma5|libgcc-s1|libuuid1|python3-xxhash|libxxhash0|python3-msgspec)$"
)
# of the library, what no daemon and no test imports
PRUNE = ("config-3.*", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtledemo", "venv")
RECIPE = "1"  # raise it when the layout of the tree changes
COMPILE_S = 300.0


def python_recipe() -> str:
    """Return a name for what is fetched and how it is laid out; it changes when these do."""
    parts = (RECIPE, PYTHON_PACKAGES, PYTHON_NEEDS.pattern, PRUNE)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def lay_out(debs: Path, tree: Path) -> None:
    """Unpack the packages, drop what is of no use, and compile the library."""
    unpack(debs, tree)
    for unused in ("usr/share", "usr/lib/valgrind", "etc"):
        shutil.rmtree(tree / unused, ignore_errors=True)
    library = _library(tree)
    for pattern in PRUNE:
        for path in library.glob(pattern):
            shutil.rmtree(path)
    compile_tree(tree, [library, tree / "usr/lib/python3/dist-packages"])


def interpreter(tree: Path) -> Path:
    """Return the interpreter's program file."""
    found = sorted(path for path in (tree / "usr/bin").glob("python3.*") if path.suffix[1:].isdecimal())
    if not found:
        raise AssetError(f"the Python packages hold no interpreter in {tree / 'usr/bin'}")
    return found[0]


def compile_tree(tree: Path, folders: Sequence[Path], strip: Path | None = None, prepend: str = "") -> None:
    """Compile folders with the tree's own interpreter; the results count whatever the files' times are.

    Args:
        tree: the interpreter's tree.
        folders: what to compile.
        strip: start of the folders' paths that tracebacks must not show.
        prepend: what they show instead.
    """
    program = interpreter(tree)
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    argv = [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), str(program)]
    argv += ["-s", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"]
    argv += ["-s", str(strip), "-p", prepend] if strip else []
    argv += map(str, folders)
    environment = {"PYTHONHOME": str(tree / "usr"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=COMPILE_S, check=False)
    if done.returncode != 0:
        raise AssetError(f"the guest's Python cannot compile: {(done.stderr or done.stdout).strip()[-300:]}")


def _library(tree: Path) -> Path:
    return tree / "usr/lib" / interpreter(tree).name
