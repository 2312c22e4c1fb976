"""Limits, with the precedent for each: what we accept, and what others are known to accept or send."""

from __future__ import annotations

from dataclasses import dataclass

#: Data bytes of one REGION_*/DMA_*/MIG_DATA_* transfer; the default of the specification and of every implementation.
DEFAULT_MAX_DATA_XFER_SIZE = 1 << 20
#: What a peer that says nothing can receive per message (specification); QEMU 11 assumes 8 from a silent server.
DEFAULT_MAX_MSG_FDS = 1
#: What we announce. libvfio-user announces 8, QEMU 16; QEMU refuses a server that says more than 16.
OUR_MAX_MSG_FDS = 16
#: What we accept all the same: the rust-vmm client sends every MSI-X eventfd in one message whatever we announce,
#: and the kernel carries at most 253 per sendmsg (SCM_MAX_FD).
ACCEPTED_MSG_FDS = 253
#: Windows of client memory; QEMU refuses a server that says more.
DEFAULT_MAX_DMA_MAPS = 65535
DEFAULT_PGSIZES = 4096
#: QEMU's own default for the largest dirty bitmap it takes.
DEFAULT_MAX_BITMAP_SIZE = 256 << 20
#: Room for header and fixed part around the largest data transfer. REGION_WRITE has 32 bytes, libvfio-user allows 32
#: too; WRITE_MULTI and SET_IRQS with BOOL data stay far below.
MESSAGE_OVERHEAD = 64
#: Largest JSON text in VERSION. QEMU's whole request is 214 bytes.
MAX_VERSION_DATA = 64 << 10
#: libvfio-user refuses an argsz above this for GET_REGION_IO_FDS, DMA_UNMAP and DIRTY_PAGES.
MAX_BITMAP_ARGSZ = 1 << 20
#: Vectors of one interrupt index: PCI's largest MSI-X table. State is kept per vector, so more is not believed.
MAX_IRQ_VECTORS = 2048
#: Areas of one region that may be mapped. Real devices have a handful, and a VMM makes a memory slot of each.
MAX_SPARSE_AREAS = 1024
#: Capabilities in the description of one region; three kinds exist.
MAX_REGION_CAPABILITIES = 64
#: Where a region may end in its file: the last offset that mmap() can express.
MAX_FILE_OFFSET = (1 << 63) - 1
#: Bytes of a PCI function's config space.
MAX_CONFIG_SIZE = 4096
#: Sub-regions of one region that have descriptors of their own; each needs one in a single reply.
MAX_IO_FDS = 512
#: Writes of one REGION_WRITE_MULTI, and ranges of one DMA_LOGGING_START: each message is decoded in one piece. QEMU
#: sends 200 writes and a few ranges; the kernel takes 256 ranges.
MAX_MULTI_WRITES = 4096
MAX_LOGGING_RANGES = 1024
#: Error numbers that a reply may carry (libvfio-user accepts 1…4096).
MAX_ERRNO = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """What one side of a connection accepts from the other.

    Args:
        max_data_xfer_size: data bytes per transfer.
        max_msg_fds: file descriptors that are announced as receivable per message.
        accepted_msg_fds: file descriptors that are really accepted per message.
        max_dma_maps: simultaneously valid DMA windows.
    """

    max_data_xfer_size: int = DEFAULT_MAX_DATA_XFER_SIZE
    max_msg_fds: int = OUR_MAX_MSG_FDS
    accepted_msg_fds: int = ACCEPTED_MSG_FDS
    max_dma_maps: int = DEFAULT_MAX_DMA_MAPS

    @property
    def max_message_size(self) -> int:
        """Largest whole message, header included, in bytes."""
        return self.max_data_xfer_size + MESSAGE_OVERHEAD
