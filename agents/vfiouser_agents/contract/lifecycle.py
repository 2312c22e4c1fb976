"""Checks of everything but the data: connecting, sessions, states, migrations, reset, cancellation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import trio

from vfiouser_agents.api import AgentState, Capabilities, Outcome, Phase, Range, Role
from vfiouser_agents.errors import (
    AgentError,
    Busy,
    Incompatible,
    InvalidArgument,
    InvalidState,
    NotFound,
    Unsupported,
)

from .bench import MIGRATION, Bench, CheckFailed, CheckTable, expect, expect_error

CHECKS = CheckTable()
AsyncCall = Callable[[], Awaitable[object]]
_STOPPED = AgentState.STOPPED
_RUNNING = AgentState.RUNNING


@CHECKS.add("connect-again", "connect answers again, and the same")
async def _(bench: Bench) -> None:
    first, second = await bench.agent.connect(), await bench.agent.connect()
    expect(first == second, f"connect answered {first}, then {second}")
    expect(bool(first.vendor and first.product), "vendor and product must not be empty")


@CHECKS.add("functions", "functions lists the function, or says Unsupported")
async def _(bench: Bench) -> None:
    try:
        listed = [function.function_id for function in await bench.agent.functions()]
    except Unsupported:
        return
    expect(bench.session.function_id in listed, f"{bench.session.function_id!r} is not among {listed}")
    expect(len(set(listed)) == len(listed), f"a function is listed twice: {listed}")


@CHECKS.add("open-unknown", "opening a function that does not exist raises NotFound")
async def _(bench: Bench) -> None:
    await expect_error("open", bench.agent.open("no such function, surely"), NotFound)


@CHECKS.add("capabilities", "capabilities are consistent")
async def _(bench: Bench) -> None:
    caps = bench.caps
    expect(caps.max_chunk >= 4096, f"max_chunk is {caps.max_chunk}; at least 4096 is needed")
    expect(not caps.stop_copy or bool(caps.formats), "stop_copy without any format")
    expect(caps.stop_copy or not caps.precopy, "precopy without stop_copy")
    expect(not caps.stop_copy or caps.max_state > 0, "stop_copy without room for a state")
    sizes = list(caps.page_sizes)
    if caps.dirty:
        expect(bool(sizes) and sizes == sorted(set(sizes)), f"page_sizes {sizes} must be ascending")
        expect(all(size > 0 and size & (size - 1) == 0 for size in sizes), f"page_sizes {sizes}: powers of two only")
        expect(caps.max_ranges > 0, "dirty log without room for a range")


@CHECKS.add("describe", "a function describes itself, always the same, in its first format")
async def _(bench: Bench) -> None:
    first, second = await bench.descriptor(), await bench.descriptor()
    expect(first == second, f"described as {first}, then as {second}")
    if bench.caps.stop_copy:
        expect(first.format_id in bench.caps.formats, f"format {first.format_id!r} is not among its capabilities")
        expect(first.state_max <= bench.caps.max_state, f"state_max {first.state_max} is above max_state")


@CHECKS.add("check-itself", "a function accepts its own descriptor", "stop_copy")
async def _(bench: Bench) -> None:
    await bench.session.check(await bench.descriptor())


@CHECKS.add("check-foreign", "a foreign descriptor is refused as Incompatible, with reasons", "stop_copy")
async def _(bench: Bench) -> None:
    ours = await bench.descriptor()
    foreign = [
        replace(ours, format_id="no-such-format"),
        replace(ours, format_version=ours.format_version + 1000),
        replace(ours, kind="no-such-kind"),
        replace(ours, model="no such model"),
        replace(ours, vendor="no such vendor"),
    ]
    for descriptor in foreign:
        error = await expect_error("check", bench.session.check(descriptor), Incompatible)
        expect(isinstance(error, Incompatible) and bool(error.reasons), "Incompatible without a reason")
    await bench.expect_state(_RUNNING)


@CHECKS.add("stop-resume", "stop makes it STOPPED and resume RUNNING, each even when repeated")
async def _(bench: Bench) -> None:
    for _ in range(2):
        await bench.session.stop()
        await bench.expect_state(_STOPPED)
    for _ in range(2):
        await bench.session.resume()
        await bench.expect_state(_RUNNING)


@CHECKS.add("quiesce", "quiesce makes it QUIESCED, or STOPPED without p2p; repeating it or stopping works")
async def _(bench: Bench) -> None:
    wanted = AgentState.QUIESCED if bench.caps.p2p else _STOPPED
    for _ in range(2):
        await bench.session.quiesce()
        await bench.expect_state(wanted)
    await bench.session.resume()
    await bench.expect_state(_RUNNING)
    await bench.session.quiesce()
    await bench.session.stop()
    await bench.expect_state(_STOPPED)
    await bench.session.quiesce()
    await bench.expect_state(_STOPPED)


@CHECKS.add("begin", "begin is seen in status, changes nothing else, and may be repeated", "stop_copy")
async def _(bench: Bench) -> None:
    for _ in range(2):
        await bench.session.begin(Role.SOURCE, MIGRATION)
        status = await bench.expect_state(_RUNNING)
        seen = (status.role, status.migration_id)
        expect(seen == (Role.SOURCE, MIGRATION), f"status shows {seen}")


@CHECKS.add("begin-other", "another migration cannot begin before the first one has ended", "stop_copy")
async def _(bench: Bench) -> None:
    await bench.session.begin(Role.SOURCE, MIGRATION)
    await expect_error("begin", bench.session.begin(Role.SOURCE, "another"), InvalidState, Busy)
    await expect_error("begin", bench.session.begin(Role.DESTINATION, MIGRATION), InvalidState, Busy)
    second = await bench.another()
    await expect_error("begin in another session", second.begin(Role.SOURCE, "another"), Busy)
    await expect_error("stop in another session", second.stop(), Busy)
    await second.aclose()
    status = await bench.expect_state(_RUNNING)
    expect(status.migration_id == MIGRATION, f"the migration is now {status.migration_id!r}")


@CHECKS.add("begin-nameless", "a migration needs a name", "stop_copy")
async def _(bench: Bench) -> None:
    await expect_error("begin without a name", bench.session.begin(Role.SOURCE, ""), InvalidArgument)


@CHECKS.add("end", "end leaves the migration and the state of the function, and may be repeated", "stop_copy")
async def _(bench: Bench) -> None:
    await bench.session.begin(Role.SOURCE, MIGRATION)
    await bench.session.stop()
    for outcome in (Outcome.CANCELLED, Outcome.CANCELLED):
        await bench.session.end(outcome)
        status = await bench.expect_state(_STOPPED)
        expect(status.role is None and not status.migration_id, f"status still shows {status}")


@CHECKS.add("abort-idle", "abort changes nothing when nothing is being saved or loaded, and may be repeated")
async def _(bench: Bench) -> None:
    for _ in range(2):
        await bench.session.abort()
        await bench.expect_state(_RUNNING)


@CHECKS.add("two-sessions", "two sessions see the same function, and closing one leaves it as it is")
async def _(bench: Bench) -> None:
    second = await bench.another()
    await bench.session.stop()
    state = (await second.status()).state
    expect(state is _STOPPED, f"the second session sees {state.value}")
    await second.aclose()
    await bench.expect_state(_STOPPED)


@CHECKS.add(
    "survives-connection", "a stopped function stays stopped when its connection ends, and can continue", "status_query"
)
async def _(bench: Bench) -> None:
    async with bench.new_connection() as other:
        if bench.caps.stop_copy:
            await other.begin(Role.SOURCE, MIGRATION)
        await other.stop()
    status = await bench.expect_state(_STOPPED)
    if bench.caps.stop_copy:
        gone = bench.caps.takeover and status.migration_id != MIGRATION
        expect(not gone, "the migration ended with its connection")
        await bench.session.begin(Role.SOURCE, MIGRATION)
        await bench.session.save(0, 4096, Phase.FINAL)
    await bench.session.resume()
    await bench.expect_state(_RUNNING)


@CHECKS.add(
    "takeover-other", "a stopped function whose session is gone cannot join another migration", "stop_copy", "takeover"
)
async def _(bench: Bench) -> None:
    async with bench.new_connection() as other:
        await other.begin(Role.SOURCE, MIGRATION)
        await other.stop()
    await expect_error("begin", bench.session.begin(Role.DESTINATION, "another"), InvalidState, Busy)
    await bench.expect_state(_STOPPED)


@CHECKS.add("reset-states", "reset makes it RUNNING from every state, in no migration, with no log", "reset")
async def _(bench: Bench) -> None:
    async def loading() -> None:
        await bench.begin(Role.DESTINATION)
        await bench.session.load_begin(None)

    ways = [bench.session.quiesce, bench.session.stop, *([loading] if bench.caps.stop_copy else [])]
    for way in ways:
        await way()
        if bench.caps.dirty:
            await bench.session.dirty_start([Range(0, 1 << 20)], bench.caps.page_sizes[0])
        await bench.session.reset()
        status = await bench.expect_state(_RUNNING)
        expect(status.role is None and not status.dirty_active, f"after reset, status shows {status}")


@CHECKS.add("cancelled-call", "after a cancelled call the session still works, and the function is not in ERROR")
async def _(bench: Bench) -> None:
    for delay in (0.0, 0.001):
        with trio.move_on_after(delay):
            await bench.session.stop()
        await bench.expect_state(_RUNNING, AgentState.QUIESCED, _STOPPED)
        await bench.session.resume()
        await bench.expect_state(_RUNNING)


@CHECKS.add("concurrent-status", "many calls at once all get an answer")
async def _(bench: Bench) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(bench.session.status)


def _unsupported(caps: Capabilities, bench: Bench) -> list[tuple[str, AsyncCall]]:
    session = bench.session
    rows: list[tuple[bool, str, AsyncCall]] = [
        (caps.stop_copy, "begin", lambda: session.begin(Role.SOURCE, MIGRATION)),
        (caps.dirty, "dirty_start", lambda: session.dirty_start([Range(0, 1 << 20)], 4096)),
        (caps.reset, "reset", session.reset),
    ]
    return [(name, call) for claimed, name, call in rows if not claimed]


@CHECKS.add("unsupported", "calls that the capabilities exclude raise Unsupported")
async def _(bench: Bench) -> None:
    for name, call in _unsupported(bench.caps, bench):
        await expect_error(name, call(), Unsupported)
    if bench.caps.stop_copy and not bench.caps.precopy:
        await bench.session.begin(Role.SOURCE, MIGRATION)
        await expect_error("save(PRECOPY)", bench.session.save(0, 4096, Phase.PRECOPY), Unsupported)


@CHECKS.add("events", "a function can be watched while calls are made, or watch says Unsupported")
async def _(bench: Bench) -> None:
    try:
        async with bench.session.watch():
            await bench.session.stop()
    except Unsupported:
        return
    except AgentError as error:
        raise CheckFailed(f"watch raised {type(error).__name__}: {error}") from error
    await bench.expect_state(_STOPPED)
