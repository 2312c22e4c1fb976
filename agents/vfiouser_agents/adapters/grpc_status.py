"""Errors of agents as gRPC statuses, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc

from vfiouser_agents.errors import (
    AgentError,
    AuthError,
    Busy,
    ConnectError,
    CorruptState,
    DeadlineExceeded,
    DeviceFailed,
    Incompatible,
    InvalidArgument,
    InvalidState,
    NoResources,
    NotFound,
    ProtocolError,
    TransportLost,
    Unsupported,
)
from vfiouser_agents.rpc.errormap import error_from_map, error_to_map

from .grpc_messages import ERROR_KEY, MESSAGES, DecodeError, pack, unpack

_CODES: Mapping[type[AgentError], grpc.StatusCode] = {
    AgentError: grpc.StatusCode.INTERNAL,
    ConnectError: grpc.StatusCode.UNAVAILABLE,
    AuthError: grpc.StatusCode.PERMISSION_DENIED,
    TransportLost: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Busy: grpc.StatusCode.ABORTED,
    Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidState: grpc.StatusCode.FAILED_PRECONDITION,
    Incompatible: grpc.StatusCode.FAILED_PRECONDITION,
    CorruptState: grpc.StatusCode.DATA_LOSS,
    NoResources: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeviceFailed: grpc.StatusCode.INTERNAL,
    ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
}
#: What a status without an Error of ours means; the rest is an `AgentError`.
_KINDS: Mapping[grpc.StatusCode, type[AgentError]] = {
    grpc.StatusCode.UNAVAILABLE: TransportLost,
    grpc.StatusCode.CANCELLED: TransportLost,
    grpc.StatusCode.UNAUTHENTICATED: AuthError,
    grpc.StatusCode.PERMISSION_DENIED: AuthError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.ABORTED: Busy,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidState,
    grpc.StatusCode.DATA_LOSS: CorruptState,
    grpc.StatusCode.RESOURCE_EXHAUSTED: NoResources,
}
#: What grpcio says of a handshake that failed; there is no code for it.
_TLS_WORDS = ("Ssl handshake", "SSL_ERROR", "CERTIFICATE_VERIFY_FAILED", "Peer name", "certificate")


#: The part of it that means something to people, in our words.
_TLS_REASONS = {
    "certificate has expired": "the peer's certificate has expired",
    "certificate is not yet valid": "the peer's certificate is not valid yet",
    "self signed certificate": "the peer's certificate is not accepted: no authority in `ca` has signed it",
    "self-signed certificate": "the peer's certificate is not accepted: no authority in `ca` has signed it",
    "unable to get local issuer certificate": "the peer's certificate is not accepted: `ca` does not name its issuer",
}


def to_status(error: AgentError) -> tuple[grpc.StatusCode, str, bytes]:
    """An error as code, text and the bytes of the metadata.

    Args:
        error: as the agent raised it.
    """
    return _CODES.get(type(error), grpc.StatusCode.INTERNAL), error.message, _error_bytes(error)


def _error_bytes(error: AgentError) -> bytes:
    return bytes(pack("Error", error_to_map(error)).SerializeToString())


def from_status(error: Any) -> AgentError:
    """The error that a failed call stands for.

    Args:
        error: a `grpc.RpcError` of a call, which is the call.
    """
    code, text = error.code(), str(error.details() or "no details")[:4096]
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KEY:
            try:
                return error_from_map(unpack("Error", MESSAGES["Error"].FromString(value)))
            except DecodeError:
                break
    kind = _KINDS.get(code, AgentError)
    if code is grpc.StatusCode.UNAVAILABLE and any(word in text for word in _TLS_WORDS):
        kind = AuthError
        reasons = (words for fragment, words in _TLS_REASONS.items() if fragment in text)
        text = f"TLS failed: {next(reasons, text)}"
    return kind(text, vendor_code=f"gRPC {code.name}")
