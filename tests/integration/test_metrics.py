"""What a running daemon measures, and who gets it: by the control socket, and by HTTP on a socket of its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import trio
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from daemonkit import function, serving
from migrationkit import until
from rawclient import attached
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import DaemonConfig
from vfiouser_oob.control.metrics_http import serve_metrics
from vfiouser_oob.observability import openmetrics
from vfiouser_oob.server import daemon as daemon_module
from vfiouser_oob.server.daemon import Daemon, run_daemon


async def scrape(path: Path) -> dict[tuple[str, ...], float]:
    """Everything that a scraper reads: value by name and values of labels, in the order of the labels' names."""
    stream = await trio.open_unix_socket(path)
    async with stream:
        await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b"".join([part async for part in stream])
    body = answer.partition(b"\r\n\r\n")[2].decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body)  # type: ignore[no-untyped-call]
        for sample in family.samples
    }


def counted(daemon: Daemon, start: int) -> bool:
    """Whether the start of the daemon was counted."""
    return daemon.metrics()["starts"] == start


async def test_scrape(tmp_path: Path) -> None:
    """A socket of the daemon's own: what a client does is in the figures of its function."""
    path = tmp_path / "metrics.sock"
    config = DaemonConfig(
        functions=(function(tmp_path, "f0"), function(tmp_path, "f1")),
        metrics_socket=path,
        state_directory=tmp_path / "state",
    )
    for start in (1, 2):
        async with trio.open_nursery() as nursery:
            daemon: Daemon = await nursery.start(partial(run_daemon, config, metrics=serve_metrics))
            async with attached(tmp_path / "f0.sock") as client:
                for _ in range(7):
                    await client.read32(0, 0)
                await until(partial(counted, daemon, start), 20)
                found = await scrape(path)
            assert start == found["vfiouser_oob_starts_total",]
            assert (1, 0) == tuple(found["vfiouser_oob_client_connected", name] for name in ("f0", "f1"))
            assert 7 == found["vfiouser_oob_request_duration_seconds_count", "REGION_READ", "f0"]
            assert 0 < found["vfiouser_oob_request_duration_seconds_sum", "REGION_READ", "f0"] < 60
            nursery.cancel_scope.cancel()
    assert not path.exists()


async def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metrics socket that cannot be served is refused at the start, with what to install."""
    monkeypatch.setattr(daemon_module, "available", lambda: False)
    config = DaemonConfig(functions=(function(tmp_path, "f0"),), metrics_socket=tmp_path / "m.sock")
    with pytest.raises(ConfigError, match=r"vfiouser-oob\[metrics\]"):
        await run_daemon(config, metrics=serve_metrics)


async def test_what_is_measured(tmp_path: Path) -> None:
    """What the control socket gives can be rendered by whoever asked."""
    async with serving(function(tmp_path, "f0")) as daemon, attached(tmp_path / "f0.sock") as client:
        assert isinstance(daemon, Daemon)
        await client.dma_map(0, 4096)
        measured = daemon.metrics()
        (shown,) = measured["functions"]
        assert (1, 4096, 0) == (shown["maps"], shown["mapped_bytes"], shown["mapped_files"])
        assert b"vfiouser_oob_dma_mapped_bytes" in openmetrics.render(measured)
