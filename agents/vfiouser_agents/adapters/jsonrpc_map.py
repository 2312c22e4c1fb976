"""The method map of the `jsonrpc` adapter: how a vendor's methods are to be called for what the interface asks.

    [function.agent]
    kind = "jsonrpc"
    functions = ["blk0"]
    methods.stop = { method = "suspend", params = { name = "$function", timeout_ms = 500 } }
    methods.status = { method = "get", params = { name = "$function" }, result = { state = "info.state" },
                       states = { active = "running", suspended = "stopped" } }
    state = { path = "/tmp/$function.state", fetch = ["ssh", "dpu", "cat", "$path"], store = [...] }
    caps = { max_state = "1M" }
    descriptor = { vendor = "…", model = "…", kind = "virtio-blk", format_id = "…" }

A parameter that begins with ``$`` is one of our variables, ``$$`` is a plain ``$``, and everything else is a constant.
`result` says where in the vendor's result one of our values is: keys with dots between them, or empty text for the
whole. Everything is checked when it is read, and errors name the key that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vfiouser_agents.api import AgentState, Capabilities, Descriptor
from vfiouser_agents.operations import Op, Operation
from vfiouser_agents.options import OptionError, hint, number, read_options, switch

from .descriptor_option import read_descriptor
from .jsonrpc_presets import PRESETS


@dataclass(frozen=True, slots=True)
class Mappable:
    """What may be said of one thing that can be mapped.

    Args:
        variables: what its parameters may name besides `function`; in `_ROWS` also besides the operation's arguments.
        required: variables that some parameter must carry.
        results: what is taken from the result; True = must be mapped.
    """

    variables: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    results: Mapping[str, bool] = field(default_factory=dict)


_ROWS: Mapping[Op[..., Any], Mappable] = {
    Operation.DESCRIBE: Mappable(results={"descriptor": False}),
    Operation.CHECK: Mappable(required=("descriptor",)),
    Operation.BEGIN: Mappable(),
    Operation.END: Mappable(),
    Operation.STATUS: Mappable(results={"state": True}),
    Operation.QUIESCE: Mappable(),
    Operation.STOP: Mappable(("role",)),
    Operation.RESUME: Mappable(),
    Operation.ESTIMATE: Mappable(results={"bytes": True}),
    Operation.SAVE: Mappable(("path",), results={"data": False, "eof": False, "drained": False}),
    Operation.LOAD_BEGIN: Mappable(),
    Operation.LOAD: Mappable(("path",)),
    Operation.LOAD_COMMIT: Mappable(),
    Operation.DIRTY_START: Mappable(required=("ranges",), results={"page_size": False}),
    Operation.DIRTY_REPORT: Mappable(required=("iova", "length"), results={"bitmap": True}),
    Operation.DIRTY_STOP: Mappable(),
    Operation.RESET: Mappable(),
}
#: The one method that belongs to no function.
FUNCTIONS = "functions"
#: All that can be mapped, by name.
MAPPABLE: Mapping[str, Mappable] = {
    FUNCTIONS: Mappable(results={"list": False, "name": True}),
    **{op.name: replace(row, variables=(*op.arguments, *row.variables)) for op, row in _ROWS.items()},
}
_SAVE, _LOAD, _STATUS = Operation.SAVE.name, Operation.LOAD.name, Operation.STATUS.name
#: Ways that there must be; the others are done without, or refused.
_NEEDED = (Operation.STOP.name, Operation.RESUME.name)
#: Names that belong together: with one of them, the others are needed.
_TOGETHER = (
    (Operation.DIRTY_START.name, Operation.DIRTY_REPORT.name, Operation.DIRTY_STOP.name),
    (_SAVE, _LOAD),
)
#: What a static capability may say: those that the map itself tells cannot be claimed.
_CAPS = {
    "precopy": switch,
    "random_access_save": switch,
    "verifies": switch,
    "max_state": number(1, 64 << 30),
    "max_chunk": number(4096, 128 << 10),
    "max_ranges": number(1, 1024),
}


@dataclass(frozen=True, slots=True)
class MappedMethod:
    """How one operation is called.

    Args:
        method: the vendor's name for it.
        params: constants, and variables with ``$``.
        result: where our values are in the result.
        states: for `status`: the vendor's words for what a function does.
    """

    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, AgentState] = field(default_factory=dict)

    def arguments(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with the variables filled in.

        Args:
            variables: by name, without ``$``.
        """
        return _filled(self.params, variables)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class StateFile:
    """A state that the vendor's methods keep in a file on the SoC.

    Args:
        path: where, with ``$function``.
        fetch: command that writes the file to its standard output.
        store: command that makes the file out of its standard input.
        remove: command that removes the file, or nothing.
    """

    path: str
    fetch: tuple[str, ...]
    store: tuple[str, ...]
    remove: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MethodMap:
    """Everything that the configuration says about a vendor's methods."""

    methods: Mapping[str, MappedMethod]
    functions: tuple[str, ...]
    state: StateFile | None
    caps: Capabilities
    descriptor: Descriptor


def read_map(options: Mapping[str, Any]) -> MethodMap:
    """Read the options `preset`, `methods`, `functions`, `state`, `caps` and `descriptor`.

    Args:
        options: those of them that were given; what a preset says is replaced by what stands beside it.

    Raises:
        OptionError: something cannot be used; the message begins with its key.
    """
    preset = PRESETS[_preset(options["preset"])] if "preset" in options else {}
    methods = _methods({**preset.get("methods", {}), **_table("methods", options.get("methods", {}))})
    state = _state_file({**preset.get("state", {}), **_table("state", options.get("state", {}))}, methods)
    _check_methods(methods, state)
    caps = {**preset.get("caps", {}), **_table("caps", options.get("caps", {}))}
    descriptor = {**preset.get("descriptor", {}), **_table("descriptor", options.get("descriptor", {}))}
    functions = _functions(options.get("functions", ()), methods)
    found = _capabilities(caps, methods, state)
    described = read_descriptor(descriptor, found.max_state, state_max=True)
    if found.stop_copy and Operation.DESCRIBE.name not in methods:
        _require("descriptor", descriptor, "format_id", "without it a destination cannot judge whether a state fits")
    formats = (described.format_id,) if found.stop_copy and described.format_id else ()
    return MethodMap(methods, functions, state, replace(found, formats=formats), described)


def _preset(name: Any) -> str:
    if name not in PRESETS:
        raise OptionError(f"there is none called {name!r}{hint(str(name), PRESETS)}", "preset")
    return str(name)


def _table(key: str, raw: Any) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise OptionError(f"must be a table, got {raw!r}", key)
    return raw


def _require(key: str, table: Mapping[str, Any], name: str, why: str) -> None:
    if not table.get(name):
        raise OptionError(f"missing; {why}", f"{key}.{name}")


def _methods(raw: Mapping[str, Any]) -> dict[str, MappedMethod]:
    found = {}
    for name, value in raw.items():
        key = f"methods.{name}"
        if name not in MAPPABLE:
            raise OptionError(f"no such operation{hint(name, MAPPABLE)}", key)
        if value is False:
            continue  # what a preset has is not to be used
        table = {"method": value} if isinstance(value, str) else _table(key, value)
        found[name] = _method(key, MAPPABLE[name], name, table)
    return found


def _method(key: str, operation: Mappable, name: str, raw: Mapping[str, Any]) -> MappedMethod:
    allowed = {"method", "params", "result", *(["states"] if name == _STATUS else [])}
    for part in raw:
        if part not in allowed:
            raise OptionError(f"no such key{hint(part, dict.fromkeys(sorted(allowed)))}", f"{key}.{part}")
    _require(key, raw, "method", "the vendor's name of the method")
    if not isinstance(raw["method"], str):
        raise OptionError(f"must be text, got {raw['method']!r}", f"{key}.method")
    params = _table(f"{key}.params", raw.get("params", {}))
    used = _variables(f"{key}.params", params, ("function", *operation.variables))
    for variable in operation.required:
        if variable not in used:
            raise OptionError(f"no parameter carries ${variable}", f"{key}.params")
    result = _results(f"{key}.result", operation, raw.get("result", {}))
    states = _states(f"{key}.states", raw.get("states", {})) if name == _STATUS else {}
    return MappedMethod(raw["method"], params, result, states)


def _variables(key: str, value: Any, allowed: tuple[str, ...]) -> set[str]:
    if isinstance(value, Mapping):
        return {name for part, item in value.items() for name in _variables(f"{key}.{part}", item, allowed)}
    if isinstance(value, list):
        return {name for index, item in enumerate(value) for name in _variables(f"{key}[{index}]", item, allowed)}
    if value is not None and not isinstance(value, str | int | float):
        raise OptionError(f"{value!r} cannot be sent as JSON", key)
    if not isinstance(value, str) or not value.startswith("$") or value.startswith("$$"):
        return set()
    if value[1:] not in allowed:
        raise OptionError(f"unknown variable {value!r}{hint(value, {f'${name}': None for name in allowed})}", key)
    return {value[1:]}


def _results(key: str, operation: Mappable, raw: Any) -> dict[str, str]:
    table = _table(key, raw)
    for name, path in table.items():
        if name not in operation.results:
            raise OptionError(f"this operation has no such result{hint(name, operation.results)}", f"{key}.{name}")
        if not isinstance(path, str):
            raise OptionError(f"must be keys with dots between them, or empty text, got {path!r}", f"{key}.{name}")
    for name, needed in operation.results.items():
        if needed and name not in table:
            raise OptionError(f"missing; it names the key of {name} in the vendor's result", f"{key}.{name}")
    return dict(table)


def _states(key: str, raw: Any) -> dict[str, AgentState]:
    words = {state.value: state for state in AgentState}
    found = {}
    for word, state in _table(key, raw).items():
        if state not in words:
            raise OptionError(f"{state!r} is not a state{hint(str(state), words)}", f"{key}.{word}")
        found[word] = words[state]
    return found or words


def _state_file(raw: Mapping[str, Any], methods: Mapping[str, MappedMethod]) -> StateFile | None:
    uses = [name for name in (_SAVE, _LOAD) if name in methods and "$path" in methods[name].params.values()]
    if not raw and not uses:
        return None
    if uses != [_SAVE, _LOAD]:
        raise OptionError("only for methods.save and methods.load that both have a parameter $path", "state")
    readers: dict[str, Callable[[str, Any], Any]] = {
        "path": _path,
        "fetch": _command,
        "store": _command,
        "remove": _command,
    }
    for name in raw:
        if name not in readers:
            raise OptionError(f"no such key{hint(name, readers)}", f"state.{name}")
    _require("state", raw, "path", "the file on the SoC, such as /tmp/$function.state")
    _require("state", raw, "fetch", 'the command that prints the file, such as ["ssh", "soc", "cat", "$path"]')
    _require("state", raw, "store", 'the command that makes the file out of its input, such as ["ssh", "soc", "dd", …]')
    return StateFile(**{name: readers[name](f"state.{name}", value) for name, value in raw.items()})


def _path(key: str, raw: Any) -> str:
    if not isinstance(raw, str) or not raw.startswith("/") or "$" in raw.replace("$function", ""):
        raise OptionError(f"must be an absolute path with no variable but $function, got {raw!r}", key)
    return raw


def _command(key: str, raw: Any) -> tuple[str, ...]:
    if not isinstance(raw, list) or not raw or not all(isinstance(word, str) for word in raw):
        raise OptionError(f"must be a list of words, got {raw!r}", key)
    if not any("$path" in word for word in raw):
        raise OptionError("no word has $path in it", key)
    return tuple(raw)


def _check_methods(methods: Mapping[str, MappedMethod], state: StateFile | None) -> None:
    for name in _NEEDED:
        if name not in methods:
            raise OptionError(f"missing; the agent must be able to {name} a function", f"methods.{name}")
    for group in _TOGETHER:
        missing = [name for name in group if name not in methods]
        if missing and len(missing) < len(group):
            raise OptionError(f"missing; the others of {', '.join(group)} are there", f"methods.{missing[0]}")
    if _SAVE not in methods or state is not None:
        return
    for name, variables in ((_SAVE, ("limit",)), (_LOAD, ("data",))):
        for variable in variables:
            if f"${variable}" not in methods[name].params.values():
                raise OptionError(f"no parameter carries ${variable}, and none $path", f"methods.{name}.params")
    for wanted in ("data", "eof"):
        if wanted not in methods[_SAVE].result:
            raise OptionError("missing; it names the key in the vendor's result", f"methods.save.result.{wanted}")


def _functions(raw: Any, methods: Mapping[str, MappedMethod]) -> tuple[str, ...]:
    if not isinstance(raw, list | tuple) or not all(isinstance(name, str) and name for name in raw):
        raise OptionError(f"must be a list of names, got {raw!r}", "functions")
    if not raw and not {FUNCTIONS, _STATUS} & set(methods):
        raise OptionError("missing; no method lists the functions", "functions")
    return tuple(raw)


def _capabilities(raw: Mapping[str, Any], methods: Mapping[str, MappedMethod], state: StateFile | None) -> Capabilities:
    told = _read("caps", raw, {**_CAPS, "page_sizes": _page_sizes})
    if told.get("precopy") and (state is not None or "drained" not in methods.get(_SAVE, MappedMethod("")).result):
        raise OptionError("needs methods.save in pieces, with result.drained", "caps.precopy")
    if Operation.DIRTY_START.name in methods and "max_ranges" not in told:
        raise OptionError("missing; methods.dirty_start is there", "caps.max_ranges")
    base = Capabilities(
        stop_copy=_SAVE in methods,
        p2p=Operation.QUIESCE.name in methods,
        dirty=Operation.DIRTY_START.name in methods,
        reset=Operation.RESET.name in methods,
        status_query=_STATUS in methods,
        random_access_save=True,
        max_chunk=128 << 10,
        takeover=False,
        verifies=False,
    )
    return replace(base, **told)


def _read(key: str, raw: Mapping[str, Any], readers: Mapping[str, Callable[[str, Any], Any]]) -> dict[str, Any]:
    try:
        return read_options(raw, readers)
    except OptionError as error:
        raise OptionError(f"{error}", key) from error


def _page_sizes(name: str, raw: Any) -> tuple[int, ...]:
    good = (
        isinstance(raw, list) and raw and all(type(size) is int and size > 0 and not size & (size - 1) for size in raw)
    )
    if not good or raw != sorted(set(raw)):
        raise OptionError(f"{name} must be a list of ascending powers of two, got {raw!r}")
    return tuple(raw)


def _filled(value: Any, variables: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        filled = {name: _filled(item, variables) for name, item in value.items()}
        # A variable without a value, such as a total that nobody knows, is left out.
        return {name: item for name, item in filled.items() if item is not None or value[name] is None}
    if isinstance(value, list):
        return [_filled(item, variables) for item in value]
    if isinstance(value, str) and value.startswith("$"):
        return value[1:] if value.startswith("$$") else variables[value[1:]]
    return value
