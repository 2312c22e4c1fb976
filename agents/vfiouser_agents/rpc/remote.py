"""An agent at an address, as the adapters that dial have it in common: their options, and the way to a stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import trio

from vfiouser_agents.errors import ConnectError
from vfiouser_agents.options import OptionError, read_options, seconds, switch, text

from .endpoint import (
    DEFAULT_PORT,
    Address,
    TlsOptions,
    check_plaintext,
    client_context,
    connect,
    parse_address,
    read_tls,
)

Readers = Mapping[str, Callable[[str, Any], Any]]


def remote_readers(default_port: int = DEFAULT_PORT) -> dict[str, Callable[[str, Any], Any]]:
    """Readers of the options that all of these adapters take.

    Args:
        default_port: of an address that has none.
    """
    return {
        "address": lambda _, value: parse_address(text("address", value), default_port),
        "tls": lambda _, value: read_tls(value),
        "allow_plaintext": switch,
        "connect_timeout_s": seconds(0.01, 600),
    }


def read_remote_options(options: Mapping[str, Any], readers: Readers, example: str) -> dict[str, Any]:
    """Read options of which `address` must be there.

    Args:
        options: by name.
        readers: of all that are known.
        example: an address, or several with "or", for whoever left it out.

    Raises:
        OptionError: an option cannot be used.
    """
    if "address" not in options:
        raise OptionError(f"option 'address' is missing, such as {example}")
    return read_options(options, readers)


class Remote:
    """An agent's address, and what it takes to reach it.

    Args:
        address: where it is.
        tls: for `tls` addresses.
        allow_plaintext: `tcp` addresses may be other hosts.

    Raises:
        OptionError: plain text is refused, or the TLS files cannot be used.
    """

    def __init__(self, address: Address, tls: TlsOptions | None = None, *, allow_plaintext: bool = False) -> None:
        check_plaintext(address, allowed=allow_plaintext)
        if tls is not None and address.scheme != "tls":
            raise OptionError(f"tls does not apply to {address}; the address must begin with tls://")
        self.address = address
        self.tls = tls or TlsOptions()
        self._context = client_context(self.tls) if self.encrypted else None
        self._allow_plaintext = allow_plaintext

    @property
    def encrypted(self) -> bool:
        """Each side shows what certificate it has."""
        return self.address.scheme == "tls"

    async def connect(self) -> trio.abc.Stream:
        """A stream to the agent; see `endpoint.connect`."""
        return await connect(self.address, self.tls, self._context, allow_plaintext=self._allow_plaintext)

    async def connect_within(self, limit_s: float) -> trio.abc.Stream:
        """As `connect`, in a limited time.

        Args:
            limit_s: seconds.

        Raises:
            ConnectError: nobody answers, or not in time.
            AuthError: as `connect`.
        """
        with trio.move_on_after(limit_s):
            return await self.connect()
        raise ConnectError(f"agent {self.address} did not answer within {limit_s:g} s")
