"""What a new configuration changes, before anything is touched: a value for every unit that is concerned."""

from __future__ import annotations

from pathlib import Path

from vfiouser_oob.config.schema import FunctionConfig, LogLevel, ModelDevice
from vfiouser_oob.config.tables import SpoiledTable
from vfiouser_oob.server.life import LIVE_KEYS
from vfiouser_oob.server.registry import Units
from vfiouser_oob.server.reload import ReloadStep, difference
from vfiouser_oob.server.unit import Origin, Unit, UnitFailure, UnitKind


def kind(header: str) -> UnitKind:
    """A kind whose units nobody opens."""

    def never(config: FunctionConfig) -> None:
        raise AssertionError(config.name)

    return UnitKind(header, f"[[{header}]]", lambda config: (), never, str, LIVE_KEYS)  # type: ignore[arg-type]


FUNCTION, VM = kind("function"), kind("vm")


def config(name: str, line: int = 1, **more: object) -> FunctionConfig:
    """A function's."""
    return FunctionConfig(name=name, device=ModelDevice(model="test"), line=line, **more)  # type: ignore[arg-type]


def units(*there: Unit) -> Units:
    """Those that there are."""
    found = Units([FUNCTION, VM])
    for unit in there:
        found.put(unit)
    return found


def steps(found: Units, *wanted: FunctionConfig, spoiled: tuple[SpoiledTable, ...] = ()) -> list[tuple[str, str]]:
    """The difference, in short."""
    return [(change.step.value, change.name) for change in difference(found, {FUNCTION: wanted}, spoiled)]


def test_nothing_changed_is_no_difference() -> None:
    """Also where tables moved in the file."""
    there = units(Unit(FUNCTION, "a", config("a", 1)), Unit(FUNCTION, "b", config("b", 9)))
    assert [] == steps(there, config("b", 2), config("a", 30))


def test_each_step_and_their_order() -> None:
    """What goes, goes first; what comes, comes last."""
    there = units(
        Unit(FUNCTION, "gone", config("gone")),
        Unit(FUNCTION, "live", config("live")),
        Unit(FUNCTION, "other", config("other")),
        Unit(FUNCTION, "bad", config("bad"), failure=UnitFailure("smoke")),
        Unit(FUNCTION, "typo", config("typo")),
        Unit(FUNCTION, "never", None, failure=UnitFailure("was a typo")),
    )
    found = difference(
        there,
        {
            FUNCTION: [
                config("new"),
                config("never"),
                config("bad"),
                config("other", socket=Path("/x")),
                config("live", log_level=LogLevel.DEBUG, allow_uids=(1,)),
            ]
        },
        [SpoiledTable("[[function]]", "typo", "a typo"), SpoiledTable("[[function]]", "late", "another")],
    )
    assert [
        ("remove", "gone", ()),
        ("adapt", "live", ("allow_uids", "log_level")),
        ("replace", "other", ("socket",)),
        ("retry", "bad", ()),
        ("retry", "never", ()),
        ("spoiled", "typo", ()),
        ("spoiled", "late", ()),
        ("add", "new", ()),
    ] == [(change.step.value, change.name, tuple(sorted(change.keys))) for change in found]
    assert list(ReloadStep) == sorted({change.step for change in found}, key=list(ReloadStep).index)


def test_what_was_added_by_a_command_stays() -> None:
    """Until the file names it, and then it is the file's to change."""
    there = units(Unit(FUNCTION, "mine", config("mine"), Origin.ADDED))
    assert [] == steps(there)
    assert [] == steps(there, config("mine"))
    assert [("replace", "mine")] == steps(there, config("mine", retain_state=True))


def test_kinds_do_not_meet() -> None:
    """A VM and a function may have one name; VMs go before the functions that they use, and come after them."""
    there = units(Unit(FUNCTION, "a", config("a")), Unit(VM, "a", config("a")))
    changes = difference(there, {FUNCTION: (), VM: ()})
    assert [VM, FUNCTION] == [change.kind for change in changes]
    changes = difference(units(), {VM: [config("a")], FUNCTION: [config("a")]})
    assert [FUNCTION, VM] == [change.kind for change in changes]
    spoiled = (SpoiledTable("[[vm]]", "a", "typo"),)
    assert [(VM, "a")] == [
        (change.kind, change.name) for change in difference(there, {FUNCTION: [config("a")], VM: ()}, spoiled)
    ]
