"""The watchdog is told that the daemon lives when every unit has answered, or was taken out of service."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from vfiouser_oob.observability import log
from vfiouser_oob.server.pulse import Pulse
from vfiouser_oob.server.unit import Unit, UnitKind


class ScriptedLife:
    """A unit that answers as it is told to."""

    def __init__(self, answer: str | None = "", hangs: bool = False) -> None:
        self.answer = answer
        self.hangs = hangs
        self.exhausted = False
        self.ended = trio.Event()
        self.failure: str | None = None
        self.user = None
        self.asked = 0

    async def prove(self) -> str | None:
        """Answer, or never."""
        self.asked += 1
        if self.hangs:
            await trio.sleep_forever()
        return self.answer

    def condemn(self, reason: str) -> None:
        """It is of no use any more."""
        self.failure = reason


def unit(life: ScriptedLife) -> Unit:
    """A unit that lives so."""
    kind = UnitKind("function", "[[function]]", lambda config: life)  # type: ignore[arg-type, return-value]
    return Unit(kind, "f0", None, life=life)  # type: ignore[arg-type]


async def test_one_that_hangs_costs_itself(autojump_clock: MockClock) -> None:
    """The others answer, the manager hears of us, and the one is not asked again."""
    good, stuck, late = ScriptedLife(), ScriptedLife(hangs=True), ScriptedLife("a message is late")
    told: list[float] = []
    units = [unit(life) for life in (good, stuck, late)]
    pulse = Pulse(lambda: units, 12.0, lambda: told.append(trio.current_time()), log.get("test"))
    start = trio.current_time()
    with trio.move_on_after(20):
        await pulse.run()
    assert good.failure is None
    assert "it hangs: its tasks did not answer within 3 s" == stuck.failure
    assert "it hangs: a message is late" == late.failure
    assert (1, 1) == (stuck.asked, late.asked)
    assert good.asked == len(told)
    assert [3.0, 7.0, 11.0, 15.0, 19.0] == [round(when - start) for when in told]


async def test_what_has_ended_is_not_asked(autojump_clock: MockClock) -> None:
    """Nor what has failed, or never lived."""
    gone, broken = ScriptedLife(hangs=True), ScriptedLife(hangs=True)
    gone.ended.set()
    broken.failure = "smoke"
    never = unit(ScriptedLife())
    never.life = None
    units = [unit(gone), unit(broken), never]
    await Pulse(lambda: units, 12.0, lambda: None, log.get("test")).round()
    assert (0, 0) == (gone.asked, broken.asked)
