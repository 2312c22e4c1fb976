"""The suite as a whole: what cases say of themselves, what they cover, and that golden bytes and builders agree."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from mutants.caught import CAUGHT_BY
from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import Case, CaseEffect, CaseFailed, Level
from vfiouser_conformance.cases import all_cases
from vfiouser_conformance.facts import parse_capabilities
from vfiouser_conformance.requirements import NOT_FROM_OUTSIDE, REQUIREMENTS, SENTENCES, coverage
from vfiouser_conformance.select_cases import BadExpression, select
from vfiouser_protocol.constants import Command

CASES = all_cases()
#: Behaviours that no case fails, but that a run reports.
SEEN_ONLY = {"info/intx-flags-plain"}
MUTANTS = Path(__file__).resolve().parents[1] / "support" / "mutants"
BUILT = {
    "version 0.0 without data": (1, wire.version()),
    "get info": (2, wire.info()),
    "get region info 7": (3, wire.region_info(7)),
    "get irq info 2": (4, wire.info(16, 0, 2)),
    "get io fds 1": (5, wire.info(16, 0, 1)),
    "map 64 KiB at 0x100000": (6, wire.dma_map(0x100000, 0x10000)),
    "unmap 64 KiB at 0x100000": (7, wire.dma_unmap(0x100000, 0x10000)),
    "disable MSI-X": (8, wire.set_irqs(0x21, 2, 0, 0)),
    "read 4 bytes of config space": (9, wire.access(7, 0, 4)),
    "write the interrupt line": (10, wire.access(7, 0x3C, 1, b"\x0b")),
    "reset": (11, b""),
    "two config writes in one": (12, wire.write_multi([(7, 0x3C, b"\x0b"), (7, 4, b"\x06\x00")])),
    "get migration feature": (13, wire.feature(0x10001, argsz=16)),
    "set state stop": (14, wire.feature(0x20002, b"\1\0\0\0\0\0\0\0")),
    "report dirty pages": (15, wire.log_report(0x100000, 0x10000, 4096)),
    "read 64 bytes of migration data": (16, wire.mig_data(64)),
    "write 4 bytes of migration data": (17, wire.mig_data(4, b"\xde\xad\xbe\xef")),
    "start v1 dirty logging": (18, wire.FEATURE.pack(8, 1)),
    "get v1 dirty pages": (19, wire.dirty_get(0x100000, 0x10000)),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_says_what_it_is(case: Case) -> None:
    """Every case has a summary, what it sends and expects, requirements that exist, and a fault to catch."""
    assert re.fullmatch(r"[A-Z0-9-]+-\d{3}", case.name)
    assert case.summary.endswith(".")
    assert case.sent
    assert case.expected
    assert case.requirements
    assert set(case.requirements) <= set(REQUIREMENTS)
    assert CAUGHT_BY[case.name]
    assert (case.level is Level.COMPAT) == bool(case.compat)


@pytest.mark.parametrize("case", [case for case in CASES if case.level is Level.MUST], ids=lambda case: case.name)
def test_a_must_rests_on_the_specification(case: Case) -> None:
    """No MUST without a requirement of the specification, of the kernel's definitions that it refers to, or of PCI."""
    assert any(REQUIREMENTS[number].binds for number in case.requirements), case.requirements


def test_sentences_belong_to_what_binds() -> None:
    """Whatever is quoted is quoted for a requirement that exists, and that may be demanded."""
    assert all(REQUIREMENTS[number].binds for number in SENTENCES)


def test_there_are_enough_cases() -> None:
    """At least 150 cases and 40 faults, each name once."""
    assert [] == [name for name, count in Counter(case.name for case in CASES).items() if count > 1]
    assert len(CASES) >= 150
    assert len({fault for faults in CAUGHT_BY.values() for fault in faults}) >= 40


def test_requirements_are_covered() -> None:
    """Every requirement is cited by a case, or stands in the list of those that no case can decide, with a reason."""
    found = coverage(CASES)
    assert () == found.missing
    assert set(found.outside) == set(NOT_FROM_OUTSIDE)
    assert found.share > 0.95


def test_every_fault_is_claimed() -> None:
    """Each fault that the server of the tests knows is caught by a case, and each that a row names exists."""
    assert set(CAUGHT_BY) == {case.name for case in CASES}
    planted = set()
    for path in set(MUTANTS.glob("*.py")) - {MUTANTS / "caught.py"}:
        planted |= set(re.findall(r'"((?:[a-z0-9]+-?)+/[a-z0-9-]+)"', path.read_text()))
    planted -= SEEN_ONLY
    assert planted == {fault.partition("@")[0] for faults in CAUGHT_BY.values() for fault in faults}


@pytest.mark.parametrize("name", BUILT)
def test_builders_give_the_golden_bytes(name: str) -> None:
    """What the builders pack is what was written down by hand."""
    golden = vectors.message(name)
    msg_id, payload = BUILT[name]
    assert golden == wire.pack(int.from_bytes(golden[2:4], "little"), payload, msg_id=msg_id)
    assert len(golden) == int.from_bytes(golden[4:8], "little")


def test_every_command_has_golden_bytes() -> None:
    """There is a golden message for each command that a client may send."""
    sent = {int.from_bytes(message[2:4], "little") for message in vectors.MESSAGES.values()}
    assert set(Command) - {Command.DMA_READ, Command.DMA_WRITE} == sent
    assert 214 == len(wire.pack(1, wire.version(vectors.QEMU_CAPABILITIES)))
    assert 120 == len(wire.pack(1, wire.version(vectors.V1_CAPABILITIES)))


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("FRAME-001", {"FRAME-001"}),
        ("frame-001 or info-001", {"FRAME-001", "INFO-001", "REGION-INFO-001"}),
        ("(frame-001 or info-001) and not region", {"FRAME-001", "INFO-001"}),
        ("not (info or frame) and R230 and session-001", {"SESSION-001"}),
    ],
)
def test_expressions(expression: str, wanted: set[str]) -> None:
    """-k chooses by name, area and requirement, with and, or, not and parentheses."""
    assert wanted == {case.name for case in select(CASES, expression=expression)}


@pytest.mark.parametrize("expression", ["and", "a or", "(a", "a)", "not", "()", "a b"])
def test_bad_expressions(expression: str) -> None:
    """An expression that cannot be read is refused, not guessed at."""
    with pytest.raises(BadExpression):
        select(CASES, expression=expression)


def test_levels_and_safety() -> None:
    """--level and --safe leave out what they say."""
    assert {Level.SHOULD} == {case.level for case in select(CASES, levels=[Level.SHOULD])}
    safe = select(CASES, safe=True)
    assert CaseEffect.DEVICE not in {case.effect for case in safe}
    assert len(safe) > 100


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"{", "is not JSON"),
        (b"[]", "is not an object"),
        (b'{"capabilities": 1}', "is not an object"),
    ],
)
def test_capabilities_of_a_hostile_server(data: bytes, words: str) -> None:
    """Whatever a server sends for capabilities fails the case, in words."""
    with pytest.raises(CaseFailed, match=words):
        parse_capabilities(bytes(4) + data + b"\0")
