"""Method maps: what is wrong with one is said when it is read, with the key that is wrong."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from vfiouser_agents.adapters.jsonrpc import JsonRpcAgent, MappedAgent
from vfiouser_agents.adapters.jsonrpc_map import MAPPABLE, read_map
from vfiouser_agents.adapters.jsonrpc_presets import PRESETS
from vfiouser_agents.api import AgentState
from vfiouser_agents.options import OptionError
from vfiouser_agents.registry import make_agent
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.load import parse_config

STATE = {"path": "/tmp/$function", "fetch": ["cat", "$path"], "store": ["tee", "$path"]}
GOOD: dict[str, Any] = {
    "methods": {
        "stop": "suspend",
        "resume": {"method": "resume", "params": {"name": "$function", "cost": "$$5", "n": 3, "none": None}},
        "save": {"method": "save", "params": {"file": "$path"}},
        "load": {"method": "load", "params": {"file": "$path"}},
    },
    "state": STATE,
    "functions": ["f"],
    "descriptor": {"format_id": "x"},
}


def test_a_good_map() -> None:
    """Variables are filled in, constants stay, and `$$` is a plain dollar."""
    found = read_map(GOOD)
    expected = {"name": "f0", "cost": "$5", "n": 3, "none": None}
    assert expected == found.methods["resume"].arguments({"function": "f0"})
    assert {} == found.methods["stop"].arguments({"function": "f0"})
    assert (True, False, False) == (found.caps.stop_copy, found.caps.p2p, found.caps.reset)
    assert ("x",) == found.caps.formats


def test_variables_without_a_value_are_left_out() -> None:
    """A parameter whose variable has no value, such as a role before a migration, is not sent."""
    options = deepcopy(GOOD)
    options["methods"]["stop"] = {"method": "suspend", "params": {"as": "$role", "deep": {"list": ["$function"]}}}
    found = read_map(options).methods["stop"].arguments({"function": "f", "role": None})
    assert {"deep": {"list": ["f"]}} == found


def test_without_save_nothing_can_be_migrated() -> None:
    """Suspend and resume alone are a function that is not migratable."""
    found = read_map({"methods": {"stop": "suspend", "resume": "resume"}, "functions": ["f"]})
    assert not found.caps.stop_copy
    assert () == found.caps.formats


def test_states_default_to_our_own_words() -> None:
    """Without `states`, the vendor's words are ours."""
    options = deepcopy(GOOD)
    options["methods"]["status"] = {"method": "get", "result": {"state": ""}}
    assert AgentState.QUIESCED is read_map(options).methods["status"].states["quiesced"]


#: Path of a key to replace, its new value (None = remove it), and what the error begins with and has in it.
WRONG: list[tuple[str, Any, str, str]] = [
    ("methods.stpo", "x", "methods.stpo:", "did you mean 'stop'"),
    ("methods.stop", None, "methods.stop:", "missing"),
    ("methods.stop", 5, "methods.stop:", "must be a table"),
    ("methods.stop", {"params": {}}, "methods.stop.method:", "missing"),
    ("methods.stop", {"method": 5}, "methods.stop.method:", "must be text"),
    ("methods.stop", {"method": "x", "param": {}}, "methods.stop.param:", "no such key"),
    ("methods.stop", {"method": "x", "params": []}, "methods.stop.params:", "must be a table"),
    ("methods.stop", {"method": "x", "states": {}}, "methods.stop.states:", "no such key"),
    ("methods.resume.params.name", "$funktion", "methods.resume.params.name:", "did you mean '$function'"),
    ("methods.resume.params.deep", {"a": ["$offset"]}, "methods.resume.params.deep.a[0]:", "'$offset'"),
    ("methods.resume.params.when", object(), "methods.resume.params.when:", "cannot be sent"),
    ("methods.resume.result", {"state": "x"}, "methods.resume.result.state:", "no such result"),
    ("methods.status", "get", "methods.status.result.state:", "missing"),
    ("methods.status", {"method": "g", "result": {"state": 5}}, "methods.status.result.state:", "keys with dots"),
    (
        "methods.status",
        {"method": "g", "result": {"state": ""}, "states": {"up": "runing"}},
        "methods.status.states.up:",
        "did you mean 'running'",
    ),
    ("methods.load", None, "state:", "$path"),
    ("methods.save.params", {"n": "$limit"}, "state:", "$path"),
    ("state", None, "state.path:", "missing"),
    ("state.path", "relative", "state.path:", "absolute"),
    ("state.path", "/tmp/$path", "state.path:", "$function"),
    ("state.fetch", None, "state.fetch:", "missing"),
    ("state.store", "tee $path", "state.store:", "list of words"),
    ("state.store", ["tee"], "state.store:", "$path"),
    ("state.move", ["mv", "$path"], "state.move:", "no such key"),
    ("methods.dirty_start", {"method": "on", "params": {"r": "$ranges"}}, "methods.dirty_report:", "missing"),
    ("methods.check", "check", "methods.check.params:", "$descriptor"),
    ("functions", "f", "functions:", "list of names"),
    ("functions", None, "functions:", "missing"),
    ("caps.max_stat", 5, "caps:", "did you mean 'max_state'"),
    ("caps.max_state", -5, "caps:", "max_state must be"),
    ("caps.precopy", True, "caps.precopy:", "in pieces"),
    ("caps.reset", True, "caps:", "'reset'"),
    ("descriptor", None, "descriptor.format_id:", "missing"),
    ("descriptor.vender", "x", "descriptor:", "did you mean 'vendor'"),
    ("descriptor.fingerprint", {"queues": 8}, "descriptor:", "table of text"),
    ("preset", "snap4", "preset:", "snap3-virtio-blk"),
]


@pytest.mark.parametrize(("path", "value", "begins", "says"), WRONG, ids=[row[0] + " " + row[3] for row in WRONG])
def test_errors_name_the_key(path: str, value: Any, begins: str, says: str) -> None:
    """Each mistake is found when the map is read; the message begins with its key and says what would do."""
    options = deepcopy(GOOD)
    *above, last = path.split(".")
    table = options
    for key in above:
        table = table.setdefault(key, {})
    if value is None:
        table.pop(last)
    else:
        table[last] = value
    with pytest.raises(OptionError) as caught:
        read_map(options)
    assert str(caught.value).startswith(begins)
    assert says in str(caught.value)


def test_pieces_need_their_variables() -> None:
    """Without a file, save needs a limit and gives data and eof, and load takes data."""
    options = deepcopy(GOOD)
    del options["state"]
    save = {"method": "s", "params": {"n": "$limit"}, "result": {"data": "d", "eof": "e"}}
    load = {"method": "l", "params": {"d": "$data"}}
    options["methods"] |= {"save": save, "load": load}
    assert read_map(options).caps.stop_copy
    for name, part, key in [("save", "params", "params"), ("save", "result", "result.data"), ("load", "params", "p")]:
        broken = deepcopy(options)
        broken["methods"][name][part] = {}
        with pytest.raises(OptionError, match=rf"^methods.{name}.{key}"):
            read_map(broken)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_need_only_what_is_the_users_to_say(name: str) -> None:
    """A preset with the commands that move the file is complete; each method can be left out or replaced."""
    options = {"preset": name, "state": {"fetch": ["cat", "$path"], "store": ["tee", "$path"]}}
    found = read_map(options)
    assert found.caps.stop_copy
    assert set(found.methods) <= set(MAPPABLE)
    without = read_map({**options, "methods": {"functions": False, "resume": "other"}, "functions": ["f"]})
    assert "functions" not in without.methods
    assert "other" == without.methods["resume"].method
    with pytest.raises(OptionError, match=r"state\.fetch: missing"):
        read_map({"preset": name})


def test_which_agent_is_made() -> None:
    """A map makes an agent with the vendor's methods; options of one sort are not of the other."""
    address = {"address": "unix:///run/a.sock"}
    assert isinstance(make_agent("jsonrpc", address), JsonRpcAgent)
    assert isinstance(make_agent("jsonrpc", {**address, **GOOD}), MappedAgent)
    for options, says in [
        ({}, "'address' is missing"),
        ({**address, "functions": ["f"]}, "functions: only for a method map"),
        ({**address, **GOOD, "chunk_size": 5000}, "unknown option 'chunk_size'"),
        ({**address, "chunk_size": "256K"}, "chunk_size"),
        ({"address": "tcp://192.0.2.1:7", **GOOD}, "without TLS"),
        ({**address, **GOOD, "tls": {"ca": "x"}}, "tls does not apply"),
    ]:
        with pytest.raises(OptionError, match=says):
            make_agent("jsonrpc", options)


CONFIGURATION = """
[[function]]
name = "nvme0"
socket = "/run/nvme0.sock"
device = { kind = "vfio-user", socket = "/run/soc/f0.sock" }

[function.agent]
kind = "jsonrpc"
address = "unix:///run/agent.sock"
function = "f0"
functions = ["f0"]

[function.agent.methods]
stop = { method = "pause", params = { id = "$funktion" } }
resume = "run"
"""


def test_errors_name_the_line() -> None:
    """In a configuration file, the error is at the line of the key that is wrong, or of what is around it."""
    for text, line in [
        (CONFIGURATION, 14),
        (CONFIGURATION.replace("$funktion", "$function").replace('resume = "run"', "resume = 5"), 15),
        (CONFIGURATION.replace("$funktion", "$function").replace('resume = "run"', ""), 13),
        (CONFIGURATION.replace("$funktion", "$function").replace('["f0"]', '"f0"'), 11),
    ]:
        with pytest.raises(ConfigError) as caught:
            parse_config(text, Path("c.toml"))
        assert f"c.toml:{line}: " in str(caught.value)
