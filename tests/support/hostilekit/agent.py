"""An agent whose answers an attack chooses; everything else it answers as one of few words would."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack

from vendors.msgpackbare import BareFunction, Refused, _Connection

#: Takes a connection, the request's id, its parameters and the answer as it would be; returns the result to send.
Tamper = Callable[["AgentLink", dict[str, Any], Any], Any]


class AgentLink:
    """One connection of the daemon to the agent.

    Args:
        sock: the socket; owned from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def say(self, message: Any) -> None:
        """Send a message, or bytes as they are."""
        self.sock.sendall(message if isinstance(message, bytes) else msgpack.packb(message))


class RogueAgent:
    """The agent; its one function is called `f0`.

    Args:
        path: where it listens.
        tamper: by method, what becomes of its answers.
    """

    def __init__(self, path: Path, tamper: dict[str, Tamper] | None = None) -> None:
        self._tamper = tamper or {}
        self.links: list[AgentLink] = []
        self.asked: list[str] = []
        self._function = BareFunction(bytes(4096))
        self._numbers = itertools.count()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(path))
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            link = AgentLink(self._listener.accept()[0])
            self.links.append(link)
            threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: AgentLink) -> None:
        connection = _Connection({"f0": self._function})
        unpacker = msgpack.Unpacker(raw=False)
        try:
            while data := link.sock.recv(1 << 20):
                unpacker.feed(data)
                for _, number, method, params in unpacker:
                    self._answer(link, connection, number, method, params[0] if params else {})
        except (OSError, Refused):
            pass

    def _answer(self, link: AgentLink, connection: _Connection, number: int, method: str, params: Any) -> None:
        self.asked.append(method)
        answer = connection.answer(number, method, params)
        tamper = self._tamper.get(method)
        if tamper is not None:
            answer = [1, number, None, tamper(link, params, answer[3])]
        link.say(answer)
