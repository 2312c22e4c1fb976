"""What a daemon that serves one plain function has no use for is not in its memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: What `serve` imports before it serves; packages of adapters and of models come with those that are configured.
_SERVE = """
import sys
import vfiouser_oob.cli.main
import vfiouser_oob.cli.serve
import vfiouser_oob.control.metrics_http
import vfiouser_oob.control.server
import vfiouser_oob.server.daemon
import vfiouser_oob.vm.kind
print(*sys.modules)
"""
#: What is imported at need, by what needs it.
_AT_NEED = {
    "asyncio": "the adapter for gRPC",
    "google": "the adapter for gRPC",
    "grpc": "the adapter for gRPC",
    "http": "nothing of the daemon",
    "jeepney": "the carrier dbus-vmstate",
    "jsonschema": "nothing of the daemon",
    "multiprocessing": "nothing of the daemon",
    "rich": "what shows tables to people",
    "vfiouser_conformance": "the command conformance",
    "vfiouser_oob.keeper": "the command keep",
    "vfiouser_oob.lab": "the commands demo and bench",
    "vfiouser_oob.migration.port": "a function with an agent",
    "vfiouser_oob.migration.runner": "a function with an agent",
    "vfiouser_oob.vm.carriers": "a VM",
    "vfiouser_oob.vm.hosting": "a VM",
    "vfiouser_oob.vm.runner": "a VM",
    "vfiouser_soc": "the model nvme, and the command simulate-soc",
    "xml": "a machine's XML, as libvirt has it",
}


@pytest.fixture(scope="module")
def imported() -> frozenset[str]:
    """The modules of a daemon with one function, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _SERVE], capture_output=True, text=True, check=True)
    return frozenset(done.stdout.split())


@pytest.mark.parametrize("name", _AT_NEED)
def test_a_plain_daemon_does_without(name: str, imported: frozenset[str]) -> None:
    """A module that only some daemons need is imported by what needs it."""
    assert name not in imported, f"only {_AT_NEED[name]} needs {name}; import it there, when it is needed"
