"""The state of a VM's functions as one piece: what is packed comes out again, and nothing else does."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_oob.vm.bundle import BundleError, FunctionState, pack, unpack

STATES = st.builds(
    FunctionState,
    st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,62}\Z"),
    st.binary(max_size=200),
    st.booleans(),
    st.binary(max_size=50),
    st.binary(max_size=256),
)
FULL = FunctionState("f0", b"stream", False, b"registers", b"memory")


@given(st.lists(STATES, max_size=3, unique_by=lambda state: state.name))
def test_what_is_packed_comes_out(states: list[FunctionState]) -> None:
    """Whatever is in it."""
    assert {state.name: state for state in states} == unpack(pack(states), [state.name for state in states])


def test_every_damage_but_to_the_stream_is_found() -> None:
    """Each byte is guarded, by this or by the stream's own checksum; cut off anywhere, it is refused."""
    bundle = pack([FULL])
    stream = bundle.index(b"stream")
    for place in range(len(bundle)):
        damaged = bytearray(bundle)
        damaged[place] ^= 1
        if stream <= place < stream + len(b"stream"):
            assert unpack(damaged, ["f0"])["f0"].stream != b"stream"
            continue
        with pytest.raises(BundleError):
            unpack(damaged, ["f0"])
        with pytest.raises(BundleError):
            unpack(bundle[:place], ["f0"])


@given(st.binary(max_size=500), st.integers())
def test_rubbish_is_refused(rubbish: bytes, seed: int) -> None:
    """Also behind a good beginning; nothing is allocated that is not there."""
    source = random.Random(seed)
    good = pack([FULL, FULL])
    for bundle in (rubbish, good[: source.randrange(len(good))] + rubbish):
        with pytest.raises(BundleError):
            unpack(bundle, ["f0", "f1"])
