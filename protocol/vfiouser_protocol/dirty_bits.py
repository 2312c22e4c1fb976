"""Bitmaps of pages as numbers and as bytes: made coarser, made finer, cut and put together."""

from __future__ import annotations


def fold(bitmap: bytes, factor: int) -> bytes:
    """Make each bit stand for `factor` former ones: 1 if any of them is.

    Args:
        bitmap: a bitmap of whole bytes.
        factor: a power of two.

    Returns:
        The bitmap for pages `factor` times as large, padded to whole bytes.
    """
    while factor > 1:
        if len(bitmap) % 2:
            bitmap += b"\0"
        low = int.from_bytes(bitmap[0::2].translate(_FOLD_LOW), "little")
        high = int.from_bytes(bitmap[1::2].translate(_FOLD_HIGH), "little")
        bitmap = (low | high).to_bytes(len(bitmap) // 2, "little")
        factor >>= 1
    return bitmap


def replicate(bitmap: bytes, factor: int) -> bytes:
    """Repeat each bit `factor` times: the same dirt, in pages `factor` times smaller.

    Args:
        bitmap: a bitmap of whole bytes.
        factor: a power of two.

    Returns:
        A bitmap `factor` times as long.
    """
    while factor > 1:
        doubled = bytearray(2 * len(bitmap))
        doubled[0::2] = bitmap.translate(_DOUBLE_LOW)
        doubled[1::2] = bitmap.translate(_DOUBLE_HIGH)
        bitmap = bytes(doubled)
        factor >>= 1
    return bitmap


def _fold_nibble(byte: int) -> int:
    return sum(1 << bit for bit in range(4) if byte >> 2 * bit & 3)


def _double_nibble(nibble: int) -> int:
    return sum(3 << 2 * bit for bit in range(4) if nibble >> bit & 1)


_FOLD_LOW = bytes(_fold_nibble(byte) for byte in range(256))
_FOLD_HIGH = bytes(_fold_nibble(byte) << 4 for byte in range(256))
_DOUBLE_LOW = bytes(_double_nibble(byte & 15) for byte in range(256))
_DOUBLE_HIGH = bytes(_double_nibble(byte >> 4) for byte in range(256))


def cut(bits: int, position: int, end: int) -> tuple[int, int]:
    """Keep the bits that come to lie in [0, `end`) when bit 0 is at `position`.

    Args:
        bits: a bitmap as a number.
        position: where bit 0 is; may be negative.
        end: the first position that is cut off.

    Returns:
        The bits that are left, and the position of their bit 0.
    """
    if position < 0:
        return bits >> -position & ((1 << end) - 1 if end < bits.bit_length() else -1), 0
    if position + bits.bit_length() > end:
        bits = bits & ((1 << end - position) - 1) if end > position else 0
    return bits, position


def replicate_bits(bits: int, factor: int) -> int:
    """Repeat each bit `factor` times, as `replicate` does.

    Args:
        bits: a bitmap as a number.
        factor: a power of two.
    """
    return int.from_bytes(replicate(bits.to_bytes((bits.bit_length() + 7) // 8, "little"), factor), "little")


def gather_bits(bits: int, position: int, factor: int) -> tuple[int, int]:
    """OR groups of `factor` bits, counted from position 0, into one bit each.

    Args:
        bits: a bitmap as a number, not 0.
        position: where bit 0 is; at least 0.
        factor: a power of two.

    Returns:
        The groups' bits, and the position of bit 0, counted in groups.
    """
    if factor == 1:
        return bits, position
    lowest = (position + (bits & -bits).bit_length() - 1) // factor
    highest = (position + bits.bit_length() - 1) // factor
    if highest - lowest <= 1:
        # Also what keeps the padding below small: here a group may be far larger than all of `bits`.
        return (3 if highest > lowest else 1), lowest
    bits <<= position % factor
    return (
        int.from_bytes(fold(bits.to_bytes((bits.bit_length() + 7) // 8, "little"), factor), "little"),
        position // factor,
    )


def put(bitmap: bytearray, bits: int, position: int) -> None:
    """OR bits into a bitmap that is long enough for them.

    Args:
        bitmap: changed in place.
        bits: a bitmap as a number.
        position: the bit of `bitmap` that bit 0 goes to.
    """
    start = position >> 3
    bits <<= position & 7
    stop = start + (bits.bit_length() + 7) // 8
    bits |= int.from_bytes(bitmap[start:stop], "little")
    bitmap[start:stop] = bits.to_bytes(stop - start, "little")
