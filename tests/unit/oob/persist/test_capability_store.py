"""What agents can do is remembered per function and agent; whatever is wrong with the disk costs a warning."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

import pytest
import trio

from vfiouser_agents.api import Capabilities
from vfiouser_oob.observability import log
from vfiouser_oob.persist import capabilities
from vfiouser_oob.persist.capabilities import CapabilityStore, Facts, FunctionCapabilities, Source, agent_identity
from vfiouser_oob.persist.record import write_record

CAPS = Capabilities(stop_copy=False, p2p=True, formats=("a", "b"), max_state=1 << 40, page_sizes=(4096, 65536))


def drawer(directory: Path | None, function: str = "f0", identity: str = "i") -> FunctionCapabilities:
    """A place as another life of the daemon would have it."""
    return CapabilityStore(directory, log.get("test")).drawer(function, identity)


def file_of(directory: Path, function: str = "f0") -> Path:
    """Where a function's facts are."""
    return directory / "agents" / f"{function}.json"


async def test_facts_come_back(tmp_path: Path) -> None:
    """Another daemon finds the capabilities, when they were learned, and that it did not hear them itself."""
    await drawer(tmp_path).remember(Facts(CAPS, 1000.5))
    assert Facts(CAPS, 1000.5, Source.STORED) == await drawer(tmp_path).recall()


async def test_facts_belong_to_a_function_and_its_agent(tmp_path: Path) -> None:
    """Another function, or the same one with an agent configured differently, finds nothing."""
    await drawer(tmp_path).remember(Facts(CAPS, 1.0))
    assert await drawer(tmp_path, function="f1").recall() is None
    assert await drawer(tmp_path, identity="j").recall() is None
    same = {"address": "unix:///a", "tls": {"ca": "x"}}
    assert agent_identity("k", "f", same) == agent_identity("k", "f", dict(reversed(same.items())))
    assert agent_identity("k", "f", same) != agent_identity("k", "f", {**same, "address": "unix:///b"})
    assert agent_identity("k", "f", same) != agent_identity("k", "g", same)


async def test_secrets_are_not_written(tmp_path: Path) -> None:
    """Of an adapter's options only a digest is kept."""
    await drawer(tmp_path, identity=agent_identity("k", {"password": "hunter2"})).remember(Facts(CAPS, 1.0))
    assert "hunter2" not in file_of(tmp_path).read_text()


async def test_without_a_directory_nothing_is_remembered(tmp_path: Path) -> None:
    """No directory means memory only, without a complaint."""
    place = drawer(None)
    await place.remember(Facts(CAPS, 1.0))
    assert (None, None) == (await place.recall(), place.problem)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace("agent-capabilities", "something"),
        lambda text: text.replace('"stop_copy": false', '"stop_copy": "no"'),
        lambda text: text.replace('"max_state": 1099511627776', '"max_state": -1'),
        lambda text: text.replace('"learned": 1.0', '"learned": "today"'),
        lambda text: text.replace('"learned": 1.0', '"learned": NaN'),
    ],
)
async def test_damage_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object) -> None:
    """What cannot be used counts as nothing, is said once, and is replaced by what the agent says next."""
    await drawer(tmp_path).remember(Facts(CAPS, 1.0))
    path = file_of(tmp_path)
    text = path.read_text()
    assert text != damage(text)  # type: ignore[operator]
    path.write_text(damage(text))  # type: ignore[operator]
    place = drawer(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert await place.recall() is None
    assert ["the record of what the agent can do could not be read; going on without it"] == caplog.messages
    problem = place.problem
    assert problem is not None
    assert str(path) in problem
    await place.remember(Facts(CAPS, 2.0))
    assert place.problem is None
    assert Facts(CAPS, 2.0, Source.STORED) == await drawer(tmp_path).recall()


async def test_a_newer_version_adds_keys(tmp_path: Path) -> None:
    """Keys that this version does not know are ignored, and those that are missing have their defaults."""
    await drawer(tmp_path).remember(Facts(CAPS, 1.0))
    document = json.loads(file_of(tmp_path).read_text())
    del document["capabilities"]["takeover"]
    document["capabilities"]["levitation"] = True
    file_of(tmp_path).write_text(json.dumps(document))
    assert Facts(CAPS, 1.0, Source.STORED) == await drawer(tmp_path).recall()


async def test_a_store_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, not with every session; the same goes for reading."""
    (tmp_path / "agents").write_text("a file where the directory should be")
    place = drawer(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert await place.recall() is None
        for _ in range(3):
            await place.remember(Facts(CAPS, 1.0))
    assert 2 == len(caplog.messages)
    assert place.problem is not None


async def test_a_disk_that_hangs_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A read that does not come back is given up; the thread is left alone."""
    released = threading.Event()
    monkeypatch.setattr(capabilities, "read_record", lambda *_: released.wait(30))
    try:
        with trio.fail_after(2 * capabilities.READ_S):
            place = drawer(tmp_path)
            assert await place.recall() is None
        assert place.problem is not None
        assert "did not answer" in place.problem
    finally:
        released.set()


async def test_the_last_word_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes while something is being written is written after it, and of several only the last."""
    place = drawer(tmp_path)
    written = []
    write = write_record

    def slow(*args: object) -> None:
        written.append(args)
        time.sleep(0.05)
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(capabilities, "write_record", slow)
    async with trio.open_nursery() as nursery:
        for size in range(1, 6):
            nursery.start_soon(place.remember, Facts(Capabilities(max_state=size), 1.0))
            await trio.testing.wait_all_tasks_blocked()
    assert 2 == len(written)
    facts = await drawer(tmp_path).recall()
    assert facts is not None
    assert 5 == facts.caps.max_state
    await place.remember(Facts(Capabilities(max_state=5), 2.0))
    assert 2 == len(written)


async def test_a_clock_that_was_wrong(tmp_path: Path) -> None:
    """What was learned in the future was learned now, at the latest."""
    await drawer(tmp_path).remember(Facts(CAPS, time.time() + 1e6))
    facts = await drawer(tmp_path).recall()
    assert facts is not None
    assert facts.learned <= time.time()
