"""The measurement of adapters: each protocol that is installed has a figure for each way."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import pytest

from vfiouser_agents.rpc.protocols import PROTOCOLS
from vfiouser_oob.lab.bench.adapters import measure_adapters, usable_protocols


async def test_every_protocol_has_its_figures() -> None:
    """Saving and loading by each protocol, beside the plain copy."""
    with tempfile.TemporaryDirectory(prefix="vt-") as place:
        results = await measure_adapters(Path(place, "adapters"), 1 << 20, 1, lambda line: None)
    expected = {f"adapter {protocol}, {way}" for protocol in PROTOCOLS for way in ("save", "load")}
    # What sends state as it is has no encoding.
    expected |= {f"adapter {protocol}, encoding alone" for protocol in PROTOCOLS if protocol != "legacy-tcp"}
    assert expected == {result.name for result in results}
    assert all(result.value > 0 for result in results)
    assert all(("encoding" in result.name) == (result.baseline_name != "copy") for result in results)


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without grpcio there is no figure for gRPC, and the rest is measured."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert set(PROTOCOLS) - {"grpc"} == set(usable_protocols())
