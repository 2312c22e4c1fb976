"""`GET /metrics`: what a scraper gets, and what a hostile client does not get."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest
import trio
import trio.testing

from vfiouser_oob.control import metrics_http
from vfiouser_oob.control.metrics_http import CONNECTIONS_MAX, HEAD_MAX, MetricsServer
from vfiouser_oob.observability.measured import Measured
from vfiouser_oob.observability.status import StatusProvider

MEASURED: Measured = {
    "version": "1",
    "python": "3.11.7",
    "kernel": "6.1",
    "started_s": 0.0,
    "starts": None,
    "functions": [],
    "certificates": {},
}


class Measuring:
    """A provider that counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def metrics(self) -> Measured:
        """Nothing much."""
        self.asked += 1
        return MEASURED


@asynccontextmanager
async def scraped(family: socket.AddressFamily = socket.AF_INET) -> AsyncIterator[tuple[Measuring, str, int]]:
    """A server on a port of this host."""
    provider = Measuring()
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.bind(("127.0.0.1", 0))
    sock.listen(64)
    host, port = sock.getsockname()
    async with trio.open_nursery() as nursery:
        await nursery.start(MetricsServer(cast("StatusProvider", provider)).serve, sock)
        yield provider, host, port
        nursery.cancel_scope.cancel()


async def say(host: str, port: int, data: bytes) -> bytes:
    """Send something and take the whole answer."""
    async with await trio.open_tcp_stream(host, port) as stream:
        with trio.fail_after(20):
            try:
                await stream.send_all(data)
                return b"".join([part async for part in stream])
            except trio.BrokenResourceError:
                return b""


async def test_a_scrape() -> None:
    """A GET gets OpenMetrics and its type; a second one within a second gets the same without measuring again."""
    async with scraped() as (provider, host, port):
        for _ in range(3):
            answer = await say(host, port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert b"application/openmetrics-text" in head
        assert body.endswith(b"# EOF\n")
        assert f"content-length: {len(body)}".encode() in head
        assert 1 == provider.asked


async def test_an_old_scraper_and_a_head() -> None:
    """HTTP/1.0 is understood; HEAD gets the head only."""
    async with scraped() as (_, host, port):
        assert b"# EOF" in await say(host, port, b"GET /metrics?a=b HTTP/1.0\r\n\r\n")
        answer = await say(host, port, b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" in answer
        assert b"# EOF" not in answer


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (b"GET /metrics/../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", b"405"),
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 2 * HEAD_MAX + b" HTTP/1.1\r\n", b"4"),
        (b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 2 * HEAD_MAX, b"4"),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
    ],
    ids=["root", "dots", "post", "no host", "tls", "long line", "many headers", "negative"],
)
async def test_what_is_refused(data: bytes, status: bytes) -> None:
    """Everything else gets an error, or the end of the connection; nothing is measured, and the next scrape works."""
    async with scraped() as (provider, host, port):
        answer = await say(host, port, data)
        assert not answer or answer.startswith(b"HTTP/1.1 " + status)
        assert 0 == provider.asked
        assert b"# EOF" in await say(host, port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")


async def test_silent_clients_keep_nobody_out_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as may connect say nothing, byte by byte or at all: their time is over, and the next one is served."""
    monkeypatch.setattr(metrics_http, "CONNECTION_S", 0.3)
    async with scraped() as (_, host, port):
        silent = [await trio.open_tcp_stream(host, port) for _ in range(2 * CONNECTIONS_MAX)]
        await silent[0].send_all(b"GET /met")
        assert b"# EOF" in await say(host, port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        for stream in silent:
            await stream.aclose()
