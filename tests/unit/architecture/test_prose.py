"""The check of the documents' English: each rule finds its example and leaves the better one, and reads prose only."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
TOOL = runpy.run_path(str(ROOT / "tools" / "prose.py"))
CODE_TOOL = runpy.run_path(str(ROOT / "tools" / "prose_code.py"))


def broken(text: str) -> list[tuple[int, str]]:
    """Line and rule of everything that is found."""
    return sorted((found.line, found.rule) for found in TOOL["findings"](text))


@pytest.mark.parametrize("rule", TOOL["RULES"], ids=lambda rule: rule.name)
def test_a_rule_finds_its_example(rule: Any) -> None:
    """The bad sentence is found, and the good one is not, by any rule; folded or not, alone or after another."""
    assert rule.name in [name for _, name in broken(f"{rule.bad}\n")]
    assert [] == broken(f"{rule.good}\n")
    folded = rule.bad.replace(" ", "\n  ")
    assert rule.name in [name for _, name in broken(f"* It works. {folded}\n")]


def test_only_prose_is_read() -> None:
    """Code, links and comments are left out, and lines keep their numbers."""
    code = "# Heading\n\n```sh\nIt begins anew.\n```\n\n<!-- anew\nanew -->\n"
    text = f"{code}`anew` [a](anew.md) https://a.example/anew\n\nAn\nend anew.\n"
    assert [(12, "anew")] == broken(text)


def test_the_line_is_that_of_the_sentence() -> None:
    """A paragraph's first sentence is reported with its own line, not with the empty one before."""
    assert [(3, "subject last")] == broken("One.\n\nWhat it does is good.\n")


def test_a_long_sentence_is_found() -> None:
    """Forty words pass, forty-one do not; a cell, an item and a paragraph end a sentence."""
    words = "word " * TOOL["LONGEST"]
    assert [] == broken(f"{words.strip()}.\n\n| {words}| {words}|\n\n* {words}\n* {words}\n")
    assert [(1, TOOL["LONG"])] == broken(f"{words}more.\n")


def test_the_columns_of_help_are_no_sentences(tmp_path: Path) -> None:
    """The other rules are for what `--help` prints, too."""
    page = tmp_path / "help.txt"
    page.write_text("word " * 50 + "anew\n")
    assert ["anew"] == [found.rule for found in TOOL["findings_in"](page)]


@pytest.mark.parametrize("path", TOOL["documents"](), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_documents_pass(path: Path) -> None:
    """No rule finds anything in what people read."""
    assert [] == list(TOOL["findings_in"](path))


def test_findings_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tool prints place, rule and advice, and fails."""
    page = tmp_path / "page.md"
    page.write_text("Fine.\n\nUse it in order to stop, whoever asks.\n")
    assert 1 == TOOL["main"]([str(page)])
    printed = capsys.readouterr().out
    assert f"{page}:3: wordy: write: to, " in printed
    assert f"{page}:3: whoever: write: name the person or program" in printed
    page.write_text("Fine.\n")
    assert 0 == TOOL["main"]([str(page)])


def broken_code(text: str, tmp_path: Path, *, with_docstrings: bool = False) -> list[tuple[int, str]]:
    """Line and rule of everything that is found in a module."""
    module = tmp_path / "module.py"
    module.write_text(text)
    found = CODE_TOOL["findings_in"](module, with_docstrings=with_docstrings)
    return sorted((line, rule) for line, rule, _, _ in found)


@pytest.mark.parametrize(
    "text",
    [
        'log.info("the stream begins anew", name=name)',
        'raise ValueError(f"{name}: the stream begins anew")',
        'parser.add_argument("--again", help="begin the stream anew")',
        'TEXTS = {Phase.LOST: ("nothing", "the stream begins anew")}',
        'log.info("the stream "\n         "begins anew")',
    ],
    ids=["log", "error", "help", "table", "two parts"],
)
def test_what_the_code_says_is_read(tmp_path: Path, text: str) -> None:
    """Wherever a text waits until it is printed."""
    assert [(2, "anew")] == broken_code(f"import logging\n{text}\n", tmp_path)


def test_names_and_quotations_are_not_ours(tmp_path: Path) -> None:
    """A word is a key, and a specification writes as it likes; nor are comments and our own docstrings for users."""
    text = 'KEY = "anew"\nSENTENCES: dict = {"R1": "the stream begins anew"}\n\ndef run():  # begins anew\n'
    assert [] == broken_code(f'{text}    """Begin it all anew."""\n', tmp_path)


def test_docstrings_on_the_site_are_read(tmp_path: Path) -> None:
    """Those of public names; a clause may be one."""
    text = (
        'class Stream:\n    """What it is."""\n\n'
        '    def run(self):\n        """Run.\n\n        It begins anew.\n        """\n'
        '\n    def _run(self):\n        """Begin it anew."""\n'
    )
    assert [(7, "anew")] == broken_code(text, tmp_path, with_docstrings=True)


def test_the_site_prints_more_than_one_package() -> None:
    """Modules are found by the API pages; a package there brings its modules."""
    printed = {str(path.relative_to(ROOT)) for path in CODE_TOOL["published"]()}
    expected = ("vfiouser_oob/client/client.py", "agents/vfiouser_agents/api.py", "protocol/vfiouser_protocol/codec.py")
    assert {*expected} <= printed


def test_findings_in_code_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tool prints place, rule and advice, and fails."""
    module = tmp_path / "module.py"
    module.write_text('\nprint("Use it in order to stop.")\n')
    assert 1 == CODE_TOOL["main"]([str(module)])
    assert f"{module}:2: wordy: write: to, " in capsys.readouterr().out
    module.write_text('print("Use it to stop.")\n')
    assert 0 == CODE_TOOL["main"]([str(module)])
