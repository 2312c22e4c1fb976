"""Whether P2P is offered: chosen, or by what the device can reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfiouser_oob.config import parse_config
from vfiouser_oob.config.p2p import p2p_offer, settled
from vfiouser_oob.config.schema import P2p
from vfiouser_oob.config.summary import summary

TEXT = """\
[[function]]
name = "f0"
socket = "/nowhere/f0.sock"
device = {{ {device} }}
agent = {{ kind = "msgpack-rpc", address = "tcp://127.0.0.1:1", function = "f0" }}
{migration}
"""
DEVICES = {
    'kind = "kernel-vfio", bdf = "0000:3b:00.2"': True,
    'kind = "model", model = "nvme", size = "64M"': False,
    'kind = "vfio-user", socket = "/nowhere/soc.sock"': False,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [("", None), ('p2p = "auto"', None), ('p2p = "on"', True), ('p2p = "off"', False)],
)
def test_what_is_offered(device: str, chosen: str, expected: bool | None) -> None:
    """By default a real function offers it and what does DMA by messages does not; what is chosen holds for all."""
    migration = f"migration = {{ {chosen} }}" if chosen else ""
    config = parse_config(TEXT.format(device=device, migration=migration), Path("c.toml"))
    (function,) = config.functions
    wanted = DEVICES[device] if expected is None else expected
    assert wanted is p2p_offer(function).offered
    assert settled(function).p2p is (P2p.ON if wanted else P2p.OFF)
    said = summary(config)[-1]
    assert f"{'with' if wanted else 'without'} P2P states: " in said
    assert (chosen[6:-1] in said) if expected is not None else ("peer's BAR" in said)
