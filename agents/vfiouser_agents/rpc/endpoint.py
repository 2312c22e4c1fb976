"""Addresses of agents, and the streams that lead to them: TCP, TLS and mTLS, UNIX sockets."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import re
import secrets
import socket
import ssl
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from vfiouser_agents.causes import words_of
from vfiouser_agents.errors import AgentError, AuthError, ConnectError
from vfiouser_agents.options import OptionError
from vfiouser_agents.rpc.certificates import expiry_words

from .core import broken

_log = logging.getLogger(__name__)

#: Port of `tcp://` and `tls://` addresses that have none.
DEFAULT_PORT = 7711
SCHEMES = ("tcp", "tls", "unix")


@dataclass(frozen=True, slots=True)
class Address:
    """Where an agent is.

    Args:
        scheme: `tcp`, `tls` or `unix`.
        host: name or IP address; empty for `unix`.
        port: number of the port; 0 for `unix`, or "any" when listening.
        path: the socket's path; empty for the others.
    """

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """What TLS needs.

    Args:
        ca: file with the certificates that the peer's must come from; None = the system's.
        cert: file with our own certificate and its chain; None = none is shown.
        key: file with its key; None = it is in `cert`.
        server_name: the name that the server's certificate must have; None = the host's.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None


def parse_address(text: str, default_port: int = DEFAULT_PORT) -> Address:
    """Read an address.

    Args:
        text: ``tcp://HOST[:PORT]``, ``tls://HOST[:PORT]`` or ``unix:///PATH``.
        default_port: of an address that has none.

    Raises:
        OptionError: it is something else.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in SCHEMES:
        raise OptionError(f"address {text!r} must be tcp://HOST:PORT, tls://HOST:PORT or unix:///PATH")
    if scheme == "unix":
        if not rest.startswith("/") or len(os.fsencode(rest)) > 107:
            raise OptionError(f"address {text!r}: the path must be absolute and have at most 107 bytes")
        return Address(scheme, path=rest)
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/@\s]+))(?::([0-9]{1,5}))?", rest)
    if match is None or int(match[3] or 0) > 65535:
        raise OptionError(f"address {text!r} must be {scheme}://HOST:PORT (an IPv6 address in brackets)")
    return Address(scheme, match[1] or match[2], default_port if match[3] is None else int(match[3]))


def read_tls(raw: Any) -> TlsOptions:
    """Read a ``tls`` table.

    Args:
        raw: a map with `ca`, `cert`, `key`, `server_name`, all optional.

    Raises:
        OptionError: it is something else.
    """
    names = ("ca", "cert", "key", "server_name")
    if not isinstance(raw, Mapping):
        raise OptionError(f"tls must be a table with {', '.join(names)}, not {raw!r}")
    for name, value in raw.items():
        if name not in names:
            raise OptionError(f"unknown key {name!r} in tls (allowed: {', '.join(names)})")
        if not isinstance(value, str) or not value:
            raise OptionError(f"tls.{name} must be text, not {value!r}")
    if "key" in raw and "cert" not in raw:
        raise OptionError("tls.key needs tls.cert")
    return TlsOptions(**raw)


def check_plaintext(address: Address, *, allowed: bool) -> None:
    """Refuse an address that would carry a function's state over a network in the clear.

    Args:
        address: where.
        allowed: the user wants it so.

    Raises:
        OptionError: it would.
    """
    if address.scheme == "tcp" and not allowed and not _is_loopback(address.host):
        raise OptionError(
            f"{address}: TCP without TLS is for this host only, since a function's state holds the guest's secrets; "
            "use tls://, or allow_plaintext=true on a network that nobody else can reach"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def client_context(tls: TlsOptions) -> ssl.SSLContext:
    """TLS for a client: the server's certificate is always checked.

    Raises:
        OptionError: a file cannot be used.
    """
    return _loaded(tls, ssl.Purpose.SERVER_AUTH)


def server_context(tls: TlsOptions) -> ssl.SSLContext:
    """TLS for a server: with `ca`, clients need a certificate from there.

    Raises:
        OptionError: a file cannot be used, or there is no certificate.
    """
    if tls.cert is None:
        raise OptionError("a TLS server needs tls.cert")
    context = _loaded(tls, ssl.Purpose.CLIENT_AUTH)
    if tls.ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _loaded(tls: TlsOptions, purpose: ssl.Purpose) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(purpose, cafile=tls.ca)
        if tls.cert is not None:
            context.load_cert_chain(tls.cert, tls.key)
    except OSError as error:
        files = ", ".join(name for name in (tls.ca, tls.cert, tls.key) if name)
        raise OptionError(f"TLS files {files} cannot be used: {error.strerror or error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


async def connect(
    address: Address, tls: TlsOptions, context: ssl.SSLContext | None, *, allow_plaintext: bool
) -> trio.abc.Stream:
    """A stream to an agent.

    Args:
        address: where.
        tls: for the server's name.
        context: for `tls` addresses.
        allow_plaintext: TCP may leave this host.

    Raises:
        ConnectError: nobody answers.
        AuthError: TLS fails, or plain text would leave this host.
    """
    try:
        if address.scheme == "unix":
            return await trio.open_unix_socket(address.path)
        stream = await trio.open_tcp_stream(address.host, address.port)
    except OSError as error:
        raise ConnectError(f"cannot reach agent {address}: {_attempt(error)}") from error
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    try:
        if context is not None:
            return await _shake_hands(stream, context, tls.server_name or address.host, address)
        peer = stream.socket.getpeername()[0]
        if not allow_plaintext and not _is_loopback(peer):
            raise AuthError(f"agent {address} is at {peer}, which is not this host; TCP without TLS is refused")
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream


async def _shake_hands(
    stream: trio.SocketStream, context: ssl.SSLContext, name: str, address: Address
) -> trio.abc.Stream:
    secure = trio.SSLStream(stream, context, server_hostname=name)
    try:
        await secure.do_handshake()
    except (trio.BrokenResourceError, OSError) as error:
        reason: AgentError = broken(error)
        kind = AuthError if isinstance(reason, AuthError) else ConnectError
        raise kind(f"agent {address}: {reason.message}") from error
    _warn_of_expiry(secure.getpeercert(), address)
    return secure


def _warn_of_expiry(certificate: Mapping[str, Any] | None, address: Address) -> None:
    """Tell of a peer's certificate that is good for two weeks at most."""
    end = (certificate or {}).get("notAfter")
    words = None if end is None else expiry_words(ssl.cert_time_to_seconds(str(end)), time.time())
    if words is not None:
        _log.warning("the certificate of agent %s needs renewal: %s", address, words)


def _attempt(error: OSError) -> str:
    # trio says that all attempts failed; why is in the group below.
    return words_of(error.__cause__ or error)


async def open_listeners(
    address: Address, tls: TlsOptions | None = None, *, allow_plaintext: bool = False
) -> Sequence[trio.abc.Listener[trio.abc.Stream]]:
    """Listen at an address.

    Args:
        address: where; a UNIX socket that nobody listens at any more is replaced.
        tls: certificate and, for client certificates, CA; needed for `tls`.
        allow_plaintext: TCP without TLS may be for other hosts.

    Raises:
        OptionError: plain text is refused, or the TLS files cannot be used.
        OSError: the address cannot be used.
    """
    check_plaintext(address, allowed=allow_plaintext)
    if address.scheme == "unix":
        return [_unix_listener(address.path)]
    context = server_context(tls or TlsOptions()) if address.scheme == "tls" else None
    listeners = await trio.open_tcp_listeners(address.port, host=address.host)
    if context is None:
        return listeners
    return [trio.SSLListener(listener, context) for listener in listeners]


def _unix_listener(path: str) -> trio.SocketListener:
    remove_stale_socket(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Bound without any rights for others; who else may connect is for the one who made the directory.
        os.fchmod(made.fileno(), stat.S_IRUSR | stat.S_IWUSR)
        _appear(made, Path(path))
        return trio.SocketListener(trio.socket.from_stdlib_socket(made))
    except BaseException:
        made.close()
        raise


def _appear(made: socket.socket, path: Path) -> None:
    """Bind a socket so that its file appears only once it listens: whoever waits for the file can connect at once."""
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        name = f".{secrets.token_hex(8)}"
        made.bind(f"/proc/self/fd/{parent}/{name}")
        try:
            made.listen(64)
            os.rename(name, path.name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            os.unlink(name, dir_fd=parent)
            raise
    finally:
        os.close(parent)


async def open_at(
    address: Address, tls: TlsOptions | None = None, *, allow_plaintext: bool = False
) -> tuple[Sequence[trio.abc.Listener[trio.abc.Stream]], Address]:
    """Listen at an address, and tell it with the port that was really taken.

    Args:
        address: where; port 0 is any, but one only: a name with several addresses would get a port for each, and the
            first is found by all clients.
        tls: as for `open_listeners`.
        allow_plaintext: as for `open_listeners`.
    """
    listeners = await open_listeners(address, tls, allow_plaintext=allow_plaintext)
    if address.port == 0 and address.scheme != "unix":
        for superfluous in listeners[1:]:
            await superfluous.aclose()
        listeners = listeners[:1]
    return listeners, listening_address(address, listeners[0])


def remove_stale_socket(path: str) -> None:
    """Remove a UNIX socket that nobody listens at any more.

    Args:
        path: where it is.

    Raises:
        OSError: somebody listens there.
    """
    if not Path(path).is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink(missing_ok=True)
        except OSError:
            return
        else:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), path)


def listening_address(address: Address, listener: trio.abc.Listener[Any]) -> Address:
    """The address with the port that was really taken.

    Args:
        address: what was asked for.
        listener: one of `open_listeners`.
    """
    inner = listener.transport_listener if isinstance(listener, trio.SSLListener) else listener
    if address.scheme == "unix" or not isinstance(inner, trio.SocketListener):
        return address
    return Address(address.scheme, address.host, inner.socket.getsockname()[1])
