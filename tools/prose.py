"""Find English in the documents and in `--help` that its speakers would not write.

    python tools/prose.py [FILE …]

Each rule is a row: what it finds, and what to write instead. Code, links and HTML comments are left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
#: Words of one sentence, at most.
LONGEST = 40

_BLANKED = (
    re.compile(r"^( *)(```|~~~).*?^\1\2[`~]*$", re.MULTILINE | re.DOTALL),
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"`[^`\n]+`"),
    re.compile(r"(?<=\])\([^)\n]*\)"),
    re.compile(r"https?://\S+"),
)
#: A line break inside a paragraph, an item or a cell.
_SOFT = re.compile(r"\n(?! *(?:\n|$|[-*+] |\d+\. |[#|>:]))")
#: Ends of sentences, cells, items and paragraphs.
_END = re.compile(r"[.!?:;](?= )|\||\n")
_START = r"(?:^\x20*(?:[-*] |\d+\. )?|(?<=[.!?:|]\x20))"


class Rule(NamedTuple):
    """Something that is not written.

    Args:
        name: what to call it.
        pattern: what finds it; a space stands for any space between words.
        instead: what to write.
        bad: a sentence that it finds.
        good: the same, well said.
    """

    name: str
    pattern: str
    instead: str
    bad: str
    good: str

    def places(self, text: str) -> Iterator[int]:
        """Where it is found.

        Args:
            text: prose.
        """
        pattern = self.pattern.replace(" ", " +")
        found = re.finditer(pattern, text, re.MULTILINE)
        return (match.start() + len(match[0]) - len(match[0].lstrip()) for match in found)


RULES: Sequence[Rule] = (
    Rule(
        "what there is",
        r"\b(?:what|that|which) there (?:is|are|was|were)\b",
        "name the thing",
        "The message lists what there is.",
        "The message lists the types.",
    ),
    Rule(
        "is to be",
        r"\b(?:is|are|was|were) to be\b",
        "say who must do it: must, has to, will",
        "Two classes are to be implemented.",
        "Implement two classes.",
    ),
    Rule(
        "is no",
        r"(?<!there\x20)\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|way\b|doubt\b|larger\b|one\b)[a-z]",
        "is not a, does not",
        "It is no error.",
        "It is not an error.",
    ),
    Rule(
        "no such one",
        r"\bno [a-z]+ ones?\b",
        "name the thing, or deny the verb",
        "It takes no new one until then.",
        "It accepts no new client until then.",
    ),
    Rule(
        "tells what",
        r"\b(?:tells|tell) (?:what|how|which|when|where|why|whether)\b",
        "says, explains, shows; or tells whom",
        "This page tells how to set them.",
        "This page explains how to set them.",
    ),
    Rule(
        "subject last",
        _START + r"(?:Whether|What) [^.?!|\n]*? (?:is|are|was|were) [^.?!|\n]*\.",
        "put the subject first, and do not begin with a clause",
        "What it is for is live migration.",
        "It is for live migration.",
    ),
    Rule(
        "belongs into",
        r"\bbelongs? into\b",
        "belongs in, goes into",
        "An adapter belongs into the distribution.",
        "An adapter belongs in the distribution.",
    ),
    Rule(
        "passive with its doer",
        r"\b(?:is|are|was|were|be|been) (?:\w+ )?\w+(?:ed|en|ept|ade|ound|eld|told|ent) by "
        r"(?<!killed\x20by\x20)(?!itself|themselves|hand|default|name)\w",
        "let the doer do it",
        "Many of them are checked by tests.",
        "Tests check many of them.",
    ),
    Rule(
        "anew",
        r"\banew\b",
        "again, from the start",
        "The stream begins anew.",
        "The stream begins again.",
    ),
    Rule(
        "mend",
        r"\b[Mm]end(?:s|ed|ing)?\b",
        "fix, repair, help",
        "Trying again does not mend it.",
        "Trying again does not help.",
    ),
    Rule(
        "whoever",
        r"\b[Ww]ho(?:m)?ever\b",
        "name the person or program",
        "The interface of whoever moves the state.",
        "The interface that every mover of state has.",
    ),
    Rule(
        "found out",
        r"\b(?:is|are) found out\b",
        "say who finds it",
        "This is found out by a test.",
        "A test finds this.",
    ),
    Rule(
        "in place of it",
        r"\bin (?:the place of|which \w+ \w+ stand)\b",
        "instead of, replaces",
        "A UUID in the place of the address.",
        "A UUID instead of the address.",
    ),
    Rule(
        "never heard",
        r"\b(?:never|not) heard\b",
        "has not answered, is unknown",
        "agent never heard",
        "the agent has not answered",
    ),
    Rule(
        "becomes of",
        r"\b(?:what|whatever) (?:becomes|became) of\b",
        "what happens to",
        "It decides what becomes of a VM.",
        "It decides what happens to a VM.",
    ),
    Rule(
        "is said",
        r"\b(?:is|are) said\b",
        "say where it stands, or who says it",
        "It is said at attach.",
        "The daemon reports it at attach.",
    ),
    Rule(
        "leads out",
        r"\bleads? out\b",
        "ends this state",
        "Only a reset leads out.",
        "Only a reset ends it.",
    ),
    Rule(
        "one that",
        r"\b(?:[Ss]o that|of) one that\b|\b[Oo]ne (?:that is|whose)\b",
        "name the thing again",
        "So that one that dies takes no other with it.",
        "When a process dies, the others go on.",
    ),
    Rule(
        "nothing of",
        r"\b[Nn]othing of\b",
        "none of, no part of",
        "It imports nothing of the daemon.",
        "It imports no part of the daemon.",
    ),
    Rule(
        "as far as that",
        r"\bas far as (?:its|their|is|it is|was|they)\b",
        "if, where, unless",
        "It answers, as far as is known.",
        "It answers, or is not known to be silent.",
    ),
    Rule(
        "also when",
        r"\b[Aa]lso (?:if|when|while|where|before) ",
        "even if, even when",
        "It is finished also when the client has gone.",
        "It finishes even if the client has gone.",
    ),
    Rule(
        "was begun",
        r"\b(?:is|are|was|were|be|been) begun\b",
        "starts, has started",
        "It counts how often the stream was begun.",
        "It counts how often the stream has started.",
    ),
    Rule(
        "can be had",
        r"\b(?:can|could|may)(?:not| not)? be had\b",
        "is available",
        "The device cannot be had now.",
        "The device is not available now.",
    ),
    Rule(
        "taken for",
        r"\b(?:is|are|was|were|be) taken for\b",
        "counts as, treats as",
        "What is configured is taken for possible.",
        "The daemon assumes that the configured abilities exist.",
    ),
    Rule(
        "says of",
        r"\b(?:say|says|said|tell|tells|told) of\b",
        "says about, describes",
        "It checks what the server says of itself.",
        "It checks the server's description of itself.",
    ),
    Rule(
        "stands in",
        r"\b(?:stands?|stood) (?:in|on|at|below|above|there) (?!for\b)",
        "is in",
        "The reason stands in the log.",
        "The log has the reason.",
    ),
    Rule(
        "inverted condition",
        _START + r"(?:Had|Were|Should) (?:the|a|an|it|he|they|this|that|any\w*|something|one)\b",
        "begin with if",
        "Had anything failed, the source would go on.",
        "If anything had failed, the source would go on.",
    ),
    Rule(
        "takes the place",
        r"\b(?:take|takes|took|taking|taken) the place of\b",
        "replaces",
        "The driver takes the place of the agent.",
        "The driver replaces the agent.",
    ),
    Rule(
        "turned out",
        r"\b(?:is|are|was|were) turned out\b|\bturn(?:s|ed|ing)? (?:\w+ ){0,4}clients? out\b",
        "disconnects, turns away",
        "The command turns its client out.",
        "The command disconnects its client.",
    ),
    Rule(
        "for want of",
        r"\bfor want of\b|\bsees? to it\b|\bwished for\b|\bof no use\b|\baffairs?\b",
        "for lack of, ensures, requested, does not work, it is up to",
        "No reset fails for want of an agent.",
        "No reset fails because the agent is away.",
    ),
    Rule(
        "Germanisms",
        r"\b(?:actualize|eventually possible|in the contrary|how it looks like|allows to)\b",
        "update, may, on the contrary, what it looks like, allows … -ing",
        "This allows to stop it.",
        "This stops it.",
    ),
    Rule(
        "stop to",
        r"\b[Ss]tops? to (?!stop\b|the\b|a\b)[a-z]",
        "stop …-ing",
        "It stops to log writes.",
        "It stops logging writes.",
    ),
    Rule(
        "wordy",
        r"\b(?:in order to|due to the fact|it should be noted|please note|basically|utili[sz]e)\b",
        "to, because, nothing, use",
        "Use it in order to stop.",
        "Use it to stop.",
    ),
    Rule("said twice", r"\b(the|a|an|of|to|is|and|in|on|that) \1\b(?! \1)", "say it once", "It is is.", "It is."),
)
LONG = f"a sentence of more than {LONGEST} words"


class Finding(NamedTuple):
    """A place where a rule is broken.

    Args:
        line: its number, from 1.
        rule: what is broken.
        instead: what to write.
        text: the line.
    """

    line: int
    rule: str
    instead: str
    text: str


def prose(text: str) -> str:
    """A document as paragraphs of one line each, without what is not prose; every place stays where it is.

    Args:
        text: Markdown.
    """
    for pattern in _BLANKED:
        text = pattern.sub(_blank, text)
    return _SOFT.sub(" ", text)


def _blank(found: re.Match[str]) -> str:
    """A block leaves its lines; a word of code is a word."""
    return re.sub(r"\S", " ", found[0]) if "\n" in found[0] else "x" * len(found[0])


def long_sentences(text: str) -> Iterator[int]:
    """Where a sentence begins that has too many words.

    Args:
        text: prose.
    """
    start = 0
    for end in [*_END.finditer(text), None]:
        stop = end.start() if end else len(text)
        if len(re.findall(r"\w[\w'’-]*", text[start:stop])) > LONGEST:
            yield start + len(text[start:stop]) - len(text[start:stop].lstrip())
        start = end.end() if end else stop


def findings(text: str, *, sentences: bool = True) -> Iterator[Finding]:
    """What is not well said in a document.

    Args:
        text: Markdown, or what `--help` prints.
        sentences: whether it has any, which may be too long; the columns of `--help` have none.
    """
    clean, lines = prose(text), text.splitlines()

    def finding(place: int, rule: str, instead: str) -> Finding:
        line = text.count("\n", 0, place) + 1
        return Finding(line, rule, instead, lines[line - 1].strip() if lines else "")

    for rule in RULES:
        yield from (finding(place, rule.name, rule.instead) for place in rule.places(clean))
    if sentences:
        yield from (finding(place, LONG, "two sentences") for place in long_sentences(clean))


def findings_in(path: Path) -> Iterator[Finding]:
    """What is not well said in a file.

    Args:
        path: Markdown, or what `--help` prints, in a file `.txt`.
    """
    yield from findings(path.read_text(encoding="utf-8"), sentences=path.suffix == ".md")


def documents() -> list[Path]:
    """What people read: the pages, the READMEs, and what `--help` prints."""
    return sorted(
        [
            *ROOT.glob("*.md"),
            *(ROOT / "docs").rglob("*.md"),
            *(ROOT / room / "README.md" for room in ("agents", "protocol")),
            *(path for room in ("examples", "tests") for path in (ROOT / room).rglob("README.md")),
            ROOT / "tests/unit/oob/cli/help/80.txt",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print each finding; 1 when there is one."""
    parser = argparse.ArgumentParser(description="Find English that its speakers would not write.")
    parser.add_argument("files", metavar="FILE", nargs="*", type=Path, help="files to read (default: all documents)")
    found_any = False
    for path in parser.parse_args(argv).files or documents():
        for found in sorted(findings_in(path)):
            found_any = True
            place = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
            print(f"{place}:{found.line}: {found.rule}: write: {found.instead}\n    {found.text}")
    return found_any


if __name__ == "__main__":
    sys.exit(main())
