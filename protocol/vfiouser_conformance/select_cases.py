"""Which cases run: the language of `-k`, and the options that leave cases out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from vfiouser_conformance.case import Case, CaseEffect, Level

_TOKENS = re.compile(r"\(|\)|[^\s()]+")


class BadExpression(ValueError):
    """A -k expression that cannot be read."""


def select(
    cases: Iterable[Case], *, expression: str | None = None, levels: Iterable[Level] = Level, safe: bool = False
) -> list[Case]:
    """The cases that are asked for, in their order.

    Args:
        cases: to choose from.
        expression: words, `and`, `or`, `not` and parentheses; a word is looked for in name, area and requirements.
        levels: the levels that are wanted.
        safe: whether cases that may disturb a device in use are left out.

    Raises:
        BadExpression: the expression cannot be read.
    """
    wanted = set(levels)
    matches = parse(expression) if expression else lambda case: True
    return [
        case
        for case in cases
        if case.level in wanted and matches(case) and not (safe and case.effect is CaseEffect.DEVICE)
    ]


def parse(expression: str) -> Callable[[Case], bool]:
    """Turn an expression into a predicate.

    Args:
        expression: as for `select`.

    Raises:
        BadExpression: the expression cannot be read.
    """
    tokens = _TOKENS.findall(expression)
    predicate, rest = _either(tokens)
    if rest:
        raise BadExpression(f"-k: {rest[0]!r} was not expected in {expression!r}")
    return predicate


def _either(tokens: Sequence[str]) -> tuple[Callable[[Case], bool], Sequence[str]]:
    left, rest = _both(tokens)
    if rest and rest[0].lower() == "or":
        right, rest = _either(rest[1:])
        return lambda case: left(case) or right(case), rest
    return left, rest


def _both(tokens: Sequence[str]) -> tuple[Callable[[Case], bool], Sequence[str]]:
    left, rest = _one(tokens)
    if rest and rest[0].lower() == "and":
        right, rest = _both(rest[1:])
        return lambda case: left(case) and right(case), rest
    return left, rest


def _one(tokens: Sequence[str]) -> tuple[Callable[[Case], bool], Sequence[str]]:
    if not tokens or tokens[0] == ")" or tokens[0].lower() in {"and", "or"}:
        raise BadExpression("-k: a word, `not` or `(` is missing")
    first, rest = tokens[0], tokens[1:]
    if first.lower() == "not":
        inner, rest = _one(rest)
        return lambda case: not inner(case), rest
    if first == "(":
        inner, rest = _either(rest)
        if not rest or rest[0] != ")":
            raise BadExpression("-k: a `)` is missing")
        return inner, rest[1:]
    word = first.lower()
    return lambda case: word in " ".join((case.name, case.area, *case.requirements)).lower(), rest
