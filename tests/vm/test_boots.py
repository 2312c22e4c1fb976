"""How guests are run beside each other, without guests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from vmbed import boots as module
from vmbed.assets import Assets
from vmbed.boots import AT_A_TIME, Boots
from vmbed.errors import BedError
from vmbed.guest import Answer
from vmbed.vfioguest import Answers, Boot

NOWHERE = Path("/nowhere")
ASSETS = Assets(NOWHERE, "", NOWHERE, "", NOWHERE, NOWHERE)


class Guests:
    """What stands for guests: each waits until its scenario's name is let go, and then answers with it."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.most = 0
        self.cancelled: list[str] = []

    async def run(self, assets: Assets, boot: Boot) -> Answers:
        """Be a guest: `slow` never ends, `lost` is lost, any other answers once two are running or it is the last."""
        assert assets is ASSETS
        (name,) = boot.scenarios
        self.running.append(name)
        self.most = max(self.most, len(self.running))
        try:
            if name == "slow":
                await trio.sleep_forever()
            if name == "lost":
                raise BedError("lost")
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            return {name: Answer(name, (), 0)}
        except trio.Cancelled:
            self.cancelled.append(name)
            raise
        finally:
            self.running.remove(name)


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guests]:
    """The bed's guests are these."""
    found = Guests()
    monkeypatch.setattr(module, "scenarios_of", found.run)
    yield found
    assert not found.running


def test_all_answer_and_no_more_run_than_may(guests: Guests) -> None:
    """Each boot's answers are its own; as many run at a time as there may."""
    asked = [Boot((str(number),)) for number in range(5)]
    with Boots(ASSETS, asked) as boots:
        answers = [boots.answers(boot) for boot in asked]
    assert [list(answer) for answer in answers] == [["0"], ["1"], ["2"], ["3"], ["4"]]
    assert guests.most == AT_A_TIME


def test_guest_that_is_lost_is_nobody_elses_matter(guests: Guests) -> None:
    """Whoever asks for its answers gets the error, each time; the others answer."""
    lost, well = Boot(("lost",)), Boot(("well",))
    with Boots(ASSETS, [lost, well]) as boots:
        for _ in range(2):
            with pytest.raises(BedError, match="lost"):
                boots.answers(lost)
        assert list(boots.answers(well)) == ["well"]


def test_guest_nobody_waits_for_is_ended(guests: Guests) -> None:
    """The end of the tests ends it, and those that have not begun never do."""
    boots = Boots(ASSETS, [Boot((name,)) for name in ("well", "slow")])
    with boots:
        assert list(boots.answers(Boot(("well",)))) == ["well"]
    assert guests.cancelled in ([], ["slow"])
    with pytest.raises(BedError, match="ended before"):
        boots.answers(Boot(("slow",)))


def test_boot_that_was_not_foreseen_is_carried_out(guests: Guests, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run by itself."""
    monkeypatch.setattr(module, "run_scenarios", lambda assets, boot: {"alone": Answer("alone", (), 0)})
    with Boots(ASSETS, []) as boots:
        assert list(boots.answers(Boot(("other",)))) == ["alone"]
