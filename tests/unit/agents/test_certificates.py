"""When certificates expire: read as OpenSSL reads them, whatever is in the file."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from vfiouser_agents.rpc.certificates import UnreadableCertificate, expiry_of, expiry_words, first_expiry

AUTHORITY = trustme.CA()
DER = ssl.PEM_cert_to_DER_cert(AUTHORITY.cert_pem.bytes().decode())


@pytest.mark.parametrize("days", [-3, 5, 400, 40_000], ids=["past", "soon", "year", "generalized time"])
def test_expiry(tmp_path: Path, days: int) -> None:
    """The moment in the file is the one that it was made with; before 2050 and after it is written in two ways."""
    wanted = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    issued = AUTHORITY.issue_cert("localhost", not_before=wanted - timedelta(days=100), not_after=wanted)
    path = tmp_path / "cert.pem"
    issued.private_key_and_cert_chain_pem.write_to_path(path)
    soonest = min(wanted.timestamp(), expiry_of(DER)) if days > 20_000 else wanted.timestamp()
    assert soonest == first_expiry(path)


def test_the_same_as_openssl(tmp_path: Path) -> None:
    """Python's ssl has a reader of its own for authorities; both say the same."""
    path = tmp_path / "ca.pem"
    AUTHORITY.cert_pem.write_to_path(path)
    context = ssl.create_default_context(cafile=str(path))
    (told,) = context.get_ca_certs()
    assert ssl.cert_time_to_seconds(str(told["notAfter"])) == first_expiry(path)


@pytest.mark.parametrize("text", ["", "no certificate", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"])
def test_no_certificate(tmp_path: Path, text: str) -> None:
    """A file without a certificate is said to be one."""
    path = tmp_path / "x.pem"
    path.write_text(text)
    with pytest.raises(UnreadableCertificate):
        first_expiry(path)


@settings(deadline=None)
@given(st.integers(0, len(DER) - 1), st.integers(0, 255))
def test_damaged_certificates(place: int, value: int) -> None:
    """Whatever a byte becomes, there is a time or a refusal."""
    damaged = bytearray(DER)
    damaged[place] = value
    try:
        expiry_of(bytes(damaged))
    except UnreadableCertificate:
        pass


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_garbage(data: bytes) -> None:
    """What is no certificate is refused, and nothing else happens."""
    with pytest.raises(UnreadableCertificate):
        expiry_of(data)


def test_words() -> None:
    """Two weeks before its end a certificate is spoken of, and after it it is called expired."""
    day = 86400.0
    assert expiry_words(15 * day, 0.0) is None
    assert "it expires in 13 days (1970-01-14 12:00 UTC)" == expiry_words(13.5 * day, 0.0)
    assert "it expires in 1 day (1970-01-02 02:24 UTC)" == expiry_words(1.1 * day, 0.0)
    assert "it has expired (1970-01-02 00:00 UTC)" == expiry_words(day, 2 * day)
