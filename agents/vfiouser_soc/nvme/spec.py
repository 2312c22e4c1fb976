"""Numbers of NVM Express 1.4 that the controller model uses, named as in the specification."""

from __future__ import annotations

from enum import IntEnum, IntFlag

VERSION_1_4 = 0x0001_0400

SQE_SIZE = 64
CQE_SIZE = 16
IDENTIFY_SIZE = 4096
BROADCAST_NSID = 0xFFFF_FFFF

#: Layout of BAR0: one page each for the registers and the doorbells, then MSI-X table and pending bits.
REGISTERS_OFFSET = 0x0000
DOORBELLS_OFFSET = 0x1000
MSIX_TABLE_OFFSET = 0x2000
MSIX_PBA_OFFSET = 0x3000
BAR0_SIZE = 0x4000
PAGE = 0x1000


class ControllerRegister(IntEnum):
    """Offsets of the controller registers (NVMe 1.4, 3.1)."""

    CAP = 0x00
    VS = 0x08
    INTMS = 0x0C
    INTMC = 0x10
    CC = 0x14
    CSTS = 0x1C
    AQA = 0x24
    ASQ = 0x28
    ACQ = 0x30
    CMBLOC = 0x38
    CMBSZ = 0x3C
    CMBMSC = 0x50
    CMBSTS = 0x58


class Cc(IntFlag):
    """Single bits and field masks of CC (NVMe 1.4, 3.1.5)."""

    EN = 1 << 0
    CSS = 7 << 4
    MPS = 15 << 7
    AMS = 7 << 11
    SHN = 3 << 14
    IOSQES = 15 << 16
    IOCQES = 15 << 20


CC_MPS_SHIFT = 7
CC_IOSQES_SHIFT = 16
CC_IOCQES_SHIFT = 20


class Csts(IntFlag):
    """Bits of CSTS (NVMe 1.4, 3.1.6)."""

    RDY = 1 << 0
    CFS = 1 << 1
    SHST_OCCURRING = 1 << 2
    SHST_COMPLETE = 2 << 2
    SHST = 3 << 2


class CmbMsc(IntFlag):
    """Bits of CMBMSC (NVMe 1.4, 3.1.16); the base address is in bits 63:12."""

    CRE = 1 << 0
    CMSE = 1 << 1


class AdminOpcode(IntEnum):
    """Admin commands that the model executes (NVMe 1.4, figure 139)."""

    DELETE_SQ = 0x00
    CREATE_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_CQ = 0x04
    CREATE_CQ = 0x05
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT_REQUEST = 0x0C


class IoOpcode(IntEnum):
    """NVM commands that the model executes (NVMe 1.4, figure 346)."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    COMPARE = 0x05
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09
    VERIFY = 0x0C


class StatusCode(IntEnum):
    """Status code type in bits 10:8, status code in bits 7:0 (NVMe 1.4, 4.6.1)."""

    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    COMMAND_ID_CONFLICT = 0x003
    DATA_TRANSFER_ERROR = 0x004
    INTERNAL_ERROR = 0x006
    ABORT_REQUESTED = 0x007
    ABORTED_SQ_DELETION = 0x008
    INVALID_NAMESPACE = 0x00B
    COMMAND_SEQUENCE_ERROR = 0x00C
    INVALID_PRP_OFFSET = 0x013
    LBA_OUT_OF_RANGE = 0x080
    CAPACITY_EXCEEDED = 0x081

    COMPLETION_QUEUE_INVALID = 0x100
    INVALID_QUEUE_ID = 0x101
    INVALID_QUEUE_SIZE = 0x102
    ASYNC_EVENT_LIMIT = 0x105
    INVALID_VECTOR = 0x108
    INVALID_LOG_PAGE = 0x109
    INVALID_QUEUE_DELETION = 0x10C
    FEATURE_NOT_SAVEABLE = 0x10D
    FEATURE_NOT_CHANGEABLE = 0x10E
    FEATURE_NOT_NAMESPACE_SPECIFIC = 0x10F

    WRITE_FAULT = 0x280
    UNRECOVERED_READ = 0x281
    COMPARE_FAILURE = 0x285


#: Bits of the 15-bit status field of a completion above status code and type.
STATUS_MORE = 1 << 13
STATUS_DNR = 1 << 14

#: Failures that may go away by themselves; every other one carries Do Not Retry.
RETRYABLE = frozenset(
    {
        StatusCode.DATA_TRANSFER_ERROR,
        StatusCode.INTERNAL_ERROR,
        StatusCode.ABORT_REQUESTED,
        StatusCode.ABORTED_SQ_DELETION,
        StatusCode.WRITE_FAULT,
        StatusCode.UNRECOVERED_READ,
    }
)


class FeatureId(IntEnum):
    """Feature identifiers (NVMe 1.4, figure 271)."""

    ARBITRATION = 0x01
    POWER_MANAGEMENT = 0x02
    TEMPERATURE_THRESHOLD = 0x04
    ERROR_RECOVERY = 0x05
    VOLATILE_WRITE_CACHE = 0x06
    NUMBER_OF_QUEUES = 0x07
    INTERRUPT_COALESCING = 0x08
    INTERRUPT_VECTOR = 0x09
    WRITE_ATOMICITY = 0x0A
    ASYNC_EVENT_CONFIG = 0x0B
    TIMESTAMP = 0x0E


class LogPage(IntEnum):
    """Log page identifiers (NVMe 1.4, figure 191)."""

    ERROR = 0x01
    SMART = 0x02
    FIRMWARE_SLOT = 0x03
    CHANGED_NAMESPACES = 0x04
    COMMANDS_SUPPORTED = 0x05


class Cns(IntEnum):
    """Structures that Identify can return (NVMe 1.4, figure 244)."""

    NAMESPACE = 0x00
    CONTROLLER = 0x01
    ACTIVE_NAMESPACES = 0x02
    NAMESPACE_DESCRIPTORS = 0x03
    ALLOCATED_NAMESPACES = 0x10
    ALLOCATED_NAMESPACE = 0x11
    NAMESPACE_CONTROLLERS = 0x12
    SUBSYSTEM_CONTROLLERS = 0x13


class EventType(IntEnum):
    """Asynchronous event types (NVMe 1.4, figure 146)."""

    ERROR = 0
    SMART = 1
    NOTICE = 2


class ErrorEvent(IntEnum):
    """Information of error events (NVMe 1.4, figure 147)."""

    INVALID_DOORBELL_REGISTER = 0
    INVALID_DOORBELL_VALUE = 1


class SmartEvent(IntEnum):
    """Information of SMART events (NVMe 1.4, figure 148)."""

    RELIABILITY = 0
    TEMPERATURE = 1
    SPARE = 2


class NoticeEvent(IntEnum):
    """Information of notices (NVMe 1.4, figure 149)."""

    NAMESPACE_CHANGED = 0


class NvmeError(Exception):
    """A command fails with an NVMe status.

    Args:
        status: the status code to complete the command with.
        reason: what came and what was allowed, for the log.
        location: byte (bits 7:0) and bit (bits 10:8) of the field at fault, for the error log; 0xFFFF is
            unknown.
        lba: first logical block concerned, for the error log.
    """

    def __init__(self, status: StatusCode, reason: str, *, location: int = 0xFFFF, lba: int = 0) -> None:
        super().__init__(f"{status.name}: {reason}")
        self.status = status
        self.location = location
        self.lba = lba

    @property
    def field(self) -> int:
        """The 15-bit status field that goes into the completion."""
        return status_field(self.status)


def status_field(status: StatusCode) -> int:
    """Make the 15-bit status field of a completion.

    Args:
        status: code and type.

    Returns:
        Code and type, Do Not Retry where a retry is of no use, and More since every failure is in the error
        log.
    """
    if status is StatusCode.SUCCESS:
        return 0
    return status | STATUS_MORE | (0 if status in RETRYABLE else STATUS_DNR)
