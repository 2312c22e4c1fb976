"""Write the transcript of a real `vfiouser-oob demo` into `docs/tutorial/demo.md`.

    python tools/demo_page.py

A test runs the demo and compares what it says with the page, numbers aside.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorial" / "demo.md"
COMMAND = "vfiouser-oob demo"
_BLOCK = re.compile(rf"(?<=```text\n)\$ {COMMAND}\n.*?(?=^```$)", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\d+(\.\d+)?")
_SPACE = re.compile(r" +")
_BAR = re.compile(r"\[[#.]+\]")


def transcript() -> str:
    """Run the demo; return its command and its lines, each with the seconds at which it came."""
    lines = [f"$ {COMMAND}"]
    began = time.monotonic()
    command = [sys.executable, "-m", "vfiouser_oob", *COMMAND.split()[1:]]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        lines += [f"{time.monotonic() - began:5.1f} s  {line.rstrip()}".rstrip() for line in demo.stdout]
    if demo.returncode:
        raise SystemExit(demo.returncode)
    return "\n".join(lines) + "\n"


def shown(page: str) -> str:
    """What the demo says on the page, without the seconds.

    Args:
        page: the page's text.
    """
    found = _BLOCK.search(page)
    assert found is not None
    _, _, said = found[0].partition("\n")
    return "".join(re.sub(r"^ *\d+\.\d s( {2}|$)", "", line) + "\n" for line in said.splitlines())


def shape(said: str) -> str:
    """What does not change from run to run: words, without numbers, bars and widths.

    Args:
        said: what the demo said.
    """
    return _SPACE.sub(" ", _NUMBER.sub("N", _BAR.sub("[bar]", said)))


def main() -> None:
    """Write the page with the transcript of a run that just took place."""
    run = transcript()
    PAGE.write_text(_BLOCK.sub(lambda _: run, PAGE.read_text()))


if __name__ == "__main__":
    main()
