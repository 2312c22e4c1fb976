"""The contract of an agent, kept by the simulated functions: in the process, and through the reference protocol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from nvmebed import machine, make_function
from nvmebed.machine import FunctionOptions
from nvmebed.moving import agent_function
from vfiouser_agents.adapters.msgpack_rpc import MsgpackRpcAgent
from vfiouser_agents.api import Agent, AgentState
from vfiouser_agents.rpc.endpoint import open_listeners, parse_address
from vfiouser_agents.rpc.server import serve_agent
from vfiouser_agents.testing import CheckOutcome, check_agent
from vfiouser_soc.agent.session import NvmeAgent

KINDS = pytest.mark.parametrize(
    ("options", "state_size"),
    [({}, 0), ({"polled": True, "cmb_size": 2 << 20}, 0), ({}, 3 << 20)],
    ids=["plain", "shared memory", "state memory"],
)


async def _failures(factory: Callable[[], Agent]) -> dict[str, str]:
    results = await check_agent(factory, function_id="f0")
    passed = [result.name for result in results if result.outcome is CheckOutcome.PASSED]
    assert len(passed) > len(results) // 2
    return {result.name: result.detail for result in results if result.outcome is not CheckOutcome.PASSED}


@KINDS
async def test_contract_in_the_process(options: FunctionOptions, state_size: int) -> None:
    """Every check applies and passes; the function runs afterwards."""
    async with machine(make_function(**options)) as bed:
        function = agent_function(bed.function, state_size=state_size, churn=state_size)
        assert {} == await _failures(lambda: NvmeAgent([function]))
        assert AgentState.RUNNING is function.state


@KINDS
async def test_contract_through_the_reference_protocol(
    options: FunctionOptions, state_size: int, tmp_path: Path
) -> None:
    """The same through msgpack-RPC over a UNIX socket."""
    address = parse_address(f"unix://{tmp_path}/agent.sock")
    async with machine(make_function(**options)) as bed, trio.open_nursery() as nursery:
        function = agent_function(bed.function, state_size=state_size, churn=state_size)
        await nursery.start(serve_agent, NvmeAgent([function]), await open_listeners(address))
        assert {} == await _failures(lambda: MsgpackRpcAgent(address))
        nursery.cancel_scope.cancel()
