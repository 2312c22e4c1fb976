"""The language of the control socket: one JSON object per line, UTF-8.

    server:  {"hello": "vfiouser-oob", "protocol": 1, "version": "…", "methods": ["status", "watch"]}
    client:  {"id": 1, "method": "status"}
    server:  {"id": 1, "result": {…}}            or {"id": 1, "error": {"code": "…", "message": "…"}}
    client:  {"id": 3, "method": "remove", "params": {"name": "nvme0", "force": true}}
    client:  {"id": 2, "method": "watch"}
    server:  {"id": 2, "result": {…}}            the state now, then for each change
             {"id": 2, "event": {…}}

`protocol` changes only when a client of the old one would misunderstand; new methods and new keys do not
change it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

NAME = "vfiouser-oob"
PROTOCOL = 1
# No request is longer than this; a peer that never ends its line costs no more memory, and one of brackets no time.
REQUEST_MAX = 64 << 10
# An administrator may add many functions at once.
ADMIN_REQUEST_MAX = 1 << 20


class ErrorCode(StrEnum):
    """Why a request was refused."""

    BAD_REQUEST = "bad-request"
    UNKNOWN_METHOD = "unknown-method"
    BAD_PARAMETERS = "bad-parameters"
    FAILED = "failed"
    NOT_ALLOWED = "not-allowed"
    BUSY = "busy"


class RequestError(Exception):
    """A line that is no request, or one that cannot be served.

    Args:
        code: the reason, for machines.
        message: what came and what is allowed.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class ControlRequest:
    """One request of a client.

    Args:
        id: the client's mark, repeated in every answer.
        method: what it wants.
        params: the particulars.
    """

    id: int | str
    method: str
    params: Mapping[str, Any] = field(default_factory=dict)


def encode(message: Mapping[str, Any]) -> bytes:
    """One message as a line."""
    return json.dumps(message, separators=(",", ":"), default=str).encode() + b"\n"


def parse_request(line: bytes) -> ControlRequest:
    """Read a client's line.

    Args:
        line: the line, with or without its end.

    Raises:
        RequestError: it is not a request.
    """
    try:
        raw = json.loads(line)
    # ValueError: no JSON, no UTF-8, or a number of thousands of digits; RecursionError: thousands of
    # brackets.
    except (ValueError, RecursionError):
        raise RequestError(ErrorCode.BAD_REQUEST, "the line is not JSON") from None
    if not isinstance(raw, dict):
        raise RequestError(ErrorCode.BAD_REQUEST, "the line is not a JSON object")
    request_id, method = raw.get("id"), raw.get("method")
    if isinstance(request_id, bool) or not isinstance(request_id, int | str):
        raise RequestError(ErrorCode.BAD_REQUEST, "id must be a number or text")
    if not isinstance(method, str):
        raise RequestError(ErrorCode.BAD_REQUEST, "method must be text")
    params = raw.get("params", {})
    if not isinstance(params, dict):
        raise RequestError(ErrorCode.BAD_REQUEST, "params must be an object")
    return ControlRequest(request_id, method, params)


def error_message(error: RequestError, request_id: int | str | None = None) -> dict[str, Any]:
    """The answer to a request that is refused; `id` is null when the line could not be read."""
    return {"id": request_id, "error": {"code": error.code.value, "message": error.message}}
