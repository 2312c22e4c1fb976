"""A record is written down and read, field by field; what is no record is refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from vfiouser_agents.api import AgentState, Role, Status
from vfiouser_oob.migration.record import (
    VERSION,
    Begun,
    Certainty,
    Failure,
    Goal,
    MigrationRecord,
    Owner,
    PlanProgress,
    ResetDue,
    Stream,
)
from vfiouser_protocol.constants import DeviceState

FULL = MigrationRecord(
    state=DeviceState.STOP_COPY,
    certainty=Certainty.UNKNOWN,
    unknown_since=1234.5,
    owner=Owner.V1,
    p2p=True,
    by_client=True,
    begun=Begun(Role.SOURCE, "abc"),
    stream=Stream(Role.SOURCE, epoch=2, position=1 << 40),
    handed=True,
    committed=True,
    load_failure="no",
    attached=True,
    asked=True,
    fenced=True,
    paused=True,
    over_link=True,
    reset_due=ResetDue.GUEST,
    awaiting=True,
    goal=Goal.LEARN,
    errand=PlanProgress(
        "bring back",
        DeviceState.PRE_COPY,
        at=1,
        touched=True,
        ahead="begin source",
        rest=("a", "b"),
        owner=Owner.V2,
        arc="RUNNING → STOP",
        failure=Failure("lost", 5, unclear=True),
        missing=Failure("away", 107, unsent=True, away=True),
    ),
    logging=True,
    blocked="old",
    last_error="lost",
    changes=7,
)


def test_every_field_is_written_down() -> None:
    """None is forgotten, whatever is in it."""
    plain = MigrationRecord()
    assert [] == [
        field.name for field in fields(MigrationRecord) if getattr(plain, field.name) == getattr(FULL, field.name)
    ]
    assert FULL == MigrationRecord.from_json(FULL.to_json())
    assert plain == MigrationRecord.from_json(plain.to_json())


@pytest.mark.parametrize("name", [field.name for field in fields(MigrationRecord)])
def test_each_field_by_itself(name: str) -> None:
    """A record that differs in one field is read with that difference."""
    record = replace(MigrationRecord(), **{name: getattr(FULL, name)})
    assert record == MigrationRecord.from_json(record.to_json())


@pytest.mark.parametrize("name", [field.name for field in fields(MigrationRecord)])
def test_a_record_with_another_field_is_what_replace_makes(name: str) -> None:
    """And the one that it was made of stays as it is."""
    before, value = MigrationRecord(), getattr(FULL, name)
    assert replace(before, **{name: value}) == before.but({name: value})
    assert MigrationRecord() == before
    with pytest.raises(KeyError):
        before.but({"colour": 1})


def test_what_the_agent_said_is_not_written_down() -> None:
    """It would be old when it is read."""
    errand = PlanProgress("ask", DeviceState.STOP, status=Status(AgentState.STOPPED))
    read = MigrationRecord.from_json(MigrationRecord(errand=errand).to_json())
    assert replace(errand, status=None) == read.errand


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps({"version": VERSION + 1}),
        json.dumps({"version": VERSION, "colour": "red"}),
        json.dumps({"version": VERSION, "state": "FLYING"}),
        json.dumps({"version": VERSION, "owner": "v3"}),
        json.dumps({"version": VERSION, "begun": {"name": "x"}}),
    ],
)
def test_what_is_no_record_is_refused(text: str) -> None:
    """With a ValueError that says why, whatever it is."""
    with pytest.raises(ValueError, match=r"."):
        MigrationRecord.from_json(text)


def test_what_is_shown() -> None:
    """Names for people, states for clients."""
    shown = {certainty: MigrationRecord(certainty=certainty).shown for certainty in Certainty}
    assert {Certainty.KNOWN: "RUNNING", Certainty.UNKNOWN: "UNKNOWN", Certainty.FAILED: "ERROR"} == shown
    assert DeviceState.ERROR is MigrationRecord(certainty=Certainty.FAILED).state_shown
    assert MigrationRecord(state=DeviceState.STOP, over_link=True).runs
    assert DeviceState.RUNNING is MigrationRecord(state=DeviceState.STOP, over_link=True).at_agent
    assert (True, False) == (FULL.saves, FULL.loads)
    assert (True, True) == (FULL.busy, FULL.elsewhere)
    assert "lost" == str(Failure("lost", 5))
