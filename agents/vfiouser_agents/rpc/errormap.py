"""Errors as plain maps, the same in every codec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vfiouser_agents.errors import ERRORS, AgentError, Incompatible, NoResources


def error_to_map(error: AgentError) -> dict[str, Any]:
    """An error as it is sent."""
    found: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.vendor_code is not None:
        found["vendor_code"] = error.vendor_code
    if isinstance(error, Incompatible):
        found["reasons"] = list(error.reasons)
    if isinstance(error, NoResources):
        found["limits"] = error.limits
    return found


def error_from_map(value: Any) -> AgentError:
    """An error as it came; what is not understood becomes an `AgentError` with the peer's words.

    Args:
        value: the error of a response.
    """
    if not isinstance(value, Mapping):
        return AgentError(f"the agent failed: {str(value)[:500]}")
    code, vendor = value.get("code"), value.get("vendor_code")
    message = str(value.get("message", "no message"))[:4096]
    vendor_code = None if vendor is None else str(vendor)[:256]
    kind = ERRORS.get(code, AgentError) if isinstance(code, str) else AgentError
    if kind is Incompatible:
        reasons = value.get("reasons")
        lines = [str(line)[:1024] for line in reasons] if isinstance(reasons, list) else [message]
        return Incompatible(lines, message, vendor_code=vendor_code)
    if kind is NoResources:
        limits = value.get("limits")
        pairs = limits.items() if isinstance(limits, Mapping) else ()
        known = {name: limit for name, limit in pairs if isinstance(name, str) and type(limit) is int}
        return NoResources(message, known, vendor_code=vendor_code)
    return kind(message, vendor_code=vendor_code)
