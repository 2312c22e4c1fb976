"""Find English in the code's texts that its speakers would not write: in what users read, and in what the site prints.

    python tools/prose_code.py [FILE.py …]

Users read string literals: logs, errors, `--help`, tables of reports. Any literal of several words counts, wherever it
is, because a text often waits in a table until something prints it. The site prints the docstrings of public modules.
The rules are those of `prose.py`.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
#: Whose literals users read.
ROOMS = ("vfiouser_oob", "protocol", "agents")
#: A literal of fewer words is a name, a key or a word of a protocol.
FEWEST = 3
#: A docstring may be a clause: "Whether a client is attached." So may the text of a requirement.
CLAUSES = frozenset({"subject last"})
#: A mapping of quotations, whose words are not ours.
QUOTED = "SENTENCES"
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_PUBLISHED = re.compile(r"^\.\. automodule:: ([\w.]+)$", re.MULTILINE)


def _rules() -> ModuleType:
    """The rules, by their path: tools is not a package."""
    spec = importlib.util.spec_from_file_location("prose", ROOT / "tools" / "prose.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("prose", module)
    spec.loader.exec_module(module)
    return module


prose = _rules()


class Text(NamedTuple):
    """Something that people read.

    Args:
        line: where it begins, from 1.
        words: what it says; `x` replaces what the program fills in.
        published: whether it is a docstring.
    """

    line: int
    words: str
    published: bool


def literals(tree: ast.AST) -> Iterator[Text]:
    """Each string of several words, except docstrings and quotations.

    Args:
        tree: a module, or a part of one.
    """
    if isinstance(tree, ast.AnnAssign) and isinstance(tree.target, ast.Name) and tree.target.id == QUOTED:
        return
    for node in ast.iter_child_nodes(tree):
        words = _words(node)
        if words is None:
            yield from literals(node)
        elif not isinstance(tree, ast.Expr) and len(words.split()) >= FEWEST:
            yield Text(node.lineno, words, published=False)  # type: ignore[attr-defined]


def _words(node: ast.AST) -> str | None:
    """The text of a literal; what an f-string fills in is a word."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in node.values)
    return None


def docstrings(node: _Documented) -> Iterator[Text]:
    """The docstrings of public names.

    Args:
        node: a module or a class.
    """
    text = ast.get_docstring(node)
    if text is not None:
        yield Text(node.body[0].lineno, text, published=True)
    for inner in node.body:
        if isinstance(inner, _Documented) and not inner.name.startswith("_"):
            yield from docstrings(inner)


def published() -> list[Path]:
    """The modules that the site's API pages print."""
    names = {
        name for page in (ROOT / "docs/reference/api").glob("*.md") for name in _PUBLISHED.findall(page.read_text())
    }
    found: list[Path] = []
    for name in sorted(names):
        inside = name.replace(".", "/")
        bases = [base / inside for base in (ROOT, ROOT / "protocol", ROOT / "agents")]
        # A package on these pages publishes what its modules define.
        paths = [path for base in bases for path in (base.with_suffix(".py"), *base.glob("*.py")) if path.is_file()]
        assert paths, f"an API page names {name}, which is not there"
        found += paths
    return found


def modules() -> list[Path]:
    """Every module that ships."""
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py") if not path.name.endswith("_pb2.py"))


def findings_in(path: Path, *, with_docstrings: bool) -> Iterator[tuple[int, str, str, str]]:
    """What is not well said in a module: line, rule, what to write, and the words.

    Args:
        path: Python.
        with_docstrings: whether the site prints its docstrings.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), path.name)
    texts = [*literals(tree), *(docstrings(tree) if with_docstrings else ())]
    for text in texts:
        for found in prose.findings(text.words, sentences="\n" not in text.words):
            if not (text.published and found.rule in CLAUSES):
                yield text.line + found.line - 1, found.rule, found.instead, found.text


def main(argv: Sequence[str] | None = None) -> int:
    """Print each finding; 1 when there is one."""
    parser = argparse.ArgumentParser(description="Find English in the code's texts that its speakers would not write.")
    parser.add_argument("files", metavar="FILE", nargs="*", type=Path, help="modules (default: all that ship)")
    printed, found_any = set(published()), False
    for path in [path.resolve() for path in parser.parse_args(argv).files] or modules():
        for line, rule, instead, words in sorted(findings_in(path, with_docstrings=path in printed)):
            found_any = True
            place = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
            print(f"{place}:{line}: {rule}: write: {instead}\n    {words}")
    return found_any


if __name__ == "__main__":
    sys.exit(main())
