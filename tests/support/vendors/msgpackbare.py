"""An agent written from docs/reference/agent-protocol.md alone: sockets, threads and msgpack, nothing of ours.

It stands for a vendor's, in whatever language. Its functions have some bytes of state, which a test may change.
"""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable
from typing import Any

import msgpack
from xxhash import xxh3_128_digest

Params = dict[str, Any]
ROOM = 1 << 20
PAGE = 4096
CAPABILITIES = {
    "stop_copy": True,
    "precopy": True,
    "dirty": True,
    "formats": ["images"],
    "max_state": ROOM,
    "max_chunk": 65536,
    "page_sizes": [PAGE],
    "max_ranges": 16,
}


class Refused(Exception):
    """An answer with an error."""

    def __init__(self, code: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.error = {"code": code, "message": message, **more}


class BareFunction:
    """One function. Its state travels as images of its memory, of which the last one counts, and an `E`.

    Args:
        memory: its state.
    """

    def __init__(self, memory: bytes) -> None:
        self.first = self.memory = memory
        self.reset()

    def reset(self) -> None:
        """As it was at first."""
        self.memory = self.first
        self.state = "running"
        self.log: tuple[list[list[int]], set[int]] | None = None
        self.spoiled = False
        self.forget()

    def forget(self) -> None:
        """No migration."""
        self.role: str | None = None
        self.name = ""
        self.owner: object = None
        self.drop()

    def drop(self) -> None:
        """No buffers."""
        self.ready, self.phase = b"", ""
        self.last: tuple[int, bytes] = (0, b"")
        self.loaded, self.piece = b"", (-1, b"")
        if self.state == "loading":
            self.state = "stopped"

    def require(self, true: bool, message: str, code: str = "invalid-state") -> None:
        """Refuse what is not so."""
        if not true:
            raise Refused(code, f"{message}; the function is {self.state}")

    def wrote(self, page: int) -> None:
        """The device wrote a page of guest memory."""
        if self.log is not None:
            self.log[1].add(page)

    # The methods of a session

    def describe(self, params: Params) -> Params:
        """What it is."""
        kinds = {"vendor": "bare", "model": "images", "kind": "test", "firmware": "1"}
        return {"format_id": "images", "format_version": 1, "state_max": ROOM, **kinds}

    def check(self, params: Params) -> None:
        """Whether a source fits."""
        theirs, ours = params["descriptor"], self.describe({})
        names = ("format_id", "format_version", "vendor", "model", "kind")
        wrong = [f"{name}: {theirs[name]!r} there, {ours[name]!r} here" for name in names if theirs[name] != ours[name]]
        if wrong:
            raise Refused("incompatible", "another function", reasons=wrong)

    def quiesce(self, params: Params) -> None:
        """Stop, without a step of its own."""
        self.state = "stopped" if self.state == "running" else self.state

    stop = quiesce

    def resume(self, params: Params) -> None:
        """Run."""
        self.require(not self.spoiled, "a load was not committed")
        self.ready, self.phase, self.last = b"", "", (0, b"")
        self.state = "running"

    def estimate(self, params: Params) -> Params:
        """One more image and the end."""
        return {"stop_copy_bytes": len(self.memory) + 2}

    def save(self, params: Params) -> Params:
        """The next chunk, or the last one again."""
        offset, limit, phase = params["offset"], params["limit"], params["phase"]
        self.require(limit > 0, "a limit of 0", "invalid-argument")
        allowed = ("running",) if phase == "precopy" else ("stopped", "loaded")
        self.require(self.role == "source" and self.state in allowed and not self.spoiled, f"no save ({phase})")
        at, data = self.last
        if offset == at and data:
            self.ready, data = data[limit:] + self.ready, data[:limit]
        else:
            if offset == 0:
                self.ready, self.phase, self.last = b"", "", (0, b"")
            elif offset != at + len(data):
                raise Refused("invalid-argument", f"{offset} after {at}+{len(data)}")
            if phase != self.phase:
                self.phase = phase
                self.ready += b"M" + self.memory + (b"E" if phase == "final" else b"")
            data, self.ready = self.ready[: min(limit, 65536)], self.ready[min(limit, 65536) :]
        self.last = (offset, data)
        done = not self.ready and phase == self.phase
        return {"data": data, "eof": done and phase == "final", "drained": done and phase == "precopy"}

    def load_begin(self, params: Params) -> None:
        """Get ready."""
        self.require(self.role == "destination" and self.state in ("stopped", "loading", "loaded"), "no load")
        self.require((params.get("total") or 0) <= ROOM, "too large", "no-resources")
        self.drop()
        self.state, self.spoiled = "loading", True

    def load(self, params: Params) -> None:
        """Take a piece."""
        self.require(self.state == "loading", "no load_begin")
        offset, data = params["offset"], params["data"]
        if (offset, data) != self.piece:
            self.require(offset == len(self.loaded), "a gap", "invalid-argument")
            self.require(offset + len(data) <= ROOM, "too large", "no-resources")
            self.loaded, self.piece = self.loaded + data, (offset, data)

    def load_commit(self, params: Params) -> None:
        """Verify and apply."""
        self.require(self.state == "loading", "no load_begin")
        data, size = self.loaded, len(self.memory) + 1
        good = params["total"] == len(data) and params["digest"] == xxh3_128_digest(data)
        self.require(good, "not what was sent", "corrupt-state")
        images = [data[start : start + size] for start in range(0, len(data) - 1, size)]
        good = data[-1:] == b"E" and all(image[:1] == b"M" and len(image) == size for image in images) and bool(images)
        self.require(good, "no images", "corrupt-state")
        self.memory, self.spoiled, self.state = images[-1][1:], False, "loaded"

    def abort(self, params: Params) -> None:
        """Drop buffers."""
        self.drop()

    def end(self, params: Params) -> None:
        """Leave the migration."""
        self.forget()

    def dirty_start(self, params: Params) -> Params:
        """Log."""
        ranges, wish = params["ranges"], params["page_size"]
        self.require(self.log is None, "logged already")
        self.require(len(ranges) <= 16, "too many ranges", "no-resources")
        good = wish & (wish - 1) == 0 < wish and all(length for _, length in ranges)
        self.require(good, "no such pages or ranges", "invalid-argument")
        self.log = (ranges, set())
        return {"page_size": PAGE}

    def dirty_report(self, params: Params) -> Params:
        """Report and forget."""
        self.require(self.log is not None, "not logged")
        assert self.log is not None
        ranges, pages = self.log
        iova, length = params["iova"], params["length"]
        inside = any(first <= iova and iova + length <= first + size for first, size in ranges)
        self.require(length > 0 == iova % PAGE == length % PAGE and inside, "no such pages", "invalid-argument")
        bitmap = bytearray(-(-length // PAGE // 8))
        for page in [page for page in pages if iova <= page * PAGE < iova + length]:
            bit = page - iova // PAGE
            bitmap[bit // 8] |= 1 << bit % 8
            pages.remove(page)
        return {"bitmap": bytes(bitmap), "final": self.state != "running"}

    def dirty_stop(self, params: Params) -> None:
        """Forget."""
        self.log = None

    def status(self) -> Params:
        """Where it is."""
        return {
            "state": self.state,
            "role": self.role,
            "migration_id": self.name,
            "dirty_active": self.log is not None,
        }

    def begin(self, params: Params, caller: object) -> None:
        """Become the owner."""
        role, name = params["role"], params["migration_id"]
        self.require(bool(name), "no name", "invalid-argument")
        if (role, name) != (self.role, self.name) and self.role is not None:
            self.require(self.owner in (None, caller), "another migration", "busy")
            self.require(self.owner is None and self.state == "running", "another migration")
            self.forget()
        self.role, self.name, self.owner = role, name, caller


class BareAgent:
    """The server.

    Args:
        functions: what it serves, by name.
    """

    def __init__(self, functions: dict[str, BareFunction]) -> None:
        self.functions = functions
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        try:
            while True:
                sock = self._listener.accept()[0]
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()
        except OSError:
            return

    def _serve(self, sock: socket.socket) -> None:
        connection = _Connection(self.functions)
        unpacker = msgpack.Unpacker(raw=False)
        with sock:
            try:
                while data := sock.recv(1 << 20):
                    unpacker.feed(data)
                    for _, number, method, params in unpacker:
                        with self._lock:
                            answer = connection.answer(number, method, params[0] if params else {})
                        sock.sendall(msgpack.packb(answer))
            except OSError:
                pass
            with self._lock:
                connection.lost()


class _Connection:
    """One client: its sessions have numbers, which are what owns migrations."""

    def __init__(self, functions: dict[str, BareFunction]) -> None:
        self._functions = functions
        self._greeted = False
        self._numbers = itertools.count(1)
        self._sessions: dict[int, BareFunction] = {}
        self._agent: dict[str, Callable[[Params], Any]] = {
            "agent.hello": self._hello,
            "agent.ping": lambda params: None,
            "agent.functions": lambda params: {"functions": [{"function_id": name} for name in functions]},
            "session.open": self._open,
            "session.close": lambda params: self._close(params["session"]),
        }

    def answer(self, number: int, method: str, params: Params) -> list[Any]:
        """Do what is asked."""
        try:
            if not self._greeted and method != "agent.hello":
                raise Refused("invalid-state", "hello first")
            if method in self._agent:
                return [1, number, None, self._agent[method](params)]
            return [1, number, None, self._call(method, params)]
        except Refused as refused:
            return [1, number, refused.error, None]

    def lost(self) -> None:
        """The client has gone; what was stopped stays stopped."""
        for number in list(self._sessions):
            self._close(number)

    def _hello(self, params: Params) -> Params:
        if params["protocol"] != "vfiouser-oob-agent" or 1 not in params["versions"]:
            raise Refused("unsupported", "this is vfiouser-oob-agent, version 1")
        self._greeted = True
        return {"vendor": "bare", "product": "agent", "protocol": "vfiouser-oob-agent", "protocol_version": 1}

    def _open(self, params: Params) -> Params:
        if params["function"] not in self._functions:
            raise Refused("not-found", "no such function")
        number = next(self._numbers)
        self._sessions[number] = self._functions[params["function"]]
        return {"session": number, "capabilities": CAPABILITIES}

    def _close(self, number: int) -> None:
        function = self._sessions.pop(number, None)
        if function is not None and function.owner == (self, number):
            function.owner = None

    def _call(self, method: str, params: Params) -> Any:
        group, _, name = method.partition(".")
        function = self._sessions.get(params.get("session", 0))
        if group not in ("migration", "dirty", "device"):
            raise Refused("unsupported", f"no method {method}")
        if function is None:
            raise Refused("not-found", "no such session")
        caller = (self, params["session"])
        if name == "status":
            return function.status()
        if method == "device.reset":
            return function.reset()
        if name == "begin":
            return function.begin(params, caller)
        if name not in ("describe", "check") and function.owner not in (None, caller):
            raise Refused("busy", "another session's migration")
        if name in ("save", "load_begin", "load", "load_commit") and function.owner != caller:
            raise Refused("invalid-state", "not in this session's migration")
        return getattr(function, f"dirty_{name}" if group == "dirty" else name)(params)
