"""The container image, as far as its recipe says it: who runs in it, what runs, and what tells whether it is well."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vfiouser_oob.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[3]
RECIPE = (ROOT / "packaging/Containerfile").read_text()
#: Instructions and their arguments, in order; comments are none.
STEPS: list[tuple[str, str]] = re.findall(r"^([A-Z]+) (.*)$", RECIPE, re.MULTILINE)
#: Those of the image that runs: what was built is only copied from the stages before.
FINAL = STEPS[max(number for number, (word, _) in enumerate(STEPS) if word == "FROM") :]


def final(word: str) -> str:
    """The arguments of the one instruction of its kind in the image that runs."""
    [rest] = [rest for found, rest in FINAL if found == word]
    return rest


def command(text: str) -> list[str]:
    """A command in the form that no shell reads."""
    words = json.loads(text)
    assert isinstance(words, list)
    return words


def test_nobody_is_root_in_it() -> None:
    """The user is a number, which a cluster can check, and nothing follows that would make it root again."""
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", final("USER"))
    assert "root" not in {rest for word, rest in STEPS if word == "USER"}
    assert f"chown {final('USER')} " in final("RUN")


def test_what_it_runs_is_a_command_of_ours() -> None:
    """The command and the health check parse, and ask the same control socket, in a directory that the user owns."""
    assert ["vfiouser-oob"] == command(final("ENTRYPOINT"))
    serve = build_parser(whole=True).parse_args(command(final("CMD")))
    check = final("HEALTHCHECK").partition("CMD ")[2]
    program, *words = command(check)
    assert "vfiouser-oob" == program
    status = build_parser(whole=True).parse_args(words)
    assert ("serve", "status") == (command(final("CMD"))[0], words[0])
    assert serve.control_socket == status.control_socket
    assert f"{Path(str(serve.control_socket)).parent} " in final("RUN")
    assert f"COPY packaging/config.toml {serve.config}\n" in RECIPE


def test_the_health_check_has_bounds() -> None:
    """A daemon that does not answer is unwell, and soon."""
    options = dict(re.findall(r"--(\w+)=(\d+)s", final("HEALTHCHECK")))
    assert 1 <= int(options["timeout"]) < int(options["interval"]) <= 60


@pytest.mark.parametrize("path", [rest.split()[-2] for word, rest in STEPS if word == "COPY" and "--from" not in rest])
def test_what_it_copies_is_there(path: str) -> None:
    """And what must not be in an image is not sent to the builder."""
    assert (ROOT / path).exists()
    left_out = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", ".cache", "dist"} <= {*left_out}
    assert path.split("/")[0] not in left_out


def test_its_python_is_new_enough() -> None:
    """The default image has a Python that the project supports, and both stages use the same one."""
    [base] = [rest for word, rest in STEPS if word == "ARG" and rest.startswith("BASE=")]
    found = re.match(r"BASE=python:(\d+)\.(\d+)-slim", base)
    assert found is not None
    assert (3, 11) <= (int(found[1]), int(found[2]))
    assert {"${BASE}"} == {rest.split()[0] for word, rest in STEPS if word == "FROM"}
