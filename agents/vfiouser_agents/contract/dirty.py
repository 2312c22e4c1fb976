"""Checks of the dirty log."""

from __future__ import annotations

from vfiouser_agents.answers import check_report
from vfiouser_agents.api import Range
from vfiouser_agents.errors import InvalidArgument, InvalidState, NoResources

from .bench import Bench, CheckTable, broken_rules, expect, expect_error

CHECKS = CheckTable()
_PAGES = 64


async def _start(bench: Bench) -> tuple[int, int]:
    wanted = bench.caps.page_sizes[0]
    length = _PAGES * bench.caps.page_sizes[-1]
    page_size = await bench.session.dirty_start([Range(0, length)], wanted)
    expect(page_size in bench.caps.page_sizes, f"page size {page_size} is not among {list(bench.caps.page_sizes)}")
    return page_size, length


@CHECKS.add("dirty", "the log starts, reports in the size asked for, and stops, also twice", "dirty")
async def _(bench: Bench) -> None:
    page_size, length = await _start(bench)
    status = await bench.session.status()
    expect(status.dirty_active, "status does not show that dirty pages are logged")
    report = await bench.session.dirty_report(0, length)
    with broken_rules():
        check_report(report, 0, length, page_size)
    for _ in range(2):
        await bench.session.dirty_stop()
        status = await bench.session.status()
        expect(not status.dirty_active, "status shows that dirty pages are still logged")


@CHECKS.add("dirty-clears", "no page is reported twice, and a stopped function adds none", "dirty")
async def _(bench: Bench) -> None:
    _, length = await _start(bench)
    await bench.session.stop()
    report = await bench.session.dirty_report(0, length)
    while report.more:
        report = await bench.session.dirty_report(0, length)
    report = await bench.session.dirty_report(0, length)
    expect(not report.ranges and not any(report.bitmap or b""), "pages are reported twice, or written when stopped")
    expect(report.final, "the function is stopped, but the report does not say that it is final")


@CHECKS.add("dirty-twice", "the log cannot be started twice", "dirty")
async def _(bench: Bench) -> None:
    await _start(bench)
    again = bench.session.dirty_start([Range(0, 1 << 30)], bench.caps.page_sizes[0])
    await expect_error("a second dirty_start", again, InvalidState)


@CHECKS.add("dirty-off", "a report needs a log", "dirty")
async def _(bench: Bench) -> None:
    await expect_error("dirty_report", bench.session.dirty_report(0, bench.caps.page_sizes[-1]), InvalidState)


@CHECKS.add("dirty-arguments", "invalid page sizes, ranges and reports are refused", "dirty")
async def _(bench: Bench) -> None:
    size = bench.caps.page_sizes[0]
    session = bench.session
    await expect_error("a page size of 3000", session.dirty_start([Range(0, 1 << 20)], 3000), InvalidArgument)
    await expect_error("an empty range", session.dirty_start([Range(0, 0)], size), InvalidArgument)
    ranges = [Range(index << 30, 1 << 20) for index in range(min(bench.caps.max_ranges + 1, 2048))]
    if len(ranges) > bench.caps.max_ranges:
        await expect_error(f"{len(ranges)} ranges", session.dirty_start(ranges, size), NoResources)
    page_size, length = await _start(bench)
    await expect_error("a report of half a page", session.dirty_report(0, page_size // 2), InvalidArgument)
    away = session.dirty_report(length * 16, page_size)
    await expect_error("a report outside the ranges", away, InvalidArgument)
