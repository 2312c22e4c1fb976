"""Why a VM could not migrate: one reason for each thing in the way, and none for a VM that would."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_oob.vm.preflight import (
    RULES,
    FunctionFacts,
    Moment,
    VmFacts,
    Weight,
    judge,
    read_answers,
    refusals,
)
from vfiouser_oob.vm.record import CarrierKind, VmPhase

GOOD = VmFacts(
    version=(11, 1, 3),
    capabilities={"return-path": True, "postcopy-ram": False, "events": True},
    objects={"oobvmstate": "dbus-vmstate", "mon": "monitor-qmp"},
    devices={"f0": "vfio-user-pci", "net0": "virtio-net-pci"},
    functions=(FunctionFacts("f0"),),
)
F0 = FunctionFacts("f0")
#: Code: what is different, and a piece of the sentence.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no-functions": ({"functions": (), "devices": {}}, "No function is configured"),
    "no-monitor": ({"connected": False}, "has not connected its monitor"),
    "no-events": ({"tells": False}, "sends no events"),
    "qemu-too-old": ({"version": (10, 2, 0)}, "QEMU 10.2.0 is too old: the client of QEMU 11.1 is"),
    "barred": ({"phase": VmPhase.BARRED}, "without its functions' state"),
    "incoming": ({"phase": VmPhase.INCOMING}, "has not arrived"),
    "no-return-path": ({"capabilities": {}}, "return-path is off"),
    "postcopy": ({"capabilities": {"return-path": True, "postcopy-ram": True}}, "postcopy-ram is on"),
    "background-snapshot": ({"capabilities": {"return-path": True, "background-snapshot": True}}, "snapshot is on"),
    "colo": ({"capabilities": {"return-path": True, "x-colo": True}}, "x-colo is on"),
    "blocked": ({"blockers": ("the disk is local",)}, "QEMU itself would refuse: the disk is local"),
    "no-ecam": ({"ecam": False}, "has no ECAM"),
    "no-carrier": ({"objects": {}}, "QEMU has no dbus-vmstate"),
    "function-missing": ({"devices": {"f0": "nvme"}}, "no device vfio-user-pci with the id f0"),
    "stranger": ({"devices": {"f0": "vfio-user-pci", "x": "vfio-user-pci"}}, "device x is a vfio-user-pci too"),
    "function-detached": ({"functions": (replace(F0, attached=False),)}, "f0 has no QEMU as its client"),
    "function-unfit": ({"functions": (replace(F0, unfit="it has no agent"),)}, "be migrated: it has no agent."),
    "agent-away": ({"functions": (replace(F0, away=True),)}, "agent of function f0 does not answer"),
    "unrecorded-memory": (
        {"functions": (replace(F0, unrecorded=4097, unrecorded_max=4096),)},
        "written 4097 bytes of guest memory unseen, and only 4096",
    ),
    "mismatch": ({"functions": (replace(F0, mismatch="other firmware"),)}, "cannot take the state: other firmware"),
}
#: What a manager may yet set.
ADVICE = {"no-return-path", "postcopy", "background-snapshot", "colo"}
#: What each function says of itself when it is armed.
AT_REST = {"no-ecam"}


@pytest.mark.parametrize("moment", Moment)
def test_a_vm_that_would(moment: Moment) -> None:
    """Nothing is in the way."""
    assert judge(GOOD, moment) == ()
    companion = replace(GOOD, carrier=CarrierKind.VHOST_USER_FS, devices={**GOOD.devices, "oob": "vhost-user-fs-pci"})
    assert judge(companion, moment) == ()


def test_every_rule_has_its_case() -> None:
    """None is untested, and none has a name twice."""
    assert [rule.code for rule in RULES] == list(CASES)


@pytest.mark.parametrize("code", CASES)
@pytest.mark.parametrize("moment", Moment)
def test_one_thing_in_the_way(code: str, moment: Moment) -> None:
    """One thing gives one reason, in one sentence."""
    change, words = CASES[code]
    reasons = judge(replace(GOOD, **change), moment)
    if moment is Moment.SETUP and code in AT_REST:
        assert not reasons
        return
    (reason,) = reasons
    assert reason.code == code
    assert words in reason.text
    assert reason.text[0].isupper()
    assert reason.weight is (Weight.ADVICE if moment is Moment.REST and code in ADVICE else Weight.REFUSED)
    assert refusals((reason,)) == (() if reason.weight is Weight.ADVICE else (reason.text,))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_sentences(rule: Any) -> None:
    """Each text is one sentence that ends, or ends with somebody else's words."""
    assert re.search(r"([.?]|\})$", rule.text)
    assert not re.search(r"[.?] [A-Z]", rule.text)


def test_a_client_that_migrates_needs_no_ecam() -> None:
    """Nothing is written for a function whose client migrates it itself."""
    facts = replace(GOOD, ecam=False, functions=(replace(F0, by_client=True),))
    assert judge(facts, Moment.REST) == ()


def test_a_paused_vm_needs_no_way_back() -> None:
    """It may be saved into a file, which has none; one that stands for its switchover is not paused."""
    assert judge(replace(GOOD, paused=True, capabilities={}), Moment.SETUP) == ()
    assert read_answers({"runstate": {"status": "paused"}})["paused"]
    assert not read_answers({"runstate": {"status": "finish-migrate"}})["paused"]


def test_several_at_once() -> None:
    """All are told, in the order of the table, and each function for itself."""
    facts = replace(
        GOOD,
        functions=(replace(F0, away=True), FunctionFacts("f1", away=True)),
        capabilities={},
    )
    assert [reason.code for reason in judge(facts, Moment.SETUP)] == [
        *("no-return-path", "function-missing", "agent-away", "agent-away")
    ]


def test_without_a_monitor_nothing_is_guessed() -> None:
    """What QEMU was not asked is no reason."""
    assert ["no-monitor"] == [reason.code for reason in judge(VmFacts(connected=False, functions=(F0,)), Moment.REST)]


@pytest.mark.parametrize("phase", VmPhase)
def test_phases_that_can_be_left(phase: VmPhase) -> None:
    """A VM that has arrived may move on, also before it ever ran here."""
    reasons = judge(replace(GOOD, phase=phase), Moment.SETUP)
    assert bool(reasons) == (phase in {VmPhase.BARRED, VmPhase.INCOMING, VmPhase.LOADING, VmPhase.LOADED})


def test_words_of_others_are_no_format() -> None:
    """Braces in somebody else's words stay what they are."""
    (reason,) = judge(replace(GOOD, blockers=("{name} {0}",)), Moment.SETUP)
    assert reason.text.endswith("{name} {0}")


def test_answers_as_qemu_gives_them() -> None:
    """As QEMU 11.1.3 wrote them."""
    assert read_answers(
        {
            "capabilities": [
                {"state": False, "capability": "xbzrle"},
                {"state": True, "capability": "return-path"},
            ],
            "migration": {"blocked-reasons": ["no"], "status": "none"},
            "objects": [{"name": "type", "type": "string"}, {"name": "mon", "type": "child<monitor-qmp>"}],
            "devices": [{"name": "f0", "type": "child<vfio-user-pci>"}],
            "ecam": 0xB000_0000,
        }
    ) == {
        "capabilities": {"xbzrle": False, "return-path": True},
        "blockers": ("no",),
        "paused": False,
        "objects": {"mon": "monitor-qmp"},
        "devices": {"f0": "vfio-user-pci"},
        "ecam": True,
    }


@pytest.mark.parametrize(
    ("answers", "ecam"), [({}, False), ({"ecam": (1 << 64) - 1}, True), ({"ecam": 0xE000_0000}, True)]
)
def test_machines_with_and_without_ecam(answers: dict[str, Any], ecam: bool) -> None:
    """A machine `pc` refuses to say where ECAM is; q35 says nowhere before firmware has run, which is no obstacle."""
    assert read_answers(answers)["ecam"] is ecam


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "type", "capability", "state", "blocked-reasons"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["capabilities", "migration", "objects", "devices", "ecam", "runstate"]), ODD))
def test_odd_answers(answers: dict[str, Any]) -> None:
    """Whatever QEMU answers can be judged."""
    judge(VmFacts(functions=(F0,), **read_answers(answers)), Moment.SETUP)
