"""What a case is: its name, level, requirements and function, and the areas that cases are collected in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vfiouser_conformance.trial import Trial

Body = Callable[["Trial"], None]


class CaseFailed(Exception):
    """The server did not do what the case expects; the message says what came and what was expected."""


class NotApplicable(Exception):
    """The device or the server lacks what the case is about; the message says what."""


class CannotTell(Exception):
    """Neither a pass nor a failure can be shown; the message says why."""


class Level(Enum):
    """How binding a case is."""

    #: The specification, or the kernel's definitions that it refers to, demand it.
    MUST = "MUST"
    #: Robustness asks for it.
    SHOULD = "SHOULD"
    #: A known client or implementation depends on it; the case names it.
    COMPAT = "COMPAT"


class CaseEffect(IntEnum):
    """What a case may do to the device."""

    #: It asks questions only.
    NONE = 0
    #: It sets things up that end with the connection: maps, eventfds.
    SESSION = 1
    #: It writes registers, resets, migrates. `--safe` leaves such cases out.
    DEVICE = 2


@dataclass(frozen=True, slots=True)
class Case:
    """One demand on a server, and the function that finds out whether it is met.

    Args:
        name: area and number, e.g. ``DMA-MAP-004``.
        area: title of its area.
        level: how binding it is.
        requirements: the requirements it tests, by id.
        summary: one sentence: what a pass proves.
        sent: what is sent.
        expected: what is expected.
        run: the function.
        effect: what it may do to the device.
        compat: for COMPAT, whose behaviour it rests on.
    """

    name: str
    area: str
    level: Level
    requirements: tuple[str, ...]
    summary: str
    sent: str
    expected: str
    run: Body
    effect: CaseEffect
    compat: str = ""


@dataclass(slots=True)
class Area:
    """The cases of one area, collected while its module is imported.

    Args:
        prefix: what their names begin with.
        title: for people.
        effect: what its cases do to the device unless they say otherwise.
    """

    prefix: str
    title: str
    effect: CaseEffect = CaseEffect.SESSION
    cases: list[Case] = field(default_factory=list)

    def case(
        self,
        number: int,
        level: Level,
        requirements: str,
        *,
        effect: CaseEffect | None = None,
        compat: str = "",
    ) -> Callable[[Body], Body]:
        """Add the decorated function as a case; its docstring has a summary, `Sends:` and `Expects:`.

        Args:
            number: the case's number in its area.
            level: how binding it is.
            requirements: ids, separated by blanks.
            effect: what it may do to the device; None = as its area.
            compat: for COMPAT, whose behaviour it rests on.
        """

        def add(body: Body) -> Body:
            summary, sent, expected = _parts(inspect.getdoc(body) or "")
            self.add(number, level, requirements, (summary, sent, expected), body, effect, compat)
            return body

        return add

    def add(
        self,
        number: int,
        level: Level,
        requirements: str,
        text: tuple[str, str, str],
        body: Body,
        effect: CaseEffect | None = None,
        compat: str = "",
    ) -> None:
        """Add a case without a decorator.

        Args:
            number: the case's number in its area.
            level: how binding it is.
            requirements: ids, separated by blanks.
            text: its summary, what is sent and what is expected.
            body: what it does.
            effect: what it may do to the device; None = as its area.
            compat: for COMPAT, whose behaviour it rests on.
        """
        self.cases.append(
            Case(
                name=f"{self.prefix}-{number:03}",
                area=self.title,
                level=level,
                requirements=tuple(requirements.split()),
                summary=text[0],
                sent=text[1],
                expected=text[2],
                run=body,
                effect=self.effect if effect is None else effect,
                compat=compat,
            )
        )


@dataclass(frozen=True, slots=True)
class RefusedRequest:
    """A row of a table of requests that have to fail.

    Args:
        number: the case's number in its area.
        level: how binding it is.
        requirements: ids, separated by blanks.
        summary: one sentence: what a pass proves.
        sent: what is sent.
        make: builds the requests, as (command, payload) or (command, payload, descriptors).
        effect: what it may do to the device; None = as its area.
    """

    number: int
    level: Level
    requirements: str
    summary: str
    sent: str
    make: Callable[[Trial], Sequence[tuple[int, bytes] | tuple[int, bytes, Sequence[int]]]]
    effect: CaseEffect | None = None


def refusals(area: Area, rows: Sequence[RefusedRequest]) -> None:
    """Add a case per row: each request gets an error reply, and the connection goes on.

    Args:
        area: where the cases belong.
        rows: the requests.
    """
    for row in rows:
        text = (row.summary, row.sent, "an error reply with any error number; the connection goes on")
        body = _refusal_body(row)
        area.add(row.number, row.level, row.requirements, text, body, row.effect)


def _refusal_body(row: RefusedRequest) -> Body:
    def body(t: Trial) -> None:
        t.link = t.attach()
        requests = row.make(t)  # it may need another connection than the usual one
        link = t.link
        for request in requests:
            link.refused(request[0], request[1], request[2] if len(request) == 3 else ())
        link.answers()

    return body


def _parts(text: str) -> tuple[str, str, str]:
    summary, _, rest = text.partition("\n")
    sent, _, expected = rest.partition("Expects:")
    return summary.strip(), _flat(sent.replace("Sends:", "", 1)), _flat(expected)


def _flat(text: str) -> str:
    return " ".join(text.split())


def check(condition: object, message: str) -> None:
    """Fail the case unless the condition holds.

    Args:
        condition: what must be true.
        message: what is wrong otherwise, one line.

    Raises:
        CaseFailed: it is not.
    """
    if not condition:
        raise CaseFailed(message)


def same(expected: object, actual: object, what: str) -> None:
    """Fail the case unless both are equal.

    Args:
        expected: what the requirement asks for.
        actual: what the server gave.
        what: what was compared, for the report.

    Raises:
        CaseFailed: they differ.
    """
    if expected != actual:
        raise CaseFailed(f"{what}: expected {_shown(expected)}, got {_shown(actual)}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:180]}… ({len(text)} characters)"
