"""A small coverage-guided loop for Pythons that atheris has no wheel for: mutate, keep what reaches a new line."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

_PACKAGES = ("vfiouser_protocol", "vfiouser_agents", "vfiouser_oob")
#: Numbers at which sizes and counts change their meaning.
_EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)
_MOST = 4096


def fuzz(run: Callable[[bytes], None], corpus: Sequence[bytes], seconds: float, seed: int = 1) -> int:
    """Run a target for some time.

    Args:
        run: the target; what it raises ends the loop.
        corpus: where to begin.
        seconds: how long.
        seed: of the mutations.

    Returns:
        How often it ran.
    """
    chance = random.Random(seed)
    kept = [*corpus] or [b""]
    seen: set[tuple[Any, int]] = set()
    fresh = False

    def watch(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal fresh
        if event == "call" and not str(frame.f_globals.get("__name__", "")).startswith(_PACKAGES):
            return None
        place = (frame.f_code, frame.f_lineno)
        if place not in seen:
            seen.add(place)
            fresh = True
        return watch

    runs, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        data = kept[runs] if runs < len(corpus) else _mutated(chance.choice(kept), kept, chance)
        runs, fresh = runs + 1, False
        sys.settrace(watch)
        try:
            run(data)
        except BaseException as error:
            error.add_note(f"the input was {data!r}")
            raise
        finally:
            sys.settrace(None)
        if fresh:
            kept.append(data)
    return runs


def _mutated(data: bytes, kept: Sequence[bytes], chance: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(found) + 1)
        match chance.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << chance.randrange(8)
            case 1:
                del found[at : at + chance.randint(1, 16)]
            case 2:
                found[at:at] = chance.randbytes(chance.randint(1, 16))
            case 3:
                width = chance.choice((1, 2, 4, 8))
                number = chance.choice(_EDGES) & ((1 << 8 * width) - 1)
                found[at : at + width] = number.to_bytes(width, chance.choice(("little", "big")))
            case 4:
                found[at:at] = found[at : at + chance.randint(1, 64)]
            case _:
                other = chance.choice(kept)
                found[at:] = other[chance.randrange(len(other) + 1) :]
    return bytes(found[:_MOST])
