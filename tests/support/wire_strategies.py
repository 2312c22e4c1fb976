"""Hypothesis strategies for messages of the wire: every payload class, consistent in itself."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from vfiouser_protocol import messages as m

u16 = st.integers(0, (1 << 16) - 1)
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
data = st.binary(max_size=64)


def _of(cls: type, *fields: Any) -> Any:
    """Payloads of exactly these fields; st.builds would guess the optional ones too."""
    return st.tuples(*fields).map(lambda values: cls(*values))


@st.composite
def _counted(draw: Any, cls: type, *first: Any) -> Any:
    """A payload of `first` fields, then the size of its data, then the data."""
    content = draw(data)
    return cls(*[draw(field) for field in first], len(content), content)


_write = st.builds(
    lambda offset, region, content: m.RegionWrite(offset, region, len(content), content),
    u64,
    u32,
    st.binary(max_size=8),
)
_short_entry = _of(m.IoFdEntry, u64, u64, u32, u32, u32, u64)
_long_entry = _of(m.IoFdEntry, u64, u64, u32, u32, u32, u64, u32, u64)


def _io_fds(stride: int, entry: Any) -> Any:
    return st.builds(
        lambda index, entries: m.RegionIoFds(16 + stride * len(entries), 0, index, len(entries), tuple(entries)),
        u32,
        st.lists(entry, max_size=4),
    )


_clear_bit_0 = u32.map(lambda flags: flags & ~1)
_set_bit_0 = u32.map(lambda flags: flags | 1)

#: A strategy for every payload.
MESSAGES: dict[type, Any] = {
    m.Version: _of(m.Version, u16, u16, data),
    m.Empty: st.just(m.Empty()),
    m.DeviceInfo: _of(m.DeviceInfo, u32, u32, u32, u32),
    m.RegionInfo: _of(m.RegionInfo, u32, u32, u32, u32, u64, u64, data),
    m.RegionIoFds: st.one_of(_io_fds(40, _short_entry), _io_fds(48, _long_entry)),
    m.IrqInfo: _of(m.IrqInfo, u32, u32, u32, u32),
    m.SetIrqs: _of(m.SetIrqs, u32, u32, u32, u32, u32, data),
    m.RegionRead: _of(m.RegionRead, u64, u32, u32),
    m.RegionReadReply: _counted(m.RegionReadReply, u64, u32),
    m.RegionWrite: _counted(m.RegionWrite, u64, u32),
    m.RegionWriteReply: _of(m.RegionWriteReply, u64, u32, u32),
    m.RegionWriteMulti: st.lists(_write, max_size=5).map(lambda writes: m.RegionWriteMulti(tuple(writes))),
    m.RegionWriteMultiReply: _of(m.RegionWriteMultiReply, u64),
    m.DmaMap: _of(m.DmaMap, u32, u32, u64, u64, u64),
    m.DmaUnmap: st.one_of(
        _of(m.DmaUnmap, u32, _clear_bit_0, u64, u64),
        _of(m.DmaUnmap, u32, _set_bit_0, u64, u64, u64, u64, data),
    ),
    m.DmaRead: _of(m.DmaRead, u64, u64),
    m.DmaReadReply: _counted(m.DmaReadReply, u64),
    m.DmaWrite: _counted(m.DmaWrite, u64),
    m.DmaWriteReply: _of(m.DmaWriteReply, u64, u64),
    m.NarrowDmaReadReply: _counted(m.NarrowDmaReadReply, u64),
    m.NarrowDmaWrite: _counted(m.NarrowDmaWrite, u64),
    m.DirtyPages: st.one_of(
        _of(m.DirtyPages, u32, u32.map(lambda flags: flags & ~4)),
        _of(m.DirtyPages, u32, u32.map(lambda flags: flags | 4), u64, u64, u64, u64, data),
    ),
    m.DeviceFeature: _of(m.DeviceFeature, u32, u32, data),
    m.FeatureMigration: _of(m.FeatureMigration, u64),
    m.FeatureDeviceState: _of(m.FeatureDeviceState, u32, u32),
    m.FeatureLoggingStart: st.builds(
        lambda page_size, ranges: m.FeatureLoggingStart(page_size, tuple(ranges)),
        u64,
        st.lists(_of(m.LoggingRange, u64, u64), max_size=4),
    ),
    m.FeatureLoggingReport: _of(m.FeatureLoggingReport, u64, u64, u64, data),
    m.MigDataRead: _of(m.MigDataRead, u32, u32),
    m.MigDataReadReply: _counted(m.MigDataReadReply, u32),
    m.MigDataWrite: _counted(m.MigDataWrite, u32),
}

any_message = st.one_of(*MESSAGES.values())
