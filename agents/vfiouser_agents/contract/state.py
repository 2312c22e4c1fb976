"""Checks of saving and loading."""

from __future__ import annotations

from xxhash import xxh3_128_digest

from vfiouser_agents.api import AgentState, Outcome, Phase, Role
from vfiouser_agents.errors import CorruptState, InvalidArgument, InvalidState, NoResources

from .bench import Bench, CheckTable, expect, expect_error

CHECKS = CheckTable()
FINAL, PRECOPY = Phase.FINAL, Phase.PRECOPY


@CHECKS.add("save-role", "save needs a source", "stop_copy")
async def _(bench: Bench) -> None:
    await bench.session.stop()
    await expect_error("save in no migration", bench.session.save(0, 4096, FINAL), InvalidState)
    await bench.begin(Role.DESTINATION)
    await expect_error("save on a destination", bench.session.save(0, 4096, FINAL), InvalidState)


@CHECKS.add("save-running", "save(FINAL) needs a function that is stopped", "stop_copy")
async def _(bench: Bench) -> None:
    await bench.begin(Role.SOURCE)
    await expect_error("save(FINAL) while running", bench.session.save(0, 4096, FINAL), InvalidState)


@CHECKS.add("save-precopy-stopped", "save(PRECOPY) needs a function that is not stopped", "stop_copy", "precopy")
async def _(bench: Bench) -> None:
    await bench.begin(Role.SOURCE)
    await bench.session.stop()
    await expect_error("save(PRECOPY) while stopped", bench.session.save(0, 4096, PRECOPY), InvalidState)


@CHECKS.add("save-arguments", "save of nothing is refused", "stop_copy")
async def _(bench: Bench) -> None:
    await bench.begin(Role.SOURCE)
    await bench.session.stop()
    await expect_error("save of 0 bytes", bench.session.save(0, 0, FINAL), InvalidArgument)


@CHECKS.add("save-repeat", "the last chunk can be asked for again, whole or in part, and is the same", "stop_copy")
async def _(bench: Bench) -> None:
    await bench.begin(Role.SOURCE)
    await bench.session.stop()
    first = await bench.session.save(0, 100, FINAL)
    expect(first == await bench.session.save(0, 100, FINAL), "the chunk at 0 differs when asked for again")
    second = await bench.session.save(len(first.data), 100, FINAL)
    again = await bench.session.save(len(first.data), 100, FINAL)
    expect(second == again, "the second chunk differs when asked for again")
    part = await bench.session.save(len(first.data), 7, FINAL)
    expect(
        bytes(second.data).startswith(bytes(part.data)) and len(part.data) <= 7,
        "a part of the last chunk is not a part of it",
    )


@CHECKS.add("save-gap", "an offset beyond the next one is refused", "stop_copy")
async def _(bench: Bench) -> None:
    await bench.begin(Role.SOURCE)
    await bench.session.stop()
    first = await bench.session.save(0, 100, FINAL)
    await expect_error("save behind a gap", bench.session.save(len(first.data) + 1, 100, FINAL), InvalidArgument)
    await bench.session.save(len(first.data), 100, FINAL)


@CHECKS.add("save-constant", "a stopped function gives the same state again, in chunks of any size", "stop_copy")
async def _(bench: Bench) -> None:
    await bench.begin(Role.SOURCE)
    await bench.session.stop()
    one = await bench.pull(bench.caps.max_chunk, FINAL)
    await bench.session.abort()
    two = await bench.pull(bench.caps.max_chunk, FINAL)
    expect(len(one) == len(two), f"the state of a stopped function had {len(one)} bytes, then {len(two)}")
    expect(one == two, "the state of a stopped function changed")
    await bench.session.abort()
    odd = await bench.pull(max(1, min(len(one) // 9 - 1, 65537)), FINAL)
    expect(odd == one, "the state differs when it is asked for in small chunks")
    end = await bench.session.save(len(odd), 4096, FINAL)
    expect(end.eof and not end.data, "after the end, save must give nothing, with eof")


@CHECKS.add("estimate", "an exact estimate is exact, and no estimate exceeds max_state", "stop_copy")
async def _(bench: Bench) -> None:
    await bench.begin(Role.SOURCE)
    await bench.session.stop()
    estimate = await bench.session.estimate()
    expect(estimate.stop_copy_bytes <= bench.caps.max_state, f"{estimate} is above max_state {bench.caps.max_state}")
    stream = await bench.pull(bench.caps.max_chunk, FINAL)
    exact = not estimate.exact or estimate.stop_copy_bytes == len(stream)
    expect(exact, f"{estimate.stop_copy_bytes} bytes were estimated as exact; {len(stream)} came")


@CHECKS.add("resume-after-save", "a source that was saved in part can continue", "stop_copy")
async def _(bench: Bench) -> None:
    await bench.begin(Role.SOURCE)
    await bench.session.stop()
    await bench.session.save(0, 100, FINAL)
    for _ in range(2):
        await bench.session.abort()
        await bench.expect_state(AgentState.STOPPED)
    await bench.session.resume()
    await bench.expect_state(AgentState.RUNNING)
    await bench.session.stop()
    await bench.session.save(0, 100, FINAL)


@CHECKS.add("round-trip", "a saved state can be loaded, in pieces of any size, and run", "stop_copy")
async def _(bench: Bench) -> None:
    stream = await bench.whole_state()
    for size in (bench.caps.max_chunk, min(bench.caps.max_chunk, 4099) - 1):
        await bench.begin(Role.DESTINATION)
        await bench.push(stream, size)
        await bench.expect_state(AgentState.LOADING)
        await bench.commit(stream)
        await bench.expect_state(AgentState.LOADED)
        await bench.session.end(Outcome.SUCCESS)
        await bench.expect_state(AgentState.LOADED)
        again = await bench.whole_state()
        expect(again == stream, "the function saves another state than the one that was loaded")
        await bench.session.resume()
        await bench.expect_state(AgentState.RUNNING)


@CHECKS.add("precopy", "a state saved in pre-copy and completed after the stop can be loaded", "stop_copy", "precopy")
async def _(bench: Bench) -> None:
    await bench.begin(Role.SOURCE)
    stream = await bench.pull(bench.caps.max_chunk, PRECOPY)
    await bench.expect_state(AgentState.RUNNING)
    await bench.session.quiesce()
    await bench.session.stop()
    stream += await bench.pull(bench.caps.max_chunk, FINAL, offset=len(stream))
    await bench.session.end(Outcome.SUCCESS)
    await bench.begin(Role.DESTINATION)
    await bench.push(stream, bench.caps.max_chunk)
    await bench.commit(stream)
    await bench.expect_state(AgentState.LOADED)


@CHECKS.add("precopy-cancel", "pre-copy can be given up and begun again", "stop_copy", "precopy")
async def _(bench: Bench) -> None:
    for _ in range(2):
        await bench.begin(Role.SOURCE)
        await bench.session.save(0, 4096, PRECOPY)
        await bench.session.abort()
        await bench.session.end(Outcome.CANCELLED)
        await bench.expect_state(AgentState.RUNNING)


@CHECKS.add("load-role", "load_begin needs a destination that is stopped, and load a load_begin", "stop_copy")
async def _(bench: Bench) -> None:
    await expect_error("load_begin in no migration", bench.session.load_begin(None), InvalidState)
    await bench.session.begin(Role.DESTINATION, "agent-check")
    await expect_error("load_begin while running", bench.session.load_begin(None), InvalidState)
    await bench.session.stop()
    await expect_error("load before load_begin", bench.session.load(0, b"x"), InvalidState)
    await expect_error("commit before load_begin", bench.session.load_commit(0, bytes(16)), InvalidState)


@CHECKS.add("load-order", "a piece that does not follow is refused; the last one may come again", "stop_copy")
async def _(bench: Bench) -> None:
    stream = await bench.whole_state()
    await bench.begin(Role.DESTINATION)
    await bench.session.load_begin(None)
    half = min(len(stream) // 2, bench.caps.max_chunk)
    await bench.session.load(0, stream[:half])
    await expect_error("load behind a gap", bench.session.load(half + 1, stream[half + 1 : half + 2]), InvalidArgument)
    await bench.session.load(0, stream[:half])
    for offset in range(half, len(stream), bench.caps.max_chunk):
        await bench.session.load(offset, stream[offset : offset + bench.caps.max_chunk])
    await bench.commit(stream)
    await bench.expect_state(AgentState.LOADED)


@CHECKS.add("load-too-large", "a state larger than max_state is refused at once", "stop_copy")
async def _(bench: Bench) -> None:
    await bench.begin(Role.DESTINATION)
    await expect_error("load_begin", bench.session.load_begin(bench.caps.max_state + 1), NoResources)


async def _must_not_load(bench: Bench, what: str, stream: bytes, total: int, digest: bytes, good: bytes) -> None:
    await bench.begin(Role.DESTINATION)
    await bench.push(stream, bench.caps.max_chunk)
    await expect_error(f"commit of {what}", bench.session.load_commit(total, digest), CorruptState)
    await bench.expect_state(AgentState.LOADING, AgentState.STOPPED, AgentState.ERROR)
    if bench.caps.reset:
        await bench.session.reset()
        await bench.expect_state(AgentState.RUNNING)
    else:
        # Without a reset, another load is the only way out.
        await bench.push(good, bench.caps.max_chunk)
        await bench.commit(good)
        await bench.expect_state(AgentState.LOADED)


@CHECKS.add("commit-digest", "a state whose digest differs is refused", "stop_copy")
async def _(bench: Bench) -> None:
    stream = await bench.whole_state()
    await _must_not_load(bench, "a wrong digest", stream, len(stream), bytes(16), stream)


@CHECKS.add("commit-total", "a state whose length differs is refused", "stop_copy")
async def _(bench: Bench) -> None:
    stream = await bench.whole_state()
    digest = xxh3_128_digest(stream)
    await _must_not_load(bench, "a wrong total", stream, len(stream) + 1, digest, stream)


@CHECKS.add("commit-truncated", "half a state is refused, although its digest is right", "stop_copy", "verifies")
async def _(bench: Bench) -> None:
    stream = await bench.whole_state()
    half = stream[: (len(stream) - 1) // 2]
    await _must_not_load(bench, "half a state", half, len(half), xxh3_128_digest(half), stream)


@CHECKS.add(
    "commit-garbage", "bytes that are not a state are refused, even if their digest is right", "stop_copy", "verifies"
)
async def _(bench: Bench) -> None:
    stream = await bench.whole_state()
    garbage = xxh3_128_digest(b"garbage") * 16
    await _must_not_load(bench, "garbage", garbage, len(garbage), xxh3_128_digest(garbage), stream)


@CHECKS.add("load-abort", "an aborted load leaves it STOPPED, and it runs only after a reset", "stop_copy")
async def _(bench: Bench) -> None:
    stream = await bench.whole_state()
    await bench.begin(Role.DESTINATION)
    await bench.session.load_begin(None)
    await bench.session.load(0, stream[:100])
    await expect_error("resume while loading", bench.session.resume(), InvalidState)
    for _ in range(2):
        await bench.session.abort()
        await bench.expect_state(AgentState.STOPPED)
    await expect_error("resume after an aborted load", bench.session.resume(), InvalidState)
    await bench.session.load_begin(None)
    await bench.push(stream, bench.caps.max_chunk)
    await bench.commit(stream)
    await bench.session.resume()
    await bench.expect_state(AgentState.RUNNING)
