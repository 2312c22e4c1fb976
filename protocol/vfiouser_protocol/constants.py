"""Every number of the vfio-user wire, named as in the specification and in linux/vfio.h.

Nothing here has behaviour: the tables that give these numbers a meaning are in `commands`, `irq`, `regions` and `dma`.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

PROTOCOL_MAJOR = 0
#: Highest minor version that this implementation speaks; libvfio-user's samples go up to 2.
PROTOCOL_MINOR = 2

HEADER_SIZE = 16


class Command(IntEnum):
    """Message commands, of both migration generations."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    DIRTY_PAGES = 14
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class MessageType(IntEnum):
    """The low four bits of the header's flags; 2 to 15 are undefined."""

    COMMAND = 0
    REPLY = 1


class HeaderFlags(IntFlag):
    """Bits of the header's flags field."""

    TYPE_MASK = 0x0F
    NO_REPLY = 0x10
    ERROR = 0x20


class DmaMapFlags(IntFlag):
    """DMA_MAP flags; MMAP and FILE_IO are libvfio-user's extension for how the server should use the fd."""

    READ = 1 << 0
    WRITE = 1 << 1
    MMAP = 1 << 2
    FILE_IO = 1 << 3


class DmaUnmapFlags(IntFlag):
    """DMA_UNMAP flags of the v1 generation, still implemented by libvfio-user."""

    GET_DIRTY_BITMAP = 1 << 0
    ALL = 1 << 1


class DeviceInfoFlags(IntFlag):
    """DEVICE_GET_INFO flags (VFIO_DEVICE_FLAGS_*)."""

    RESET = 1 << 0
    PCI = 1 << 1


class RegionFlags(IntFlag):
    """DEVICE_GET_REGION_INFO flags (VFIO_REGION_INFO_FLAG_*)."""

    READ = 1 << 0
    WRITE = 1 << 1
    MMAP = 1 << 2
    CAPS = 1 << 3


class RegionIndex(IntEnum):
    """VFIO_PCI_*_REGION_INDEX; MIGRATION is where the v1 generation puts its region."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8
    MIGRATION = 9


#: Regions that every PCI function has an index for, implemented or not.
PCI_NUM_REGIONS = 9


class RegionCapId(IntEnum):
    """Capability ids of the region info chain (VFIO_REGION_INFO_CAP_*)."""

    SPARSE_MMAP = 1
    TYPE = 2
    MSIX_MAPPABLE = 3
    NVLINK2_SSATGT = 4
    NVLINK2_LNKSPD = 5


REGION_TYPE_PCI_VENDOR = 0x8000_0000
REGION_TYPE_MIGRATION = 3
REGION_SUBTYPE_MIGRATION = 1


class IrqIndex(IntEnum):
    """VFIO_PCI_*_IRQ_INDEX."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


PCI_NUM_IRQS = 5


class IrqInfoFlags(IntFlag):
    """DEVICE_GET_IRQ_INFO flags (VFIO_IRQ_INFO_*)."""

    EVENTFD = 1 << 0
    MASKABLE = 1 << 1
    AUTOMASKED = 1 << 2
    NORESIZE = 1 << 3


class IrqSetFlags(IntFlag):
    """DEVICE_SET_IRQS flags (VFIO_IRQ_SET_*): one DATA bit and one ACTION bit."""

    DATA_NONE = 1 << 0
    DATA_BOOL = 1 << 1
    DATA_EVENTFD = 1 << 2
    ACTION_MASK = 1 << 3
    ACTION_UNMASK = 1 << 4
    ACTION_TRIGGER = 1 << 5


class DirtyPagesFlags(IntFlag):
    """DIRTY_PAGES flags (v1 generation): exactly one is set."""

    START = 1 << 0
    STOP = 1 << 1
    GET_BITMAP = 1 << 2


class FeatureFlags(IntFlag):
    """DEVICE_FEATURE flags (VFIO_DEVICE_FEATURE_*)."""

    INDEX_MASK = 0xFFFF
    GET = 1 << 16
    SET = 1 << 17
    PROBE = 1 << 18


class Feature(IntEnum):
    """Device features that vfio-user carries; the kernel's other indices have no meaning on the wire."""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    MIG_DATA_SIZE = 9


class MigrationFlags(IntFlag):
    """What feature MIGRATION reports (VFIO_MIGRATION_*)."""

    STOP_COPY = 1 << 0
    P2P = 1 << 1
    PRE_COPY = 1 << 2


class DeviceState(IntEnum):
    """States of the v2 generation (VFIO_DEVICE_STATE_*)."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


class DeviceStateV1(IntFlag):
    """Bits of device_state in the v1 migration region (VFIO_DEVICE_STATE_V1_*)."""

    RUNNING = 1 << 0
    SAVING = 1 << 1
    RESUMING = 1 << 2


class IoFdType(IntEnum):
    """Sub-region types of GET_REGION_IO_FDS."""

    IOEVENTFD = 0
    IOREGIONFD = 1
    IOEVENTFD_SHADOW = 2
