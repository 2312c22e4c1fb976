"""Payloads of the v2 migration generation: device features and migration data."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from construct import Array, Bytes, Int32ul, Rebuild, len_, this

from vfiouser_protocol.constants import Feature, FeatureFlags
from vfiouser_protocol.fields import U32, U64, Rest, Show, flag_names, layout_of, member_name, shown, shown_length

_INDEX_MASK = int(FeatureFlags.INDEX_MASK)
_GET = int(FeatureFlags.GET)
_SET = int(FeatureFlags.SET)
_PROBE = int(FeatureFlags.PROBE)


def _operation(flags: int) -> str:
    return f"{flag_names(flags & ~_INDEX_MASK, FeatureFlags)} {member_name(flags & _INDEX_MASK, Feature)}"


OPERATION = Show(_operation)


class DeviceFeature(NamedTuple):
    """DEVICE_FEATURE, request and reply.

    Args:
        argsz: bytes of reply payload the client takes (request), bytes of this payload (reply to GET).
        flags: `Feature` index and `FeatureFlags`.
        data: the feature's own payload, one of the Feature… classes.

    Spec: vfio-user, VFIO_USER_DEVICE_FEATURE; struct vfio_device_feature.
    """

    argsz: U32
    flags: Annotated[U32, OPERATION]
    data: Annotated[Rest, shown_length("data=")] = b""

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


class FeatureMigration(NamedTuple):
    """Data of feature MIGRATION.

    Args:
        flags: `MigrationFlags`.

    Spec: struct vfio_device_feature_migration.
    """

    flags: U64


class FeatureDeviceState(NamedTuple):
    """Data of feature MIG_DEVICE_STATE.

    Args:
        device_state: `DeviceState`.
        data_fd: unused in vfio-user, where MIG_DATA_READ and MIG_DATA_WRITE carry the data.

    Spec: struct vfio_device_feature_mig_state.
    """

    device_state: U32
    data_fd: U32 = 0


class LoggingRange(NamedTuple):
    """A range of client memory.

    Args:
        iova: DMA address.
        length: bytes.
    """

    iova: U64
    length: U64


#: Rebuilt from the ranges, so they are no fields of the tuple.
_NUM_RANGES = "num_ranges" / Rebuild(Int32ul, len_(this.ranges))
_RESERVED = "reserved" / Rebuild(Int32ul, 0)
_RANGES = Array(this.num_ranges, layout_of(LoggingRange))


class FeatureLoggingStart(NamedTuple):
    """Data of feature DMA_LOGGING_START.

    Args:
        page_size: requested (request), chosen (reply), bytes.
        ranges: what to log; nothing means everything.

    Spec: struct vfio_device_feature_dma_logging_control.
    """

    page_size: U64
    ranges: Annotated[
        tuple[LoggingRange, ...], _NUM_RANGES, _RESERVED, Array(this.num_ranges, layout_of(LoggingRange))
    ] = ()


class FeatureLoggingReport(NamedTuple):
    """Data of feature DMA_LOGGING_REPORT, request and reply.

    Args:
        iova: start of the range.
        length: bytes of the range.
        page_size: bytes per bit.
        bitmap: bit n is the page at iova + n * page_size; in the reply only.

    Spec: struct vfio_device_feature_dma_logging_report.
    """

    iova: U64
    length: U64
    page_size: U64
    bitmap: Rest = b""


class MigDataRead(NamedTuple):
    """MIG_DATA_READ request.

    Args:
        argsz: bytes of reply payload the client takes, at least 8 + size.
        size: bytes of data wanted.

    Spec: vfio-user, VFIO_USER_MIG_DATA_READ.
    """

    argsz: U32
    size: Annotated[U32, shown("size=")]


class MigDataReadReply(NamedTuple):
    """MIG_DATA_READ reply.

    Args:
        argsz: 8 + size.
        size: bytes of data returned; fewer than requested means that no more is available now.
        data: the data. libvfio-user pads its reply to the size that was wanted; what exceeds `size` is cut
            off.
    """

    argsz: U32
    size: Annotated[U32, shown("size=")]
    data: Annotated[bytes, Bytes(this.size)]


class MigDataWrite(NamedTuple):
    """MIG_DATA_WRITE request; its reply has no payload.

    Args:
        argsz: at least 8 + size.
        size: bytes of data.
        data: the data.

    Spec: vfio-user, VFIO_USER_MIG_DATA_WRITE.
    """

    argsz: U32
    size: Annotated[U32, shown("size=")]
    data: Annotated[bytes, Bytes(this.size)]
