"""Certificates made on the fly, so that daemons and agents can prove to each other who they are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


class CertificatesUnavailable(Exception):
    """The package that makes certificates is not installed."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Files that prove who one is.

    Args:
        cert: certificate and key.
    """

    cert: Path


@dataclass(frozen=True, slots=True)
class Certificates:
    """An authority that lives as long as its files, and two who trust it.

    Args:
        authority: the authority's certificate.
        agent: for the agents' servers, at 127.0.0.1.
        daemon: for the daemons, clients of the agents.
    """

    authority: Path
    agent: Identity
    daemon: Identity


def make_certificates(directory: Path) -> Certificates:
    """Make an authority and its certificates.

    Args:
        directory: where the files go; only we may read them.

    Raises:
        CertificatesUnavailable: `trustme` is not installed.
    """
    try:
        import trustme
    except ImportError as error:
        raise CertificatesUnavailable(
            "certificates are made with the package trustme, which is not installed; "
            "install vfiouser-oob[demo], or use --no-migration"
        ) from error
    directory.mkdir(mode=0o700)
    authority = trustme.CA()
    ca = directory / "ca.pem"
    authority.cert_pem.write_to_path(os.fspath(ca))
    found = {}
    for name, identity in (("agent", "127.0.0.1"), ("daemon", "daemon.invalid")):
        path = directory / f"{name}.pem"
        authority.issue_cert(identity).private_key_and_cert_chain_pem.write_to_path(os.fspath(path))
        found[name] = Identity(path)
    return Certificates(ca, found["agent"], found["daemon"])
