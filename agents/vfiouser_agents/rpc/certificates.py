"""When a certificate expires: read out of its file, without a library for certificates.

Certificate ::= SEQUENCE { tbsCertificate SEQUENCE { [0] version, serialNumber, signature, issuer, validity, … }, … }
Validity    ::= SEQUENCE { notBefore Time, notAfter Time }           (RFC 5280, 4.1)
"""

from __future__ import annotations

import re
import ssl
from datetime import UTC, datetime
from pathlib import Path

#: Days before its end from which on a certificate is warned of.
WARN_DAYS = 14
#: Bytes of the largest file that is read: a bundle of the world's authorities has a fifth of that.
_MAX_SIZE = 1 << 20
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_SEQUENCE, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18
_FORMATS = {_UTC_TIME: "%y%m%d%H%M%SZ", _GENERALIZED_TIME: "%Y%m%d%H%M%SZ"}


class UnreadableCertificate(ValueError):
    """What is there is no certificate."""


def first_expiry(path: Path) -> float:
    """When the first of the certificates in a file expires.

    Args:
        path: a PEM file.

    Returns:
        Seconds since 1970.

    Raises:
        OSError: the file cannot be read.
        UnreadableCertificate: it holds no certificate.
    """
    with path.open("rb") as file:
        text = file.read(_MAX_SIZE).decode("ascii", "replace")
    found = _PEM.findall(text)
    if not found:
        raise UnreadableCertificate("it holds no certificate in PEM form")
    return min(expiry_of(_der(pem)) for pem in found)


def _der(pem: str) -> bytes:
    try:
        return ssl.PEM_cert_to_DER_cert(pem)
    except ValueError as error:
        raise UnreadableCertificate(f"its certificate is damaged: {error}") from error


def expiry_of(der: bytes) -> float:
    """When a certificate expires.

    Args:
        der: the certificate.

    Returns:
        Seconds since 1970.

    Raises:
        UnreadableCertificate: it is none.
    """
    data = memoryview(der)
    try:
        certificate, _ = _enter(data, _SEQUENCE)
        rest, _ = _enter(certificate, _SEQUENCE)
        if rest[0] == _VERSION:
            _, rest = _enter(rest)
        for _ in ("serialNumber", "signature", "issuer"):
            _, rest = _enter(rest)
        validity, _ = _enter(rest, _SEQUENCE)
        _, rest = _enter(validity)
        moment, _ = _enter(rest)
        read = datetime.strptime(bytes(moment).decode("ascii"), _FORMATS[rest[0]])  # it ends in Z
    except (IndexError, KeyError, ValueError) as error:
        raise UnreadableCertificate("its certificate is not an X.509 certificate") from error
    return read.replace(tzinfo=UTC).timestamp()


def _enter(data: memoryview, tag: int | None = None) -> tuple[memoryview, memoryview]:
    """What one DER value holds, and what follows it."""
    if tag is not None and data[0] != tag:
        raise ValueError("another type")
    length, start = data[1], 2
    if length >= 0x80:
        size = length & 0x7F
        if not 1 <= size <= 4:
            raise ValueError("no definite length")
        start += size
        length = int.from_bytes(data[2:start], "big")
    if start + length > len(data):
        raise ValueError("cut short")
    return data[start : start + length], data[start + length :]


def expiry_words(seconds: float, now: float) -> str | None:
    """What is to be said of a certificate that expires soon.

    Args:
        seconds: when it does, since 1970.
        now: the time.

    Returns:
        None if that is more than two weeks away.
    """
    days = (seconds - now) / 86400
    day = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    if days < 0:
        return f"it has expired ({day})"
    if days > WARN_DAYS:
        return None
    return f"it expires in {int(days)} day{'' if int(days) == 1 else 's'} ({day})"
