"""SET_IRQS: every row of the DATA x ACTION table, every refusal, and where interrupts go."""

from __future__ import annotations

import errno

import pytest

from vfiouser_protocol.constants import IrqIndex
from vfiouser_protocol.errors import CommandError, LocalProtocolError
from vfiouser_protocol.irq import INTX, NO_IRQ, IrqDescription, IrqOperation, IrqSet
from vfiouser_protocol.messages import SetIrqs

MSIX = IrqIndex.MSIX
VECTORS = 8


def make(*, msi: int = 0) -> IrqSet:
    """A function with INTx, eight MSI-X vectors, ERR and REQ."""
    return IrqSet([INTX, IrqDescription(msi), IrqDescription(VECTORS), IrqDescription(1), IrqDescription(1)])


def request(flags: int, index: int, start: int, count: int, data: bytes = b"", argsz: int = 20) -> SetIrqs:
    """A request as QEMU sends it: argsz always 20."""
    return SetIrqs(argsz, flags, index, start, count, data)


def assigned(irqs: IrqSet, index: int = MSIX) -> list[object]:
    """The handles of an index, vector by vector."""
    return [irqs.handle(index, vector) for vector in range(irqs.descriptions[index].count)]


@pytest.mark.parametrize(
    ("flags", "index", "start", "count", "data", "argsz", "nfds"),
    [
        pytest.param(0x21, MSIX, 0, 1, b"", 19, 0, id="argsz 19"),
        pytest.param(0x22, MSIX, 0, 2, b"\1", 20, 0, id="BOOL too short"),
        pytest.param(0x22, MSIX, 0, 2, b"\1\1\1", 20, 0, id="BOOL too long"),
        pytest.param(0x21, 5, 0, 1, b"", 20, 0, id="index 5"),
        pytest.param(0x21, 0xFFFFFFFF, 0, 0, b"", 20, 0, id="index 2^32-1"),
        pytest.param(0x19, MSIX, 0, 1, b"", 20, 0, id="MASK and UNMASK"),
        pytest.param(0x01, MSIX, 0, 1, b"", 20, 0, id="no ACTION"),
        pytest.param(0x23, MSIX, 0, 1, b"\1", 20, 0, id="NONE and BOOL"),
        pytest.param(0x20, MSIX, 0, 1, b"", 20, 0, id="no DATA"),
        pytest.param(0x00, MSIX, 0, 1, b"", 20, 0, id="flags 0"),
        pytest.param(0x21, MSIX, VECTORS, 1, b"", 20, 0, id="start is the vector count"),
        pytest.param(0x21, MSIX, VECTORS, 0, b"", 20, 0, id="start is the vector count, count 0"),
        pytest.param(0x21, MSIX, 7, 2, b"", 20, 0, id="start + count too big"),
        pytest.param(0x21, MSIX, 1, 0xFFFFFFFF, b"", 20, 0, id="start + count wraps 32 bits"),
        pytest.param(0x21, IrqIndex.MSI, 0, 1, b"", 20, 0, id="index without vectors"),
        pytest.param(0x09, IrqIndex.ERR, 0, 1, b"", 20, 0, id="MASK on ERR"),
        pytest.param(0x11, IrqIndex.REQ, 0, 1, b"", 20, 0, id="UNMASK on REQ"),
        pytest.param(0x21, IrqIndex.ERR, 0, 2, b"", 20, 0, id="ERR with count 2"),
        pytest.param(0x24, IrqIndex.REQ, 0, 2, b"", 20, 2, id="REQ with count 2"),
        pytest.param(0x21, MSIX, 1, 0, b"", 20, 0, id="count 0 with start 1"),
        pytest.param(0x09, MSIX, 0, 0, b"", 20, 0, id="count 0 with MASK"),
        pytest.param(0x22, MSIX, 0, 0, b"", 20, 0, id="count 0 with BOOL"),
        pytest.param(0x24, MSIX, 0, 0, b"", 20, 0, id="count 0 with EVENTFD"),
        pytest.param(0x22, MSIX, 0, 1, b"\1", 20, 1, id="descriptors with BOOL"),
        pytest.param(0x21, MSIX, 0, 1, b"", 20, 1, id="descriptors with NONE"),
        pytest.param(0x21, MSIX, 0, 0, b"", 20, 1, id="descriptors with disable-all"),
        pytest.param(0x24, MSIX, 0, 2, b"", 20, 1, id="1 descriptor, count 2"),
        pytest.param(0x24, MSIX, 0, 1, b"", 20, 2, id="2 descriptors, count 1"),
    ],
)
def test_refusals(flags: int, index: int, start: int, count: int, data: bytes, argsz: int, nfds: int) -> None:
    """Each broken rule is EINVAL and changes nothing, for check and for apply."""
    irqs = make()
    irqs.apply(request(0x24, MSIX, 0, VECTORS), list("abcdefgh"))
    bad = request(flags, index, start, count, data, argsz)
    with pytest.raises(CommandError) as checked:
        irqs.check(bad, nfds)
    with pytest.raises(CommandError) as applied:
        irqs.apply(bad, ["new"] * nfds)
    assert [errno.EINVAL] * 2 == [checked.value.errno, applied.value.errno]
    assert list("abcdefgh") == assigned(irqs)
    assert not any(irqs.masked(MSIX, vector) for vector in range(VECTORS))


@pytest.mark.parametrize(
    ("flags", "count", "data", "nfds", "expected"),
    [
        (0x21, 0, b"", 0, IrqOperation.DISABLE),
        (0x21, 2, b"", 0, IrqOperation.LOOPBACK),
        (0x22, 2, b"\0\1", 0, IrqOperation.LOOPBACK),
        (0x24, 2, b"", 2, IrqOperation.ASSIGN),
        (0x24, 2, b"", 0, IrqOperation.DEASSIGN),
        (0x09, 2, b"", 0, IrqOperation.MASK),
        (0x0A, 2, b"\0\1", 0, IrqOperation.MASK),
        (0x0C, 2, b"", 2, IrqOperation.ASSIGN_MASK),
        (0x0C, 2, b"", 0, IrqOperation.DEASSIGN_MASK),
        (0x11, 2, b"", 0, IrqOperation.UNMASK),
        (0x12, 2, b"\0\1", 0, IrqOperation.UNMASK),
        (0x14, 2, b"", 2, IrqOperation.ASSIGN_UNMASK),
        (0x14, 2, b"", 0, IrqOperation.DEASSIGN_UNMASK),
        (0x61, 2, b"", 0, IrqOperation.LOOPBACK),
    ],
)
def test_every_row_of_the_table(flags: int, count: int, data: bytes, nfds: int, expected: IrqOperation) -> None:
    """Each DATA x ACTION combination is told apart; flag bit 6 is ignored."""
    assert expected == make().check(request(flags, MSIX, 0, count, data), nfds)


def test_disable_all_on_an_index_without_vectors_succeeds() -> None:
    """The kernel accepts it, and clients that stop every type in turn rely on it."""
    irqs = IrqSet([NO_IRQ] * 5)
    for index in range(5):
        assert ([], [], []) == irqs.apply(request(0x21, index, 0, 0), [])


def test_assign_again_replaces_and_drops_the_old_handle() -> None:
    """The new eventfd is used, the old one is given back for closing."""
    irqs = make()
    irqs.apply(request(0x24, MSIX, 2, 2), ["a", "b"])
    effect = irqs.apply(request(0x24, MSIX, 3, 2), ["c", "d"])
    assert (["b"], [], []) == effect
    assert [None, None, "a", "c", "d", None, None, None] == assigned(irqs)
    assert 3 == irqs.assigned(MSIX)
    assert ["a", "c", "d"] == [irqs.trigger(MSIX, vector) for vector in (2, 3, 4)]


def test_deassign_touches_only_its_range() -> None:
    """EVENTFD without descriptors takes [start, start + count) and nothing else."""
    irqs = make()
    irqs.apply(request(0x24, MSIX, 0, 4), list("abcd"))
    assert ["c", "d"] == irqs.apply(request(0x24, MSIX, 2, 2), []).dropped
    assert ["a", "b", None, None] == assigned(irqs)[:4]
    assert [] == irqs.apply(request(0x24, MSIX, 2, 2), []).dropped


def test_each_index_has_its_own_eventfds() -> None:
    """MSI-X vector 0 does not replace INTx's eventfd, and disabling MSI-X leaves it alone."""
    irqs = make(msi=2)
    irqs.apply(request(0x24, IrqIndex.INTX, 0, 1), ["intx"])
    irqs.apply(request(0x24, IrqIndex.MSI, 0, 1), ["msi"])
    irqs.apply(request(0x24, MSIX, 0, 1), ["msix"])
    assert ["msix"] == irqs.apply(request(0x21, MSIX, 0, 0), []).dropped
    assert ["intx", "msi"] == [irqs.trigger(IrqIndex.INTX, 0), irqs.trigger(IrqIndex.MSI, 0)]
    assert irqs.trigger(MSIX, 0) is None


def test_loopback_signals_configured_vectors() -> None:
    """NONE signals the whole range, BOOL the chosen ones; vectors without an eventfd are passed over."""
    irqs = make()
    irqs.apply(request(0x24, MSIX, 0, 3), list("abc"))
    assert ["a", "b", "c"] == irqs.apply(request(0x21, MSIX, 0, 4), []).signal
    assert ["a", "c"] == irqs.apply(request(0x22, MSIX, 0, 3, b"\1\0\1"), []).signal
    assert ["b"] == irqs.apply(request(0x22, MSIX, 1, 2, b"\xff\0"), []).signal
    irqs.apply(request(0x09, MSIX, 0, 1), [])
    assert ["a"] == irqs.apply(request(0x21, MSIX, 0, 1), []).signal
    assert [] == irqs.pending_vectors(MSIX)


def test_masked_vector_latches_and_delivers_once_on_unmask() -> None:
    """However often a masked vector fires, unmasking signals it once."""
    irqs = make()
    irqs.apply(request(0x24, MSIX, 0, 2), ["a", "b"])
    irqs.apply(request(0x09, MSIX, 0, 2), [])
    assert [None, None] == [irqs.trigger(MSIX, 0), irqs.trigger(MSIX, 0)]
    assert irqs.pending(MSIX, 0)
    assert [0] == irqs.pending_vectors(MSIX)
    assert ["a"] == irqs.apply(request(0x11, MSIX, 0, 2), []).signal
    assert not irqs.pending(MSIX, 0)
    assert "a" == irqs.trigger(MSIX, 0)


def test_bool_data_chooses_what_is_masked() -> None:
    """MASK and UNMASK with BOOL act on the vectors whose byte is not 0."""
    irqs = make()
    irqs.apply(request(0x0A, MSIX, 1, 3, b"\1\0\1"), [])
    assert [0, 1, 0, 1] == [irqs.masked(MSIX, vector) for vector in range(4)]
    irqs.apply(request(0x12, MSIX, 1, 3, b"\0\0\1"), [])
    assert [0, 1, 0, 0] == [irqs.masked(MSIX, vector) for vector in range(4)]


def test_without_eventfd_nothing_is_written() -> None:
    """Before the client uses an index its interrupts are dropped, not kept for later."""
    irqs = make()
    assert irqs.trigger(MSIX, 0) is None
    assert [] == irqs.apply(request(0x24, MSIX, 0, 1), ["a"]).signal


def test_missing_eventfd_latches_once_the_index_is_in_use() -> None:
    """QEMU takes eventfds away to mask and to re-arm; what fires meanwhile comes with the next assignment."""
    irqs = make()
    irqs.apply(request(0x24, MSIX, 0, 1), [])
    assert irqs.trigger(MSIX, 1) is None
    effect = irqs.apply(request(0x24, MSIX, 0, 2), ["a", "b"])
    assert ["b"] == effect.signal
    irqs.apply(request(0x21, MSIX, 0, 0), [])
    assert irqs.trigger(MSIX, 0) is None
    assert ["c"] == irqs.apply(request(0x24, MSIX, 0, 1), ["c"]).signal
    irqs.apply(request(0x21, MSIX, 0, 0), [])
    irqs.trigger(MSIX, 0)
    irqs.discard_pending(MSIX)
    assert [] == irqs.apply(request(0x24, MSIX, 0, 1), ["d"]).signal


def test_qemu_enables_msix() -> None:
    """Four vectors in chunks of two, after the count-1 message without a descriptor, as QEMU sends them."""
    irqs = make()
    irqs.apply(request(0x24, IrqIndex.INTX, 0, 1), ["intx"])
    assert ["intx"] == irqs.apply(request(0x21, IrqIndex.INTX, 0, 0), []).dropped
    for start, count, handles in ((0, 1, []), (0, 2, ["a", "b"]), (2, 2, ["c", "d"])):
        assert ([], [], []) == irqs.apply(request(0x24, MSIX, start, count), handles)
    assert ["a", "b", "c", "d"] == [irqs.trigger(MSIX, vector) for vector in range(4)]


def test_intx_masks_itself_and_repeats_while_asserted() -> None:
    """One event per UNMASK while the line stays high; none after it fell."""
    irqs = make()
    unmask = request(0x11, IrqIndex.INTX, 0, 1)
    irqs.apply(request(0x24, IrqIndex.INTX, 0, 1), ["intx"])
    assert "intx" == irqs.set_level(True)
    assert irqs.masked(IrqIndex.INTX, 0)
    assert irqs.set_level(True) is None
    assert irqs.pending(IrqIndex.INTX, 0)
    assert ["intx"] == irqs.apply(unmask, []).signal
    assert ["intx"] == irqs.apply(unmask, []).signal
    assert irqs.set_level(False) is None
    assert [] == irqs.apply(unmask, []).signal
    assert "intx" == irqs.set_level(True)
    irqs.set_level(False)
    assert irqs.set_level(True) is None
    assert ["intx"] == irqs.apply(unmask, []).signal


def test_intx_asserted_before_its_eventfd_fires_on_assignment() -> None:
    """The level is the device's: an eventfd that comes late, or comes back after MSI-X, is signalled at
    once."""
    irqs = make()
    assert irqs.set_level(True) is None
    assert ["first"] == irqs.apply(request(0x24, IrqIndex.INTX, 0, 1), ["first"]).signal
    assert ["first"] == irqs.apply(request(0x21, IrqIndex.INTX, 0, 0), []).dropped
    assert ["second"] == irqs.apply(request(0x24, IrqIndex.INTX, 0, 1), ["second"]).signal
    assert ["second"] == irqs.clear()
    assert ["third"] == irqs.apply(request(0x24, IrqIndex.INTX, 0, 1), ["third"]).signal


def test_intx_edge_is_latched_while_automasked() -> None:
    """trigger() on INTx behaves as an edge: one more event after the UNMASK, then none."""
    irqs = make()
    unmask = request(0x11, IrqIndex.INTX, 0, 1)
    irqs.apply(request(0x24, IrqIndex.INTX, 0, 1), ["intx"])
    assert ["intx", None] == [irqs.trigger(IrqIndex.INTX, 0), irqs.trigger(IrqIndex.INTX, 0)]
    assert ["intx"] == irqs.apply(unmask, []).signal
    assert [] == irqs.apply(unmask, []).signal


def test_intx_without_automask_fires_on_each_rise() -> None:
    """A function that announces no automask signals each assertion and never repeats by itself."""
    irqs = IrqSet([IrqDescription(1)] + [NO_IRQ] * 4)
    irqs.apply(request(0x24, IrqIndex.INTX, 0, 1), ["intx"])
    assert ["intx", None, None, "intx"] == [irqs.set_level(level) for level in (True, True, False, True)]
    assert [] == irqs.apply(request(0x11, IrqIndex.INTX, 0, 1), []).signal
    assert IrqSet([NO_IRQ] * 5).set_level(True) is None


def test_mask_and_unmask_eventfds_are_kept_and_given_back() -> None:
    """0x0c and 0x14 with descriptors are stored to be watched; replaced, removed and cleared ones are
    dropped."""
    irqs = make()
    assert ([], [], ["u"]) == irqs.apply(request(0x14, IrqIndex.INTX, 0, 1), ["u"])
    assert ([], [], ["m"]) == irqs.apply(request(0x0C, MSIX, 3, 1), ["m"])
    assert ["u", "m"] == [irqs.unmask_handle(IrqIndex.INTX, 0), irqs.mask_handle(MSIX, 3)]
    assert (["u"], [], ["v"]) == irqs.apply(request(0x14, IrqIndex.INTX, 0, 1), ["v"])
    assert (["m"], [], []) == irqs.apply(request(0x0C, MSIX, 2, 2), [])
    assert ["v"] == irqs.apply(request(0x21, IrqIndex.INTX, 0, 0), []).dropped
    irqs.apply(request(0x14, MSIX, 0, 2), ["x", "y"])
    assert ["x", "y"] == irqs.clear()
    assert irqs.unmask_handle(MSIX, 0) is None


def test_watcher_can_mask_and_unmask() -> None:
    """mask() and unmask() are what a written mask or unmask eventfd stands for."""
    irqs = make()
    irqs.apply(request(0x24, MSIX, 0, 1), ["a"])
    irqs.mask(MSIX, 0)
    assert irqs.trigger(MSIX, 0) is None
    assert "a" == irqs.unmask(MSIX, 0)
    assert irqs.unmask(MSIX, 0) is None


def test_clear_forgets_the_client() -> None:
    """After clear() no handle, mask or latch is left."""
    irqs = make()
    irqs.apply(request(0x24, IrqIndex.INTX, 0, 1), ["i"])
    irqs.apply(request(0x24, MSIX, 0, 2), ["a", "b"])
    irqs.apply(request(0x24, IrqIndex.ERR, 0, 1), ["e"])
    irqs.apply(request(0x09, MSIX, 0, 2), [])
    irqs.trigger(MSIX, 0)
    assert ["i", "a", "b", "e"] == irqs.clear()
    assert [] == irqs.clear()
    assert not irqs.masked(MSIX, 0)
    assert [] == irqs.apply(request(0x24, MSIX, 0, 1), ["c"]).signal


@pytest.mark.parametrize(("index", "vector"), [(MSIX, VECTORS), (MSIX, -1), (9, 0), (IrqIndex.MSI, 0)])
def test_device_cannot_raise_what_it_does_not_have(index: int, vector: int) -> None:
    """A vector that the function does not have is a bug of the model, said by name."""
    with pytest.raises(LocalProtocolError, match=f"IRQ index {index} has no vector {vector}"):
        make().trigger(index, vector)
