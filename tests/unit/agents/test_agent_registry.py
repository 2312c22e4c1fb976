"""Adapters by kind: ours, other people's, those that are not there; and the short form on a command line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from vfiouser_agents import registry
from vfiouser_agents.adapters.msgpack_rpc import MsgpackRpcAgent
from vfiouser_agents.options import OptionError

ROOT = Path(__file__).resolve().parents[3]


THEIRS = """
from vfiouser_agents.memory import MemoryAgent

class TheirAgent(MemoryAgent):
    @classmethod
    def from_options(cls, options):
        return cls()
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution of somebody else's, with a good adapter, a bad one, and one that takes our name."""
    metadata = tmp_path / "acme-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[vfiouser_oob.agents]\nacme = acme_agent:TheirAgent\nbad = no_such_module:Agent\nmsgpack-rpc = x:y\n"
    )
    (tmp_path / "acme_agent.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_the_table_is_what_is_installed() -> None:
    """The entry points that the distribution registers are those of the table for source trees."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert dict(registry.BUILT_IN) == project["entry-points"][registry.GROUP]


def test_ours() -> None:
    """Our own kind is made, with its options."""
    agent = registry.make_agent("msgpack-rpc", {"address": "unix:///run/agent.sock"})
    assert isinstance(agent, MsgpackRpcAgent)
    assert "unix:///run/agent.sock" == str(agent.address)


def test_unknown_kind() -> None:
    """The error lists what there is, and guesses what was meant."""
    with pytest.raises(OptionError, match=r"did you mean 'msgpack-rpc'\? \(allowed: .*msgpack-rpc"):
        registry.make_agent("msgpack_rpc", {})


@pytest.mark.usefixtures("installed")
def test_somebody_elses() -> None:
    """An installed adapter is found; one that cannot be loaded says why; ours cannot be replaced."""
    assert "TheirAgent" == type(registry.make_agent("acme", {})).__name__
    with pytest.raises(OptionError, match=r"'bad' .* cannot be loaded: No module named 'no_such_module'"):
        registry.make_agent("bad", {})
    assert isinstance(registry.make_agent("msgpack-rpc", {"address": "unix:///x"}), MsgpackRpcAgent)


@pytest.mark.parametrize(
    ("text", "kind", "options"),
    [
        ("msgpack-rpc:unix:///run/a.sock", "msgpack-rpc", {"address": "unix:///run/a.sock"}),
        ("k:tls://h:1,function=f,tls.ca=a,tls.key=b", "k", {
            "address": "tls://h:1", "function": "f", "tls": {"ca": "a", "key": "b"}
        }),
        ("k:unix:///a,,b,x=1,,2", "k", {"address": "unix:///a,b", "x": "1,2"}),
        ("k:x=1", "k", {"x": "1"}),
        ("k:", "k", {}),
    ],
)  # fmt: skip
def test_short_form(text: str, kind: str, options: dict[str, Any]) -> None:
    """The short form becomes what the table of a configuration would be."""
    assert (kind, options) == registry.parse_agent(text)


@pytest.mark.parametrize(
    "text", ["", "k", ":x", "k:a,b", "k:a,=b", "k:a,x=1,x=2", "k:a,tls=1,tls.ca=2", "k:a,t.x=1,t.x=2"]
)
def test_short_forms_that_cannot_be_used(text: str) -> None:
    """A short form that is none is refused rather than guessed at."""
    with pytest.raises(OptionError):
        registry.parse_agent(text)
