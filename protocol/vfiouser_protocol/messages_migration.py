"""Payloads of the v2 migration generation: device features and migration data."""

from __future__ import annotations

from typing import NamedTuple

from construct import Array, Bytes, GreedyBytes, Int32ul, Int64ul, Rebuild, Struct, len_, this

from vfiouser_protocol.constants import FeatureFlags

_INDEX_MASK = int(FeatureFlags.INDEX_MASK)
_GET = int(FeatureFlags.GET)
_SET = int(FeatureFlags.SET)
_PROBE = int(FeatureFlags.PROBE)

DEVICE_FEATURE_LAYOUT = Struct("argsz" / Int32ul, "flags" / Int32ul, "data" / GreedyBytes)


class DeviceFeature(NamedTuple):
    """DEVICE_FEATURE, request and reply.

    Args:
        argsz: bytes of reply payload the client takes (request), bytes of this payload (reply to GET).
        flags: `Feature` index and `FeatureFlags`.
        data: the feature's own payload, one of the Feature… classes.

    Spec: vfio-user, VFIO_USER_DEVICE_FEATURE; struct vfio_device_feature.
    """

    argsz: int
    flags: int
    data: bytes = b""

    # `index` of a tuple is a method; here it has to be the feature's number.
    @property
    def index(self) -> int:  # type: ignore[override]
        """The feature's number."""
        return self.flags & _INDEX_MASK

    @property
    def get(self) -> bool:
        """Whether GET is asked for."""
        return bool(self.flags & _GET)

    @property
    def set(self) -> bool:
        """Whether SET is asked for."""
        return bool(self.flags & _SET)

    @property
    def probe(self) -> bool:
        """Whether this only asks for what is supported."""
        return bool(self.flags & _PROBE)


FEATURE_MIGRATION_LAYOUT = Struct("flags" / Int64ul)


class FeatureMigration(NamedTuple):
    """Data of feature MIGRATION.

    Args:
        flags: `MigrationFlags`.

    Spec: struct vfio_device_feature_migration.
    """

    flags: int


FEATURE_DEVICE_STATE_LAYOUT = Struct("device_state" / Int32ul, "data_fd" / Int32ul)


class FeatureDeviceState(NamedTuple):
    """Data of feature MIG_DEVICE_STATE.

    Args:
        device_state: `DeviceState`.
        data_fd: unused in vfio-user, where MIG_DATA_READ and MIG_DATA_WRITE carry the data.

    Spec: struct vfio_device_feature_mig_state.
    """

    device_state: int
    data_fd: int = 0


LOGGING_RANGE_LAYOUT = Struct("iova" / Int64ul, "length" / Int64ul)


class LoggingRange(NamedTuple):
    """A range of client memory.

    Args:
        iova: DMA address.
        length: bytes.
    """

    iova: int
    length: int


FEATURE_LOGGING_START_LAYOUT = Struct(
    "page_size" / Int64ul,
    "num_ranges" / Rebuild(Int32ul, len_(this.ranges)),
    "reserved" / Rebuild(Int32ul, 0),
    "ranges" / Array(this.num_ranges, LOGGING_RANGE_LAYOUT),
)


class FeatureLoggingStart(NamedTuple):
    """Data of feature DMA_LOGGING_START.

    Args:
        page_size: wished for (request), chosen (reply), bytes.
        ranges: what to log; nothing means everything.

    Spec: struct vfio_device_feature_dma_logging_control.
    """

    page_size: int
    ranges: tuple[LoggingRange, ...] = ()


FEATURE_LOGGING_REPORT_LAYOUT = Struct(
    "iova" / Int64ul, "length" / Int64ul, "page_size" / Int64ul, "bitmap" / GreedyBytes
)


class FeatureLoggingReport(NamedTuple):
    """Data of feature DMA_LOGGING_REPORT, request and reply.

    Args:
        iova: start of the range.
        length: bytes of the range.
        page_size: bytes per bit.
        bitmap: bit n is the page at iova + n * page_size; in the reply only.

    Spec: struct vfio_device_feature_dma_logging_report.
    """

    iova: int
    length: int
    page_size: int
    bitmap: bytes = b""


MIG_DATA_READ_LAYOUT = Struct("argsz" / Int32ul, "size" / Int32ul)
MIG_DATA_LAYOUT = Struct("argsz" / Int32ul, "size" / Int32ul, "data" / Bytes(this.size))


class MigDataRead(NamedTuple):
    """MIG_DATA_READ request.

    Args:
        argsz: bytes of reply payload the client takes, at least 8 + size.
        size: bytes of data wanted.

    Spec: vfio-user, VFIO_USER_MIG_DATA_READ.
    """

    argsz: int
    size: int


class MigDataReadReply(NamedTuple):
    """MIG_DATA_READ reply.

    Args:
        argsz: 8 + size.
        size: bytes of data returned; fewer than wanted means that there is no more for now.
        data: the data. libvfio-user pads its reply to the size that was wanted; what exceeds `size` is cut
            off.
    """

    argsz: int
    size: int
    data: bytes


class MigDataWrite(NamedTuple):
    """MIG_DATA_WRITE request; its reply has no payload.

    Args:
        argsz: at least 8 + size.
        size: bytes of data.
        data: the data.

    Spec: vfio-user, VFIO_USER_MIG_DATA_WRITE.
    """

    argsz: int
    size: int
    data: bytes
