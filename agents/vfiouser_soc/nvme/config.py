"""What distinguishes one controller from another: identity and sizes, all chosen when it is built."""

from __future__ import annotations

from dataclasses import dataclass

#: An id that no vendor uses, so that no driver quirk for a real device applies (0x1b36:0x0010 has three in
#: Linux).
DEFAULT_VENDOR_ID = 0x1234
DEFAULT_DEVICE_ID = 0x0B0B


@dataclass(frozen=True, slots=True)
class ControllerIdentity:
    """How a host recognises the controller.

    Args:
        serial: up to 20 ASCII characters.
        subsystem_nqn: NVMe qualified name of the subsystem.
        model: up to 40 ASCII characters.
        firmware: up to 8 ASCII characters.
        vendor_id: PCI vendor id.
        device_id: PCI device id.
        controller_id: id inside the subsystem.
    """

    serial: str
    subsystem_nqn: str
    model: str = "vfiouser-oob simulated NVMe"
    firmware: str = "1.0"
    vendor_id: int = DEFAULT_VENDOR_ID
    device_id: int = DEFAULT_DEVICE_ID
    controller_id: int = 1


@dataclass(frozen=True, slots=True)
class ControllerLimits:
    """Sizes of the controller.

    Args:
        io_queues: I/O queue pairs.
        max_entries: entries of the largest queue.
        vectors: MSI-X vectors.
        mdts: log2 of the largest data transfer in units of 4 KiB.
        page_shift_max: log2 of the largest memory page that a host may choose.
        event_requests: asynchronous event requests that may wait.
        timeout_s: longest time for a reset, in seconds.
    """

    io_queues: int = 31
    max_entries: int = 1024
    vectors: int = 32
    mdts: int = 7
    page_shift_max: int = 16
    event_requests: int = 4
    timeout_s: float = 20.0

    @property
    def doorbells(self) -> int:
        """How many doorbells there are: two for each pair of queues, the admin queues included."""
        return 2 * (1 + self.io_queues)

    @property
    def max_transfer(self) -> int:
        """Bytes of the largest data transfer of one command."""
        return 4096 << self.mdts


#: Temperatures in kelvin: what the controller measures, and where it starts to warn and to complain.
TEMPERATURE_K = 311
WARNING_TEMPERATURE_K = 343
CRITICAL_TEMPERATURE_K = 353
